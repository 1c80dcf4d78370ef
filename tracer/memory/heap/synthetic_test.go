package heap

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakeMemory is an address space of a few pieces.
type fakeMemory struct {
	ranges []Range
	data   [][]byte
}

func (m *fakeMemory) add(start uint64, size int, perms, path string) []byte {
	b := make([]byte, size)
	m.ranges = append(m.ranges, Range{Start: start, End: start + uint64(size), Perms: perms, Path: path})
	m.data = append(m.data, b)
	return b
}

func (m *fakeMemory) ReadAt(b []byte, addr int64) (int, error) {
	for i, r := range m.ranges {
		if r.has(uint64(addr)) {
			n := copy(b, m.data[i][uint64(addr)-r.Start:])
			if n < len(b) {
				return n, io.EOF
			}
			return n, nil
		}
	}
	return 0, io.EOF
}

func (m *fakeMemory) set(addr, value uint64) {
	for i, r := range m.ranges {
		if r.has(addr) {
			binary.LittleEndian.PutUint64(m.data[i][addr-r.Start:], value)
			return
		}
	}
	panic(fmt.Sprintf("no memory at %#x", addr))
}

// glibcBuild is how one version of glibc keeps its books; written down apart from the tables of the package, from the
// struct definitions of its sources.
type glibcBuild struct {
	version             string
	fast, top, bins     uint64
	next, system        uint64
	stateSize, infoSize uint64
	tcacheWidth         uint64 // of a count; 0 without a cache
	safe                bool
	sbrkBase            uint64 // offsets in malloc_par
	nMmaps, mmapped     uint64
	layout              string
}

var glibcBuilds = []glibcBuild{
	{"2.17", 8, 88, 104, 2152, 2168, 2184, 32, 0, false, 80, 40, 56, "2.17-2.22"},
	{"2.19", 8, 88, 104, 2152, 2168, 2184, 32, 0, false, 80, 40, 56, "2.17-2.22"},
	{"2.22", 8, 88, 104, 2152, 2168, 2184, 32, 0, false, 80, 40, 56, "2.17-2.22"},
	{"2.23", 8, 88, 104, 2152, 2176, 2192, 32, 0, false, 80, 40, 56, "2.23-2.26"},
	{"2.24", 8, 88, 104, 2152, 2176, 2192, 32, 0, false, 72, 40, 56, "2.23-2.26"},
	{"2.26", 8, 88, 104, 2152, 2176, 2192, 32, 1, false, 72, 40, 56, "2.23-2.26"},
	{"2.27", 16, 96, 112, 2160, 2184, 2200, 32, 1, false, 72, 40, 56, "2.27-2.41"},
	{"2.28", 16, 96, 112, 2160, 2184, 2200, 32, 1, false, 72, 40, 56, "2.27-2.41"},
	{"2.29", 16, 96, 112, 2160, 2184, 2200, 32, 1, false, 72, 40, 56, "2.27-2.41"},
	{"2.30", 16, 96, 112, 2160, 2184, 2200, 32, 2, false, 72, 40, 56, "2.27-2.41"},
	{"2.31", 16, 96, 112, 2160, 2184, 2200, 32, 2, false, 72, 40, 56, "2.27-2.41"},
	{"2.32", 16, 96, 112, 2160, 2184, 2200, 32, 2, true, 72, 40, 56, "2.27-2.41"},
	{"2.34", 16, 96, 112, 2160, 2184, 2200, 32, 2, true, 72, 40, 56, "2.27-2.41"},
	{"2.35", 16, 96, 112, 2160, 2184, 2200, 48, 2, true, 96, 60, 80, "2.27-2.41"},
	{"2.38", 16, 96, 112, 2160, 2184, 2200, 48, 2, true, 96, 60, 80, "2.27-2.41"},
	{"2.41", 16, 96, 112, 2160, 2184, 2200, 48, 2, true, 96, 60, 80, "2.27-2.41"},
}

