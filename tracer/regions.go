package tracer

import "sort"

// regions is the address space of one process as far as mappings of the trace go: which anonymous memory was mapped
// through which stack. Pieces never overlap and are sorted. Memory from before the trace is not in it, so that cutting
// it does nothing.
type regions struct {
	pieces []piece
	books  map[regionKey]*regionBook
}

// region is one mapping as it was made. Its pieces shrink in number and size until nothing is left.
type region struct {
	key  regionKey
	time uint64 // CLOCK_MONOTONIC ns
	left uint64 // bytes still mapped
	// internal: an allocator made it for its blocks, which are in other books
	internal bool
}

type piece struct {
	start, end uint64
	of         *region
}

// regionKey is what mappings are added up by.
type regionKey struct {
	stack uint64
	brk   bool
	label string
}

// regionBook adds up the mappings of one stack; an object is freed when its last byte is unmapped.
type regionBook struct {
	allocObjects, allocBytes, freeObjects, freeBytes int64
}

func newRegions() *regions { return &regions{books: map[regionKey]*regionBook{}} }

// cut takes [start, end) out and books what was there as freed.
func (r *regions) cut(start, end uint64) {
	for _, p := range r.take(start, end) {
		r.freed(p.of, p.end-p.start)
	}
}

// take takes [start, end) out and returns the pieces it was made of.
func (r *regions) take(start, end uint64) []piece {
	if start >= end {
		return nil
	}
	first := r.find(start)
	var taken, rest []piece
	last := first
	for ; last < len(r.pieces) && r.pieces[last].start < end; last++ {
		p := r.pieces[last]
		if p.start < start {
			rest = append(rest, piece{p.start, start, p.of})
		}
		taken = append(taken, piece{max(p.start, start), min(p.end, end), p.of})
		if p.end > end {
			rest = append(rest, piece{end, p.end, p.of})
		}
	}
	r.splice(first, last, rest)
	return taken
}

// add maps [start, end): whatever was there is gone.
func (r *regions) add(start, end uint64, of region) {
	if start >= end {
		return
	}
	r.cut(start, end)
	of.left = 0
	r.insert(piece{start, end, &of})
	if !of.internal {
		r.book(of.key).allocObjects++
	}
	r.grown(&of, end-start)
}

// move carries [start, start+size) to to, over whatever is there, keeping the stacks of its pieces.
func (r *regions) move(start, size, to uint64) {
	pieces := r.take(start, start+size)
	r.cut(to, to+size)
	for _, p := range pieces {
		r.insert(piece{p.start - start + to, p.end - start + to, p.of})
	}
}

// at is the region that holds an address, or nil.
func (r *regions) at(addr uint64) *region {
	i := r.find(addr)
	if i == len(r.pieces) || r.pieces[i].start > addr {
		return nil
	}
	return r.pieces[i].of
}

// extend maps [start, end) as a further part of a region.
func (r *regions) extend(of *region, start, end uint64) {
	if start >= end {
		return
	}
	r.cut(start, end)
	r.insert(piece{start, end, of})
	r.grown(of, end-start)
}

func (r *regions) grown(of *region, bytes uint64) {
	of.left += bytes
	if !of.internal {
		r.book(of.key).allocBytes += int64(bytes)
	}
}

func (r *regions) freed(of *region, bytes uint64) {
	of.left -= bytes
	if of.internal {
		return
	}
	b := r.book(of.key)
	b.freeBytes += int64(bytes)
	if of.left == 0 {
		b.freeObjects++
	}
}

func (r *regions) book(k regionKey) *regionBook {
	b := r.books[k]
	if b == nil {
		b = &regionBook{}
		r.books[k] = b
	}
	return b
}

// find is the index of the first piece that ends behind addr.
func (r *regions) find(addr uint64) int {
	return sort.Search(len(r.pieces), func(i int) bool { return r.pieces[i].end > addr })
}

func (r *regions) insert(p piece) {
	i := r.find(p.start)
	r.splice(i, i, []piece{p})
}

func (r *regions) splice(from, to int, with []piece) {
	tail := append([]piece(nil), r.pieces[to:]...)
	r.pieces = append(append(r.pieces[:from], with...), tail...)
}
