package heap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sort"
	"strings"
)

// ErrNoAllocator is returned by Walk when the memory holds no allocator that it knows: a static program with an
// allocator of its own, musl, jemalloc, or a dump without the data of libc.
var ErrNoAllocator = errors.New("no known allocator found in this memory")

// Count is a number of blocks and their bytes. For glibc these are the bytes of chunks, as mallinfo2 counts them: eight
// bytes a block more than the program can use.
type Count struct {
	Blocks uint64 `json:"blocks"`
	Bytes  uint64 `json:"bytes"`
}

func (c *Count) add(bytes uint64)  { c.Blocks++; c.Bytes += bytes }
func (c *Count) take(bytes uint64) { c.Blocks--; c.Bytes -= bytes }
func (c *Count) sum(d Count)       { c.Blocks += d.Blocks; c.Bytes += d.Bytes }

// Arena is the book of one arena. System = InUse + Tcache + Fast + Free + Top + Overhead + Lost unless the walk has a
// problem; mallinfo2's uordblks is InUse + Tcache + Overhead.
type Arena struct {
	Addr     uint64 `json:"address"`
	Main     bool   `json:"main"`
	System   uint64 `json:"system_bytes"` // what the arena itself says it took from the kernel
	InUse    Count  `json:"in_use"`
	Tcache   Count  `json:"tcache"`   // freed, kept in threads' caches
	Fast     Count  `json:"fastbins"` // freed, kept for blocks of the same size
	Free     Count  `json:"free"`     // freed, for blocks of any size
	Top      Count  `json:"top"`      // never used, or given back, at the end
	Overhead uint64 `json:"overhead_bytes"`
	Lost     uint64 `json:"lost_bytes"` // not understood, see Heap.Problems

	state layout
}

// known is what the walk accounts for.
func (a *Arena) known() uint64 {
	return a.InUse.Bytes + a.Tcache.Bytes + a.Fast.Bytes + a.Free.Bytes + a.Top.Bytes + a.Overhead + a.Lost
}

// Problem is a place where the walk was less than exact.
type Problem struct {
	Addr uint64 `json:"address"`
	Text string `json:"text"`
}

// Heap is the result of a walk.
type Heap struct {
	Allocator string    `json:"allocator"`
	Layout    string    `json:"layout"`
	Arenas    []Arena   `json:"arenas"`
	Mmapped   Count     `json:"mmapped"` // blocks with a mapping of their own
	Problems  []Problem `json:"problems"`
	// Hidden counts the problems beyond the first maxProblems.
	Hidden uint64 `json:"problems_hidden"`
	// MmappedSaid is glibc's own count of mmapped blocks; nil when it was not found.
	MmappedSaid *Count `json:"mmapped_said"`

	space    *Space
	segments []*segment // sorted by start
	skipped  []span     // books of the allocator in data segments: no roots
	kept     []span     // free memory of the allocator outside of segments
}

type span struct{ start, end uint64 }

const maxProblems = 100

func (h *Heap) problem(addr uint64, format string, args ...any) {
	if len(h.Problems) >= maxProblems {
		h.Hidden++
		return
	}
	h.Problems = append(h.Problems, Problem{addr, fmt.Sprintf(format, args...)})
}

// Total adds up the arenas.
func (h *Heap) Total() Arena {
	var t Arena
	for i := range h.Arenas {
		a := &h.Arenas[i]
		t.System += a.System
		t.InUse.sum(a.InUse)
		t.Tcache.sum(a.Tcache)
		t.Fast.sum(a.Fast)
		t.Free.sum(a.Free)
		t.Top.sum(a.Top)
		t.Overhead += a.Overhead
		t.Lost += a.Lost
	}
	return t
}

// Exact says whether every byte of every arena was accounted for.
func (h *Heap) Exact() bool { return len(h.Problems) == 0 }

// Block is a block in use.
type Block struct {
	Addr uint64 // what malloc returned
	Size uint64 // bytes that the program may use; up to 24 more than it asked for
}

// block makes the block of the chunk that starts at unit i.
func (s *segment) block(i uint64) Block {
	p := s.start + i*unit
	if s.plain {
		if s.mmapped {
			return Block{p, s.end - p}
		}
		return Block{p, s.chunkEnd(i) - p}
	}
	if s.mmapped {
		return Block{p + 16, s.end - p - 16}
	}
	return Block{p + 16, s.chunkEnd(i) - p - 8}
}