const (
	fakeLibc    = 0x7f0000200000
	fakeMain    = fakeLibc + 0xc60
	fakePar     = fakeLibc + 0x340
	fakeHeap    = 0x555555560000
	fakeArena   = 0x7e0000000000 // a multiple of 64 MiB
	fakeMmapped = 0x7d0000000000
	fakeSize    = 0x21000
)

// image builds a process of this glibc: a main arena, a thread's arena, one block with a mapping of its own.
func (g glibcBuild) image() *Space {
	m := &fakeMemory{}
	m.add(fakeHeap, fakeSize, "rw-p", "[heap]")
	m.add(fakeMmapped, 0x40000, "rw-p", "")
	m.add(fakeArena, fakeSize, "rw-p", "")
	copy(m.add(fakeLibc-0x10000, 0x1000, "r--p", "/lib/libc.so.6")[100:],
		"GNU C Library (Test) stable release version "+g.version+".\n")
	m.add(fakeLibc, 0x3000, "rw-p", "/lib/libc.so.6")
	thread := uint64(fakeArena) + g.infoSize
	g.arena(m, fakeMain, fakeHeap, fakeHeap, thread, 0)
	m.set(fakeArena, thread)
	m.set(fakeArena+16, fakeSize)
	m.set(fakeArena+24, fakeSize)
	first := (thread + g.stateSize + 15) &^ 15
	g.arena(m, thread, fakeArena, first, fakeMain, flagArena)
	m.set(fakeMmapped+8, 0x21000|flagMmapped)
	m.set(fakePar+16, 128<<10)
	m.set(fakePar+24, 8)
	m.set(fakePar+g.mmapped, 0x21000)
	m.set(fakePar+g.mmapped+8, 0x21000)
	m.set(fakePar+g.sbrkBase, fakeHeap)
	par := m.data[4][fakePar-fakeLibc:]
	for i, v := range []uint32{1, 65536, 1, 0} {
		binary.LittleEndian.PutUint32(par[int(g.nMmaps)+i*4:], v)
	}
	return &Space{Mem: m, Ranges: sorted(m.ranges)}
}

func sorted(ranges []Range) []Range {
	out := append([]Range{}, ranges...)
	for i := range out {
		for k := i; k > 0 && out[k].Start < out[k-1].Start; k-- {
			out[k], out[k-1] = out[k-1], out[k]
		}
	}
	return out
}

// arena lays out chunks from first to the end of the heap: the cache, 40 blocks in use, 5 in the cache, 3 in a fastbin, one
// free, and the top.
func (g glibcBuild) arena(m *fakeMemory, state, heap, first, next, flag uint64) {
	for i := range uint64(127) {
		self := state + g.bins + i*16 - 16
		m.set(state+g.bins+i*16, self)
		m.set(state+g.bins+i*16+8, self)
	}
	m.set(state+g.next, next)
	if g.layout != "2.17-2.22" {
		m.set(state+g.system-8, 1)
	}
	m.set(state+g.system, fakeSize)
	m.set(state+g.system+8, fakeSize)
	p := first
	chunk := func(size uint64, prevInUse bool) (at uint64) {
		head := size | flag
		if prevInUse {
			head |= flagInUse
		}
		m.set(p+8, head)
		at = p
		p += size
		return at
	}
	cache := uint64(0)
	if g.tcacheWidth > 0 {
		cache = chunk(16+64*(8+g.tcacheWidth), true) + 16
	}
	for i := range uint64(40) {
		chunk(32+16*(i%7), true)
	}
	if cache != 0 {
		g.list(m, 5, func() uint64 { return chunk(64, true) + 16 }, func(head uint64) {
			index := uint64(64-32) / 16
			binary.LittleEndian.PutUint16(m.bytes(cache+index*g.tcacheWidth), 5)
			m.set(cache+64*g.tcacheWidth+index*8, head)
		}, 0)
	}
	g.list(m, 3, func() uint64 { return chunk(48, true) }, func(head uint64) { m.set(state+g.fast+8, head) }, 16)
	free := chunk(512, true)
	bin := state + g.bins - 16
	m.set(free+16, bin)
	m.set(free+24, bin)
	m.set(state+g.bins, free)
	m.set(state+g.bins+8, free)
	m.set(p, 512)
	chunk(32, false)
	m.set(state+g.top, p)
	m.set(p+8, heap+fakeSize-p|flagInUse)
}

