package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"

	pprof "github.com/google/pprof/profile"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/inventory"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

const whatLibs = "a PID, a profile (.pb.gz), a folder or an ELF file"

func newLibsCommand() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "libs PID|PROFILE|DIR",
		Short: "List the builds of the libraries in a process, a profile or a folder",
		Long: `List programs and shared objects with build-id, version, size, time of change and package, and
whether the file on disk still is the one in memory. Every profile carries the inventory of its
processes.`,
		Args: exactly(1, whatLibs),
		RunE: func(cmd *cobra.Command, args []string) error {
			list, err := librariesOf(args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return profile.WriteLibrariesJSON(cmd.OutOrStdout(), list)
			}
			width, color := terminal(cmd.OutOrStdout())
			return profile.WriteLibraries(cmd.OutOrStdout(), list, width, color)
		},
	}
	diff := &cobra.Command{
		Use:   "diff A B",
		Short: "Name the libraries that two processes, profiles or folders have in other builds",
		Args:  exactly(2, whatLibs),
		RunE: func(cmd *cobra.Command, args []string) error {
			var sides [2][]profile.Library
			for i, arg := range args {
				var err error
				if sides[i], err = librariesOf(arg); err != nil {
					return err
				}
			}
			changes := profile.DiffLibraries(sides[0], sides[1])
			if asJSON {
				return profile.WriteLibraryChangesJSON(cmd.OutOrStdout(), changes)
			}
			width, color := terminal(cmd.OutOrStdout())
			return profile.WriteLibraryChanges(cmd.OutOrStdout(), changes, width, color)
		},
	}
	for _, c := range []*cobra.Command{cmd, diff} {
		c.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	}
	cmd.AddCommand(diff)
	return cmd
}

// exactly asks for n arguments and says what they are.
func exactly(n int, what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != n {
			return usageErrorf("%s takes %d of %s, not %d", cmd.Name(), n, what, len(args))
		}
		return nil
	}
}

// librariesOf takes digits for a pid, and tells files by what is in them.
func librariesOf(arg string) ([]profile.Library, error) {
	if pid, err := strconv.Atoi(arg); err == nil {
		if pid <= 0 {
			return nil, usageErrorf("%s is no pid; want %s", arg, whatLibs)
		}
		return inventory.OfProcess(memory.FS{}, pid)
	}
	info, err := os.Stat(arg)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("list libraries of %s: no such file; want %s", arg, whatLibs)
	case err != nil:
		return nil, fmt.Errorf("list libraries: %w", err)
	case info.IsDir():
		return inventory.OfFolder(arg)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("list libraries of %s: not a regular file; want %s", arg, whatLibs)
	}
	l, err := inventory.OfFile(arg)
	if err == nil {
		return []profile.Library{l}, nil
	}
	if !errors.Is(err, inventory.ErrNotELF) {
		return nil, fmt.Errorf("list libraries: %w", err)
	}
	s, err := readProfile(arg)
	if err != nil {
		return nil, err
	}
	return profile.Libraries(s), nil
}

// readProfile reads a pprof file, with an error that says what the file is when it is none.
func readProfile(name string) (*profile.Snapshot, error) {
	_, s, err := readBoth(name)
	return s, err
}

// readBoth also returns the file as pprof's own tools see it.
func readBoth(name string) (*pprof.Profile, *profile.Snapshot, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, nil, fmt.Errorf("open profile: %w", err)
	}
	defer f.Close()
	p, err := profile.Parse(f)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w%s", name, err, notAProfile(f))
	}
	s, err := profile.Decode(p)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", name, err)
	}
	return p, s, nil
}

// collectRarely spares a command that reads large profiles, shows them and ends a quarter of its time. It returns the
// way back.
func collectRarely() func() {
	before := debug.SetGCPercent(400)
	return func() { debug.SetGCPercent(before) }
}

// useHugePages makes the memory that profiles will be read into come in pages of 2 MiB: taken in small ones, on a virtual
// machine, half of the time goes into page faults. It is given back at once, to the heap, which asks there first.
func useHugePages(files []string) {
	var bytes int64
	for _, name := range files {
		if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() {
			bytes += info.Size()
		}
	}
	const inMemory = 50 // bytes of a byte of a profile of many stacks, which is packed
	room := make([]byte, min(bytes*inMemory, 512<<20))
	if len(room) < 4<<20 {
		return
	}
	_ = unix.Madvise(room, unix.MADV_HUGEPAGE) // without them it is only slower
	room = nil
	runtime.GC()
}

func notAProfile(f *os.File) string {
	var head [16]byte
	n, _ := f.ReadAt(head[:], 0)
	switch {
	case n == 0:
		return " (the file is empty)"
	case bytes.HasPrefix(head[:n], []byte("\x7fELF")):
		return " (an ELF file; allocsnoop libs lists those)"
	case bytes.HasPrefix(head[:n], []byte("{")), bytes.HasPrefix(head[:n], []byte("<")):
		return " (a JSON or HTML document; the profile is the .pb.gz file)"
	}
	return ""
}

// writeOutput writes a new file as a whole or not at all.
func writeOutput(name string, write func(io.Writer) error) error {
	out, err := createOutput(name)
	if err != nil {
		return err
	}
	defer out.discard()
	if err := write(out); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return out.commit()
}
