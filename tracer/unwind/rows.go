package unwind

import "slices"

// span is a range of the rows array.
type span struct{ at, n uint32 }

// rowSpace hands out ranges of the rows array, first fit. Free spans are sorted and never touch.
type rowSpace struct {
	free []span
	used uint32
}

func newRowSpace(n uint32) *rowSpace { return &rowSpace{free: []span{{0, n}}} }

func (r *rowSpace) alloc(n uint32) (uint32, bool) {
	for i := range r.free {
		f := &r.free[i]
		if f.n < n {
			continue
		}
		at := f.at
		f.at, f.n = f.at+n, f.n-n
		if f.n == 0 {
			r.free = slices.Delete(r.free, i, i+1)
		}
		r.used += n
		return at, true
	}
	return 0, false
}

func (r *rowSpace) release(at, n uint32) {
	r.used -= n
	i, _ := slices.BinarySearchFunc(r.free, at, func(s span, at uint32) int {
		if s.at < at {
			return -1
		}
		return 1
	})
	r.free = slices.Insert(r.free, i, span{at, n})
	if i+1 < len(r.free) && r.free[i].at+r.free[i].n == r.free[i+1].at {
		r.free[i].n += r.free[i+1].n
		r.free = slices.Delete(r.free, i+1, i+2)
	}
	if i > 0 && r.free[i-1].at+r.free[i-1].n == r.free[i].at {
		r.free[i-1].n += r.free[i].n
		r.free = slices.Delete(r.free, i, i+1)
	}
}
