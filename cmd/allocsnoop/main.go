// Command allocsnoop shows who holds the memory of a running native process: through which call stack, out of which
// shared object, and what is in it.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Exit codes; scripts depend on them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitLosses      = 3
	exitInterrupted = 130
)

// exitError carries the exit code that an error asks for. A nil err means that everything was said already.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageErrorf is an error in how the command was called (exit code 2).
func usageErrorf(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func main() { os.Exit(run(os.Args[1:])) }

func run(args []string) int {
	root := newRootCommand()
	root.SetArgs(args)
	err := root.Execute()
	if err == nil {
		return exitOK
	}
	code := exitFailed
	var exit *exitError
	if errors.As(err, &exit) {
		code = exit.code
		if exit.err == nil {
			return code
		}
	}
	fmt.Fprintf(os.Stderr, "allocsnoop: %s\n", profile.SanitizeLines(err.Error()))
	return code
}

func newRootCommand() *cobra.Command {
	var trace traceFlags
	root := &cobra.Command{
		Use:           "allocsnoop --pid PID [--duration 60s] [-o FILE]\n  allocsnoop [flags] -- COMMAND [ARG...]",
		Short:         "Show who holds the memory of a running process, by call stack, library build and content",
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && cmd.ArgsLenAtDash() != 0 {
				return usageErrorf("unknown command %q; see allocsnoop --help", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, command []string) error {
			if cmd.Flags().NFlag() == 0 && len(command) == 0 {
				return cmd.Help()
			}
			return trace.run(cmd, command)
		},
	}
	trace.add(root)
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages ", ".FlagUsagesWrapped 100 "))
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitUsage, err} })
	// One line a subcommand, each in a file of its own.
	root.AddCommand(newDoctorCommand())
	root.AddCommand(newOOMCommand())
	root.AddCommand(newSymbolizeCommand())
	root.AddCommand(newInspectCommand())
	root.AddCommand(newLibsCommand())
	root.AddCommand(newDiffCommand())
	root.AddCommand(newViewCommand())
	root.AddCommand(newTopCommand())
	root.AddCommand(newMapsCommand())
	root.AddCommand(newDumpCommand())
	root.AddCommand(newGuardCommand())
	return root
}
