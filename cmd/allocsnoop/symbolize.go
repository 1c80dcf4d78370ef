package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"

	pprof "github.com/google/pprof/profile"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
)

func newSymbolizeCommand() *cobra.Command {
	var out string
	var o symbolize.Options
	cmd := &cobra.Command{
		Use:   "symbolize FILE [--debug-dir DIR] [--debuginfod URL] -o OUT",
		Short: "Complete the names of a profile that was taken where no symbols were",
		Long: `Complete the names of a profile that was taken where no symbols were.

FILE is any pprof file whose mappings have build-ids, whoever wrote it. Frames without a
source line are looked up by build-id in the objects themselves (where the profile says they
were), in --debug-dir, in /usr/lib/debug and at debuginfod servers. A file of another build is
never used. What stays unknown is named as libenc.so+0x1234, the offset in the file.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usageErrorf("symbolize needs one FILE, got %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if out == "" {
				return usageErrorf("symbolize needs -o OUT, where the completed profile goes")
			}
			o.DebuginfodURLs = debuginfodURLs(o.DebuginfodURLs)
			return runSymbolize(cmd, args[0], out, o)
		},
	}
	flags := cmd.Flags()
	flags.SortFlags = false
	flags.StringVarP(&out, "output", "o", "", "`FILE` to write; may be the one that is read")
	flags.StringArrayVar(&o.DebugDirs, "debug-dir", nil, "`DIR` to look for debug files in, before /usr/lib/debug")
	flags.StringArrayVar(&o.DebuginfodURLs, "debuginfod", nil, "`URL` of a debuginfod server (default: DEBUGINFOD_URLS)")
	flags.BoolVar(&o.NoInlines, "no-inlines", false, "do not name inlined calls")
	return cmd
}

func runSymbolize(cmd *cobra.Command, in, out string, o symbolize.Options) error {
	for _, dir := range o.DebugDirs {
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return usageErrorf("--debug-dir %s: no such directory", dir)
		}
	}
	f, err := os.Open(in)
	if err != nil {
		return fmt.Errorf("read profile: %w", err)
	}
	defer f.Close()
	p, err := pprof.Parse(f)
	if err != nil {
		return fmt.Errorf("read profile %s: %w", in, err)
	}
	ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	progress := newProgress(os.Stderr)
	o.Warn = progress.warn
	o.Progress = func(text string) { progress.say("%s", text) }
	counts, err := symbolize.New(o).Profile(ctx, p, diskFiles{})
	if errors.Is(err, context.Canceled) {
		return &exitError{exitInterrupted, errors.New("interrupted: nothing was written")}
	}
	if err != nil {
		return fmt.Errorf("symbolize %s: %w", in, err)
	}
	file, err := createOutput(out)
	if err != nil {
		return err
	}
	defer file.discard()
	if err := p.Write(file); err != nil {
		return fmt.Errorf("write profile %s: %w", out, err)
	}
	if err := file.commit(); err != nil {
		return err
	}
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %d frames with a mapping, %d named now, %d unknown still\n",
		profile.Sanitize(out), counts.Locations, counts.Named, counts.Unknown)
	return nil
}

// diskFiles opens mapped files where the profile says they were.
type diskFiles struct{}

func (diskFiles) Open(m *profile.Mapping) (symbolize.File, error) {
	info, err := os.Stat(m.File)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !info.Mode().IsRegular() {
		return nil, nil // taken on another machine: nothing to warn of
	}
	f, err := os.Open(m.File)
	if err != nil {
		return nil, err
	}
	return f, nil
}
