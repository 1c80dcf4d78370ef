package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

type mapsFlags struct {
	json  bool
	sort  string
	watch time.Duration
	count int
}

func newMapsCommand() *cobra.Command {
	var f mapsFlags
	cmd := &cobra.Command{
		Use:   "maps PID",
		Short: "List what a process has mapped, what each range is for and what it uses",
		Long: `One row a range: address, size, resident, dirty and swapped bytes, bytes in huge pages, access,
what it is for, and the file or name behind it; then the sums by kind, and the build-id of each
file.

--watch 30s prints, every 30 s, only the ranges that have grown since the start. A document of
--json can be given to "allocsnoop dump --grown" later.

Reading this makes the kernel walk the process's page tables: milliseconds for each GiB, during
which the process may wait when it maps memory. Nothing is stopped.`,
		Args: onePID,
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			return f.run(cmd.OutOrStdout(), pid)
		},
	}
	cmd.Flags().BoolVar(&f.json, "json", false, "print a JSON document (with --watch one a round, on a line each)")
	cmd.Flags().StringVar(&f.sort, "sort", "", "order of rows: address, size, rss, dirty, swap, or growth with --watch")
	cmd.Flags().DurationVar(&f.watch, "watch", 0, "print what grew, this often, until Ctrl-C or the process's end")
	cmd.Flags().IntVar(&f.count, "count", 0, "with --watch: end after this many rounds")
	return cmd
}

// mapsRow is a range on its way to the output.
type mapsRow struct {
	memory.RangeUsage
	growth, last int64 // in resident bytes, since the start and since the last round
}

var mapsOrders = map[string]func(a, b *mapsRow) int{
	"address": func(a, b *mapsRow) int { return cmp.Compare(a.Start, b.Start) },
	"size":    func(a, b *mapsRow) int { return cmp.Compare(b.Size(), a.Size()) },
	"rss":     func(a, b *mapsRow) int { return cmp.Compare(b.RSS, a.RSS) },
	"dirty":   func(a, b *mapsRow) int { return cmp.Compare(b.Dirty(), a.Dirty()) },
	"swap":    func(a, b *mapsRow) int { return cmp.Compare(b.Swap, a.Swap) },
	"growth":  func(a, b *mapsRow) int { return cmp.Compare(b.growth, a.growth) },
}

func (f *mapsFlags) check() error {
	switch {
	case f.sort != "" && mapsOrders[f.sort] == nil:
		return usageErrorf("--sort %s: it is one of address, size, rss, dirty, swap, growth", f.sort)
	case f.sort == "growth" && f.watch == 0:
		return usageErrorf("--sort growth needs --watch")
	case f.watch < 0 || f.watch > 0 && f.watch < 100*time.Millisecond:
		return usageErrorf("--watch %v: at least 100ms, for each look costs the process something", f.watch)
	case f.count < 0 || f.count > 0 && f.watch == 0:
		return usageErrorf("--count is a number of rounds of --watch")
	}
	return nil
}

func (f *mapsFlags) run(w io.Writer, pid int) error {
	if err := f.check(); err != nil {
		return err
	}
	ranges, err := memory.FS{}.Smaps(pid)
	if err != nil {
		return err
	}
	if f.watch > 0 {
		return f.watchGrowth(w, pid, ranges)
	}
	return f.print(w, pid, ranges)
}

func (f *mapsFlags) print(w io.Writer, pid int, ranges []memory.RangeUsage) error {
	ids := buildIDs(pid, ranges)
	rows := make([]mapsRow, len(ranges))
	for i := range ranges {
		rows[i].RangeUsage = ranges[i]
	}
	f.order(rows, "address")
	if f.json {
		doc := newMapsDocument(pid, memory.FS{}.State(pid).Comm, rows)
		for i := range doc.Ranges {
			doc.Ranges[i].BuildID = ids[fileOf(&rows[i].Range)]
		}
		out := json.NewEncoder(profile.JSONWriter(w))
		out.SetIndent("", "  ")
		return out.Encode(doc)
	}
	printRanges(w, rows)
	printKinds(w, ranges)
	printFiles(w, ranges, ids)
	return nil
}

func newMapsDocument(pid int, comm string, rows []mapsRow) *memory.Snapshot {
	ranges := make([]memory.RangeUsage, len(rows))
	for i := range rows {
		ranges[i] = rows[i].RangeUsage
	}
	return memory.NewSnapshot(pid, comm, time.Now(), ranges)
}

