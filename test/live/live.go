// Package live runs real things in tests: C fixtures that it compiles, target processes that speak line by line, and
// the allocsnoop command on them, with a check that nothing of it remains.
//
// The trap: a target must be quiet when probes go live, or its ledger and the trace start at different moments. So
// nothing here sleeps: a target prints a line when it is ready and waits for one before it works, and allocsnoop
// creates its --ready-file once the probes are live.
package live

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// patience bounds every wait, so that a hang fails with a message instead of the whole run's timeout. It is generous:
// two busy cores and the race detector are slow.
const patience = 3 * time.Minute

// RequireBPF fails the test with a clear sentence where BPF programs cannot be loaded. It does not skip: a run without
// the BPF tests must not look like a pass.
func RequireBPF(t testing.TB) {
	t.Helper()
	if err := loadProgram(); err != nil {
		t.Fatalf("this test needs BPF, and this machine does not let it load a program: %v\n"+
			"run it as root (or with CAP_BPF and CAP_PERFMON) on Linux 5.10 or later with CONFIG_BPF_SYSCALL", err)
	}
	if _, err := os.Stat("/sys/bus/event_source/devices/uprobe/type"); err != nil {
		t.Fatalf("this test needs uprobes, and this kernel offers none (CONFIG_UPROBES, /sys mounted): %v", err)
	}
}

var loadProgram = sync.OnceValue(func() error {
	// Needed below 5.11 only, and may be forbidden where it is not needed: the load itself is the judge.
	_ = rlimit.RemoveMemlock()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.Kprobe,
		License:      "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		return err
	}
	return prog.Close()
})

// CompileC compiles one C or C++ file with -O2 -g -pthread and the flags (which come last, so they win) into a directory
// of the test, and returns the path. With -shared among the flags the result is libNAME.so. Give it the outermost t to
// share the result among subtests.
func CompileC(t testing.TB, src string, flags ...string) string {
	t.Helper()
	compiler := "gcc"
	if ext := filepath.Ext(src); ext == ".cc" || ext == ".cpp" {
		compiler = "g++"
	}
	return CompileWith(t, compiler, src, flags...)
}

// CompileWith is CompileC with another compiler, say musl-gcc.
func CompileWith(t testing.TB, compiler, src string, flags ...string) string {
	t.Helper()
	out, err := compile(t.TempDir(), compiler, src, flags...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func compile(dir, compiler, src string, flags ...string) (string, error) {
	name := strings.TrimSuffix(filepath.Base(src), filepath.Ext(src))
	for _, flag := range flags {
		if flag == "-shared" {
			name = "lib" + name + ".so"
			break
		}
	}
	out := filepath.Join(dir, name)
	args := append([]string{"-O2", "-g", "-pthread", "-o", out, src}, flags...)
	if text, err := exec.Command(compiler, args...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", compiler, strings.Join(args, " "), err, text)
	}
	return out, nil
}

// Allocsnoop builds the command as it is shipped, without cgo, and returns its path in the repository's bin directory,
// where the go command rebuilds it only when something changed.
func Allocsnoop(t testing.TB) string {
	t.Helper()
	path, err := buildAllocsnoop()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var buildAllocsnoop = sync.OnceValues(func() (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		return "", err
	}
	// The test binaries of several packages run at once; only one may build.
	lock, err := os.OpenFile(filepath.Join(root, "bin", ".lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock bin: %w", err)
	}
	path := filepath.Join(root, "bin", "allocsnoop")
	build := exec.Command("go", "build", "-o", path, "./cmd/allocsnoop")
	build.Dir = root
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build allocsnoop: %w\n%s", err, text)
	}
	return path, nil
})

// Root is the directory of the module that the caller's working directory lies in.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("find go.mod above the working directory: none")
		}
		dir = parent
	}
}

// Process is a running target. Its stdin and stdout belong to the test; its stderr is shown when the test fails.
type Process struct {
	PID int

	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string // closed at the end of stdout
	stderr *buffer
	done   chan struct{} // closed once the process is reaped
	err    error         // of Wait, after done
}

// Start runs a target until the test ends.
func Start(t testing.TB, path string, args ...string) *Process {
	t.Helper()
	return StartCmd(t, exec.Command(path, args...))
}

// StartCmd is Start for a command with an environment, a directory or other attributes of its own.
func StartCmd(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{cmd: cmd, lines: make(chan string, 1024), stderr: &buffer{}, done: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// A test binary that dies (timeout, panic) must not leave targets behind.
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if cmd.Stderr == nil {
		cmd.Stderr = p.stderr
	}
	var err error
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start target: %v", err)
	}
	p.PID = cmd.Process.Pid
	go p.run(stdout)
	t.Cleanup(func() {
		p.Kill()
		if t.Failed() {
			t.Logf("stderr of target %s: %s", filepath.Base(cmd.Path), p.stderr)
		}
	})
	return p
}

// run reads stdout to its end before it reaps: Wait closes the pipe.
func (p *Process) run(stdout io.Reader) {
	scanner := bufio.NewScanner(stdout)
	scanner.Buffer(nil, 64<<20) // ledgers are one line
	for scanner.Scan() {
		p.lines <- scanner.Text()
	}
	close(p.lines)
	p.err = p.cmd.Wait()
	close(p.done)
}

// Line is the next line that the target prints.
func (p *Process) Line(t testing.TB) string {
	t.Helper()
	select {
	case line, ok := <-p.lines:
		if !ok {
			<-p.done
			t.Fatalf("target ended (%v) instead of printing a line; stderr: %s", p.err, p.stderr)
		}
		return line
	case <-time.After(patience):
		t.Fatalf("target printed no line within %v", patience)
	}
	return ""
}

// Expect fails unless the target's next line is want.
func (p *Process) Expect(t testing.TB, want string) {
	t.Helper()
	if line := p.Line(t); line != want {
		t.Fatalf("target printed %q, want %q", line, want)
	}
}

// Send writes one line to the target's stdin.
func (p *Process) Send(t testing.TB, line string) {
	t.Helper()
	if _, err := io.WriteString(p.stdin, line+"\n"); err != nil {
		t.Fatalf("send %q to target: %v", line, err)
	}
}

// Wait waits for the target's own end; the error is that of exec.Cmd.Wait.
func (p *Process) Wait(t testing.TB) error {
	t.Helper()
	_ = p.stdin.Close()
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		t.Fatalf("target did not end within %v", patience)
	}
	return nil
}

// Alive reports whether the target still runs.
func (p *Process) Alive() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Kill ends the target at once and waits until it is gone.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	for range p.lines { // let run reach its end
	}
	<-p.done
}

// waitFor polls until ok or ctx ends. Only for states that no file descriptor announces.
func waitFor(ctx context.Context, ok func() bool) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// buffer is a bytes.Buffer that a test may read while a process writes to it.
type buffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}
