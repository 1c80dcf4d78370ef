package allocator

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/rlimit"
)

// counter is a uprobe that counts its hits and adds up one argument.
type counter struct {
	sums *ebpf.Map
	link link.Link
}

// registerOffset is where a position's register is in x86-64's struct pt_regs.
var registerOffset = map[int]int16{1: 112, 2: 104, 3: 96, 4: 88, 5: 72, 6: 64, ArgRAX: 80}

func attachCounter(t *testing.T, path string, pid int, offset uint64, position int) *counter {
	t.Helper()
	sums, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 16, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sums.Close() })
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.Kprobe, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.StoreImm(asm.RFP, -4, 0, asm.Word),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.LoadMapPtr(asm.R1, sums.FD()),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "out"),
		asm.LoadMem(asm.R7, asm.R6, registerOffset[position], asm.DWord),
		asm.Mov.Imm(asm.R1, 1),
		asm.AddAtomic.Mem(asm.R0, asm.R1, asm.DWord, 0),
		asm.AddAtomic.Mem(asm.R0, asm.R7, asm.DWord, 8),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("out"),
		asm.Return(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	file, err := link.OpenExecutable(path)
	if err != nil {
		t.Fatal(err)
	}
	l, err := file.Uprobe("probe", prog, &link.UprobeOptions{Address: offset, PID: pid})
	if err != nil {
		t.Fatalf("attach at %#x of %s: %v", offset, path, err)
	}
	c := &counter{sums: sums, link: l}
	t.Cleanup(func() { l.Close() })
	return c
}

func (c *counter) read(t *testing.T) (hits, sum uint64) {
	t.Helper()
	value, err := c.sums.LookupBytes(uint32(0))
	if err != nil {
		t.Fatal(err)
	}
	return binary.NativeEndian.Uint64(value), binary.NativeEndian.Uint64(value[8:])
}

// exerciser is a running testdata/exercise.c.
type exerciser struct {
	pid int
	in  io.Writer
	out *bufio.Reader
}

func exercise(t *testing.T, program string, env ...string) *exerciser {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), env...)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("target: %v", err)
		}
	})
	e := &exerciser{cmd.Process.Pid, in, bufio.NewReader(out)}
	if line, err := e.out.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("target is not ready: %q, %v", line, err)
	}
	return e
}

func (e *exerciser) call(t *testing.T, name string) (sum uint64) {
	t.Helper()
	if _, err := fmt.Fprintln(e.in, name); err != nil {
		t.Fatal(err)
	}
	line, err := e.out.ReadString('\n')
	if err != nil {
		t.Fatalf("target ended in %s: %v", name, err)
	}
	if sum, err = strconv.ParseUint(strings.TrimSpace(line), 16, 64); err != nil {
		t.Fatal(err)
	}
	return sum
}

// singleStepped: the kernel gives a process the page [uprobes] when it first executes an instruction out of line.
func (e *exerciser) singleStepped(t *testing.T) bool {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", e.pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Contains(string(maps), "[uprobes]")
}

func needUprobes(t *testing.T) {
	t.Helper()
	if runtime.GOARCH != "amd64" || os.Geteuid() != 0 {
		t.Skip("placing real probes needs x86-64 and root")
	}
	_ = rlimit.RemoveMemlock() // needed before 5.11 only
}

// TestEveryCallPassesTheProbeOnceWithItsArgument runs the placements on the real kernel: 23 calls are 23 hits, the
// argument is the caller's, and no instruction was single-stepped.
func TestEveryCallPassesTheProbeOnceWithItsArgument(t *testing.T) {
	needUprobes(t)
	const rounds = 23
	calls := []string{"malloc", "calloc", "realloc", "memalign", "aligned_alloc", "posix_memalign", "free"}
	for _, tt := range []struct {
		name, compiler string
		flags, env     []string
		file           string
	}{
		{"glibc", "gcc", nil, nil, "libc.so.6"},
		{"static glibc", "gcc", []string{"-static"}, nil, "prog"},
		{"static musl", "musl-gcc", []string{"-static"}, nil, "prog"},
		{"jemalloc", "gcc", nil, []string{"LD_PRELOAD=" + libs + "libjemalloc.so.2"}, "libjemalloc.so.2"},
		{"tcmalloc", "gcc", nil, []string{"LD_PRELOAD=" + libs + "libtcmalloc.so.4"}, "libtcmalloc.so.4"},
		{"minimal tcmalloc", "gcc", nil, []string{"LD_PRELOAD=" + libs + "libtcmalloc_minimal.so.4"}, "libtcmalloc_minimal.so.4"},
		{"mimalloc", "gcc", nil, []string{"LD_PRELOAD=" + libs + "libmimalloc.so.2.0"}, "libmimalloc.so.2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			target := exercise(t, compile(t, tt.compiler, "exercise.c", append(tt.flags, "-fno-builtin")...), tt.env...)
			plan := planOf(t, &Scanner{Rules: Rules{RAX: true}}, target.pid)
			stepped := false
			for _, name := range calls {
				p := probeIn(plan, tt.file, name)
				if p == nil {
					p = forwardedTo(plan, tt.file, name)
				}
				if p == nil {
					t.Errorf("%s: neither it nor what it forwards to is probed", name)
					continue
				}
				at := p.AtProbe()
				position := at.Size
				if at.Op == Free {
					position = at.Ptr
				}
				c := attachCounter(t, p.Path, target.pid, p.ProbeOffset(), position)
				want := target.call(t, name)
				hits, sum := c.read(t)
				if hits != rounds || sum != want {
					t.Errorf("%s: probe of %s at +%d (%s): %d hits, sum %#x, want %d and %#x",
						name, p.Name, p.Place.Offset, p.Place.Instruction, hits, sum, rounds, want)
				}
				c.link.Close()
				stepped = stepped || !p.Place.Emulated
				if got := target.singleStepped(t); got != stepped {
					t.Errorf("%s: single-stepped is %v at +%d (%s)", name, got, p.Place.Offset, p.Place.Instruction)
					stepped = got
				}
			}
		})
	}
}

// forwardedTo follows the reasons for skipping a function to the one that is probed.
func forwardedTo(plan Plan, file, name string) *Probe {
	for range 8 {
		next := ""
		for _, s := range plan.Skipped {
			if s.Name == name && strings.Contains(s.Path, file) {
				next = s.Why[strings.LastIndexByte(s.Why, ' ')+1:]
			}
		}
		if p := probeIn(plan, file, next); p != nil {
			return p
		}
		name = next
	}
	return nil
}

// The oracle above can tell: an instruction that is not emulated leaves its mark.
func TestSingleStepsAreNoticed(t *testing.T) {
	needUprobes(t)
	target := exercise(t, compile(t, "gcc", "exercise.c", "-fno-builtin"))
	p := probeIn(planOf(t, &Scanner{}, target.pid), "libc.so.6", "free")
	if p == nil || p.Place.Offset == 0 {
		t.Skip("needs a glibc whose free begins with an instruction that is not emulated")
	}
	attachCounter(t, p.Path, target.pid, p.Offset, 1)
	target.call(t, "free")
	if !target.singleStepped(t) {
		t.Error("a probe on free's first instruction was not single-stepped")
	}
}
