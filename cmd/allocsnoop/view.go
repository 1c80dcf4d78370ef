package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	pprof "github.com/google/pprof/profile"
	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/view"
)

func newViewCommand() *cobra.Command {
	var (
		html, per string
		folded    bool
		port      uint16
	)
	cmd := &cobra.Command{
		Use:   "view FILE [NEWER]",
		Short: "Show a profile, or what changed between two, in the browser",
		Long: `Serve a page on this machine's loopback address: verdicts, bytes over time, flame graph, call
stacks, libraries, and pprof's own views of the same profile. Two files are shown as a comparison,
the older one first. The address has a secret in it; nothing is fetched from outside, nothing is
sent there.

--html writes the page into one file instead, to send to a colleague. --folded prints lines for
other flame graph tools ("outer;inner 4096", bytes in use).`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) < 1 || len(args) > 2 {
				return usageErrorf("view takes one profile, or two to compare, not %d", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			by, err := profile.ParsePer(per)
			switch {
			case err != nil:
				return &exitError{exitUsage, err}
			case folded && len(args) == 2:
				return usageErrorf("--folded takes one profile; allocsnoop diff -o writes a difference")
			}
			defer collectRarely()()
			useHugePages(args)
			in, p, err := viewInput(args, by)
			if err != nil {
				return err
			}
			switch {
			case folded:
				return printFolded(cmd.OutOrStdout(), in.New)
			case html != "":
				return writeOutput(html, func(w io.Writer) error { return view.WriteHTML(w, in) })
			}
			return serveView(cmd.OutOrStdout(), in, p, port)
		},
	}
	cmd.Flags().StringVar(&html, "html", "", "write one self-contained HTML `FILE` and serve nothing")
	cmd.Flags().BoolVar(&folded, "folded", false, "print folded stacks and serve nothing")
	cmd.Flags().StringVar(&per, "per", "allocations", "what makes two runs comparable, as in allocsnoop diff")
	cmd.Flags().Uint16Var(&port, "port", 0, "port to listen on (default: a free one)")
	return cmd
}

// viewInput reads one or two profiles. Of two, pprof's views show the difference.
func viewInput(names []string, per profile.Per) (view.Input, *pprof.Profile, error) {
	in := view.Input{Per: per}
	newest := names[len(names)-1]
	in.Name = filepath.Base(newest)
	p, s, err := readBoth(newest)
	if err != nil {
		return in, nil, err
	}
	in.New = s
	if len(names) == 1 {
		return in, p, nil
	}
	in.OldName = filepath.Base(names[0])
	if in.OldName == in.Name {
		in.OldName, in.Name = names[0], newest
	}
	if in.Old, err = readProfile(names[0]); err != nil {
		return in, nil, err
	}
	p, err = profile.EncodeDiff(in.Old, in.New, profile.Compare(in.Old, in.New, per).Scale)
	return in, p, err
}

func printFolded(w io.Writer, s *profile.Snapshot) error {
	for _, line := range view.Folded(s, (*profile.Group).InUseBytes) {
		if _, err := fmt.Fprintln(w, line); err != nil {
			return fmt.Errorf("print folded stacks: %w", err)
		}
	}
	return nil
}

func serveView(w io.Writer, in view.Input, p *pprof.Profile, port uint16) error {
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(port))))
	if err != nil {
		return fmt.Errorf("listen for the browser: %w", err)
	}
	_, actual, _ := net.SplitHostPort(listener.Addr().String())
	handler := view.NewHandler(in, p, actual)
	server := &http.Server{Handler: handler, ReadHeaderTimeout: 10 * time.Second}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, func() { server.Close() })
	fmt.Fprintf(w, "open http://%s%s in a browser of this machine; Ctrl-C ends\n", listener.Addr(), handler.Path)
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve the page: %w", err)
	}
	return nil
}
