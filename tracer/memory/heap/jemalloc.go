package heap

import (
	"cmp"
	"context"
	"encoding/binary"
	"slices"
)

// jemalloc 5.3 on 64-bit machines with pages of 4 KiB keeps a radix tree from page to extent: a root of 2^18 pointers in its
// variables, by bits 30 to 47 of the address, to leaves of 2^18 words, by bits 12 to 29. A leaf's word packs the extent's
// record (edata) with flags. Slabs have a bitmap of their free regions in the record; other active extents are one block.
// Earlier versions lay these out differently; they fail the checks and count as not known.
const (
	jeFanout   = 1 << 18
	jeNodeSize = jeFanout * 8
	jeRecord   = 128 // bytes of an edata_t, and its alignment
	jeAddrBits = 48

	jeSlabBitmap = 64 // offset in the record
	jeMaxRegions = 512
)

// jeExtent is what a record says.
type jeExtent struct {
	addr, size uint64
	arena      int
	szind      int
	slab       bool
	state      int // 0 active, 1 dirty, 2 muzzy, 3 retained
	free       [jeMaxRegions / 64]uint64
}

// parseExtent reads a record.
func parseExtent(b []byte) (e jeExtent) {
	bits := binary.LittleEndian.Uint64(b)
	e.addr = binary.LittleEndian.Uint64(b[8:])
	e.size = binary.LittleEndian.Uint64(b[16:]) &^ (pageSize - 1)
	e.arena = int(bits & 0xfff)
	e.slab = bits>>12&1 != 0
	e.state = int(bits >> 17 & 7)
	e.szind = int(bits >> 20 & 0xff)
	for i := range e.free {
		e.free[i] = binary.LittleEndian.Uint64(b[jeSlabBitmap+i*8:])
	}
	return e
}

// jeSizes are the size classes: 8, then steps of 16 to 128, then four to each doubling.
var jeSizes = func() []uint64 {
	sizes := []uint64{8}
	for s := uint64(16); s <= 128; s += 16 {
		sizes = append(sizes, s)
	}
	for base := uint64(128); len(sizes) < 232; base *= 2 {
		for k := uint64(1); k <= 4; k++ {
			sizes = append(sizes, base+base/4*k)
		}
	}
	return sizes
}()

// jeWalker walks one jemalloc.
type jeWalker struct {
	h       *Heap
	space   *Space
	root    uint64
	w       window
	arenas  map[int]int // from jemalloc's number to the index in Heap.Arenas
	classes map[*segment]int
}

// walkJemalloc adds the blocks of the jemalloc whose tree has its root at the given address.
func walkJemalloc(ctx context.Context, h *Heap, root uint64) error {
	j := &jeWalker{
		h: h, space: h.space, root: root, w: window{mem: h.space.Mem}, arenas: map[int]int{}, classes: map[*segment]int{},
	}
	for leaf := range j.leaves {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		j.leaf(leaf)
	}
	slices.SortFunc(h.segments, func(a, b *segment) int { return cmp.Compare(a.start, b.start) })
	for s := range j.classes {
		s.seal()
	}
	j.caches()
	return nil
}

// maxTries bounds how many pointers of one data segment are followed in search of the tree.
const maxTries = 500

// findTree looks for the root of the tree among variables: a pointer to a leaf whose extents lie where the leaf's place in
// the tree says gives the root away.
func findTree(ctx context.Context, space *Space) (root uint64, ok bool) {
	for i, r := range space.Ranges {
		if !dataRange(space, i) || r.size() < jeNodeSize || r.size() > maxData {
			continue
		}
		filled, err := space.filled(r.Start, r.End)
		if err != nil {
			return 0, false
		}
		tries := 0
		for _, f := range filled {
			w, prev := window{mem: space.Mem}, uint64(0)
			for a := f.start; a+8 <= f.end && tries < maxTries; a += 8 {
				child, ok := w.word(a)
				if !ok || child == 0 || child%64 != 0 || child>>47 != 0 || ctx.Err() != nil || !alone(child, prev) {
					prev = child
					continue
				}
				prev = child
				tries++
				if k, ok := leafIndex(space, child); ok && a-k*8 >= r.Start && a-k*8+jeNodeSize <= r.End {
					return a - k*8, true
				}
			}
		}
	}
	return 0, false
}

// alone tells an entry of the root from one of an array of pointers: its neighbours are empty or another leaf's length away.
func alone(child, prev uint64) bool {
	return prev == 0 || max(child, prev)-min(child, prev) >= jeNodeSize
}

