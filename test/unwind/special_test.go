package unwindtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf/link"

	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// name renders the file of each frame, or the mark, for comparisons that do not depend on addresses.
func files(e *ProbeEvent, s *unwind.Space) []string {
	var names []string
	for _, f := range frames(e) {
		addr, mark := unwind.Frame(f)
		m, ok := s.Find(addr)
		switch {
		case mark != "":
			names = append(names, mark)
		case !ok:
			names = append(names, "?")
		case m.Path == "":
			names = append(names, "anonymous")
		default:
			names = append(names, filepath.Base(m.Path))
		}
	}
	return slices.Compact(names)
}

func describe(e *ProbeEvent, s *unwind.Space) string {
	last := uint64(0)
	if e.N > 0 {
		last = frames(e)[e.N-1]
	}
	return s.Describe(unwind.End(e.End), int(e.N), last)
}

func TestReturnProbesOfOtherToolsDoNotCutStacks(t *testing.T) {
	w := newWalker(t, options{})
	exe := build(t, "deep.c")
	p := start(t, exe, "13")
	s := w.publish(t, p.pid)
	c := libc(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, c, "malloc")
	want := plain(w.sample(t, 1)[0])
	for file, function := range map[string]string{exe: "grow", c: "malloc"} {
		f, err := link.OpenExecutable(file)
		if err != nil {
			t.Fatal(err)
		}
		l, err := f.Uretprobe(function, w.objs.OnReturn, &link.UprobeOptions{PID: p.pid})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	for _, e := range w.sample(t, 101)[50:] { // the first ones were on their way before the return probes
		if got := plain(e); !slices.Equal(got, want) || unwind.End(e.End) != unwind.Complete {
			t.Fatalf("%s\nwithout return probes: %#x", render(e, s), want)
		}
	}
}

func TestDepthIsBoundedAndSaid(t *testing.T) {
	w := newWalker(t, options{maxFrames: 128})
	p := start(t, build(t, "deep.c"), "397")
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	e := w.sample(t, 1)[0]
	if unwind.End(e.End) != unwind.Depth || e.N != 128 {
		t.Errorf("%d frames, %s", e.N, unwind.End(e.End))
	}
	if got, want := describe(e, s), "[truncated: more than 128 frames]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// bareLibrary builds the library without any unwind table.
func bareLibrary(t *testing.T) string {
	return compile(t, "bare.c", filepath.Join(t.TempDir(), "libbare.so"), "-shared", "-fPIC", "-fno-asynchronous-unwind-tables", "-fno-unwind-tables")
}

func TestLibrariesWithoutTablesCutTheStackAndAreNamed(t *testing.T) {
	w := newWalker(t, options{})
	lib := bareLibrary(t)
	p := start(t, build(t, "loads.c"), lib)
	fmt.Fprintln(p.in)
	p.expect(t, "loaded")
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	w.set(t, w.objs.Armed, 1)
	fmt.Fprintln(p.in)
	e := w.next(t, patience)
	if e == nil {
		t.Fatal("no stack")
	}
	if got, want := files(e, s), []string{"libc.so.6", "libbare.so"}; !slices.Equal(got, want) || e.N != 2 {
		t.Errorf("%v", got)
	}
	if got, want := describe(e, s), "[truncated: no unwind table for libbare.so]"; got != want {
		t.Errorf("%s (%s), want %s", got, unwind.End(e.End), want)
	}
}

func TestLibrariesLoadedLaterAreFoundByRefresh(t *testing.T) {
	w := newWalker(t, options{})
	lib := compile(t, "bare.c", filepath.Join(t.TempDir(), "liblate.so"), "-shared", "-fPIC")
	p := start(t, build(t, "loads.c"), lib)
	s := w.publish(t, p.pid)
	fmt.Fprintln(p.in)
	p.expect(t, "loaded")
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	w.set(t, w.objs.Armed, 1)
	fmt.Fprintln(p.in)
	before := w.next(t, patience)
	// The probed function's own caller is sure, mapping or not: it stays as a frame.
	if before == nil || unwind.End(before.End) != unwind.NoMapping || before.N != 2 || before.Frames[1] != before.MissingPc {
		t.Fatalf("%+v", before)
	}
	after, err := w.tables.Refresh(s)
	if err != nil {
		t.Fatal(err)
	}
	if after == s {
		t.Fatal("refresh saw no new mapping")
	}
	if m, ok := after.Find(before.MissingPc); !ok || filepath.Base(m.Path) != "liblate.so" {
		t.Errorf("missing pc %#x is in %+v", before.MissingPc, m)
	}
	w.show(t, after)
	w.tables.Release(s)
	w.set(t, w.objs.Armed, 1)
	fmt.Fprintln(p.in)
	e := w.next(t, patience)
	if e == nil || unwind.End(e.End) != unwind.Complete {
		t.Fatalf("after refresh: %s", render(e, after))
	}
	if got := files(e, after)[1]; got != "liblate.so" {
		t.Errorf("malloc's caller is in %s", got)
	}
	same, err := w.tables.Refresh(after)
	if err != nil || same != after {
		t.Errorf("a second refresh made another slot: %v", err)
	}
}

func TestExecutedProgramsGetMappingsOfTheirOwn(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, "/bin/sh", "-c", "echo ready; read x; exec "+build(t, "deep.c")+" 7")
	s := w.publish(t, p.pid)
	fmt.Fprintln(p.in)
	p.expect(t, "ready")
	after, err := w.tables.Refresh(s)
	if err != nil || after == s {
		t.Fatalf("no new mappings after exec: %v", err)
	}
	w.show(t, after)
	w.tables.Release(s)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	e := w.sample(t, 1)[0]
	if got, want := files(e, after), []string{"libc.so.6", "deep", "libc.so.6", "deep"}; !slices.Equal(got, want) {
		t.Errorf("%v\n%s", got, render(e, after))
	}
	// what lay where the new program has nothing can still be asked for
	if m, ok := after.Find(s.Mappings[0].Start); !ok || m.Path == "" {
		t.Errorf("the shell's mapping is forgotten: %+v", after.Gone)
	}
}

func TestCompiledCodeWithFramePointersIsCrossed(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, build(t, "jit.c"), "fp")
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	e := w.sample(t, 1)[0]
	want := []string{"libc.so.6", "jit", "anonymous", "jit", "libc.so.6", "jit"}
	if got := files(e, s); !slices.Equal(got, want) || unwind.End(e.End) != unwind.Complete {
		t.Errorf("%v\n%s", got, render(e, s))
	}
}

