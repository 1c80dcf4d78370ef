package memory

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Span is a run of addresses.
type Span struct{ Start, End uint64 }

// Selection says which ranges go into a dump: the union of what it names. The zero Selection is what a core file of the kernel
// has: everything that cannot be read from a file again (memory, stacks, changed data of libraries), and the first page of each
// mapped file, which has its build-id.
type Selection struct {
	Heap    bool         // heap and arenas, and beside them the variables of libraries, where allocators keep their books
	Anon    bool         // all private memory that no file backs: heap, arenas, stacks, mapped blocks
	All     bool         // every readable range, code and files and what asked to be left out included
	Spans   []Span       // these addresses
	Largest int          // the N ranges with the most resident memory
	Grown   []RangeUsage // ranges that have more resident memory than they had in this list
}

func (s *Selection) isDefault() bool {
	return !s.Heap && !s.Anon && !s.All && len(s.Spans) == 0 && s.Largest == 0 && s.Grown == nil
}

// piece is a part of a range that goes into a dump.
type piece struct {
	rng        *RangeUsage
	start, end uint64
	context    bool // nobody asked for it, but it explains the rest: it stands behind what was asked for
}

func (p *piece) size() uint64 { return p.end - p.start }

// pick turns a selection into pieces: the asked for in ascending order, then context in ascending order. They do not overlap.
func (s *Selection) pick(ranges []RangeUsage) ([]piece, error) {
	asked, context, err := s.wanted(ranges)
	if err != nil {
		return nil, err
	}
	var pieces []piece
	for i := range ranges {
		for _, span := range asked[i] {
			pieces = append(pieces, piece{&ranges[i], span.Start, span.End, false})
		}
	}
	if len(pieces) == 0 {
		return nil, fmt.Errorf("select ranges: none of the %d ranges fits", len(ranges))
	}
	for i := range ranges {
		if span, ok := context[i]; ok && len(asked[i]) == 0 {
			pieces = append(pieces, piece{&ranges[i], span.Start, span.End, true})
		}
	}
	return pieces, nil
}

// wanted maps the index of a range to the parts of it that go into the dump.
func (s *Selection) wanted(ranges []RangeUsage) (asked map[int][]Span, context map[int]Span, err error) {
	asked, context = map[int][]Span{}, map[int]Span{}
	whole := func(i int) { asked[i] = []Span{{ranges[i].Start, ranges[i].End}} }
	for _, span := range s.Spans {
		if err := cutSpan(ranges, span, asked); err != nil {
			return nil, nil, err
		}
	}
	for i := range asked {
		asked[i] = mergeSpans(asked[i])
	}
	for i := range ranges {
		r := &ranges[i]
		switch {
		case !r.readable():
		case s.All, s.Heap && (r.Kind == KindHeap || r.Kind == KindArena), s.Anon && r.isPrivateMemory() && !r.leftOut(),
			s.isDefault() && r.inCore() && !r.leftOut():
			whole(i)
		case s.Heap && r.Kind == KindLibraryData, s.isDefault() && r.Kind == KindKernel:
			context[i] = Span{r.Start, r.End}
		case s.isDefault() && r.IsFile() && r.Offset == 0 && r.Kind == KindFile:
			context[i] = Span{r.Start, min(r.End, r.Start+PageSize)}
		}
	}
	for _, i := range s.byResident(ranges) {
		whole(i)
	}
	if s.Grown != nil {
		for i, growth := range Growth(s.Grown, ranges) {
			// [vdso] grows when somebody reads it, as a dump does.
			if growth > 0 && ranges[i].readable() && ranges[i].Kind != KindKernel {
				whole(i)
			}
		}
	}
	return asked, context, nil
}

