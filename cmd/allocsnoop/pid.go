package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// onePID is the Args of a command that takes just a pid.
func onePID(cmd *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageErrorf("%s takes one PID, not %d arguments", cmd.Name(), len(args))
	}
	_, err := parsePID(args[0])
	return err
}

func parsePID(text string) (int, error) {
	pid, err := strconv.ParseInt(text, 10, 32)
	if err != nil || pid <= 0 {
		return 0, usageErrorf("%.40q is no PID: it is a number above 0", text)
	}
	return int(pid), nil
}

// outputFor is the name of a file about a process that nobody named.
func outputFor(pid int, extension string) string {
	comm := strings.Map(func(r rune) rune {
		if r == '/' || r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, memory.FS{}.State(pid).Comm)
	return fmt.Sprintf("allocsnoop-%s-%d-%s.%s", comm, pid, time.Now().UTC().Format("20060102T150405Z"), extension)
}