// leafIndex says which place in the root a leaf has, judged by the first extents in it.
func leafIndex(space *Space, leaf uint64) (k uint64, ok bool) {
	r, found := space.find(leaf)
	if !found || !r.anonymous() || r.End-leaf < jeNodeSize {
		return 0, false
	}
	agree := 0
	eachLeafWord(space, leaf, func(n, word uint64) bool {
		e, good := readExtent(space, word)
		first := e.addr>>12&(jeFanout-1) == n
		if !good || first && agree > 0 && e.addr>>30 != k {
			agree = 0
			return false
		}
		if first {
			k = e.addr >> 30
			agree++
		}
		return agree < 3
	})
	return k, agree > 0
}

func readExtent(space *Space, word uint64) (e jeExtent, ok bool) {
	record := word << 16 >> 16 &^ (jeRecord - 1)
	b := make([]byte, jeRecord)
	if record == 0 || int64(record) < 0 {
		return e, false
	}
	if n, _ := space.Mem.ReadAt(b, int64(record)); n < jeRecord {
		return e, false
	}
	e = parseExtent(b)
	return e, e.plausible(word)
}

func (e *jeExtent) plausible(word uint64) bool {
	return e.addr != 0 && e.addr>>jeAddrBits == 0 && e.size >= pageSize && e.size < 1<<40 && e.szind <= len(jeSizes) &&
		(e.slab == (word&1 != 0) || e.state != 0) // a freed extent's record keeps its old flag
}

// eachLeafWord calls yield for each word of a leaf that is not zero.
func eachLeafWord(space *Space, leaf uint64, yield func(n, word uint64) bool) {
	filled, err := space.filled(leaf&^(pageSize-1), (leaf+jeNodeSize+pageSize-1)&^(pageSize-1))
	if err != nil {
		return
	}
	w := window{mem: space.Mem}
	for _, f := range filled {
		for a := max(f.start, leaf); a+8 <= min(f.end, leaf+jeNodeSize); a += 8 {
			word, ok := w.word(a)
			if ok && word<<16 != 0 && !yield((a-leaf)/8, word) {
				return
			}
		}
	}
}

// leaves iterates over the addresses of leaves with their place in the root.
func (j *jeWalker) leaves(yield func([2]uint64) bool) {
	filled, err := j.space.filled(j.root&^(pageSize-1), (j.root+jeNodeSize+pageSize-1)&^(pageSize-1))
	if err != nil {
		return
	}
	w := window{mem: j.space.Mem}
	for _, f := range filled {
		for a := max(f.start, j.root); a+8 <= min(f.end, j.root+jeNodeSize); a += 8 {
			child, ok := w.word(a)
			if ok && child != 0 && !yield([2]uint64{child, (a - j.root) / 8}) {
				return
			}
		}
	}
}

// leaf books the extents that start under one leaf.
func (j *jeWalker) leaf(leaf [2]uint64) {
	eachLeafWord(j.space, leaf[0], func(n, word uint64) bool {
		page := leaf[1]<<30 | n<<12
		record := word << 16 >> 16 &^ (jeRecord - 1)
		b := j.w.bytes(record, jeRecord)
		if b == nil {
			j.h.problem(page, "record of an extent cannot be read")
			return true
		}
		e := parseExtent(b)
		if e.addr&^(pageSize-1) != page {
			return true // not the extent's first page
		}
		if !e.plausible(word) {
			j.h.problem(page, "record of an extent at %#x makes no sense", record)
			return true
		}
		j.extent(&e)
		return true
	})
}

func (j *jeWalker) arena(number int) *Arena {
	i, ok := j.arenas[number]
	if !ok {
		i = len(j.h.Arenas)
		j.arenas[number] = i
		j.h.Arenas = append(j.h.Arenas, Arena{Addr: uint64(number), Main: number == 0})
	}
	return &j.h.Arenas[i]
}

func (j *jeWalker) extent(e *jeExtent) {
	a := j.arena(e.arena)
	if e.state != 0 {
		j.h.kept = append(j.h.kept, span{e.addr, e.addr + e.size})
	}
	switch {
	case e.state == 0:
		a.System += e.size
		j.active(a, e)
	case e.state <= 2: // dirty or muzzy: freed, kept for a while before it goes back to the kernel
		a.System += e.size
		a.Top.add(e.size)
	}
}