func (f *mapsFlags) order(rows []mapsRow, usual string) {
	by := mapsOrders[cmp.Or(f.sort, usual)]
	slices.SortStableFunc(rows, func(a, b mapsRow) int { return by(&a, &b) })
}

func printRanges(w io.Writer, rows []mapsRow) {
	t := newTable(w, column{"ADDRESS", 12}, column{"SIZE", 8}, column{"RSS", 8}, column{"DIRTY", 8}, column{"SWAP", 8},
		column{"HUGE", 8}, column{"MODE", -4}, column{"KIND", -13}, column{"NAME", -1})
	shown, left := largestRows(rows, maxRows)
	for i := range shown {
		r := &shown[i]
		t.row(fmt.Sprintf("%x", r.Start), profile.FormatBytes(r.Size()), bytesCell(r.RSS), bytesCell(r.Dirty()), bytesCell(r.Swap),
			bytesCell(r.Huge()), r.Perms.String(), string(r.Kind), shortName(&r.Range))
	}
	if len(left) > 0 {
		var size, rss uint64
		for i := range left {
			size, rss = size+left[i].Size(), rss+left[i].RSS
		}
		fmt.Fprintf(w, "... and %d smaller ranges: %s, %s resident; --json lists all\n", len(left), profile.FormatBytes(size), profile.FormatBytes(rss))
	}
}

// maxRows is how many ranges a person is shown; a process may have 65,530.
const maxRows = 1000

// largestRows parts the rows with the most memory, which stay in order, from the others.
func largestRows(rows []mapsRow, most int) (shown, left []mapsRow) {
	if len(rows) <= most {
		return rows, nil
	}
	index := make([]int, len(rows))
	for i := range index {
		index[i] = i
	}
	slices.SortStableFunc(index, func(a, b int) int {
		return cmp.Or(cmp.Compare(rows[b].RSS, rows[a].RSS), cmp.Compare(rows[b].Size(), rows[a].Size()))
	})
	for _, i := range index[most:] {
		left = append(left, rows[i])
	}
	slices.Sort(index[:most])
	for _, i := range index[:most] {
		shown = append(shown, rows[i])
	}
	return shown, left
}

// shortName is a file's base name (the whole path stands in the list of files), or the name in brackets.
func shortName(r *memory.Range) string {
	name := profile.Sanitize(r.Path)
	if r.IsFile() {
		name = path.Base(name)
	}
	if r.Deleted {
		name += " (deleted)"
	}
	return name
}

// printKinds prints the sums by kind, the largest first.
func printKinds(w io.Writer, ranges []memory.RangeUsage) {
	type sum struct {
		kind  memory.Kind
		count int
		size  uint64
		memory.Usage
	}
	sums := map[memory.Kind]*sum{}
	total := &sum{kind: "total"}
	for i := range ranges {
		r := &ranges[i]
		s := sums[r.Kind]
		if s == nil {
			s = &sum{kind: r.Kind}
			sums[r.Kind] = s
		}
		for _, into := range []*sum{s, total} {
			into.count++
			into.size += r.Size()
			into.Add(&r.Usage)
		}
	}
	var list []*sum
	for _, s := range sums {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b *sum) int { return cmp.Or(cmp.Compare(b.RSS, a.RSS), cmp.Compare(a.kind, b.kind)) })
	fmt.Fprintln(w)
	t := newTable(w, column{"KIND", -13}, column{"RANGES", 7}, column{"SIZE", 8}, column{"RSS", 8}, column{"PSS", 8},
		column{"DIRTY", 8}, column{"SWAP", 8}, column{"HUGE", 8})
	for _, s := range append(list, total) {
		t.row(string(s.kind), fmt.Sprint(s.count), profile.FormatBytes(s.size), bytesCell(s.RSS), bytesCell(s.PSS),
			bytesCell(s.Dirty()), bytesCell(s.Swap), bytesCell(s.Huge()))
	}
}

// mappedFile names a file whatever its name is now.
type mappedFile struct {
	dev   memory.Dev
	inode uint64
}

func fileOf(r *memory.Range) mappedFile { return mappedFile{r.Dev, r.Inode} }

// buildIDs reads the build-id of each mapped ELF file. What cannot be opened has none here; the rest is shown all the same.
func buildIDs(pid int, ranges []memory.RangeUsage) map[mappedFile]string {
	ids := map[mappedFile]string{}
	for i := range ranges {
		r := &ranges[i].Range
		if _, known := ids[fileOf(r)]; known || !r.IsFile() || r.Kind == memory.KindShared || r.Kind == memory.KindAnonymous {
			continue
		}
		ids[fileOf(r)] = buildID(pid, r)
	}
	return ids
}

