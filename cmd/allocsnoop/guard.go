package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/tracer"
)

const guardCommand = "guard"

// newGuardCommand is the process that a trace starts beside itself; people do not call it.
func newGuardCommand() *cobra.Command {
	return &cobra.Command{
		Use:    guardCommand + " GROUP",
		Short:  "Remove the probe definitions of a killed trace (started by the trace itself)",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE:   func(_ *cobra.Command, args []string) error { return tracer.Sweep(os.Stdin, args[0]) },
	}
}

// guardArgs starts this very program as a guard.
func guardArgs() []string {
	self, err := os.Executable()
	if err != nil {
		return nil
	}
	return []string{self, guardCommand}
}
