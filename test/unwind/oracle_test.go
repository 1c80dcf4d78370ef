package unwindtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// TestStacksEqualTheOracles stops programs at sampled allocations and has eu-stack walk the same stack.
func TestStacksEqualTheOracles(t *testing.T) {
	for _, tt := range []struct {
		name  string
		start func(t *testing.T) *target
		every uint32
	}{
		{"python with JSON, SQLite and TLS", func(t *testing.T) *target {
			return start(t, "/usr/bin/python3", "testdata/work.py")
		}, 97},
		{"C++ with exceptions, maps and virtual calls", func(t *testing.T) *target {
			return start(t, build(t, "cxx.cc"))
		}, 31},
		{"deep recursion without frame pointers", func(t *testing.T) *target {
			return start(t, build(t, "deep.c"), "397")
		}, 3},
		{"a signal handler on a stack of its own", func(t *testing.T) *target {
			return start(t, build(t, "sigalt.c"))
		}, 3},
		{"nginx with TLS and gzip", func(t *testing.T) *target { return startNginx(t) }, 17},
		{"clang compiling C++", func(t *testing.T) *target { return startClang(t) }, 199},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWalker(t, options{})
			p := tt.start(t)
			s := w.publish(t, p.pid)
			w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
			if p.begin != nil {
				p.begin()
			}
			w.oracle(t, 20, tt.every, s)
			w.complete(t, s)
		})
	}
}

// startClang waits for a source file on standard input, by when all its libraries are in place.
func startClang(t testing.TB) *target {
	p := startQuiet(t, "clang++", "-x", "c++", "-O1", "-std=c++17", "-S", "-o", os.DevNull, "-")
	waitReading(t, p.pid)
	p.begin = func() {
		fmt.Fprintln(p.in, "#include <map>\n#include <string>\n#include <regex>\n#include <iostream>")
		for i := range 40 {
			fmt.Fprintf(p.in, "std::map<std::string, std::vector<int>> m%d; bool f%d(std::string s) { m%d[s].push_back(%d); return std::regex_match(s, std::regex(\"a%d\")); }\n", i, i, i, i, i)
		}
		p.in.Close()
	}
	return p
}

// waitReading waits until a process sleeps in a read of its standard input.
func waitReading(t testing.TB, pid int) {
	t.Helper()
	want := fmt.Sprintf("%d 0x0 ", syscall.SYS_READ)
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/syscall", pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(string(b), want) {
			return
		}
	}
	t.Fatalf("process %d does not read its input", pid)
}

// inProcess runs backtrace.c in one of its ways and compares each stack with _Unwind_Backtrace's.
func inProcess(t *testing.T, exe, way string, n int) {
	t.Helper()
	w := newWalker(t, options{})
	p := start(t, exe, way)
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, exe, "probed")
	w.set(t, w.objs.Armed, uint32(n))
	cut := map[unwind.End]int{}
	for i := range n {
		want := p.backtrace(t)
		e := w.next(t, patience)
		if e == nil {
			t.Fatalf("no stack for call %d", i)
		}
		end := unwind.End(e.End)
		got := plain(e)[min(2, int(e.N)):] // the probed function, and its caller, which is at another line there
		if !end.Whole() {
			cut[end]++
			want = want[:min(len(want), len(got))]
		}
		if !slices.Equal(got, want) {
			t.Fatalf("call %d: %s\n_Unwind_Backtrace: %#x", i, render(e, s), want)
		}
	}
	t.Logf("%d stacks equal to _Unwind_Backtrace's; cut: %v", n, cut)
	for end := range cut {
		// a static program's stubs for indirect functions have no unwind information
		if end != unwind.Invalid && end != unwind.Leaf && end != unwind.NoRow {
			t.Errorf("a stack was cut: %s", end)
		}
	}
	if way != "interrupted" && len(cut) > 0 {
		t.Errorf("stacks were cut: %v", cut)
	}
}

func (p *target) backtrace(t testing.TB) []uint64 {
	t.Helper()
	fmt.Fprintln(p.in)
	line, err := p.out.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pcs []uint64
	for _, f := range strings.Fields(line) {
		pc, err := strconv.ParseUint(f, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		pcs = append(pcs, pc)
	}
	return pcs
}

func TestStacksEqualUnwindBacktraces(t *testing.T) {
	for _, tt := range []struct {
		name, way string
		n         int
		flags     []string
	}{
		{"nested calls", "plain", 23, nil},
		{"a callback of the C library", "qsort", 23, nil},
		{"after longjmp", "longjmp", 23, nil},
		{"a coroutine made by swapcontext", "swapcontext", 23, nil},
		{"after vfork", "vfork", 23, nil},
		{"interrupted anywhere by a signal", "interrupted", 301, nil},
		{"code built with -fcf-protection, nested calls", "plain", 23, []string{"-fcf-protection=full", "-Wl,-z,ibtplt"}},
		{"code built with -fcf-protection, interrupted", "interrupted", 301, []string{"-fcf-protection=full", "-Wl,-z,ibtplt", "-Wl,-z,lazy"}},
		{"a static position-independent program", "plain", 23, []string{"-static-pie"}},
		{"a static program, interrupted", "interrupted", 301, []string{"-static"}},
		{"frame pointers kept", "plain", 23, []string{"-fno-omit-frame-pointer"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			inProcess(t, build(t, "backtrace.c", tt.flags...), tt.way, tt.n)
		})
	}
}

func TestFilesWithoutSectionHeadersUnwindAllTheSame(t *testing.T) {
	full := build(t, "backtrace.c")
	at := symbol(t, full, "probed")
	bare := filepath.Join(t.TempDir(), "bare")
	dropSections(t, full, bare)

	w := newWalker(t, options{})
	p := start(t, bare, "plain")
	s := w.publish(t, p.pid)
	w.attachAt(t, w.objs.OnUprobe, p.pid, bare, at)
	w.set(t, w.objs.Armed, 1)
	want := p.backtrace(t)
	e := w.next(t, patience)
	if e == nil {
		t.Fatal("no stack")
	}
	if got := plain(e)[2:]; !slices.Equal(got, want) || unwind.End(e.End) != unwind.Complete {
		t.Errorf("%s\n_Unwind_Backtrace: %#x", render(e, s), want)
	}
}
