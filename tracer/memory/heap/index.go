package heap

import "math/bits"

// unit is the granule of glibc's chunks on 64-bit machines.
const unit = 16

// bitmap has one bit for every unit of a segment: 8 MiB for 1 GiB of heap, however many blocks it holds.
type bitmap []uint64

func newBitmap(units uint64) bitmap { return make(bitmap, (units+63)/64) }
func (b bitmap) set(i uint64)       { b[i/64] |= 1 << (i % 64) }
func (b bitmap) clear(i uint64)     { b[i/64] &^= 1 << (i % 64) }
func (b bitmap) has(i uint64) bool  { return b[i/64]>>(i%64)&1 != 0 }

// next returns the first set bit at or after i.
func (b bitmap) next(i uint64) (uint64, bool) {
	w := i / 64
	if w >= uint64(len(b)) {
		return 0, false
	}
	if v := b[w] >> (i % 64); v != 0 {
		return i + uint64(bits.TrailingZeros64(v)), true
	}
	for w++; w < uint64(len(b)); w++ {
		if b[w] != 0 {
			return w*64 + uint64(bits.TrailingZeros64(b[w])), true
		}
	}
	return 0, false
}

// prev returns the last set bit at or before i, looking no further back than bit lo, a multiple of 64.
func (b bitmap) prev(i, lo uint64) (uint64, bool) {
	w := i / 64
	if v := b[w] << (63 - i%64); v != 0 {
		return i - uint64(bits.LeadingZeros64(v)), true
	}
	for w > lo/64 {
		w--
		if b[w] != 0 {
			return w*64 + 63 - uint64(bits.LeadingZeros64(b[w])), true
		}
	}
	return 0, false
}

// segment is a run of chunks: the program's brk heap, one 64 MiB heap of a thread arena, or a single mmapped chunk.
type segment struct {
	arena      int // index into Heap.Arenas; -1 for an mmapped chunk
	start, end uint64
	starts     bitmap // where chunks, or gaps after lost chunks, start
	inUse      bitmap // which of them the program holds
	skip       []uint32

	brk     bool   // memory that brk gave
	mmapped bool   // one block alone
	plain   bool   // blocks without a header between them (jemalloc)
	lead    uint64 // where the mapping of an mmapped chunk starts
}

func newSegment(arena int, start, end uint64) *segment {
	units := (end - start) / unit
	return &segment{arena: arena, start: start, end: end, starts: newBitmap(units), inUse: newBitmap(units)}
}

// chunkAt returns the size of the chunk that starts at p.
func (s *segment) chunkAt(p uint64) (size uint64, ok bool) {
	if s.mmapped || p < s.start || p >= s.end || (p-s.start)%unit != 0 {
		return 0, false
	}
	i := (p - s.start) / unit
	if !s.starts.has(i) {
		return 0, false
	}
	return s.chunkEnd(i) - p, true
}

// chunkEnd is where the chunk that starts at unit i ends.
func (s *segment) chunkEnd(i uint64) uint64 {
	if n, ok := s.starts.next(i + 1); ok {
		return s.start + n*unit
	}
	return s.end
}

// skipShift: one entry of skip covers 4096 units, so that the search for the start of a large block stays short.
const skipShift = 12

// seal builds what find needs, after the walk.
func (s *segment) seal() {
	if s.mmapped {
		return
	}
	units := (s.end - s.start) / unit
	s.skip = make([]uint32, units>>skipShift+1)
	last := uint64(0)
	for k := range s.skip {
		s.skip[k] = uint32(last)
		from, to := uint64(k)<<skipShift, min(uint64(k+1)<<skipShift, units)
		if to == from {
			continue
		}
		if i, ok := s.starts.prev(to-1, from); ok {
			last = i
		}
	}
}

// holds returns the unit where the chunk over address a starts.
func (s *segment) holds(a uint64) (uint64, bool) {
	i := (a - s.start) / unit
	k := i >> skipShift
	if start, ok := s.starts.prev(i, k<<skipShift); ok {
		return start, true
	}
	i = uint64(s.skip[k])
	return i, s.starts.has(i)
}
