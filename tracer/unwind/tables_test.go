package unwind

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/unwind/internal/ehframe"
)

func newTables(t *testing.T, rows, slots uint32, opts *Options) *Tables {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root to create BPF maps")
	}
	if err := rlimit.RemoveMemlock(); err != nil {
		t.Log(err)
	}
	array := func(size uintptr, n uint32) *ebpf.Map {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: uint32(size), MaxEntries: n, Flags: unix.BPF_F_MMAPABLE})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	tables, err := New(Maps{array(unsafe.Sizeof(ehframe.Row{}), rows), array(unsafe.Sizeof(ehframe.Rule{}), maxRules),
		array(unsafe.Sizeof(bpfSlot{}), slots), array(4, maxBins)}, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 2 { // the second one does nothing
			if err := tables.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return tables
}

// sleeper is a process that waits for its input to end.
func sleeper(t *testing.T, exe string) int {
	t.Helper()
	cmd := exec.Command(exe)
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
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	return cmd.Process.Pid
}

// program builds a static program with n functions of its own: its table has some 12 rows for each.
func program(t *testing.T, n int) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("#include <stdio.h>\n#include <stdlib.h>\n")
	for i := range n {
		fmt.Fprintf(&b, "void *f%d(int n) { char a[99]; for (int i = 0; i < 99; i++) a[i] = n * %d; void *p = malloc(a[n & 63]); return p; }\n", i, i)
	}
	b.WriteString("int main(void) { puts(\"ready\"); fflush(stdout); return getchar() != EOF; }\n")
	dir := t.TempDir()
	source, exe := filepath.Join(dir, "p.c"), filepath.Join(dir, fmt.Sprintf("p%d", n))
	if err := os.WriteFile(source, []byte(b.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-O2", "-static", "-o", exe, source).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	return exe
}

func publish(t *testing.T, tables *Tables, pid int) *Space {
	t.Helper()
	s, err := tables.Publish(pid)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestLayoutIsTheBPFPrograms(t *testing.T) {
	for _, tt := range []struct {
		name      string
		here, bpf uintptr
	}{
		{"row", unsafe.Sizeof(ehframe.Row{}), unsafe.Sizeof(bpf.CurrentUnwindRow{})},
		{"rule", unsafe.Sizeof(ehframe.Rule{}), unsafe.Sizeof(bpf.CurrentUnwindRule{})},
		{"slot", unsafe.Sizeof(bpfSlot{}), unsafe.Sizeof(bpf.CurrentUnwindSlot{})},
		{"mappings in a slot", unsafe.Offsetof(bpfSlot{}.M), unsafe.Offsetof(bpf.CurrentUnwindSlot{}.M)},
		{"rows of a mapping", unsafe.Offsetof(bpfMapping{}.Rows), unsafe.Offsetof(bpf.CurrentUnwindSlot{}.M[0].Nrows)},
		{"flags of a mapping", unsafe.Offsetof(bpfMapping{}.Flags), unsafe.Offsetof(bpf.CurrentUnwindSlot{}.M[0].Flags)},
		{"second parameter of a rule", unsafe.Offsetof(ehframe.Rule{}.AuxParam), unsafe.Offsetof(bpf.CurrentUnwindRule{}.AuxParam)},
	} {
		if tt.here != tt.bpf {
			t.Errorf("%s: %d here, %d in bpf/unwind.h", tt.name, tt.here, tt.bpf)
		}
	}
}

func TestEndReasonsAreTheBPFPrograms(t *testing.T) {
	spec, err := bpf.LoadCurrent()
	if err != nil {
		t.Fatal(err)
	}
	var ends *btf.Enum
	if err := spec.Types.TypeByName("unwind_end", &ends); err != nil {
		t.Fatal(err)
	}
	names := map[string]End{"END_NONE": None, "END_COMPLETE": Complete, "END_DEPTH": Depth, "END_NOMAP": NoMapping,
		"END_NOTABLE": NoTable, "END_NOROW": NoRow, "END_INVALID": Invalid, "END_READ": BadRead, "END_LEAF": Leaf,
		"END_TRAMPOLINE": Trampoline, "END_ZERO": Zero, "END_BACKWARDS": Backwards, "END_JIT": JIT,
		"END_DISTURBED": Disturbed, "END_NOUSER": NoUser, "END_COUNT": endCount}
	for _, v := range ends.Values {
		if e, ok := names[v.Name]; !ok || uint64(e) != v.Value {
			t.Errorf("%s is %d, here %d", v.Name, v.Value, e)
		}
	}
	if len(ends.Values) != len(names) {
		t.Errorf("%d reasons, here %d", len(ends.Values), len(names))
	}
	for e := range endCount {
		if e.String() == "" || !e.Whole() && (&Space{}).Describe(e, 9, 1) == "" {
			t.Errorf("reason %d has no name or text", e)
		}
	}
}

func TestProcessesShareTheTablesOfAFile(t *testing.T) {
	tables := newTables(t, 1<<20, 8, nil)
	exe := program(t, 3)
	first := publish(t, tables, sleeper(t, exe))
	rows := tables.Stats().Rows
	second := publish(t, tables, sleeper(t, exe))
	copied := filepath.Join(t.TempDir(), "copy")
	b, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, b, 0o700); err != nil {
		t.Fatal(err)
	}
	third := publish(t, tables, sleeper(t, copied)) // another inode with the same build-id
	st := tables.Stats()
	if rows == 0 || st.Rows != rows {
		t.Errorf("%d rows for one process, %d for three", rows, st.Rows)
	}
	if first.Slot == second.Slot || st.Slots != 3 {
		t.Errorf("slots %d and %d, %d in use", first.Slot, second.Slot, st.Slots)
	}
	for _, s := range []*Space{first, second, third} {
		slot := at[bpfSlot](tables.slots, s.Slot)
		if int(slot.N) != len(s.Mappings) || slot.M[0].Rows == 0 || slot.M[0].Row0 != at[bpfSlot](tables.slots, 0).M[0].Row0 {
			t.Errorf("slot %d: %+v", s.Slot, slot.M[:slot.N])
		}
		if id := s.Mappings[0].BuildID(); len(id) != 40 {
			t.Errorf("build-id %q", id)
		}
	}
	if filepath.Base(third.Mappings[0].Path) != "copy" {
		t.Errorf("path %s", third.Mappings[0].Path)
	}
}

func TestReleasedSlotsAreReusedWithANewGeneration(t *testing.T) {
	tables := newTables(t, 1<<20, 1, nil)
	pid := sleeper(t, program(t, 1))
	s := publish(t, tables, pid)
	gen := at[bpfSlot](tables.slots, 0).Gen
	if _, err := tables.Publish(pid); !errors.Is(err, ErrSlots) {
		t.Errorf("a second process in one slot: %v", err)
	}
	child := tables.Share(s, pid)
	tables.Release(s)
	if now := at[bpfSlot](tables.slots, 0).Gen; now != gen {
		t.Errorf("the generation moved from %d to %d under a child that still uses the slot", gen, now)
	}
	tables.Release(child)
	tables.Release(child) // once too often does nothing
	if now := at[bpfSlot](tables.slots, 0).Gen; now == gen {
		t.Error("released, but of the same generation")
	}
	again := publish(t, tables, pid)
	if again.Slot != 0 || tables.Stats().Slots != 1 {
		t.Errorf("%+v", tables.Stats())
	}
	if m, ok := s.Find(s.Mappings[0].Start); !ok || m.Path == "" {
		t.Error("a released space forgot its mappings")
	}
}

func TestUnusedTablesMakeRoomForNewOnes(t *testing.T) {
	small, big := program(t, 10), program(t, 400)
	probe := newTables(t, 1<<20, 8, nil)
	s := publish(t, probe, sleeper(t, small))
	vdso := int(at[bpfSlot](probe.slots, s.Slot).M[slices.IndexFunc(s.Mappings, func(m Mapping) bool { return m.Path == "[vdso]" })].Rows)
	rows := uint32(probe.Stats().Rows)
	publish(t, probe, sleeper(t, big))
	both := uint32(probe.Stats().Rows)

	tables := newTables(t, both-uint32(vdso)-1, 8, nil)
	pid := sleeper(t, small)
	first := publish(t, tables, pid)
	if got := tables.Stats().Rows; uint32(got) != rows {
		t.Fatalf("%d rows, want %d", got, rows)
	}
	tables.Release(first)
	second := publish(t, tables, sleeper(t, big))
	st := tables.Stats()
	if !slices.Contains(st.Evicted, "p10") || second.Mappings[0].NoTable() != "" {
		t.Errorf("evicted %v; new table: %q", st.Evicted, second.Mappings[0].NoTable())
	}
	if got, want := first.Describe(NoTable, 2, first.Mappings[0].Start+1), "[truncated: no room for the unwind table of p10, raise --max-table-mb]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestTheLeastUsedTableGoesFirstAndLeavesLiveSlots(t *testing.T) {
	hot, cold, late := program(t, 50), program(t, 60), program(t, 40)
	probe := newTables(t, 1<<20, 8, nil)
	publish(t, probe, sleeper(t, hot))
	publish(t, probe, sleeper(t, cold))
	two := uint32(probe.Stats().Rows)

	tables := newTables(t, two+16, 8, nil)
	hotSpace, coldSpace := publish(t, tables, sleeper(t, hot)), publish(t, tables, sleeper(t, cold))
	// as the walker counts
	tables.use.word(hotSpace.Mappings[0].bin.id, 0).Store(1000)
	tables.use.word(coldSpace.Mappings[0].bin.id, 0).Store(3)
	coldSlot := at[bpfSlot](tables.slots, coldSpace.Slot)
	gen := coldSlot.Gen
	lateSpace := publish(t, tables, sleeper(t, late))
	if got := tables.Stats().Evicted; len(got) == 0 || !slices.Contains(got, "p60") || slices.Contains(got, "p50") {
		t.Errorf("evicted %v, want p60", got)
	}
	if coldSlot.M[0].Rows != 0 || coldSlot.Gen == gen {
		t.Errorf("the slot still points to %d rows of generation %d", coldSlot.M[0].Rows, coldSlot.Gen)
	}
	if lateSpace.Mappings[0].NoTable() != "" || hotSpace.Mappings[0].NoTable() != "" {
		t.Errorf("%+v", tables.Stats())
	}
}

func TestATableThatDoesNotFitAtAllLeavesTheOthers(t *testing.T) {
	tables := newTables(t, 4096, 8, nil)
	s := publish(t, tables, sleeper(t, program(t, 2)))
	st := tables.Stats()
	if s.Mappings[0].NoTable() != reasonFull || len(st.Missing) != 1 || st.Files != 1 {
		t.Errorf("%q, %+v", s.Mappings[0].NoTable(), st)
	}
}

func TestATableThatTakesLongComesIntoTheLiveSlot(t *testing.T) {
	tables := newTables(t, 1<<20, 8, &Options{Wait: time.Nanosecond})
	pid := sleeper(t, program(t, 300))
	s, err := tables.Refresh(&Space{PID: pid})
	if err != nil {
		t.Fatal(err)
	}
	<-s.Mappings[0].bin.done
	slot := at[bpfSlot](tables.slots, s.Slot)
	if slot.M[0].Rows == 0 || slot.M[0].Bias != s.Mappings[0].Start-s.Mappings[0].Offset && slot.M[0].Bias != 0 {
		t.Errorf("%+v", slot.M[0])
	}
}

func TestManyGoroutinesMayAsk(t *testing.T) {
	tables := newTables(t, 1<<15, 16, nil)
	var pids []int
	for i := range 4 {
		pids = append(pids, sleeper(t, program(t, 100+i)))
	}
	pids = append(pids, os.Getpid(), 1<<30) // one without tables of ours, one that does not exist
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			for j := range 12 {
				s, err := tables.Publish(pids[(i+j)%len(pids)])
				if err != nil {
					continue
				}
				if child := tables.Share(s, 1); child != nil {
					tables.Release(child)
				}
				if next, err := tables.Refresh(s); err == nil && next != s {
					tables.Release(next)
				}
				s.Describe(NoTable, 1, s.Mappings[0].Start+1)
				tables.Stats()
				tables.Release(s)
			}
		})
	}
	wg.Wait()
	if got := tables.Stats().Slots; got != 0 {
		t.Errorf("%d slots in use after all were released", got)
	}
}

func TestAClosedTablesRefuses(t *testing.T) {
	tables := newTables(t, 1<<15, 2, nil)
	if err := tables.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := tables.Publish(os.Getpid()); !errors.Is(err, ErrClosed) {
		t.Errorf("%v", err)
	}
}

func TestWrongMapsAreRefused(t *testing.T) {
	tables := newTables(t, 1<<15, 2, nil)
	_ = tables
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if _, err := New(Maps{m, m, m, m}, nil); err == nil {
		t.Error("maps that cannot be mapped pass")
	}
}