// Blocks calls yield for each block in use, in order of address, until it returns false.
func (h *Heap) Blocks(yield func(Block) bool) {
	for _, s := range h.segments {
		for i, ok := s.inUse.next(0); ok; i, ok = s.inUse.next(i + 1) {
			if !yield(s.block(i)) {
				return
			}
		}
	}
}

// Find returns the block in use that holds address a, which may point to its inside.
func (h *Heap) Find(a uint64) (Block, bool) {
	s, i, ok := h.locate(a)
	if !ok {
		return Block{}, false
	}
	return s.block(i), true
}

// locate finds the chunk in use whose usable bytes hold a. These start 16 bytes into the chunk and, in an arena, end 8
// bytes into the next one.
func (h *Heap) locate(a uint64) (*segment, uint64, bool) {
	n := sort.Search(len(h.segments), func(n int) bool { return h.segments[n].end > a })
	if n == len(h.segments) || a < h.segments[n].start {
		return nil, 0, false
	}
	s := h.segments[n]
	if s.mmapped {
		return s, 0, s.plain || a >= s.start+16
	}
	if s.plain {
		i, ok := s.holds(a)
		return s, i, ok && s.inUse.has(i)
	}
	i, ok := s.holds(a)
	if !ok {
		return nil, 0, false
	}
	if off := a - (s.start + i*unit); off < 8 && i > 0 {
		i, ok = s.holds(s.start + (i-1)*unit)
	} else if off < 16 {
		return nil, 0, false // the size field
	}
	return s, i, ok && s.inUse.has(i)
}

// Walk reads the heap's books. It returns ErrNoAllocator when there are none that it knows.
func Walk(ctx context.Context, space *Space) (*Heap, error) {
	h := &Heap{space: space}
	libcs := findLibcs(space)
	tree, jemalloc := findTree(ctx, space)
	if jemalloc && neverUsed(space, libcs) {
		libcs = nil
	}
	if len(libcs) == 0 && !jemalloc {
		return nil, cmp.Or(ctx.Err(), ErrNoAllocator)
	}
	for _, l := range libcs {
		w := &walker{heap: h, space: space, libc: l, main: window{mem: space.Mem}, probe: window{mem: space.Mem}}
		if err := w.walk(ctx); err != nil {
			return nil, fmt.Errorf("walk heap: %w", err)
		}
	}
	if jemalloc {
		if err := walkJemalloc(ctx, h, tree); err != nil {
			return nil, fmt.Errorf("walk heap: %w", err)
		}
	}
	h.name(libcs, jemalloc)
	h.checkBooks()
	return h, nil
}

// name says what was walked. A program may have both: Rust code on jemalloc, C libraries on glibc.
func (h *Heap) name(libcs []*libc, jemalloc bool) {
	var names, layouts []string
	for _, l := range libcs {
		names = append(names, strings.TrimSpace("glibc "+l.version))
		layouts = append(layouts, l.state.name)
	}
	if jemalloc {
		names, layouts = append(names, "jemalloc 5.3"), append(layouts, "5.3")
	}
	h.Allocator, h.Layout = strings.Join(names, " and "), strings.Join(layouts, " and ")
}

// neverUsed says whether the program's blocks come from elsewhere: glibc's own malloc is there, but has handed out nothing.
func neverUsed(space *Space, libcs []*libc) bool {
	for _, l := range libcs {
		system := words(space.Mem, l.main+l.state.systemMem, 1)
		if system == nil || system[0] > 0 || len(l.threads) > 0 {
			return false
		}
	}
	return true
}

// checkBooks compares what was found with what the allocator itself says.
func (h *Heap) checkBooks() {
	for i := range h.Arenas {
		a := &h.Arenas[i]
		if sum := a.known(); sum != a.System {
			h.problem(a.Addr, "arena says it has %d bytes, the walk accounts for %d", a.System, sum)
		}
	}
	if said := h.MmappedSaid; said != nil && *said != h.Mmapped {
		h.problem(0, "%d mmapped blocks of %d bytes found, glibc counts %d of %d",
			h.Mmapped.Blocks, h.Mmapped.Bytes, said.Blocks, said.Bytes)
	}
}
