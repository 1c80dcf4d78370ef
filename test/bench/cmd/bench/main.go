// Command bench measures everything and writes docs/benchmarks.md. Run it as root on a machine with nothing else to do.
//
// The trap: it takes half an hour, and what else runs meanwhile is in the figures.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/allocsnoop/allocsnoop/test/bench"
)

func main() {
	command := flag.String("allocsnoop", "./allocsnoop", "path of the command")
	only := flag.String("only", "", "names of benchmarks, with commas between them; all when empty")
	rounds := flag.Int("rounds", 0, "turns of each contender; 0 for the usual number")
	out := flag.String("o", "docs/benchmarks.md", "document whose sections are replaced")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *command, *only, *rounds, *out); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, command, only string, rounds int, out string) error {
	command, err := filepath.Abs(command)
	if err != nil {
		return err
	}
	o := bench.Full(command)
	o.Progress = os.Stderr
	if rounds > 0 {
		o.Rounds = rounds
	}
	for _, b := range bench.Benchmarks() {
		if only != "" && !slices.Contains(strings.Split(only, ","), b.Name) {
			continue
		}
		fmt.Fprintln(os.Stderr, b.Name)
		section, err := b.Run(ctx, o)
		if err != nil {
			return fmt.Errorf("%s: %w", b.Name, err)
		}
		if err := bench.Update(out, section); err != nil {
			return err
		}
		fmt.Printf("## %s\n\n%s\n", section.Title, section.Text)
	}
	return nil
}
