package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

type dumpFlags struct {
	memory.DumpOptions
	out    string
	ranges []string
	grown  string
}

func newDumpCommand() *cobra.Command {
	var f dumpFlags
	cmd := &cobra.Command{
		Use:   "dump PID [--heap|--anon|--range A-B|--largest N|--grown OLD|--all] [-o FILE]",
		Short: "Write memory of a running process to a sparse file or an ELF core",
		Long: `Without a selection: what a core file has, that is everything that cannot be read from a file
again. Selections add up. The process runs on and its memory changes while it is read; only --core
--registers stops it, for as long as reading the registers and stacks takes, which is printed.

The file is sparse, readable by you alone, and has its name only once it is whole. Ctrl-C finishes
it with what is there, marked as partial (exit code 130). "allocsnoop inspect FILE" shows what the
bytes are; gdb, eu-stack and chap open a --core.`,
		Args: onePID,
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := parsePID(args[0])
			if err != nil {
				return err
			}
			return f.run(cmd.OutOrStdout(), pid)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&f.Heap, "heap", false, "heap and arenas, and the variables of libraries beside them")
	flags.BoolVar(&f.Anon, "anon", false, "all private memory that no file backs: heap, arenas, stacks, mapped blocks")
	flags.BoolVar(&f.All, "all", false, "every readable range, files and what asked to be left out of dumps included")
	flags.StringArrayVar(&f.ranges, "range", nil, "addresses START-END in hex (repeatable)")
	flags.IntVar(&f.Largest, "largest", 0, "the N ranges with the most resident memory")
	flags.StringVar(&f.grown, "grown", "", "ranges that grew since this output of allocsnoop maps PID --json")
	flags.BoolVar(&f.Core, "core", false, "write an ELF core for gdb, eu-stack and chap")
	flags.BoolVar(&f.Registers, "registers", false, "with --core: stop the process shortly for all threads' registers")
	flags.StringVarP(&f.out, "output", "o", "", "file to write (allocsnoop-COMM-PID-UTCTIME.dump or .core)")
	return cmd
}

func (f *dumpFlags) check() error {
	if f.Registers && !f.Core {
		return usageErrorf("--registers needs --core: a raw dump has no place for them")
	}
	if f.Largest < 0 {
		return usageErrorf("--largest %d: it is a number of ranges", f.Largest)
	}
	for _, text := range f.ranges {
		span, err := memory.ParseSpan(text)
		if err != nil {
			return &exitError{exitUsage, err}
		}
		f.Spans = append(f.Spans, span)
	}
	return nil
}

func (f *dumpFlags) run(w io.Writer, pid int) error {
	if err := f.check(); err != nil {
		return err
	}
	if f.grown != "" {
		if err := f.readGrown(pid); err != nil {
			return err
		}
	}
	// Two buffers of 256 KiB do the work whatever the size; this keeps the lists of ranges from doubling what they take.
	debug.SetGCPercent(25)
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	if f.out == "" {
		f.out = outputFor(pid, map[bool]string{false: "dump", true: "core"}[f.Core])
	}
	bar := newDumpBar(os.Stderr)
	f.Progress = bar.update
	result, err := memory.FS{}.Dump(ctx, pid, f.out, f.DumpOptions)
	bar.clear()
	if err != nil {
		return err
	}
	printDump(w, result)
	switch {
	case result.Partial == "":
		return nil
	case ctx.Err() != nil:
		return &exitError{exitInterrupted, nil}
	}
	return &exitError{exitLosses, nil}
}

func (f *dumpFlags) readGrown(pid int) error {
	in, err := os.Open(f.grown)
	if err != nil {
		return fmt.Errorf("read --grown: %w", err)
	}
	defer in.Close()
	doc, ranges, err := memory.ReadSnapshot(in)
	if err != nil {
		return fmt.Errorf("read --grown %s: %w", f.grown, err)
	}
	if doc.PID != pid {
		return usageErrorf("--grown %s is of pid %d, not %d", f.grown, doc.PID, pid)
	}
	f.Grown = ranges
	return nil
}

func printDump(w io.Writer, r *memory.DumpResult) {
	fmt.Fprintf(w, "%s: %s of %d ranges in %v (%s/s): %s of data, %s of zeros left out\n", profile.Sanitize(r.Path),
		profile.FormatBytes(r.Span), r.Ranges, r.Took.Round(time.Millisecond),
		profile.FormatBytes(uint64(float64(r.Data+r.Zero)/max(r.Took.Seconds(), 1e-6))), profile.FormatBytes(r.Data),
		profile.FormatBytes(r.Zero))
	if r.Threads > 0 {
		fmt.Fprintf(w, "stopped %s for %v\n", plural(r.Threads, "thread"), r.Stop.Round(10*time.Microsecond))
	}
	if r.Skipped > 0 {
		fmt.Fprintf(w, "registers of %d threads are missing: %s\n", r.Skipped, r.Why)
	}
	if r.Lost > 0 {
		fmt.Fprintf(w, "%s vanished or could not be read: zeros in the file, marked as lost in its index\n", profile.FormatBytes(r.Lost))
	}
	if r.Swapped > 0 {
		fmt.Fprintf(w, "%s were swapped out and are in memory again by the reading\n", profile.FormatBytes(r.Swapped))
	}
	if r.Partial != "" {
		fmt.Fprintf(w, "the file is PARTIAL: %s\n", r.Partial)
	}
}

// dumpBar shows progress on a terminal: share, rate and time left.
type dumpBar struct {
	*progress
	mu      sync.Mutex
	started time.Time
	last    time.Time
}

func newDumpBar(f *os.File) *dumpBar {
	return &dumpBar{progress: newProgress(f), started: time.Now()}
}

func (b *dumpBar) update(done, total uint64) {
	if !b.terminal || total == 0 {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if now.Sub(b.last) < 100*time.Millisecond {
		return
	}
	b.last = now
	b.renew(dumpProgress(done, total, now.Sub(b.started)))
}

// dumpProgress is the text of the bar.
func dumpProgress(done, total uint64, elapsed time.Duration) string {
	const cells = 30
	share := float64(done) / float64(total)
	bar := make([]byte, cells)
	for i := range bar {
		bar[i] = ' '
		if float64(i) < share*cells {
			bar[i] = '='
		}
	}
	rate := float64(done) / max(elapsed.Seconds(), 1e-6)
	left := "?"
	if rate > 0 {
		left = time.Duration(float64(total-done) / rate * float64(time.Second)).Round(time.Second).String()
	}
	return fmt.Sprintf("[%s] %3.0f %%  %s of %s  %s/s  %s left", bar, 100*share, profile.FormatBytes(done),
		profile.FormatBytes(total), profile.FormatBytes(uint64(rate)), left)
}
