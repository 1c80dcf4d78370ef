package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/oom"
)

type oomFlags struct {
	json, follow, journal bool
}

func newOOMCommand() *cobra.Command {
	var f oomFlags
	cmd := &cobra.Command{
		Use:   "oom [FILE...]",
		Short: "Say whom the OOM killer took, by which limit, and why",
		Long: `Say whom the OOM killer took, by which limit, at what usage, and what that means.

Reads the kernel's log of this machine; where that is forbidden or holds no kill, the journal of
all boots. FILE is a saved log instead: of dmesg, syslog or journalctl, - for standard input.`,
		Example: `  allocsnoop oom                 everything this boot's log still has
  allocsnoop oom --follow        and what comes, until Ctrl-C
  dmesg -T | allocsnoop oom -    a log from elsewhere`,
		RunE: func(cmd *cobra.Command, files []string) error { return f.run(cmd, files) },
	}
	cmd.Flags().BoolVar(&f.json, "json", false, "one JSON document a line for each kill")
	cmd.Flags().BoolVarP(&f.follow, "follow", "f", false, "wait for more until Ctrl-C")
	cmd.Flags().BoolVar(&f.journal, "journal", false, "read the journal of all boots (journalctl)")
	return cmd
}

func (f *oomFlags) run(cmd *cobra.Command, files []string) error {
	if f.follow && (len(files) > 0 || f.journal) {
		return usageErrorf("--follow reads this machine's log as it grows, no file and no journal")
	}
	if f.journal && len(files) > 0 {
		return usageErrorf("give --journal or files, not both")
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	p := &oomPrinter{out: cmd.OutOrStdout(), json: f.json}
	if err := f.read(ctx, cmd, files, p); err != nil {
		return err
	}
	if p.printed == 0 && !f.json {
		_, err := fmt.Fprintln(p.out, "no process was killed for lack of memory, as far as the log reaches back")
		return err
	}
	return nil
}

func (f *oomFlags) read(ctx context.Context, cmd *cobra.Command, files []string, p *oomPrinter) error {
	switch {
	case len(files) > 0:
		return readOOMFiles(cmd.InOrStdin(), files, p)
	case f.journal:
		return readOOMJournal(ctx, p)
	}
	kmsgErr := f.readKmsg(ctx, p)
	if kmsgErr == nil && (p.printed > 0 || f.follow) {
		return nil
	}
	if _, err := exec.LookPath("journalctl"); err == nil && !f.follow {
		return readOOMJournal(ctx, p)
	}
	if errors.Is(kmsgErr, os.ErrPermission) {
		return fmt.Errorf("%w: run as root, or save the log with dmesg and give the file", kmsgErr)
	}
	return kmsgErr
}

func (f *oomFlags) readKmsg(ctx context.Context, p *oomPrinter) error {
	log, err := oom.OpenKmsg()
	if err != nil {
		return err
	}
	defer log.Close()
	return log.Kills(ctx, f.follow, p.print)
}

func readOOMFiles(stdin io.Reader, files []string, p *oomPrinter) error {
	for _, name := range files {
		if err := readOOMFile(stdin, name, p); err != nil {
			return err
		}
	}
	return nil
}

func readOOMFile(stdin io.Reader, name string, p *oomPrinter) error {
	if name == "-" {
		return oom.Read(stdin, time.Now(), p.print)
	}
	file, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("read log: %w", err)
	}
	defer file.Close()
	return oom.Read(file, time.Now(), p.print)
}

// readOOMJournal has journalctl print what the kernel said in every boot that the journal knows.
func readOOMJournal(ctx context.Context, p *oomPrinter) error {
	journal := exec.CommandContext(ctx, "journalctl", "--no-pager", "--quiet", "--output=short-iso", "_TRANSPORT=kernel")
	journal.Stderr = os.Stderr
	out, err := journal.StdoutPipe()
	if err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	if err := journal.Start(); err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	readErr := oom.Read(out, time.Now(), p.print)
	if readErr != nil {
		journal.Process.Kill()
	}
	// journalctl ends with 1 when nothing matches, which is no failure of ours.
	var exit *exec.ExitError
	if err := journal.Wait(); err != nil && !errors.As(err, &exit) {
		return errors.Join(readErr, fmt.Errorf("read journal: %w", err))
	}
	return readErr
}

type oomPrinter struct {
	out     io.Writer
	json    bool
	printed int
}

func (p *oomPrinter) print(k *oom.Kill) error {
	p.printed++
	if p.json {
		return json.NewEncoder(profile.JSONWriter(p.out)).Encode(k.Document())
	}
	when := ""
	switch {
	case !k.Time.IsZero():
		when = k.Time.Format(time.RFC3339) + "\n"
	case k.Uptime > 0:
		when = k.Uptime.Round(time.Second).String() + " after boot\n"
	}
	separator := ""
	if p.printed > 1 {
		separator = "\n"
	}
	if _, err := fmt.Fprintf(p.out, "%s%s%s\n", separator, when, k.Headline()); err != nil {
		return err
	}
	for _, fact := range k.Facts() {
		if _, err := fmt.Fprintf(p.out, "  %-9s  %s\n", fact.Name, fact.Text); err != nil {
			return err
		}
	}
	return nil
}
