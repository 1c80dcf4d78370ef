package heap

import (
	"cmp"
	"context"
	"slices"
)

// leads are where in its first page the chunk of an mmapped block may start: at 0, or where memalign put it so that the
// block behind the header is aligned.
var leads = []uint64{0, 16, 48, 112, 240, 496, 1008, 2032, 4080}

// mmapped looks for blocks that have a mapping of their own. Their chunk says how long it is; neighbours merge in the
// kernel's list of ranges, so that one range may hold many, beside mappings that are no blocks.
func (w *walker) mmapped(ctx context.Context) error {
	if p := w.libc.params; p != nil {
		w.heap.MmappedSaid = &p.mmapped
		if p.mmapped.Blocks == 0 {
			return nil
		}
	}
	for _, free := range outside(w.heap, w.space) {
		for at := free.start; at < free.end; {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			s, next := w.mmappedAt(at, free.end)
			at = next
			if s == nil {
				continue
			}
			w.heap.segments = append(w.heap.segments, s)
			w.heap.Mmapped.add(next - s.lead)
			if said := w.heap.MmappedSaid; said != nil && *said == w.heap.Mmapped {
				return nil
			}
		}
	}
	return nil
}

// mmappedAt looks for a chunk whose mapping starts at page, and returns the next page to look at.
func (w *walker) mmappedAt(page, end uint64) (*segment, uint64) {
	for _, lead := range leads {
		p := page + lead
		prev, ok1 := w.main.word(p)
		head, ok2 := w.main.word(p + 8)
		if !ok1 || !ok2 {
			break
		}
		size := head &^ flags
		whole := prev + size
		if head&flags != flagMmapped || prev > p || prev%unit != 0 || size < minChunk || whole < size || whole%4096 != 0 {
			continue
		}
		// A block with a large alignment may leave whole pages free before it.
		start := p - prev
		if start%4096 != 0 || start+whole > end || lead < 4080 && start != page {
			continue
		}
		s := &segment{arena: -1, start: p, end: p + size, lead: start, mmapped: true, inUse: bitmap{1}, starts: bitmap{1}}
		return s, start + whole
	}
	return nil, page + 4096
}

// outside lists the anonymous memory that belongs to no arena.
func outside(h *Heap, space *Space) []span {
	taken := make([]span, 0, len(h.segments)+len(h.kept))
	taken = append(taken, h.kept...)
	for _, s := range h.segments {
		if s.plain {
			taken = append(taken, span{s.start &^ 4095, (s.end + 4095) &^ 4095})
			continue
		}
		if s.mmapped {
			taken = append(taken, span{s.lead, (s.end + 4095) &^ 4095})
			continue
		}
		if !h.Arenas[s.arena].Main {
			taken = append(taken, span{s.start &^ (heapMax - 1), s.end})
			continue
		}
		taken = append(taken, span{s.start &^ 4095, s.end})
	}
	sortSpans(taken)
	var free []span
	for _, r := range space.Ranges {
		if !r.anonymous() || r.Path == "[heap]" && len(h.segments) > 0 {
			continue
		}
		at := r.Start
		for len(taken) > 0 && taken[0].end <= at {
			taken = taken[1:]
		}
		for _, t := range taken {
			if t.start >= r.End {
				break
			}
			if t.start > at {
				free = append(free, span{at, t.start})
			}
			at = (t.end + 4095) &^ 4095
		}
		if at < r.End {
			free = append(free, span{at, r.End})
		}
	}
	return free
}

func sortSpans(spans []span) {
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.start, b.start) })
}
