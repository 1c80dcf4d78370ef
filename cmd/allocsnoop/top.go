package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"os/signal"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// detailBudget is what a round may spend on the page tables of the processes shown.
const detailBudget = 150 * time.Millisecond

type topFlags struct {
	once, json bool
	interval   time.Duration
	limit      int
	sort       string
}

func newTopCommand() *cobra.Command {
	var f topFlags
	cmd := &cobra.Command{
		Use:   "top",
		Short: "List the processes whose memory grows, and how far each is from its cgroup's limit",
		Long: `Processes in order of growth per minute since the command's start, then of resident memory. HEAP
is what is resident in heap and arenas. LIMIT is the memory limit that the process will meet
first, of its cgroup or one above it, and LEFT is when, if all processes in that cgroup go on
growing as they have.

On a terminal it renews itself until Ctrl-C. --once looks twice, --interval apart, prints and
ends; with --interval 0 it looks once and knows no growth.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageErrorf("top takes no arguments; allocsnoop maps PID shows one process")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return f.run(cmd.OutOrStdout()) },
	}
	cmd.Flags().BoolVar(&f.once, "once", false, "print one list and end")
	cmd.Flags().BoolVar(&f.json, "json", false, "print a JSON document a round, on a line each")
	cmd.Flags().DurationVar(&f.interval, "interval", 2*time.Second, "time between two looks")
	cmd.Flags().IntVarP(&f.limit, "limit", "n", -1, "processes to list; 0 lists all (default: what fits the terminal, else 20)")
	cmd.Flags().StringVar(&f.sort, "sort", "growth", "order: growth, rss, pid")
	return cmd
}

func (f *topFlags) check() error {
	switch {
	case f.interval < 0 || !f.once && f.interval < 100*time.Millisecond:
		return usageErrorf("--interval %v: at least 100ms", f.interval)
	case !slices.Contains([]string{"growth", "rss", "pid"}, f.sort):
		return usageErrorf("--sort %s: it is one of growth, rss, pid", f.sort)
	case f.limit < -1:
		return usageErrorf("--limit %d: it is a number of processes", f.limit)
	}
	return nil
}

func (f *topFlags) run(w io.Writer) error {
	if err := f.check(); err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	top := memory.FS{}.NewTop()
	began := time.Now()
	rows, err := top.Sample()
	if err != nil {
		return err
	}
	if !f.once {
		if err := f.show(w, top, rows, began); err != nil {
			return err
		}
	}
	for f.interval > 0 {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(f.interval):
		}
		if rows, err = top.Sample(); err != nil {
			return err
		}
		if f.once {
			break
		}
		if err := f.show(w, top, rows, began); err != nil {
			return err
		}
	}
	if !f.once {
		return nil
	}
	return f.show(w, top, rows, began)
}

// topDocument is a round in JSON.
type topDocument struct {
	Taken     time.Time       `json:"taken"`
	Seconds   float64         `json:"seconds"` // since the start, over which growth counts
	Processes []memory.TopRow `json:"processes"`
}

// show prints one round.
func (f *topFlags) show(w io.Writer, top *memory.Top, rows []memory.TopRow, began time.Time) error {
	switch f.sort {
	case "growth":
		memory.SortByGrowth(rows)
	case "rss":
		slices.SortStableFunc(rows, func(a, b memory.TopRow) int { return cmp.Compare(b.RSS, a.RSS) })
	case "pid":
		slices.SortStableFunc(rows, func(a, b memory.TopRow) int { return cmp.Compare(a.PID, b.PID) })
	}
	terminal := !f.json && !f.once && isTerminalWriter(w)
	shown := rows[:f.rows(w, len(rows), terminal)]
	budget := detailBudget
	if f.once {
		budget = 0
	}
	top.Detail(shown, rows, budget)
	if f.json {
		return json.NewEncoder(profile.JSONWriter(w)).Encode(topDocument{time.Now().UTC(), time.Since(began).Seconds(), shown})
	}
	if !terminal {
		printTop(w, shown, len(rows), time.Since(began))
		return nil
	}
	var screen bytes.Buffer // written at once, so that it does not flicker
	screen.WriteString("\x1b[H\x1b[2J")
	printTop(&sized{&screen, w}, shown, len(rows), time.Since(began))
	_, err := w.Write(screen.Bytes())
	return err
}

// rows is how many processes to show.
func (f *topFlags) rows(w io.Writer, all int, onTerminal bool) int {
	switch {
	case f.limit == 0:
		return all
	case f.limit > 0:
		return min(f.limit, all)
	}
	want := 20
	if onTerminal {
		if size, err := unix.IoctlGetWinsize(int(w.(*os.File).Fd()), unix.TIOCGWINSZ); err == nil && size.Row > 4 {
			want = int(size.Row) - 3
		}
	}
	return min(want, all)
}

func isTerminalWriter(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && isTerminal(f)
}

// sized is a buffer that has the width of what it is copied to.
type sized struct {
	io.Writer
	to io.Writer
}

func printTop(w io.Writer, rows []memory.TopRow, all int, elapsed time.Duration) {
	fmt.Fprintf(w, "%d of %d processes, growth since %v ago\n", len(rows), all, elapsed.Round(time.Second))
	t := newTable(w, column{"PID", 7}, column{"GROWTH/MIN", 10}, column{"RSS", 8}, column{"PSS", 8}, column{"ANON", 8},
		column{"HEAP", 8}, column{"SWAP", 8}, column{"LIMIT", 8}, column{"LEFT", 7}, column{"COMMAND", -1})
	for i := range rows {
		r := &rows[i]
		pss, heap, swap, limit, left := "", "", "", "-", "-"
		if r.TopDetail != nil {
			pss, heap, swap = bytesCell(r.PSS), bytesCell(r.Heap), bytesCell(r.Swap)
		}
		if r.TopLimit != nil {
			limit, left = profile.FormatBytes(r.Limit), minutesCell(r.MinutesLeft)
		}
		t.row(fmt.Sprint(r.PID), growthCell(r.GrowthPerMinute), bytesCell(r.RSS), pss, bytesCell(r.Anonymous), heap, swap, limit, left,
			profile.Sanitize(r.Comm))
	}
}

func growthCell(perMinute *float64) string {
	if perMinute == nil {
		return ""
	}
	return profile.FormatByteChange(int64(*perMinute))
}

// minutesCell prints a time that is a guess: two figures are enough.
func minutesCell(minutes *float64) string {
	switch {
	case minutes == nil:
		return "-"
	case *minutes < 1:
		return fmt.Sprintf("%.0fs", *minutes*60)
	case *minutes < 120:
		return fmt.Sprintf("%.0fm", *minutes)
	case *minutes < 48*60:
		return fmt.Sprintf("%.0fh", *minutes/60)
	case math.IsInf(*minutes, 0) || *minutes > 1000*24*60:
		return ">1000d"
	}
	return fmt.Sprintf("%.0fd", *minutes/24/60)
}
