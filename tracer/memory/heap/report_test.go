package heap

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

func openProcess(t *testing.T, pid int) *memory.Process {
	t.Helper()
	p, err := memory.OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

func counts(groups []content.Group, kind content.Kind) map[string]uint64 {
	m := map[string]uint64{}
	for _, g := range groups {
		if g.Kind == kind {
			m[g.Detail] = g.Count
		}
	}
	return m
}

func TestInspectNamesShapesAndClasses(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	r, err := Inspect(context.Background(), openProcess(t, pid), InspectOptions{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(map[string]uint64{
		"shop::Item": 103, "shop::Box<double>": 59, "(anonymous namespace)::Hidden": 31,
	}, counts(r.Groups, content.Object)); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff(map[string]uint64{"{uid, token, payload}": 1009}, counts(r.Groups, content.JSON)); d != "" {
		t.Error(d)
	}
	var blocks uint64
	for _, g := range r.Groups {
		blocks += g.Count
	}
	if want := r.Total.InUse.Blocks + r.Heap.Mmapped.Blocks; blocks != want || !r.Exact {
		t.Errorf("%d blocks in groups, %d in use; exact %v %v", blocks, want, r.Exact, r.Heap.Problems)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "s3cr3t") {
		t.Error("the report shows content")
	}
}

func TestInspectOfDumpEqualsProcess(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	path := filepath.Join(t.TempDir(), "dump")
	if _, err := (memory.FS{}).Dump(context.Background(), pid, path, memory.DumpOptions{Selection: memory.Selection{All: true}}); err != nil {
		t.Fatal(err)
	}
	img, err := memory.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	old, err := Inspect(context.Background(), img, InspectOptions{})
	if err != nil {
		t.Fatal(err)
	}
	now, err := Inspect(context.Background(), openProcess(t, pid), InspectOptions{Since: old.Heap})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(old.Groups, now.Groups); d != "" {
		t.Error(d)
	}
	if now.NewTotal.Blocks != 0 || now.Gone.Blocks != 0 {
		t.Errorf("%d new blocks, %d gone in a process at rest", now.NewTotal.Blocks, now.Gone.Blocks)
	}
}

func TestSearchFindsBlocks(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	p := openProcess(t, pid)
	h := walkProcess(t, pid)
	found := 0
	err := Search(context.Background(), p, h, regexp.MustCompile(`needle-\d+"}`), func(m Match) bool {
		if m.InBlock {
			found++
			if m.Addr < m.Block.Addr || m.Addr+uint64(m.Length) > m.Block.Addr+m.Block.Size {
				t.Errorf("match %#x is outside of %+v", m.Addr, m.Block)
			}
		}
		if got := string(m.Around[m.At:][:7]); got != "needle-" {
			t.Errorf("the match is %q", got)
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	if found != 1009 {
		t.Errorf("%d matches in blocks, want 1009", found)
	}
}

// Matches at the edge of two windows are found once.
func TestSearchAcrossWindows(t *testing.T) {
	m := &fakeMemory{}
	b := m.add(0x10000, 3*searchStep, "rw-p", "")
	for _, at := range []int{0, searchStep - 3, 2*searchStep - 6, 2 * searchStep, 3*searchStep - 6} {
		copy(b[at:], "needle")
	}
	var got []uint64
	err := Search(context.Background(), fakeImage{m}, nil, regexp.MustCompile("needle"), func(m Match) bool {
		got = append(got, m.Addr-0x10000)
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []uint64{0, searchStep - 3, 2*searchStep - 6, 2 * searchStep, 3*searchStep - 6}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// fakeImage makes an image of made-up memory.
type fakeImage struct{ *fakeMemory }

func (f fakeImage) Close() error       { return nil }
func (f fakeImage) Info() *memory.Info { return &memory.Info{} }
func (f fakeImage) Ranges() (list []memory.Range) {
	for _, r := range f.ranges {
		list = append(list, memory.Range{Start: r.Start, End: r.End, Perms: memory.Read | memory.Write, Path: r.Path})
	}
	return list
}

func (f fakeImage) Extents(start, end uint64) ([]memory.Extent, error) {
	return []memory.Extent{{Start: start, End: end}}, nil
}

func TestInspectOfProcessThatEnds(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	p := openProcess(t, pid)
	syscall.Kill(pid, syscall.SIGKILL)
	for !(memory.FS{}).State(pid).Gone() {
		time.Sleep(time.Millisecond)
	}
	if r, err := Inspect(context.Background(), p, InspectOptions{Live: true}); !errors.Is(err, memory.ErrGone) {
		t.Errorf("got %v, %v, want %v", r, err, memory.ErrGone)
	}
}

func TestInspectStopsWhenAsked(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Inspect(ctx, openProcess(t, pid), InspectOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

func TestParseSyscall(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		sp         uint64
		registers  int
	}{
		{"waiting in a call", "34 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffe0000 0x7f0000001000\n", 0x7ffe0000, 8},
		{"waiting outside of one", "-1 0x7ffe0000 0x7f0000001000\n", 0x7ffe0000, 2},
		{"running", "running\n", 0, 0},
		{"nothing", "", 0, 0},
		{"nonsense", "1 2 x 4", 0, 0},
	} {
		got := parseSyscall(tt.text)
		if got.SP != tt.sp || len(got.Registers) != tt.registers {
			t.Errorf("%s: got %+v", tt.name, got)
		}
	}
}
