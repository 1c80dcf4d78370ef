package live

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/pprof/profile"

	snapshot "github.com/allocsnoop/allocsnoop/profile"
)

// Tracer is a running allocsnoop whose probes are live.
type Tracer struct {
	cmd     *exec.Cmd
	out     string
	stdout  buffer
	stderr  buffer
	done    chan struct{}
	objects []object
}

// Result is what a finished allocsnoop left.
type Result struct {
	ExitCode       int
	Stdout, Stderr string
	Path           string           // of the profile
	Profile        *profile.Profile // nil when none was written
}

// Trace runs `allocsnoop --pid PID ARGS` and returns once its probes are live. Without an output among the arguments
// the profile goes to a directory of the test.
func Trace(t testing.TB, pid int, args ...string) *Tracer {
	t.Helper()
	return TraceArgs(t, append([]string{"--pid", strconv.Itoa(pid)}, args...)...)
}

// TraceArgs is Trace for targets that are named in another way than by pid.
func TraceArgs(t testing.TB, args ...string) *Tracer {
	t.Helper()
	return TraceCmd(t, exec.Command, args...)
}

// TraceCmd is TraceArgs with allocsnoop started by a command that becomes allocsnoop in the end, say in a container.
func TraceCmd(t testing.TB, command func(allocsnoop string, args ...string) *exec.Cmd, args ...string) *Tracer {
	t.Helper()
	RequireBPF(t)
	dir := t.TempDir()
	tr := &Tracer{out: filepath.Join(dir, "profile.pb.gz"), done: make(chan struct{})}
	ready := filepath.Join(dir, "ready")
	args = append([]string{"-o", tr.out, "--ready-file", ready}, args...)
	tr.cmd = command(Allocsnoop(t), args...)
	tr.cmd.Stdout, tr.cmd.Stderr = &tr.stdout, &tr.stderr
	tr.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := tr.cmd.Start(); err != nil {
		t.Fatalf("start allocsnoop: %v", err)
	}
	go func() {
		_ = tr.cmd.Wait() // ProcessState tells
		close(tr.done)
	}()
	t.Cleanup(func() {
		_ = tr.cmd.Process.Kill()
		<-tr.done
	})

	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	err := waitFor(ctx, func() bool {
		_, err := os.Stat(ready)
		return err == nil || !tr.Running()
	})
	if err != nil || !tr.Running() {
		t.Fatalf("allocsnoop %s was not ready (%v)\nstdout: %s\nstderr: %s",
			strings.Join(args, " "), tr.cmd.ProcessState, &tr.stdout, &tr.stderr)
	}
	if tr.objects, err = kernelObjects(tr.cmd.Process.Pid); err != nil {
		t.Fatalf("list the tracer's BPF objects: %v", err)
	}
	return tr
}

// Running reports whether allocsnoop has not ended.
func (tr *Tracer) Running() bool {
	select {
	case <-tr.done:
		return false
	default:
		return true
	}
}

// Output is the profile that it writes.
func (tr *Tracer) Output() string { return tr.out }

// PID is the tracer's own pid.
func (tr *Tracer) PID() int { return tr.cmd.Process.Pid }

// Stop interrupts allocsnoop as Ctrl-C does and returns what it left. The exit code is 130 then, even for a perfect run.
func (tr *Tracer) Stop(t testing.TB) *Result {
	t.Helper()
	if err := tr.cmd.Process.Signal(os.Interrupt); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("interrupt allocsnoop: %v", err)
	}
	return tr.Wait(t)
}

// Kill ends allocsnoop with SIGKILL, in the middle of whatever it does.
func (tr *Tracer) Kill(t testing.TB) {
	t.Helper()
	if err := tr.cmd.Process.Kill(); err != nil {
		t.Fatalf("kill allocsnoop: %v", err)
	}
	<-tr.done
	tr.checkGone(t)
}

// Wait waits for allocsnoop's own end (the duration is over, the target has gone), checks that nothing of it remains in
// the kernel, and returns what it left.
func (tr *Tracer) Wait(t testing.TB) *Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := waitFor(ctx, func() bool { return !tr.Running() }); err != nil {
		t.Fatalf("allocsnoop did not end within %v\nstderr: %s", patience, &tr.stderr)
	}
	tr.checkGone(t)
	result := &Result{
		ExitCode: tr.cmd.ProcessState.ExitCode(),
		Stdout:   tr.stdout.String(),
		Stderr:   tr.stderr.String(),
		Path:     tr.out,
	}
	if _, err := os.Stat(tr.out); err == nil {
		result.Profile = ReadProfile(t, tr.out)
	}
	return result
}

// ReadProfile reads a pprof file and checks that it is valid.
func ReadProfile(t testing.TB, path string) *profile.Profile {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	p, err := profile.Parse(file)
	if err != nil {
		t.Fatalf("parse %s: %v", path, err)
	}
	if err := p.CheckValid(); err != nil {
		t.Fatalf("check %s: %v", path, err)
	}
	return p
}

// ReadSnapshot reads a profile as allocsnoop itself does.
func ReadSnapshot(t testing.TB, path string) *snapshot.Snapshot {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err := snapshot.Read(file)
	if err != nil {
		t.Fatalf("read %s: %v", path, err)
	}
	return s
}

// Book is what a profile says of a set of stacks, in the order of its sample types.
type Book struct {
	AllocObjects, AllocBytes, InUseObjects, InUseBytes int64
}

// OfProcess is the part of a profile that is of one process.
func OfProcess(p *profile.Profile, pid int) *profile.Profile {
	only := p.Copy()
	only.Sample = nil
	for _, sample := range p.Sample {
		if pids := sample.Label["pid"]; len(pids) == 1 && pids[0] == strconv.Itoa(pid) {
			only.Sample = append(only.Sample, sample)
		}
	}
	return only
}

// Sum adds up the samples of one kind whose stacks hold the functions side by side, innermost first: Sum(p, "malloc",
// "malloc", "leak") is what leak got from malloc directly. No function takes every stack.
func Sum(p *profile.Profile, kind string, functions ...string) Book {
	var sum Book
	for _, sample := range p.Sample {
		if kinds := sample.Label["kind"]; len(kinds) != 1 || kinds[0] != kind {
			continue
		}
		if !containsRun(Functions(sample), functions) {
			continue
		}
		sum.AllocObjects += sample.Value[0]
		sum.AllocBytes += sample.Value[1]
		sum.InUseObjects += sample.Value[2]
		sum.InUseBytes += sample.Value[3]
	}
	return sum
}

// Functions is the names of a sample's frames, innermost first, inlined ones too. A frame without a name is its address.
func Functions(sample *profile.Sample) []string {
	var names []string
	for _, loc := range sample.Location {
		if len(loc.Line) == 0 {
			names = append(names, fmt.Sprintf("%#x", loc.Address))
		}
		for _, line := range loc.Line {
			names = append(names, line.Function.Name)
		}
	}
	return names
}

func containsRun(names, run []string) bool {
	for start := 0; start+len(run) <= len(names); start++ {
		match := true
		for i := range run {
			match = match && names[start+i] == run[i]
		}
		if match {
			return true
		}
	}
	return false
}

// SampleHas reports whether a function is among the frames of a sample.
func SampleHas(sample *profile.Sample, function string) bool {
	return containsRun(Functions(sample), []string{function})
}