func buildID(pid int, r *memory.Range) string {
	f, err := memory.FS{}.OpenMapped(pid, r)
	if err != nil {
		return ""
	}
	defer f.Close()
	id, err := symbolize.BuildID(f)
	if err != nil {
		return ""
	}
	return id
}

// printFiles lists the mapped files with a build-id, or that are deleted.
func printFiles(w io.Writer, ranges []memory.RangeUsage, ids map[mappedFile]string) {
	var t *table
	seen := map[mappedFile]bool{}
	for i := range ranges {
		r := &ranges[i].Range
		id := ids[fileOf(r)]
		if seen[fileOf(r)] || !r.IsFile() || id == "" && !r.Deleted {
			continue
		}
		seen[fileOf(r)] = true
		if t == nil {
			fmt.Fprintln(w)
			t = newTable(w, column{"BUILD-ID", -40}, column{"FILE", -1})
		}
		name := profile.Sanitize(r.Path)
		if r.Deleted {
			name += " (deleted)"
		}
		t.row(cmp.Or(id, "-"), name)
	}
}

// watchGrowth prints what grew until the rounds are done, a person interrupts, or the process ends.
func (f *mapsFlags) watchGrowth(w io.Writer, pid int, first []memory.RangeUsage) error {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	comm := memory.FS{}.State(pid).Comm
	began, last := time.Now(), first
	tick := time.NewTicker(f.watch)
	defer tick.Stop()
	for round := 1; f.count == 0 || round <= f.count; round++ {
		select {
		case <-ctx.Done():
			return nil // to end it is what Ctrl-C is for here
		case <-tick.C:
		}
		now, err := memory.FS{}.Smaps(pid)
		if errors.Is(err, memory.ErrGone) {
			fmt.Fprintf(os.Stderr, "allocsnoop: pid %d (%s) has ended\n", pid, profile.Sanitize(comm))
			return nil
		}
		if err != nil {
			return err
		}
		if err := f.printGrowth(w, pid, comm, first, last, now, time.Since(began)); err != nil {
			return err
		}
		last = now
	}
	return nil
}

func (f *mapsFlags) printGrowth(w io.Writer, pid int, comm string, first, last, now []memory.RangeUsage, elapsed time.Duration) error {
	growth, recent := memory.Growth(first, now), memory.Growth(last, now)
	if f.json {
		rows := make([]mapsRow, len(now))
		for i := range now {
			rows[i] = mapsRow{now[i], growth[i], recent[i]}
		}
		f.order(rows, "address")
		doc := newMapsDocument(pid, comm, rows)
		for i := range doc.Ranges {
			doc.Ranges[i].Growth = &rows[i].growth
		}
		return json.NewEncoder(profile.JSONWriter(w)).Encode(doc)
	}
	var rows []mapsRow
	var sum, before, after int64
	for i := range first {
		before += int64(first[i].RSS)
	}
	for i := range now {
		after += int64(now[i].RSS)
		if growth[i] > 0 {
			sum += growth[i]
			rows = append(rows, mapsRow{now[i], growth[i], recent[i]})
		}
	}
	f.order(rows, "growth")
	fmt.Fprintf(w, "pid %d (%s) after %v: resident %s, %d of %d ranges grew by %s\n", pid, profile.Sanitize(comm),
		elapsed.Round(100*time.Millisecond), profile.FormatByteChange(after-before), len(rows), len(now), profile.FormatBytes(uint64(sum)))
	if len(rows) == 0 {
		return nil
	}
	t := newTable(w, column{"ADDRESS", 12}, column{"SIZE", 8}, column{"RSS", 8}, column{"GROWTH", 9},
		column{"LAST " + strings.TrimSuffix(f.watch.String(), "m0s"), 9}, column{"MODE", -4}, column{"KIND", -13}, column{"NAME", -1})
	for i := range rows {
		r := &rows[i]
		t.row(fmt.Sprintf("%x", r.Start), profile.FormatBytes(r.Size()), bytesCell(r.RSS), profile.FormatByteChange(r.growth),
			profile.FormatByteChange(r.last), r.Perms.String(), string(r.Kind), shortName(&r.Range))
	}
	fmt.Fprintln(w)
	return nil
}