func TestCompiledCodeWithoutFramePointersCutsTheStack(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, build(t, "jit.c"), "none")
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	e := w.sample(t, 1)[0]
	if got, want := files(e, s), []string{"libc.so.6", "jit", "anonymous"}; !slices.Equal(got, want) || e.N != 3 {
		t.Errorf("%v\n%s", got, render(e, s))
	}
	if got, want := describe(e, s), "[truncated: just-in-time compiled code]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestCompiledLuaIsCrossed(t *testing.T) {
	const libluajit = "/usr/lib/x86_64-linux-gnu/libluajit-5.1.so.2"
	if _, err := os.Stat(libluajit); err != nil {
		t.Skip("needs libluajit2-5.1-2: ", err)
	}
	w := newWalker(t, options{})
	made := compile(t, "luamade.c", filepath.Join(t.TempDir(), "libluamade.so"), "-shared", "-fPIC")
	exe := build(t, "lua.c")
	p := start(t, exe, libluajit, made)
	w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, made, "lua_made")

	// the compiled code may have been mapped, or been writable, since: read again as the tracer does on unknown addresses
	s := w.publish(t, p.pid)
	e := w.sample(t, 1)[0]
	want := []string{"libluamade.so", "[LuaJIT]", "libluajit-5.1.so.2.1.0", "lua", "libc.so.6", "lua"}
	for range 20 {
		if slices.Equal(files(e, s), want) {
			break
		}
		s = w.publish(t, p.pid)
		e = w.sample(t, 1)[0]
	}
	whole := 0
	events := w.sample(t, 211)
	for _, e := range events {
		if got := files(e, s); unwind.End(e.End).Whole() && slices.Equal(got, want) {
			whole++
		}
	}
	if whole < 200 {
		t.Errorf("%d of %d stacks reach main\n%s", whole, len(events), render(events[0], s))
	}
}

func TestSystemCallsUnwindFromTheirUserRegisters(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, build(t, "maps.c"))
	s := w.publish(t, p.pid)
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sys_exit", Program: w.objs.OnSyscall})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	w.oracle(t, 10, 3, s)
	w.complete(t, s)
}