// byResident lists the indexes of the Largest ranges.
func (s *Selection) byResident(ranges []RangeUsage) []int {
	var order []int
	for i := range ranges {
		if ranges[i].readable() && ranges[i].RSS+ranges[i].Swap > 0 {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(a, b int) int {
		return cmp.Compare(ranges[b].RSS+ranges[b].Swap, ranges[a].RSS+ranges[a].Swap)
	})
	return order[:min(s.Largest, len(order))]
}

// cutSpan adds a span's share of each range it meets.
func cutSpan(ranges []RangeUsage, span Span, asked map[int][]Span) error {
	met := false
	first := searchRange(len(ranges), func(i int) *Range { return &ranges[i].Range }, span.Start)
	for i := first; i < len(ranges) && ranges[i].Start < span.End; i++ {
		met = true
		if ranges[i].readable() {
			part := Span{max(span.Start, ranges[i].Start), min(span.End, ranges[i].End)}
			asked[i] = append(asked[i], part)
		}
	}
	if !met {
		return fmt.Errorf("select range %#x-%#x: nothing is mapped there", span.Start, span.End)
	}
	return nil
}

// mergeSpans sorts spans and joins those that touch.
func mergeSpans(spans []Span) []Span {
	slices.SortFunc(spans, func(a, b Span) int { return cmp.Compare(a.Start, b.Start) })
	merged := spans[:1]
	for _, s := range spans[1:] {
		if last := &merged[len(merged)-1]; s.Start <= last.End {
			last.End = max(last.End, s.End)
			continue
		}
		merged = append(merged, s)
	}
	return merged
}

// readable says whether there is anything to read: not in device memory, nor in mere reservations of addresses.
func (r *RangeUsage) readable() bool {
	switch {
	case r.Flags&FlagIO != 0:
		return false
	case r.Kind == KindReserved:
		return r.RSS+r.Swap > 0
	case r.Kind == KindKernel:
		return r.Path == "[vdso]"
	}
	return true
}

// leftOut says whether the program asked not to be dumped (MADV_DONTDUMP: keys, or huge shadow memory).
func (r *RangeUsage) leftOut() bool { return r.Flags&FlagDontDump != 0 }

func (r *RangeUsage) isPrivateMemory() bool {
	switch r.Kind {
	case KindHeap, KindArena, KindStack, KindThreadStack, KindAnonymous:
		return true
	}
	return r.IsAnonymous() && r.Kind == KindLibraryData || r.Kind == KindReserved && r.IsAnonymous()
}

// inCore says whether the content cannot be had from a file.
func (r *RangeUsage) inCore() bool {
	return r.isPrivateMemory() || r.Kind == KindLibraryData || r.Kind == KindShared || r.Anonymous > 0
}

// Growth is by how many resident bytes each range of now exceeds what the same addresses had before. A range may have merged
// with its neighbours, or been split, since: so it is addresses that are compared, not list entries.
func Growth(before, now []RangeUsage) []int64 {
	growth := make([]int64, len(now))
	j := 0
	for i := range now {
		n := &now[i]
		old := 0.0
		for j < len(before) && before[j].End <= n.Start {
			j++
		}
		for k := j; k < len(before) && before[k].Start < n.End; k++ {
			b := &before[k]
			overlap := min(b.End, n.End) - max(b.Start, n.Start)
			old += float64(b.RSS) * float64(overlap) / float64(b.Size())
		}
		growth[i] = int64(n.RSS) - int64(old+0.5)
	}
	return growth
}

// ParseSpan reads "7f0000000000-7f0000021000", each side with or without 0x.
func ParseSpan(text string) (Span, error) {
	low, high, ok := strings.Cut(text, "-")
	start, okStart := parseHex([]byte(strings.ToLower(strings.TrimPrefix(strings.TrimSpace(low), "0x"))))
	end, okEnd := parseHex([]byte(strings.ToLower(strings.TrimPrefix(strings.TrimSpace(high), "0x"))))
	if !ok || !okStart || !okEnd {
		return Span{}, fmt.Errorf("parse range %q: not two hexadecimal addresses START-END", text)
	}
	if start >= end {
		return Span{}, fmt.Errorf("parse range %q: it ends before it starts", text)
	}
	return Span{start, end}, nil
}
