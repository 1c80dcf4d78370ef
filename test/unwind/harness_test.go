package unwindtest

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// patience is how long a test waits for something that a loaded machine does slowly.
const patience = 20 * time.Second

// walker is the loaded test program with its tables.
type walker struct {
	objs   ProbeObjects
	tables *unwind.Tables
	events *ringbuf.Reader
	legacy bool // the build with scratch per CPU, since the kernel has no task storage for us
}

type options struct {
	maxFrames  uint32
	tableBytes uint64
}

func newWalker(t testing.TB, o options) *walker {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to load BPF programs")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Log(err)
	}
	w := &walker{legacy: features.HaveProgramHelper(ebpf.Kprobe, asm.FnTaskStorageGet) != nil}
	load := LoadProbe
	if w.legacy {
		load = LoadLegacy
	}
	spec, err := load()
	if err != nil {
		t.Fatal(err)
	}
	if o.maxFrames == 0 {
		o.maxFrames = 512
	}
	if o.tableBytes == 0 {
		o.tableBytes = 32 << 20
	}
	spec.Maps["unwind_rows"].MaxEntries = unwind.RowsFor(o.tableBytes)
	if err := spec.Variables["unwind_max_frames"].Set(o.maxFrames); err != nil {
		t.Fatal(err)
	}
	if err := spec.LoadAndAssign(&w.objs, nil); err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { w.objs.Close() })
	w.tables, err = unwind.New(unwind.Maps{Rows: w.objs.UnwindRows, Rules: w.objs.UnwindRules, Slots: w.objs.UnwindSlots,
		BinUse: w.objs.UnwindBinUse}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.tables.Close(); err != nil {
			t.Error(err)
		}
	})
	w.events, err = ringbuf.NewReader(w.objs.Events)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.events.Close() })
	return w
}

// publish makes the tables of a process and lets the program see it.
func (w *walker) publish(t testing.TB, pid int) *unwind.Space {
	t.Helper()
	s, err := w.tables.Publish(pid)
	if err != nil {
		t.Fatal(err)
	}
	w.show(t, s)
	return s
}

func (w *walker) show(t testing.TB, s *unwind.Space) {
	t.Helper()
	if err := w.objs.Procs.Put(uint32(s.PID), s.Slot); err != nil {
		t.Fatal(err)
	}
}

