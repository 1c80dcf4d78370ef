package heap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// mallinfo is what glibc itself counts.
type mallinfo struct{ arena, used, free, fastBlocks, fastBytes, mmapped, mmappedBytes uint64 }

func readMallinfo(t *testing.T, line string) (m mallinfo) {
	t.Helper()
	_, err := fmt.Sscanf(line, "arena %d uordblks %d fordblks %d smblks %d fsmblks %d hblks %d hblkhd %d",
		&m.arena, &m.used, &m.free, &m.fastBlocks, &m.fastBytes, &m.mmapped, &m.mmappedBytes)
	if err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return m
}

// compare checks a walk against what the program itself printed.
func compare(t *testing.T, h *Heap, line string) {
	t.Helper()
	want := readMallinfo(t, line)
	all := h.Total()
	got := mallinfo{
		arena: all.System, used: all.InUse.Bytes + all.Tcache.Bytes + all.Overhead,
		free: all.Free.Bytes + all.Fast.Bytes + all.Top.Bytes, fastBlocks: all.Fast.Blocks,
		fastBytes: all.Fast.Bytes, mmapped: h.Mmapped.Blocks, mmappedBytes: h.Mmapped.Bytes,
	}
	if got != want {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if !h.Exact() {
		t.Errorf("problems: %v", h.Problems)
	}
	if !strings.HasPrefix(h.Allocator, "glibc") || h.Layout != "2.27-2.41" {
		t.Errorf("found %s with the layout of %s", h.Allocator, h.Layout)
	}
}

func TestWalkEqualsMallinfo(t *testing.T) {
	bin := build(t, "testdata/heaps.c")
	for _, mode := range [][]string{
		{"small", "100003"}, {"small", "10000019"}, {"fragmented"}, {"cache"}, {"arenas", "64"}, {"bigarena"}, {"mmapped"}, {"foreign"}, {"nobrk"}, {"none"},
	} {
		t.Run(strings.Join(mode, " "), func(t *testing.T) {
			if testing.Short() && len(mode) > 1 && len(mode[1]) > 6 {
				t.Skip("takes 1.3 GiB")
			}
			pid, lines := start(t, nil, bin, mode...)
			compare(t, walkProcess(t, pid), lines[0])
		})
	}
}

func TestWalkCountsEveryBlock(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/heaps.c"), "small", "100003")
	h := walkProcess(t, pid)
	if got := h.Total().InUse.Blocks; got != 100003+1 { // and the thread's cache itself
		t.Errorf("%d blocks in use, want 100,004", got)
	}
	n := uint64(0)
	var last Block
	for b := range h.Blocks {
		if b.Addr < last.Addr+last.Size || b.Size < 24 {
			t.Fatalf("block %+v after %+v", b, last)
		}
		inside, ok := h.Find(b.Addr + b.Size - 1)
		if !ok || inside != b {
			t.Fatalf("the last byte of %+v is found in %+v, %v", b, inside, ok)
		}
		last = b
		n++
	}
	if n != h.Total().InUse.Blocks {
		t.Errorf("%d blocks listed, %d counted", n, h.Total().InUse.Blocks)
	}
}

func TestWalkUnderOtherSettings(t *testing.T) {
	bin := build(t, "testdata/heaps.c")
	for _, tunables := range []string{
		"glibc.malloc.tcache_count=0", "glibc.malloc.tcache_count=200", "glibc.malloc.mxfast=0",
		"glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=1", "glibc.malloc.mmap_threshold=4000",
	} {
		for _, mode := range [][]string{{"cache"}, {"fragmented"}, {"arenas", "7"}} {
			if mode[0] == "fragmented" && !strings.Contains(tunables, "=0") {
				continue // seconds each; the caches and fastbins make the difference
			}
			t.Run(tunables+" "+mode[0], func(t *testing.T) {
				pid, lines := start(t, []string{"GLIBC_TUNABLES=" + tunables}, bin, mode...)
				compare(t, walkProcess(t, pid), lines[0])
			})
		}
	}
}

func TestWalkOfStaticProgram(t *testing.T) {
	for _, flag := range []string{"-static", "-static-pie"} {
		pid, lines := start(t, nil, build(t, "testdata/heaps.c", flag), "fragmented")
		compare(t, walkProcess(t, pid), lines[0])
	}
}

// The third thread's arena and the main one are damaged; all blocks but those around the damage are still found.
func TestDamagedHeapIsWalkedOn(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/heaps.c"), "damaged")
	h := walkProcess(t, pid)
	if len(h.Arenas) != 2 {
		t.Fatalf("%d arenas, want 2", len(h.Arenas))
	}
	for _, a := range h.Arenas {
		if a.InUse.Blocks < 2000 || a.InUse.Blocks > 2010 {
			t.Errorf("arena %#x: %d blocks in use, want about 2003", a.Addr, a.InUse.Blocks)
		}
		if a.Lost == 0 || a.Lost > 1000 {
			t.Errorf("arena %#x: %d bytes lost, want a few hundred", a.Addr, a.Lost)
		}
	}
	if h.Exact() || len(h.Problems) < 2 {
		t.Errorf("problems: %v", h.Problems)
	}
}

func TestNoAllocatorIsSaid(t *testing.T) {
	if _, err := exec.LookPath("musl-gcc"); err != nil {
		t.Skip("needs musl-gcc")
	}
	bin := t.TempDir() + "/musl"
	source := bin + ".c"
	code := `#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(void) { char *p = malloc(5000); strcpy(p, "x"); puts("ready"); fflush(stdout); for (;;) pause(); }`
	if err := os.WriteFile(source, []byte(code), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("musl-gcc", "-O0", "-o", bin, source).CombinedOutput(); err != nil {
		t.Fatalf("musl-gcc: %v\n%s", err, out)
	}
	pid, _ := start(t, nil, bin)
	if h, err := Walk(context.Background(), openSpace(t, pid)); !errors.Is(err, ErrNoAllocator) {
		t.Errorf("got %v, %v, want %v", h, err, ErrNoAllocator)
	}
}