func TestCoroutinesWithASuccessorEndInAMarkedCut(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, build(t, "linked.c"))
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	for _, e := range w.sample(t, 7) {
		if got, want := files(e, s), []string{"libc.so.6", "linked", "libc.so.6"}; !slices.Equal(got, want) || e.N != 3 {
			t.Errorf("%s", render(e, s))
		}
		if got, want := describe(e, s), "[truncated: address in no known mapping]"; got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

func TestChildrenShareTheirParentsMappings(t *testing.T) {
	for _, way := range []string{"fork", "vfork"} {
		t.Run(way, func(t *testing.T) {
			w := newWalker(t, options{})
			p := start(t, build(t, "children.c"), way)
			line, err := p.out.ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(strings.TrimSpace(line))
			if err != nil {
				t.Fatal(err)
			}
			parent := w.publish(t, p.pid)
			s := w.tables.Share(parent, pid)
			w.tables.Release(parent)
			w.show(t, s)
			w.attach(t, w.objs.OnUprobe, pid, libc(t, pid), "malloc")
			w.set(t, w.objs.Armed, 1)
			fmt.Fprintln(p.in)
			e := w.next(t, patience)
			if e == nil {
				t.Fatal("no stack")
			}
			if got, want := files(e, s), []string{"libc.so.6", "children", "libc.so.6", "children"}; !slices.Equal(got, want) ||
				unwind.End(e.End) != unwind.Complete {
				t.Errorf("%s", render(e, s))
			}
		})
	}
}

// Debian's musl has no tables itself: the allocator is left by the entry rule, the frames of the program are right, and
// the cut comes where the library called main.
func TestMuslProgramsKeepTheirFramesAndCutAtTheLibrary(t *testing.T) {
	for name, flags := range map[string][]string{"dynamic": nil, "static": {"-static"}} {
		t.Run(name, func(t *testing.T) {
			exe := buildWith(t, "musl-gcc", "deep.c", append(flags, "-fasynchronous-unwind-tables", "-Wl,--eh-frame-hdr", "-g")...)
			w := newWalker(t, options{})
			p := start(t, exe, "13")
			s := w.publish(t, p.pid)
			file := exe
			if flags == nil {
				file = mapped(t, p.pid, "libc.so")
			}
			w.attach(t, w.objs.OnEntry, p.pid, file, "malloc")
			e := w.sample(t, 1)[0]
			var names []string
			for _, f := range frames(e) {
				addr, _ := unwind.Frame(f)
				m, _ := s.Find(addr)
				if filepath.Base(m.Path) == "deep" {
					names = append(names, function(t, exe, addr-m.Start+m.Offset))
				}
			}
			names = slices.Compact(names)
			names[0] = strings.TrimPrefix(names[0], "default_") // an alias
			want := []string{"malloc", "grow", "main"}
			if flags == nil {
				want = want[1:]
			}
			if len(names) < len(want) || !slices.Equal(names[:len(want)], want) || e.N < 16 {
				t.Errorf("%v, want %v\n%s", names, want, render(e, s))
			}
			if unwind.End(e.End) != unwind.NoRow && unwind.End(e.End) != unwind.NoTable {
				t.Errorf("ends with %s", unwind.End(e.End))
			}
		})
	}
}

func TestEqualStacksHaveEqualHashes(t *testing.T) {
	w := newWalker(t, options{})
	p := start(t, build(t, "cxx.cc"))
	w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, libc(t, p.pid), "malloc")
	hashes := map[string]uint64{}
	stacks := map[uint64]string{}
	for _, e := range w.sample(t, 499) {
		key := fmt.Sprint(e.End, frames(e))
		if h, ok := hashes[key]; ok && h != e.Hash {
			t.Errorf("hashes %#x and %#x of %s", h, e.Hash, key)
		}
		if k, ok := stacks[e.Hash]; ok && k != key {
			t.Errorf("hash %#x of %s and %s", e.Hash, k, key)
		}
		hashes[key], stacks[e.Hash] = e.Hash, key
	}
	if len(stacks) < 20 {
		t.Errorf("only %d different stacks", len(stacks))
	}
}

// A probe's program may be preempted. With scratch of their own, threads do not write into each other's stacks: each of
// these has one stack only. (Scratch per CPU, before 5.13, finds out and drops most of it.)
func TestThreadsDoNotDisturbEachOthersStacks(t *testing.T) {
	w := newWalker(t, options{})
	exe := build(t, "threads.c", "-static", "-pthread")
	p := start(t, exe)
	s := w.publish(t, p.pid)
	w.attach(t, w.objs.OnUprobe, p.pid, exe, "malloc")
	const rounds, n = 5, 499 // a round fits into the ring buffer
	stacks := map[uint32]uint64{}
	disturbed := 0
	for range rounds {
		for i, e := range w.sample(t, n) {
			end := unwind.End(e.End)
			if end == unwind.Disturbed {
				disturbed++
				continue
			}
			if end != unwind.Complete {
				t.Fatalf("event %d: %s", i, render(e, s))
			}
			first, ok := stacks[uint32(e.PidTgid)]
			if ok && first != e.Hash {
				t.Fatalf("event %d of thread %d has another stack: %s", i, uint32(e.PidTgid), render(e, s))
			}
			stacks[uint32(e.PidTgid)] = e.Hash
		}
	}
	t.Logf("%d threads, %d stacks dropped as disturbed", len(stacks), disturbed)
	if !w.legacy && disturbed > 0 {
		t.Errorf("%d of %d stacks were disturbed", disturbed, rounds*n)
	}
}