// attach puts a program at a function of a file in a process.
func (w *walker) attach(t testing.TB, prog *ebpf.Program, pid int, file, symbol string) {
	t.Helper()
	exe, err := link.OpenExecutable(file)
	if err != nil {
		t.Fatal(err)
	}
	l, err := exe.Uprobe(symbol, prog, &link.UprobeOptions{PID: pid})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

func (w *walker) set(t testing.TB, v *ebpf.Variable, n uint32) {
	t.Helper()
	if err := v.Set(n); err != nil {
		t.Fatal(err)
	}
}

// next is the next sent stack, nil after a while without one.
func (w *walker) next(t testing.TB, wait time.Duration) *ProbeEvent {
	t.Helper()
	w.events.SetDeadline(time.Now().Add(wait))
	rec, err := w.events.Read()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	e := *(*ProbeEvent)(unsafe.Pointer(&rec.RawSample[0]))
	return &e
}

// sample asks for n stacks, without stopping anybody.
func (w *walker) sample(t testing.TB, n int) []*ProbeEvent {
	t.Helper()
	w.set(t, w.objs.Armed, uint32(n))
	var events []*ProbeEvent
	for range n {
		e := w.next(t, patience)
		if e == nil {
			t.Fatalf("got %d stacks of %d", len(events), n)
		}
		events = append(events, e)
	}
	return events
}

func (w *walker) totals(t testing.TB) ProbeCounts {
	t.Helper()
	var each []ProbeCounts
	if err := w.objs.Totals.Lookup(uint32(0), &each); err != nil {
		t.Fatal(err)
	}
	var sum ProbeCounts
	for _, c := range each {
		sum.Events += c.Events
		sum.Frames += c.Frames
		sum.Lost += c.Lost
		sum.Unsent += c.Unsent
		for i, n := range c.Ends {
			sum.Ends[i] += n
		}
	}
	return sum
}

// complete fails when fewer than 99.9 % of all stacks so far were whole.
func (w *walker) complete(t testing.TB, space *unwind.Space) {
	t.Helper()
	c := w.totals(t)
	t.Logf("%d events, %.1f frames each, %.3f %% complete, %d lost", c.Events, float64(c.Frames)/float64(max(c.Events, 1)),
		100*float64(c.Ends[unwind.Complete])/float64(max(c.Events, 1)), c.Lost)
	for i, n := range c.Ends {
		if n > 0 && unwind.End(i) != unwind.Complete {
			t.Logf("%s: %d", unwind.End(i), n)
		}
	}
	if c.Events == 0 || float64(c.Ends[unwind.Complete]) < 0.999*float64(c.Events) {
		t.Errorf("%d of %d stacks complete, want 99.9 %%", c.Ends[unwind.Complete], c.Events)
		w.set(t, w.objs.Armed, 0)
		w.set(t, w.objs.BadArmed, 1)
		if e := w.next(t, time.Second); e != nil {
			t.Log(render(e, space))
		}
	}
}

func frames(e *ProbeEvent) []uint64 { return e.Frames[:min(int(e.N), len(e.Frames))] }

// plain are the frames without their flags, as another unwinder has them.
func plain(e *ProbeEvent) []uint64 {
	var pcs []uint64
	for _, f := range frames(e) {
		pcs = append(pcs, f&^uint64(unwind.FrameExact))
	}
	return pcs
}

func render(e *ProbeEvent, s *unwind.Space) string {
	var b strings.Builder
	for i, f := range frames(e) {
		addr, mark := unwind.Frame(f)
		m, _ := s.Find(addr)
		fmt.Fprintf(&b, "\n#%-3d %#x %s %s+%#x", i, addr, mark, filepath.Base(m.Path), addr-m.Start+m.Offset)
	}
	last := uint64(0)
	if e.N > 0 {
		last = frames(e)[e.N-1]
	}
	fmt.Fprintf(&b, "\n%s %s", unwind.End(e.End), s.Describe(unwind.End(e.End), int(e.N), last))
	return b.String()
}

// oracle compares n stacks with what eu-stack finds in the stopped thread. Complete ones must be equal.
func (w *walker) oracle(t *testing.T, n int, every uint32, space *unwind.Space) {
	t.Helper()
	w.set(t, w.objs.Stop, 1)
	w.set(t, w.objs.Every, every)
	defer w.set(t, w.objs.Stop, 0)
	cut, crossed := 0, 0
	for i := range n {
		w.set(t, w.objs.Armed, 1)
		e := w.next(t, patience)
		if e == nil {
			t.Fatalf("no stack after %d of %d", i, n)
		}
		w.set(t, w.objs.Armed, 0)
		pid, tid := int(e.PidTgid>>32), int(uint32(e.PidTgid))
		waitStopped(t, pid, tid)
		want := euStack(t, tid)
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		got, marked := untilMark(e)
		if unwind.End(e.End) != unwind.Complete {
			cut++
			t.Log(render(e, space))
		}
		if marked {
			crossed++
		}
		if marked || unwind.End(e.End) != unwind.Complete {
			// what there is of it must be right all the same
			want = want[:min(len(want), len(got))]
		}
		if len(got) == 0 || !slices.Equal(got[1:], want[1:]) {
			t.Errorf("stack %d (%s):%s\neu-stack: %#x\nwalker:   %#x", i, unwind.End(e.End), render(e, space), want, got)
			return
		}
	}
	t.Logf("%d stacks equal to eu-stack's, %d of them cut, %d through compiled Lua", n, cut, crossed)
}

func waitStopped(t testing.TB, pid, tid int) {
	t.Helper()
	path := fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(200 * time.Microsecond) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		if strings.HasPrefix(rest, "T") {
			return
		}
	}
	t.Fatalf("thread %d does not stop", tid)
}

func euStack(t testing.TB, tid int) []uint64 {
	t.Helper()
	out, err := exec.Command("eu-stack", "-n", "512", "-q", "-1", "-p", strconv.Itoa(tid)).Output()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 1) { // 1: found the end of the stack in some other way
		t.Fatalf("eu-stack: %v", err)
	}
	var pcs []uint64
	for line := range strings.Lines(string(out)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0][0] != '#' {
			continue
		}
		pc, err := strconv.ParseUint(fields[1], 0, 64)
		if err != nil {
			t.Fatalf("eu-stack line %q: %v", line, err)
		}
		pcs = append(pcs, pc)
	}
	return pcs
}

// target is a program that a test runs.
type target struct {
	cmd *exec.Cmd
	pid int
	in  io.WriteCloser
	out *bufio.Reader
	// begin starts the work when the program does not do so itself
	begin func()
}

