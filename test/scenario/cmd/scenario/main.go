// Command scenario runs the test service by hand: `scenario start` serves until Ctrl-C, `scenario load` and
// `scenario stats` talk to it.
//
// The trap: load is one worker's share for each worker; stats says what each of them holds.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/allocsnoop/allocsnoop/test/scenario"
)

const usage = `usage: scenario start [-dir DIR] [-build old|new] [-workers N] [-tls] [-gzip] [-preload LIB]
           prints one line of JSON once the service is up, and serves until Ctrl-C
       scenario load -dir DIR [-n REQUESTS] [-d DURATION] [-c CONNECTIONS] [-path PATH]
       scenario stats -dir DIR
`

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	commands := map[string]func(context.Context, []string) error{"start": start, "load": load, "stats": stats}
	command, ok := commands[os.Args[1]]
	if !ok {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := command(ctx, os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "scenario:", err)
		os.Exit(1)
	}
}

func start(ctx context.Context, args []string) error {
	var o scenario.Options
	flags := flag.NewFlagSet("scenario start", flag.ExitOnError)
	flags.StringVar(&o.Dir, "dir", "", "directory of the service; a temporary one when empty")
	flags.StringVar(&o.Build, "build", scenario.Old, "build of the library: old keeps session records, new frees them")
	flags.IntVar(&o.Workers, "workers", 2, "nginx workers")
	flags.BoolVar(&o.TLS, "tls", false, "serve https with a certificate made for it")
	flags.BoolVar(&o.Gzip, "gzip", false, "compress text")
	flags.StringVar(&o.Preload, "preload", "", "library for LD_PRELOAD, say libjemalloc.so.2")
	_ = flags.Parse(args)

	s, err := scenario.Start(ctx, o)
	if err != nil {
		return err
	}
	line := map[string]any{"url": s.URL, "dir": s.Dir, "master": s.Master, "workers": s.Workers()}
	if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
		return err
	}
	<-ctx.Done()
	return s.Close()
}

// open finds the running service of a directory.
func open(flags *flag.FlagSet, args []string) (*scenario.Service, error) {
	dir := flags.String("dir", "", "directory of the running service")
	_ = flags.Parse(args)
	if *dir == "" {
		return nil, fmt.Errorf("-dir: which service?")
	}
	return scenario.Open(*dir)
}

func load(ctx context.Context, args []string) error {
	var l scenario.Load
	flags := flag.NewFlagSet("scenario load", flag.ExitOnError)
	flags.IntVar(&l.Requests, "n", 0, "number of requests; 0 for as many as fit into -d")
	flags.DurationVar(&l.Duration, "d", 0, "length of the load; 0 until -n requests are made")
	flags.IntVar(&l.Concurrency, "c", 4, "connections")
	flags.StringVar(&l.Path, "path", "/session", "what to request")
	s, err := open(flags, args)
	if err != nil {
		return err
	}
	report, err := s.Run(ctx, l)
	fmt.Printf("%d requests in %v, %.0f/s, p50 %v, p99 %v, %d errors\n", report.Requests,
		report.Elapsed.Round(time.Millisecond), report.PerSecond(), report.P50, report.P99, report.Errors)
	return err
}

func stats(_ context.Context, args []string) error {
	s, err := open(flag.NewFlagSet("scenario stats", flag.ExitOnError), args)
	if err != nil {
		return err
	}
	for _, pid := range s.Workers() {
		stats, err := s.Stats(pid)
		if err != nil {
			return err
		}
		fmt.Printf("worker %d holds %d session records, %d bytes\n", pid, stats.Blocks, stats.Bytes)
	}
	return nil
}
