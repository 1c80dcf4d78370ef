package tracer

import (
	"testing"

	"pgregory.net/rapid"
)

func page(n uint64) uint64 { return n << 12 }

func TestRegions(t *testing.T) {
	a, b := regionKey{stack: 1}, regionKey{stack: 2}
	for _, tt := range []struct {
		name string
		do   func(r *regions)
		a, b regionBook
	}{
		{"an unmapped head leaves the rest", func(r *regions) {
			r.add(page(10), page(20), region{key: a})
			r.cut(page(9), page(13))
		}, regionBook{1, int64(page(10)), 0, int64(page(3))}, regionBook{}},
		{"an unmapped middle leaves two pieces of one object", func(r *regions) {
			r.add(page(10), page(20), region{key: a})
			r.cut(page(13), page(15))
			r.cut(page(10), page(13))
			r.cut(page(15), page(20))
		}, regionBook{1, int64(page(10)), 1, int64(page(10))}, regionBook{}},
		{"one unmap takes several mappings and the hole between them", func(r *regions) {
			r.add(page(10), page(12), region{key: a})
			r.add(page(15), page(17), region{key: b})
			r.cut(page(11), page(16))
		}, regionBook{1, int64(page(2)), 0, int64(page(1))}, regionBook{1, int64(page(2)), 0, int64(page(1))}},
		{"a fixed mapping over another frees what it covers", func(r *regions) {
			r.add(page(10), page(20), region{key: a})
			r.add(page(12), page(14), region{key: b})
		}, regionBook{1, int64(page(10)), 0, int64(page(2))}, regionBook{1, int64(page(2)), 0, 0}},
		{"a moved mapping keeps its stack and covers its target", func(r *regions) {
			r.add(page(10), page(13), region{key: a})
			r.add(page(30), page(40), region{key: b})
			r.move(page(10), page(3), page(35))
			r.cut(page(35), page(36))
		}, regionBook{1, int64(page(3)), 0, int64(page(1))}, regionBook{1, int64(page(10)), 0, int64(page(3))}},
		{"a mapping that grows stays one object", func(r *regions) {
			r.add(page(10), page(13), region{key: a})
			r.extend(r.at(page(12)), page(13), page(18))
			r.cut(page(10), page(18))
		}, regionBook{1, int64(page(8)), 1, int64(page(8))}, regionBook{}},
		{"unmapping what the trace never saw changes nothing", func(r *regions) {
			r.cut(page(1), page(100))
		}, regionBook{}, regionBook{}},
		{"an allocator's own mapping is in no total", func(r *regions) {
			r.add(page(10), page(13), region{key: a, internal: true})
			r.cut(page(11), page(12))
		}, regionBook{}, regionBook{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRegions()
			tt.do(r)
			if got := *r.book(a); got != tt.a {
				t.Errorf("first stack %+v, want %+v", got, tt.a)
			}
			if got := *r.book(b); got != tt.b {
				t.Errorf("second stack %+v, want %+v", got, tt.b)
			}
		})
	}
}

// Any series of operations leaves what an array of pages would hold.
func TestRegionsAgreeWithAPageArray(t *testing.T) {
	const size = 64
	rapid.Check(t, func(t *rapid.T) {
		r := newRegions()
		var pages [size]uint64
		for range rapid.IntRange(1, 40).Draw(t, "operations") {
			start := rapid.Uint64Range(0, size-1).Draw(t, "start")
			n := rapid.Uint64Range(1, size-start).Draw(t, "length")
			switch rapid.IntRange(0, 2).Draw(t, "operation") {
			case 0:
				stack := rapid.Uint64Range(1, 5).Draw(t, "stack")
				r.add(page(start), page(start+n), region{key: regionKey{stack: stack}})
				for i := range n {
					pages[start+i] = stack
				}
			case 1:
				r.cut(page(start), page(start+n))
				clear(pages[start : start+n])
			case 2:
				to := rapid.Uint64Range(0, size-n).Draw(t, "to")
				if to < start+n && start < to+n {
					continue // the kernel refuses to move onto itself
				}
				r.move(page(start), page(n), page(to))
				copy(pages[to:to+n], pages[start:start+n])
				clear(pages[start : start+n])
			}
		}
		want := map[uint64]int64{}
		for i, stack := range pages {
			of := r.at(page(uint64(i)))
			if (of == nil) != (stack == 0) || of != nil && of.key.stack != stack {
				t.Fatalf("page %d belongs to %+v, want stack %d", i, of, stack)
			}
			want[stack] += int64(page(1))
		}
		for stack := uint64(1); stack <= 5; stack++ {
			b := r.book(regionKey{stack: stack})
			if got := b.allocBytes - b.freeBytes; got != want[stack] {
				t.Fatalf("stack %d holds %d bytes, want %d", stack, got, want[stack])
			}
		}
	})
}
