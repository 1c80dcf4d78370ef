package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/tracer"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/target"
)

// targetFlags say whom to trace.
type targetFlags struct {
	pids                                   []int
	names, exes, cgroups, containers, libs []string
	noChildren                             bool
	user                                   string
}

func (f *targetFlags) add(cmd *cobra.Command) {
	s := cmd.Flags()
	s.IntSliceVarP(&f.pids, "pid", "p", nil, "`PID` to trace; may be given more than once")
	s.StringArrayVar(&f.names, "name", nil, "trace every process whose command or program name matches the regular expression `RE`, now and later")
	s.StringArrayVar(&f.exes, "exe", nil, "trace every process that runs the program `PATH`, as it sees it")
	s.StringArrayVar(&f.cgroups, "cgroup", nil, "trace every process in the control group `PATH` and below it")
	s.StringArrayVar(&f.containers, "container", nil, "trace every process in the container `ID|NAME`, or of the pod")
	s.StringArrayVar(&f.libs, "lib", nil, "trace every process that maps the library `NAME[@BUILDID]`")
	s.StringVar(&f.user, "user", "", "run the COMMAND behind -- as `USER[:GROUP]`")
	s.BoolVar(&f.noChildren, "no-children", false, "do not trace what the targets fork")
}

// selector reads the flags.
func (f *targetFlags) selector(command []string) (target.Selector, error) {
	s := target.Selector{PIDs: f.pids, Exes: f.exes, Cgroups: f.cgroups, Containers: f.containers}
	for _, pid := range f.pids {
		if pid <= 0 {
			return s, usageErrorf("--pid %d: it is a number above 0", pid)
		}
	}
	for _, name := range f.names {
		re, err := regexp.Compile(name)
		if err != nil {
			return s, usageErrorf("--name %q: %w", name, err)
		}
		s.Names = append(s.Names, re)
	}
	for _, name := range f.libs {
		lib, err := target.ParseLib(name)
		if err != nil {
			return s, usageErrorf("--lib: %w", err)
		}
		s.Libs = append(s.Libs, lib)
	}
	switch {
	case len(command) > 0 && !s.Empty():
		return s, usageErrorf("either a command behind -- or processes that run already, not both")
	case len(command) == 0 && f.user != "":
		return s, usageErrorf("--user goes with a command behind --")
	case len(command) == 0 && s.Empty():
		return s, usageErrorf("no target: say whom with --pid, --name, --exe, --cgroup, --container or --lib, or give a command behind --; " +
			"see allocsnoop --help")
	}
	return s, nil
}

// find looks up whom the selector means, and says early, and in words, why one cannot be traced.
func find(ctx context.Context, s target.Selector) (*target.Finder, []target.Process, error) {
	if s.Finite() {
		for _, pid := range s.PIDs {
			if err := target.Check(memory.FS{}, pid); err != nil {
				return nil, nil, err
			}
		}
	}
	if missing := target.MissingCapabilities(memory.FS{}); len(missing) > 0 {
		return nil, nil, fmt.Errorf("permission denied: tracing needs root, or these capabilities: %s; try sudo", strings.Join(missing, "; "))
	}
	if s.Empty() {
		return nil, nil, nil // a command is to be started
	}
	finder, err := target.NewFinder(ctx, s, memory.FS{}, target.Names{})
	if err != nil {
		return nil, nil, err
	}
	list, err := finder.Scan()
	if err != nil {
		return nil, nil, fmt.Errorf("look for %s: %w", s.String(), err)
	}
	return finder, list, nil
}

// explainTarget adds what a person can do to an error about one target.
func explainTarget(pid int, err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, memory.ErrGone) {
		return fmt.Errorf("process %d ended before it could be traced: %w", pid, err)
	}
	return err
}

// explainBPF shortens what the verifier says, unless the reader wants it.
func explainBPF(err error, debug bool) error {
	var verifier *ebpf.VerifierError
	if debug && errors.As(err, &verifier) {
		return fmt.Errorf("%w\n%+v", err, verifier)
	}
	if errors.Is(err, tracer.ErrNoBPF) {
		return fmt.Errorf("%w; see allocsnoop doctor", err)
	}
	return err
}
