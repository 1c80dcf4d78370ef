package heap

import (
	"fmt"
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

func TestWalkEqualsMallinfo(t *testing.T) {
	bin := build(t, "testdata/heaps.c")
	for _, mode := range [][]string{
		{"small", "100003"}, {"fragmented"}, {"cache"}, {"arenas", "64"}, {"mmapped"}, {"foreign"}, {"nobrk"}, {"none"},
	} {
		t.Run(mode[0], func(t *testing.T) {
			pid, lines := start(t, nil, bin, mode...)
			want := readMallinfo(t, lines[0])
			h := walkProcess(t, pid)
			all := h.Total()
			got := mallinfo{
				arena: all.System, used: all.InUse.Bytes + all.Tcache.Bytes + all.Overhead,
				free: all.Free.Bytes + all.Fast.Bytes + all.Top.Bytes, fastBlocks: all.Fast.Blocks,
				fastBytes: all.Fast.Bytes, mmapped: h.Mmapped.Blocks, mmappedBytes: h.Mmapped.Bytes,
			}
			if got != want {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			t.Logf("%+v %v %s %s", all, h.Problems, h.Allocator, h.Layout)
		})
	}
}
