package main

import (
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Help is wrapped when it is printed; a line break in a flag's own text would break it at another place too.
func TestHelpIsWrappedByNobodyButThePrinter(t *testing.T) {
	root := newRootCommand()
	for _, cmd := range append(root.Commands(), root) {
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if strings.Contains(f.Usage, "\n") {
				t.Errorf("%s --%s has a line break in its text", cmd.Name(), f.Name)
			}
		})
		for line := range strings.Lines(helpOf(t, cmd)) {
			if n := len([]rune(strings.TrimRight(line, "\n"))); n > plainWidth {
				t.Errorf("help of %s has a line of %d columns: %s", cmd.Name(), n, line)
			}
		}
	}
}

func helpOf(t *testing.T, cmd *cobra.Command) string {
	t.Helper()
	var out strings.Builder
	cmd.SetOut(&out)
	if err := cmd.Help(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}