// list links n entries, the last one made first in line. The link is at the given offset of each.
func (g glibcBuild) list(m *fakeMemory, n int, entry func() uint64, head func(uint64), offset uint64) {
	next := uint64(0)
	for range n {
		e := entry()
		link := next
		if g.safe {
			link ^= (e + offset) >> 12
		}
		m.set(e+offset, link)
		next = e
	}
	head(next)
}

func (m *fakeMemory) bytes(addr uint64) []byte {
	for i, r := range m.ranges {
		if r.has(addr) {
			return m.data[i][addr-r.Start:]
		}
	}
	return nil
}

func TestWalkKnowsTheLayoutsOfAllVersions(t *testing.T) {
	for _, g := range glibcBuilds {
		for _, banner := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, banner %v", g.version, banner), func(t *testing.T) {
				space := g.image()
				if !banner { // as in a dump of writable memory only
					space.Ranges = append(space.Ranges[:3:3], space.Ranges[4])
				}
				h, err := Walk(context.Background(), space)
				if err != nil {
					t.Fatal(err)
				}
				if len(h.Problems) > 0 {
					t.Errorf("problems: %v", h.Problems)
				}
				type counts struct{ InUse, Tcache, Fast, Free, Top, Mmapped uint64 }
				all := h.Total()
				got := counts{all.InUse.Blocks, all.Tcache.Blocks, all.Fast.Blocks, all.Free.Blocks, all.Top.Blocks, h.Mmapped.Blocks}
				want := counts{InUse: 82, Fast: 6, Free: 2, Top: 2, Mmapped: 1}
				if g.tcacheWidth > 0 {
					want.InUse, want.Tcache = 84, 10
				}
				if d := cmp.Diff(want, got); d != "" {
					t.Error(d)
				}
				name := "glibc"
				if banner {
					name += " " + g.version
				}
				if h.Layout != g.layout || h.Allocator != name {
					t.Errorf("%s, layout %s; want %s, %s", h.Allocator, h.Layout, name, g.layout)
				}
			})
		}
	}
}

// Whatever is in the memory, a walk ends, keeps its bounds, and its blocks do not overlap.
func FuzzWalk(f *testing.F) {
	f.Add(uint8(0), uint32(0x10000), []byte{1, 2, 3})
	f.Add(uint8(15), uint32(8), []byte{0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41, 0x41})
	f.Add(uint8(11), uint32(fakeSize+0x40000+8), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f})
	f.Fuzz(func(t *testing.T, build uint8, at uint32, damage []byte) {
		space := glibcBuilds[int(build)%len(glibcBuilds)].image()
		m := space.Mem.(*fakeMemory)
		offset := int(at)
		for _, b := range m.data {
			if offset < len(b) {
				copy(b[offset:], damage)
				break
			}
			offset -= len(b)
		}
		h, err := Walk(context.Background(), space)
		if err != nil {
			return
		}
		end := uint64(0)
		for b := range h.Blocks {
			if b.Addr < end {
				t.Fatalf("block %+v overlaps the one before, which ends at %#x", b, end)
			}
			end = b.Addr + b.Size
			h.Find(b.Addr + b.Size/2)
		}
		if _, err := h.Leaks(context.Background(), false); err != nil {
			t.Fatal(err)
		}
		if err := h.Read(context.Background(), look, []func(Block, []byte){func(Block, []byte) {}}); err != nil {
			t.Fatal(err)
		}
	})
}
