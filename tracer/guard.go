package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guard is a small process that outlives a killed tracer: the kernel closes the tracer's perf events, which takes all
// breakpoints out, but the definitions in tracefs belong to nobody and would stay.
type guard struct {
	cmd  *exec.Cmd
	pipe io.Closer
}

// startGuard runs `program args... GROUP` in a session of its own, so that the terminal's Ctrl-C does not reach it.
func startGuard(command []string, group string) (*guard, error) {
	cmd := exec.Command(command[0], append(command[1:], group)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	pipe, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start guard: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start guard: %w", err)
	}
	return &guard{cmd, pipe}, nil
}

// Close lets the guard go. It may be called twice.
func (g *guard) Close() error {
	if g == nil || g.cmd == nil {
		return nil
	}
	err := errors.Join(g.pipe.Close(), g.cmd.Wait())
	g.cmd = nil
	return err
}

// Sweep is the guard's work: wait until life ends (the tracer's end of a pipe), then remove what is left of the group.
func Sweep(life io.Reader, group string) error {
	if _, err := io.Copy(io.Discard, life); err != nil {
		return fmt.Errorf("wait for the tracer: %w", err)
	}
	fs, err := openTracefs()
	if err != nil {
		return err
	}
	defer fs.Close()
	// A dying tracer's perf events are let go one after the other, and hold the definitions until then.
	for range 500 {
		if err = fs.removeEvents(func(g string) bool { return g == group }); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// removeStale takes away definitions of tracers that are gone, should their guards have been killed with them.
func (t *tracefs) removeStale() error {
	return t.removeEvents(func(group string) bool {
		var pid, n int
		_, err := fmt.Sscanf(group, "allocsnoop_%d_%d", &pid, &n)
		return err == nil && unix.Kill(pid, 0) == unix.ESRCH
	})
}

// removeEvents removes the uprobe events of the groups that match.
func (t *tracefs) removeEvents(match func(group string) bool) error {
	fd, err := unix.Openat(t.fd, "uprobe_events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("list uprobe events: %w", err)
	}
	f := os.NewFile(uintptr(fd), "uprobe_events")
	defer f.Close()
	var errs []error
	for line := range lines(f) { // "p:GROUP/NAME PATH:OFFSET"
		_, rest, _ := strings.Cut(line, ":")
		name, _, _ := strings.Cut(rest, " ")
		group, _, _ := strings.Cut(name, "/")
		if match(group) {
			errs = append(errs, t.removeUprobe(name))
		}
	}
	return errors.Join(errs...)
}
