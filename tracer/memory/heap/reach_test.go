package heap

import (
	"context"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

func findLeaks(t *testing.T, pid int) *Leaks {
	t.Helper()
	l, err := walkProcess(t, pid).Leaks(context.Background(), false)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestLeaksAreExactlyTheUnreachableBlocks(t *testing.T) {
	bin := build(t, "testdata/leaks.c")
	pid, lines := start(t, nil, bin)
	lost := map[uint64]bool{}
	for _, line := range lines {
		a, err := strconv.ParseUint(strings.TrimPrefix(line, "lost "), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		lost[a] = true
	}
	if len(lost) != 1000 {
		t.Fatalf("the program lost %d blocks, want 1000", len(lost))
	}
	l := findLeaks(t, pid)
	found := 0
	for b := range l.Each {
		if !lost[b.Addr] {
			t.Errorf("block %#x of %d bytes is reachable, but was reported", b.Addr, b.Size)
			continue
		}
		found++
	}
	if found != 1000 {
		t.Errorf("%d of 1000 unreachable blocks found", found)
	}
	if l.Direct.Blocks != 400 { // the heads of 100 chains, 299 single blocks and the mmapped one
		t.Errorf("%d direct leaks, want 400", l.Direct.Blocks)
	}
	if len(l.Blocks) != leaksListed || l.Blocks[0].Size < 3000000 {
		t.Errorf("largest leaks: %+v", l.Blocks)
	}
	if in := walkProcess(t, pid).Total().InUse.Blocks; in < 100000 {
		t.Errorf("%d blocks in use, want 101,000 or so", in)
	}
}

// A dump of the heap alone has no stacks: what they hold must not pass for a leak without a word.
func TestLeaksOfPartialDumpAreMarked(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/leaks.c"))
	for _, tt := range []struct {
		name   string
		ranges memory.Selection
		notes  int
	}{
		{"heap only", memory.Selection{Heap: true}, 2}, // no threads are known either
		{"everything", memory.Selection{All: true}, 1},
	} {
		path := filepath.Join(t.TempDir(), "dump")
		if _, err := (memory.FS{}).Dump(context.Background(), pid, path, memory.DumpOptions{Selection: tt.ranges}); err != nil {
			t.Fatal(err)
		}
		img, err := memory.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		r, err := Inspect(context.Background(), img, InspectOptions{Reachable: true})
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Leaks.Notes) != tt.notes {
			t.Errorf("%s: notes %q, want %d", tt.name, r.Leaks.Notes, tt.notes)
		}
		if r.Leaks.Unreachable.Blocks < 1000 && tt.notes == 2 {
			t.Errorf("%s: %d unreachable blocks", tt.name, r.Leaks.Unreachable.Blocks)
		}
	}
}

var lsanSummary = regexp.MustCompile(`SUMMARY: LeakSanitizer: \d+ byte\(s\) leaked in (\d+) allocation\(s\)`)

// LeakSanitizer must say the same about the same program.
func TestLeaksAgreeWithLeakSanitizer(t *testing.T) {
	sanitized := build(t, "testdata/leaks.c", "-fsanitize=leak")
	out, _ := exec.Command(sanitized, "exit").CombinedOutput()
	m := lsanSummary.FindSubmatch(out)
	if m == nil {
		t.Fatalf("no summary of LeakSanitizer in %d bytes of output", len(out))
	}
	want, _ := strconv.ParseUint(string(m[1]), 10, 64)
	pid, _ := start(t, nil, build(t, "testdata/leaks.c"))
	if l := findLeaks(t, pid); l.Unreachable.Blocks != want {
		t.Errorf("%d unreachable blocks, LeakSanitizer has %d", l.Unreachable.Blocks, want)
	}
}
