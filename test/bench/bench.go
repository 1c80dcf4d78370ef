// Package bench measures what tracing costs the target, against an untraced run and against other tools in the same
// run, and writes the figures into docs/benchmarks.md.
//
// The trap: absolute times on a busy virtual machine say little. So contenders take turns, round after round, each is
// divided by its neighbour of the same round, and what is printed is the median of those ratios and their spread. Costs
// are CPU time of the target, which includes the traps its probes cause.
package bench

import (
	"bufio"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

//go:embed target/pairs.c
var pairsSource []byte

// Options say how much to measure.
type Options struct {
	Allocsnoop string        // path of the command
	Rounds     int           // turns of each contender
	Slice      time.Duration // CPU time that one measurement takes, roughly
	Requests   int           // of one measurement of the service
	Progress   io.Writer     // a line a step; nil for none
}

// Full is what docs/benchmarks.md is made with, Smoke only shows that everything runs.
func Full(allocsnoop string) Options {
	return Options{Allocsnoop: allocsnoop, Rounds: 7, Slice: 200 * time.Millisecond, Requests: 20_000}
}

// Smoke is the least that can be measured.
func Smoke(allocsnoop string) Options {
	return Options{Allocsnoop: allocsnoop, Rounds: 1, Slice: time.Millisecond, Requests: 200}
}

func (o Options) sayf(format string, args ...any) {
	if o.Progress != nil {
		fmt.Fprintf(o.Progress, format+"\n", args...)
	}
}

// contender is one way to run the target.
type contender struct {
	name string
	// baseline names the contender that this one is divided by.
	baseline string
	env      []string // of the target
	wrap     []string // command before the target's
	// attach puts a tool onto a running target; nil for none. The returned function takes it off.
	attach func(ctx context.Context, dir string, pid int) (detach func() error, err error)
	// needs is a command or library without which the contender sits out.
	needs string
	// settles: the target works for a while before it is measured, as the tool changes its mind about it.
	settles bool
	// slow contenders do a hundredth of the work.
	slow bool
}

// smoke tells that nothing is measured, only shown to run.
func (o Options) smoke() bool { return o.Slice < 10*time.Millisecond }

// settling is how long the target works before a contender that settles is measured.
func (o Options) settling() time.Duration {
	if o.smoke() {
		return 10 * o.Slice
	}
	return 2500 * time.Millisecond
}

const (
	alone        = "alone"
	budgetedName = "default (5 % budget), after 2.5 s"
)

// contenders lists allocsnoop's modes and the tools that people use for the same question.
func (o Options) contenders() []contender {
	mode := func(name string, args ...string) contender {
		return contender{name: name, baseline: alone, attach: func(ctx context.Context, dir string, pid int) (func() error, error) {
			return o.attachAllocsnoop(ctx, dir, pid, args...)
		}}
	}
	budgeted := mode(budgetedName)
	budgeted.settles = true
	return []contender{
		{name: alone},
		mode("growth", "--mode", "growth"),
		// Its own budget would end the sampling within two seconds, and what is measured would be a trace without probes.
		mode("sample", "--mode", "sample", "--max-overhead", "100%"),
		mode("exact", "--mode", "exact"),
		budgeted,
		{name: "bpftrace, memleak's job", baseline: alone, attach: attachBpftrace, needs: "bpftrace"},
		{name: "memleak of bcc", baseline: alone, attach: attachMemleak, needs: "memleak-bpfcc"},
		{name: "heaptrack, attached", baseline: alone, attach: attachHeaptrack, needs: "heaptrack"},
		{name: "jemalloc alone", env: []string{"LD_PRELOAD=" + library("libjemalloc.so.2")}, needs: library("libjemalloc.so.2")},
		{
			name: "jemalloc's profiler", baseline: "jemalloc alone", needs: library("libjemalloc.so.2"),
			env: []string{"LD_PRELOAD=" + library("libjemalloc.so.2"), "MALLOC_CONF=prof:true,prof_active:true"},
		},
		{name: "tcmalloc alone", env: []string{"LD_PRELOAD=" + library("libtcmalloc.so.4")}, needs: library("libtcmalloc.so.4")},
		{
			name: "tcmalloc's profiler", baseline: "tcmalloc alone", needs: library("libtcmalloc.so.4"),
			env: []string{"LD_PRELOAD=" + library("libtcmalloc.so.4"), "HEAPPROFILE=DIR/heap"},
		},
		{name: "valgrind DHAT", baseline: alone, wrap: []string{"valgrind", "--tool=dhat", "--dhat-out-file=DIR/dhat"}, needs: "valgrind", slow: true},
	}
}

// library is the path of a Debian package's library, or its name when it is not there.
func library(name string) string {
	found, _ := filepath.Glob("/usr/lib/*/" + name)
	if len(found) == 0 {
		return name
	}
	return found[0]
}

func (c contender) available() bool {
	if c.needs == "" {
		return true
	}
	if strings.Contains(c.needs, ".so") {
		_, err := os.Stat(c.needs)
		return err == nil
	}
	_, err := exec.LookPath(c.needs)
	return err == nil
}

// environment is the target's, with the contender's directory put in.
func (c contender) environment(dir string) []string {
	env := os.Environ()
	for _, v := range c.env {
		env = append(env, strings.ReplaceAll(v, "DIR", dir))
	}
	return env
}

func (c contender) command(dir, path string, args ...string) *exec.Cmd {
	line := append([]string{}, c.wrap...)
	for i := range line {
		line[i] = strings.ReplaceAll(line[i], "DIR", dir)
	}
	line = append(append(line, path), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = c.environment(dir)
	return cmd
}

const patience = 60 * time.Second

// attachAllocsnoop returns once the probes are live.
func (o Options) attachAllocsnoop(ctx context.Context, dir string, pid int, args ...string) (func() error, error) {
	tool, err := o.startAllocsnoop(ctx, dir, pid, args...)
	if err != nil {
		return nil, err
	}
	return func() error {
		if err := tool.stop(); err != nil {
			return err
		}
		if slices.Contains(args, "sample") && strings.Contains(tool.output.String(), "probes out") {
			return errors.New("sampling gave way to growth while it was measured")
		}
		return nil
	}, nil
}

func (o Options) startAllocsnoop(ctx context.Context, dir string, pid int, args ...string) (*tool, error) {
	ready := filepath.Join(dir, "ready")
	_ = os.Remove(ready)
	args = append([]string{"--pid", strconv.Itoa(pid), "-o", filepath.Join(dir, "profile.pb.gz"), "--ready-file", ready}, args...)
	t, err := startTool(exec.Command(o.Allocsnoop, args...))
	if err != nil {
		return nil, err
	}
	err = t.await(ctx, func() bool {
		_, err := os.Stat(ready)
		return err == nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// bpftraceScript does what bcc's memleak does: it keeps each block's size and stack from malloc's entry and return until
// its free.
const bpftraceScript = `
uprobe:LIBC:malloc /pid == PID/ { @size[tid] = arg0; }
uretprobe:LIBC:malloc /pid == PID && @size[tid]/ {
	@block[retval] = @size[tid];
	@stack[retval] = ustack(16);
	delete(@size[tid]);
}
uprobe:LIBC:free /pid == PID && arg0/ { delete(@block[arg0]); delete(@stack[arg0]); }
BEGIN { printf("ready\n"); }
END { clear(@block); clear(@stack); clear(@size); }
`

func attachBpftrace(ctx context.Context, _ string, pid int) (func() error, error) {
	libc, err := mappedLibc(pid)
	if err != nil {
		return nil, err
	}
	script := strings.NewReplacer("LIBC", libc, "PID", strconv.Itoa(pid)).Replace(bpftraceScript)
	cmd := exec.Command("bpftrace", "-B", "line", "-e", script)
	cmd.Env = append(os.Environ(), "BPFTRACE_MAP_KEYS_MAX=2000000")
	t, err := startTool(cmd)
	if err != nil {
		return nil, err
	}
	if err := t.await(ctx, func() bool { return strings.Contains(t.output.String(), "ready") }); err != nil {
		return nil, err
	}
	return t.stop, nil
}

// attachMemleak runs Debian's memleak. It is compiled against the kernel's headers when it starts, and wants tracefs where
// it looks for it, which may be mounted nowhere. Its first report says that its probes are in.
func attachMemleak(ctx context.Context, _ string, pid int) (func() error, error) {
	const script = "mount -t tracefs tracefs /sys/kernel/tracing && exec memleak-bpfcc -p $0 2"
	t, err := startTool(exec.Command("unshare", "--mount", "sh", "-c", script, strconv.Itoa(pid)))
	if err != nil {
		return nil, err
	}
	err = t.await(ctx, func() bool { return strings.Contains(t.output.String(), "stacks with outstanding") })
	if err != nil {
		return nil, err
	}
	return t.stop, nil
}

func mappedLibc(pid int) (string, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if len(fields) == 6 && strings.HasPrefix(filepath.Base(fields[5]), "libc.so") {
			return fields[5], nil
		}
	}
	return "", fmt.Errorf("find libc in process %d: none mapped", pid)
}

// attachHeaptrack injects its library by gdb. Its own way to detach is another gdb session, and not needed: the target
// ends with the measurement.
func attachHeaptrack(ctx context.Context, dir string, pid int) (func() error, error) {
	cmd := exec.Command("heaptrack", "--raw", "-o", filepath.Join(dir, "heaptrack"), "-p", strconv.Itoa(pid))
	t, err := startTool(cmd)
	if err != nil {
		return nil, err
	}
	injected := func() bool {
		maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
		return err == nil && bytes.Contains(maps, []byte("libheaptrack_inject")) && strings.Contains(t.output.String(), "injection finished")
	}
	if err := t.await(ctx, injected); err != nil {
		return nil, err
	}
	return t.kill, nil
}

// tool is a running tracer.
type tool struct {
	cmd    *exec.Cmd
	output *output
	done   chan struct{}
}

func startTool(cmd *exec.Cmd) (*tool, error) {
	t := &tool{cmd: cmd, output: &output{}, done: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = t.output, t.output
	// A group of its own: some tools are scripts that start the tool.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", filepath.Base(cmd.Path), err)
	}
	go func() {
		_ = cmd.Wait()
		close(t.done)
	}()
	return t, nil
}

func (t *tool) await(ctx context.Context, ready func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ready() {
		select {
		case <-tick.C:
		case <-t.done:
			return fmt.Errorf("%s ended before it was ready (%v): %s", filepath.Base(t.cmd.Path), t.cmd.ProcessState, t.output)
		case <-ctx.Done():
			_ = t.kill()
			return fmt.Errorf("%s was not ready: %w: %s", filepath.Base(t.cmd.Path), ctx.Err(), t.output)
		}
	}
	return nil
}

func (t *tool) kill() error {
	err := syscall.Kill(-t.cmd.Process.Pid, syscall.SIGKILL)
	<-t.done
	return err
}

// stop interrupts the tool and waits for its end.
func (t *tool) stop() error {
	if err := syscall.Kill(-t.cmd.Process.Pid, syscall.SIGINT); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	select {
	case <-t.done:
		return nil
	case <-time.After(patience):
		return errors.Join(fmt.Errorf("%s did not end: %s", filepath.Base(t.cmd.Path), t.output), t.kill())
	}
}

// target is a running pairs program.
type target struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	lines *bufio.Scanner
	pid   int
}

// compilePairs puts the target into dir and returns its path.
func compilePairs(dir string) (string, error) {
	source, path := filepath.Join(dir, "pairs.c"), filepath.Join(dir, "pairs")
	if err := os.WriteFile(source, pairsSource, 0o644); err != nil {
		return "", err
	}
	out, err := exec.Command("gcc", "-O2", "-g", "-fomit-frame-pointer", "-pthread", "-o", path, source).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("compile %s: %w\n%s", source, err, out)
	}
	return path, nil
}

// shape is what the target's work looks like.
type shape struct{ depth, stacks, threads int }

func (s shape) args() []string {
	return []string{strconv.Itoa(s.depth), strconv.Itoa(s.stacks), strconv.Itoa(s.threads)}
}

func startTarget(cmd *exec.Cmd) (*target, error) {
	t := &target{cmd: cmd}
	var err error
	if t.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start target: %w", err)
	}
	t.pid = cmd.Process.Pid
	t.lines = bufio.NewScanner(stdout)
	if !t.lines.Scan() || t.lines.Text() != "ready" {
		return nil, errors.Join(fmt.Errorf("start target: it says %q", t.lines.Text()), t.stop())
	}
	return t, nil
}

// order sends a line and returns the number that the target answers.
func (t *target) order(format string, args ...any) (int64, error) {
	if _, err := fmt.Fprintf(t.stdin, format+"\n", args...); err != nil {
		return 0, err
	}
	if !t.lines.Scan() {
		return 0, fmt.Errorf("target ended instead of answering "+format, args...)
	}
	return strconv.ParseInt(t.lines.Text(), 10, 64)
}

func (t *target) stop() error {
	_ = t.stdin.Close()
	_ = t.cmd.Process.Kill()
	_ = t.cmd.Wait()
	return nil
}

// perPair is the CPU nanoseconds of one pair. It finds by itself how many pairs fill the slice.
func (t *target) perPair(o Options, threads int) (float64, error) {
	for n := int64(1000); ; n *= 4 {
		took, err := t.order("run %d", n)
		if err != nil {
			return 0, err
		}
		if time.Duration(took) >= o.Slice {
			return float64(took) / float64(n) / float64(threads), nil
		}
	}
}

// output is written by a tool and read by the harness meanwhile.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// series is the figures of one contender, one a round; NaN-free: a contender that sat out has none.
type series struct {
	name     string
	baseline string
	values   []float64
	note     string
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Clone(values)
	slices.Sort(sorted)
	if n := len(sorted); n%2 == 0 {
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[len(sorted)/2]
}

// ratios divides the series by another one, round by round.
func ratios(of, by []float64) []float64 {
	var out []float64
	for i := range min(len(of), len(by)) {
		if by[i] > 0 {
			out = append(out, of[i]/by[i])
		}
	}
	return out
}