// start runs a program that prints "ready" once it is.
func start(t testing.TB, name string, args ...string) *target {
	t.Helper()
	return startCmd(t, exec.Command(name, args...))
}

func startCmd(t testing.TB, cmd *exec.Cmd) *target {
	t.Helper()
	p := &target{cmd: cmd}
	var err error
	p.in, err = cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.pid = cmd.Process.Pid
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	p.out = bufio.NewReader(out)
	p.expect(t, "ready")
	return p
}

func (p *target) expect(t testing.TB, want string) {
	t.Helper()
	line, err := p.out.ReadString('\n')
	if err != nil || strings.TrimSpace(line) != want {
		t.Fatalf("target said %q (%v), want %q", line, err, want)
	}
}

// build compiles a program of testdata; flags come after the usual ones.
func build(t testing.TB, source string, flags ...string) string {
	t.Helper()
	return compile(t, source, filepath.Join(t.TempDir(), strings.TrimSuffix(source, filepath.Ext(source))), flags...)
}

func compile(t testing.TB, source, out string, flags ...string) string {
	t.Helper()
	cc := "gcc"
	if filepath.Ext(source) == ".cc" {
		cc = "g++"
	}
	return compileWith(t, cc, source, out, flags...)
}

// buildWith builds with another compiler, if it is there.
func buildWith(t testing.TB, cc, source string, flags ...string) string {
	t.Helper()
	if _, err := exec.LookPath(cc); err != nil {
		t.Skip(err)
	}
	return compileWith(t, cc, source, filepath.Join(t.TempDir(), strings.TrimSuffix(source, filepath.Ext(source))), flags...)
}

func compileWith(t testing.TB, cc, source, out string, flags ...string) string {
	t.Helper()
	// In a virtual machine there is no compiler: the program comes along, built with the same flags.
	if dir := os.Getenv("UNWIND_PREBUILT"); dir != "" {
		return filepath.Join(dir, strings.Join(append([]string{source}, flags...), ""))
	}
	args := append([]string{"-O2", "-o", out, filepath.Join("testdata", source)}, flags...)
	if b, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", cc, strings.Join(args, " "), err, b)
	}
	return out
}

// libc is the C library that a process has mapped.
func libc(t testing.TB, pid int) string { return mapped(t, pid, "libc.so.6") }

func mapped(t testing.TB, pid int, base string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) >= 6 && filepath.Base(f[5]) == base {
			return f[5]
		}
	}
	t.Fatalf("%s is not mapped in %d", base, pid)
	return ""
}

// attachAt puts a program at an offset in a file.
func (w *walker) attachAt(t testing.TB, prog *ebpf.Program, pid int, file string, offset uint64) {
	t.Helper()
	exe, err := link.OpenExecutable(file)
	if err != nil {
		t.Fatal(err)
	}
	l, err := exe.Uprobe("", prog, &link.UprobeOptions{PID: pid, Address: offset})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}

// symbol is the file offset of a function.
func symbol(t testing.TB, file, name string) uint64 {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if errors.Is(err, elf.ErrNoSymbols) {
		symbols, err = f.DynamicSymbols()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range symbols {
		if s.Name != name || s.Value == 0 {
			continue
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_LOAD && s.Value >= p.Vaddr && s.Value < p.Vaddr+p.Filesz {
				return s.Value - p.Vaddr + p.Off
			}
		}
	}
	t.Fatalf("no function %s in %s", name, file)
	return 0
}

// function is the name of the function at a file offset, as far as the symbol table knows.
func function(t testing.TB, file string, offset uint64) string {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_LOAD || offset < p.Off || offset >= p.Off+p.Filesz {
			continue
		}
		addr := offset - p.Off + p.Vaddr
		for _, s := range symbols {
			if elf.ST_TYPE(s.Info) == elf.STT_FUNC && addr >= s.Value && addr < s.Value+s.Size {
				return strings.TrimPrefix(s.Name, "__libc_")
			}
		}
	}
	return "?"
}

// dropSections copies a program without its section headers, as some packers leave them.
func dropSections(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	clear(b[0x28:0x30]) // e_shoff
	clear(b[0x3a:0x40]) // e_shentsize, e_shnum, e_shstrndx
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

// startQuiet runs a program that says nothing.
func startQuiet(t testing.TB, name string, args ...string) *target {
	t.Helper()
	cmd := exec.Command(name, args...)
	p := &target{cmd: cmd}
	var err error
	p.in, err = cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.pid = cmd.Process.Pid
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return p
}
