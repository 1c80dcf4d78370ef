package heap

import (
	"context"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile/content"
)

func findJemalloc(t *testing.T) string {
	t.Helper()
	for _, pattern := range []string{"/usr/lib/*/libjemalloc.so.2", "/usr/lib64/libjemalloc.so.2"} {
		if found, _ := filepath.Glob(pattern); len(found) > 0 {
			return found[0]
		}
	}
	t.Skip("needs libjemalloc2")
	return ""
}

func TestWalkOfJemallocEqualsItsStatistics(t *testing.T) {
	lib := findJemalloc(t)
	pid, lines := start(t, []string{"LD_PRELOAD=" + lib}, build(t, "testdata/jemalloc.c"))
	var want uint64
	if _, err := fmt.Sscanf(lines[0], "allocated %d", &want); err != nil {
		t.Fatalf("%q: %v", lines, err)
	}
	r, err := Inspect(context.Background(), openProcess(t, pid), InspectOptions{Live: true, Reachable: true, Threads: LiveThreads(pid)})
	if err != nil {
		t.Fatal(err)
	}
	if r.Heap == nil || r.Heap.Allocator != "jemalloc 5.3" {
		t.Fatalf("found %+v", r.Heap)
	}
	if got := r.Total.InUse.Bytes + r.Total.Tcache.Bytes; got != want || !r.Exact {
		t.Errorf("%d bytes in use or cached, jemalloc says %d; problems %v", got, want, r.Heap.Problems)
	}
	if r.Total.Tcache.Blocks < 60 {
		t.Errorf("%d blocks in threads' caches, want some from each of 4", r.Total.Tcache.Blocks)
	}
	// The 66,668 blocks that were not freed, and none of those that wait in a cache.
	if got := counts(r.Groups, content.JSON)["{leak}"]; got != 66668 {
		t.Errorf("%d blocks with JSON in use, want 66,668", got)
	}
	if r.Leaks.Unreachable.Blocks > 0 { // blocks of 8 bytes are only counted
		t.Errorf("%d blocks unreachable, want none: %+v", r.Leaks.Unreachable.Blocks, r.Leaks.Blocks)
	}
}

func FuzzParseExtent(f *testing.F) {
	b := make([]byte, jeRecord)
	binary.LittleEndian.PutUint64(b, 1<<12|3<<20)
	binary.LittleEndian.PutUint64(b[8:], 0x7f0000001000)
	binary.LittleEndian.PutUint64(b[16:], 0x3000)
	f.Add(b, uint64(1))
	f.Fuzz(func(t *testing.T, b []byte, word uint64) {
		if len(b) < jeRecord {
			return
		}
		e := parseExtent(b)
		if !e.plausible(word) || e.size > 1<<24 {
			return
		}
		h := &Heap{space: &Space{Mem: &fakeMemory{}}}
		j := &jeWalker{h: h, space: h.space, arenas: map[int]int{}, classes: map[*segment]int{}}
		j.extent(&e)
		for b := range h.Blocks {
			if b.Addr < e.addr || b.Addr+b.Size > e.addr+e.size {
				t.Fatalf("block %+v is outside of its extent %+v", b, e)
			}
		}
	})
}