// active books the blocks of an extent in use.
func (j *jeWalker) active(a *Arena, e *jeExtent) {
	if e.szind >= len(jeSizes) {
		a.Overhead += e.size // jemalloc's own
		return
	}
	size := jeSizes[e.szind]
	if !e.slab {
		if size > e.size || size < pageSize {
			j.h.problem(e.addr, "extent of %d bytes has a block of %d", e.size, size)
			return
		}
		a.InUse.add(size)
		a.Overhead += e.size - size
		s := &segment{arena: j.arenas[e.arena], start: e.addr, end: e.addr + size, mmapped: true, plain: true, inUse: bitmap{1}, starts: bitmap{1}}
		j.h.segments = append(j.h.segments, s)
		return
	}
	regions := e.size / size
	if e.size%size != 0 || regions > jeMaxRegions {
		j.h.problem(e.addr, "slab of %d bytes with blocks of %d", e.size, size)
		return
	}
	s := newSegment(j.arenas[e.arena], e.addr, e.addr+e.size)
	s.plain = true
	for i := range regions {
		free := e.free[i/64]>>(i%64)&1 != 0
		if free {
			a.Free.add(size)
		} else {
			a.InUse.add(size)
		}
		if size < unit {
			continue // blocks of 8 bytes are counted only: their slab counts as one block
		}
		s.starts.set(i * size / unit)
		if !free {
			s.inUse.set(i * size / unit)
		}
	}
	if size < unit {
		return
	}
	j.classes[s] = e.szind
	j.h.segments = append(j.h.segments, s)
}

// jeCacheBin is the length of a cache_bin_t: the head of a stack of cached blocks, a count, and the low 16 bits of the
// addresses where the stack is low, full and empty.
const jeCacheBin = 24

// maxCached is the largest stack that is believed.
const maxCached = 8 << 10

// caches finds the threads' caches and takes their blocks out of those in use. They lie in thread-local storage, so that
// every word of anonymous memory outside of the heap, where such storage is, may be the start of one; the blocks on the
// stack must all be allocated ones of the same size.
func (j *jeWalker) caches() {
	for _, r := range outside(j.h, j.space) {
		filled, err := j.space.filled(r.start, r.end)
		if err != nil {
			return
		}
		for _, f := range filled {
			j.cachesIn(f)
		}
	}
}

func (j *jeWalker) cachesIn(f span) {
	w := window{mem: j.space.Mem}
	for a := f.start; a+jeCacheBin <= f.end; a += 8 {
		b := w.bytes(a, jeCacheBin)
		if b == nil {
			a = (a+pageSize)&^(pageSize-1) - 8
			continue
		}
		head := binary.LittleEndian.Uint64(b)
		full, empty := binary.LittleEndian.Uint16(b[18:]), binary.LittleEndian.Uint16(b[20:])
		left, room := empty-uint16(head), empty-full
		if head != 0 && head>>47 == 0 && head%8 == 0 && left > 0 && left%8 == 0 && room%8 == 0 && left <= room && room/8 <= maxCached {
			j.cache(head, int(left/8))
		}
	}
}

// locateSegment finds the segment that holds an address.
func (h *Heap) locateSegment(a uint64) (*segment, int, bool) {
	n, _ := slices.BinarySearchFunc(h.segments, a, func(s *segment, a uint64) int {
		if s.end <= a {
			return -1
		}
		return 1
	})
	if n == len(h.segments) || a < h.segments[n].start {
		return nil, n, false
	}
	return h.segments[n], n, true
}

// cache takes the n blocks on a stack out of those in use, if they are what a cache may hold.
func (j *jeWalker) cache(head uint64, n int) {
	blocks := words(j.space.Mem, head, n)
	if blocks == nil {
		return
	}
	var entries []cached
	class := -1
	for _, p := range blocks {
		s, _, ok := j.h.locateSegment(p)
		if !ok {
			return
		}
		i := (p - s.start) / unit
		c, slab := j.classes[s]
		if !slab {
			if !s.mmapped || p != s.start {
				return
			}
			c = len(jeSizes) // blocks with an extent of their own are cached too; sizes may then not be compared by class
		} else if (p-s.start)%unit != 0 || !s.starts.has(i) {
			return
		}
		if class >= 0 && c != class || !s.inUse.has(i) {
			return
		}
		class = c
		entries = append(entries, cached{s, i, s.block(i).Size})
	}
	for _, e := range entries {
		if !e.s.inUse.has(e.i) {
			continue
		}
		e.s.inUse.clear(e.i)
		a := &j.h.Arenas[e.s.arena]
		a.InUse.take(e.size)
		a.Tcache.add(e.size)
	}
}
