package heap

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// Leaks are the blocks in use that nothing points to: no variable, stack or register that is known, and no block that is
// itself reachable. Any aligned word counts as a pointer that looks like one into a block, also to its inside, so a block
// listed here is lost unless its address is kept in some disguise (XORed, compressed, in a file, another process or only
// in the register of a running thread); a lost block may be missed when a stale word still names it.
type Leaks struct {
	Unreachable Count `json:"unreachable"`
	Direct      Count `json:"direct"` // of these, those that no other unreachable block points to
	// Blocks are the largest direct ones.
	Blocks []Leak          `json:"blocks"`
	Groups []content.Group `json:"groups"`
	// Notes say what could not be looked at.
	Notes     []string `json:"notes,omitempty"`
	RootBytes uint64   `json:"root_bytes"`

	heap  *Heap
	marks map[*segment]*marks
}

// Leak is one unreachable block.
type Leak struct {
	Addr  uint64 `json:"address"`
	Size  uint64 `json:"size"`
	Shape string `json:"shape"`
}

// marks are the states of a segment's chunks while pointers are followed.
type marks struct {
	reached  bitmap
	pending  bitmap // reached, but not yet searched for pointers
	indirect bitmap
	queued   []bool // by region
}

const (
	regionShift = 18 // regions of 256 KiB: work is done region by region, so that reads stay together
	leaksListed = 20
)

// region is a part of a segment that has pending chunks.
type region struct {
	s *segment
	n uint64
}

// marker follows pointers.
type marker struct {
	h       *Heap
	marks   map[*segment]*marks
	queue   []region
	low     uint64 // no block lies outside of [low, high)
	high    uint64
	w       window
	noRoots []span

	lastSegment *segment
	lastMarks   *marks
}

// Leaks finds the blocks that nothing points to.
func (h *Heap) Leaks(ctx context.Context, noRedact bool) (*Leaks, error) {
	m := &marker{h: h, marks: map[*segment]*marks{}, w: window{mem: h.space.Mem}}
	for _, s := range h.segments {
		units := uint64(len(s.inUse)) * 64
		m.marks[s] = &marks{
			reached: newBitmap(units), pending: newBitmap(units), indirect: newBitmap(units),
			queued: make([]bool, (s.end-s.start)>>regionShift+1),
		}
	}
	if n := len(h.segments); n > 0 {
		m.low, m.high = h.segments[0].start, h.segments[n-1].end
	}
	l := &Leaks{heap: h, marks: m.marks}
	if err := m.roots(ctx, l); err != nil {
		return nil, err
	}
	if err := m.follow(ctx); err != nil {
		return nil, err
	}
	if err := m.classify(ctx, l, noRedact); err != nil {
		return nil, err
	}
	return l, nil
}

// Each calls yield for every unreachable block in order of address, until it returns false.
func (l *Leaks) Each(yield func(Block) bool) {
	for _, s := range l.heap.segments {
		for i := range l.units(s) {
			if !yield(s.block(i)) {
				return
			}
		}
	}
}

// units iterates over the unreachable chunks of a segment.
func (l *Leaks) units(s *segment) func(func(uint64) bool) {
	return func(yield func(uint64) bool) {
		reached := l.marks[s].reached
		for i, ok := s.inUse.next(0); ok; i, ok = s.inUse.next(i + 1) {
			if !reached.has(i) && !yield(i) {
				return
			}
		}
	}
}

// roots marks what variables, stacks and registers point to.
func (m *marker) roots(ctx context.Context, l *Leaks) error {
	space := m.h.space
	running, missing := 0, 0
	for _, t := range space.Threads {
		if t.SP == 0 {
			running++
		}
		for _, word := range t.Registers {
			m.mark(word)
		}
	}
	if len(space.Threads) == 0 {
		running = 1
		l.Notes = append(l.Notes, "no threads are known: stacks were searched whole, so that stale words may hide leaks")
	} else if running > 0 {
		l.Notes = append(l.Notes, fmt.Sprintf("%d running threads: their registers are unknown and their stacks were searched whole", running))
	}
	for i, r := range space.Ranges {
		if !m.isRoot(i) {
			continue
		}
		spans, err := m.rootSpans(r, running > 0)
		if err != nil {
			return err
		}
		for _, s := range spans {
			if err := m.root(ctx, l, s); err != nil {
				return err
			}
		}
		if absent, err := space.absent(r); err != nil {
			return err
		} else if absent {
			missing++
		}
	}
	if missing > 0 {
		l.Notes = append(l.Notes, fmt.Sprintf("%d ranges of variables and stacks are not in this dump: what only they point to "+
			"is listed as unreachable", missing))
	}
	return nil
}

// isRoot: all private memory that can be written, and what the loader made read-only after it had filled it in. Memory that
// is shared with other processes seldom holds addresses of one of them.
func (m *marker) isRoot(i int) bool {
	r := m.h.space.Ranges[i]
	if r.writable() {
		return r.Perms[3] == 'p'
	}
	ranges := m.h.space.Ranges
	return r.file() && r.Perms == "r--p" && i+1 < len(ranges) && ranges[i+1].writable() && ranges[i+1].Path == r.Path
}

// rootSpans are the parts of a range that count as roots: not the heap itself, not what lies beyond a stack's end, not the
// stacks of threads that are gone.
func (m *marker) rootSpans(r Range, running bool) ([]span, error) {
	start := r.Start
	if r.Kind == memory.KindStack || r.Kind == memory.KindThreadStack || r.Path == "[stack]" {
		sp, ok := m.lowestSP(r)
		switch {
		case ok:
			start = (sp - redZone) &^ 7
		case !running:
			return nil, nil
		}
	}
	filled, err := m.h.space.filled(max(start, r.Start), r.End)
	if err != nil {
		return nil, err
	}
	var spans []span
	for _, f := range filled {
		spans = append(spans, m.withoutHeap(f)...)
	}
	return spans, nil
}

// redZone is how far below its stack pointer a function may keep data on x86-64.
const redZone = 128

func (m *marker) lowestSP(r Range) (sp uint64, ok bool) {
	for _, t := range m.h.space.Threads {
		if r.has(t.SP) && (!ok || t.SP < sp) {
			sp, ok = t.SP, true
		}
	}
	return sp, ok
}

// withoutHeap cuts segments and the allocator's own lists out of a span.
func (m *marker) withoutHeap(f span) (rest []span) {
	at := f.start
	cut := func(start, end uint64) {
		if start > at {
			rest = append(rest, span{at, min(start, f.end)})
		}
		at = max(at, end)
	}
	holes := m.holes()
	for _, h := range holes {
		if h.end > at && h.start < f.end {
			cut(h.start, h.end)
		}
	}
	if at < f.end {
		rest = append(rest, span{at, f.end})
	}
	return rest
}

// holes are what is no root in memory that can be written, in order.
func (m *marker) holes() []span {
	if m.noRoots == nil {
		m.noRoots = append(append(m.noRoots, m.h.skipped...), m.h.kept...)
		for _, s := range m.h.segments {
			m.noRoots = append(m.noRoots, span{s.start, s.end})
		}
		sortSpans(m.noRoots)
	}
	return m.noRoots
}

// root marks what a span points to.
func (m *marker) root(ctx context.Context, l *Leaks, s span) error {
	l.RootBytes += s.end - s.start
	return m.scan(ctx, (s.start+7)&^7, s.end, nil)
}

// scanStep is how much is searched between looks at the context.
const scanStep = 1 << 20

// scan searches [start, end) for pointers and gives each word to found; nil means mark.
func (m *marker) scan(ctx context.Context, start, end uint64, found func(uint64)) error {
	for start+8 <= end {
		n := min(end-start, scanStep) &^ 7
		b := m.w.upTo(start, int(n))
		for i := 0; i+8 <= len(b); i += 8 {
			word := binary.LittleEndian.Uint64(b[i:])
			if word < m.low || word >= m.high {
				continue
			}
			if found != nil {
				found(word)
			} else {
				m.mark(word)
			}
		}
		if n == scanStep && ctx.Err() != nil {
			return ctx.Err()
		}
		start += n
		if uint64(len(b)) < n { // an unreadable page: go on behind it
			start = (start - n + uint64(len(b)) + pageSize) &^ (pageSize - 1)
		}
	}
	return nil
}

// mark marks the block that word points to, if any, and queues it to be searched.
func (m *marker) mark(word uint64) {
	s, i, ok := m.locate(word)
	if !ok {
		return
	}
	if s != m.lastSegment { // most pointers lead into the segment of the one before
		m.lastSegment, m.lastMarks = s, m.marks[s]
	}
	k := m.lastMarks
	if k.reached.has(i) {
		return
	}
	k.reached.set(i)
	k.pending.set(i)
	n := i * unit >> regionShift
	if !k.queued[n] {
		k.queued[n] = true
		m.queue = append(m.queue, region{s, n})
	}
}

func (m *marker) locate(word uint64) (*segment, uint64, bool) {
	if word < m.low || word >= m.high {
		return nil, 0, false
	}
	return m.h.locate(word)
}

// follow searches pending blocks until there are none.
func (m *marker) follow(ctx context.Context) error {
	for len(m.queue) > 0 {
		r := m.queue[len(m.queue)-1]
		m.queue = m.queue[:len(m.queue)-1]
		k := m.marks[r.s]
		k.queued[r.n] = false
		from, to := r.n<<regionShift/unit, (r.n+1)<<regionShift/unit
		for i, ok := k.pending.next(from); ok && i < to; i, ok = k.pending.next(i + 1) {
			k.pending.clear(i)
			b := r.s.block(i)
			if err := m.scan(ctx, b.Addr, b.Addr+b.Size, nil); err != nil {
				return err
			}
		}
		// Chunks marked meanwhile that lie before the one that points to them: their region is queued again.
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

// classify tells direct from indirect leaks and groups them by shape.
func (m *marker) classify(ctx context.Context, l *Leaks, noRedact bool) error {
	for b := range l.Each {
		l.Unreachable.add(b.Size)
		err := m.scan(ctx, b.Addr, b.Addr+b.Size, func(word uint64) {
			s, i, ok := m.locate(word)
			if ok && !m.marks[s].reached.has(i) && s.block(i) != b {
				m.marks[s].indirect.set(i)
			}
		})
		if err != nil {
			return err
		}
	}
	g := newGrouper(m.h.space, noRedact)
	namer := &content.Classifier{Pointer: m.h.space.NewPointers().Is, Class: m.h.space.NewClasses().Name}
	for _, s := range m.h.segments {
		for i := range l.units(s) {
			b := s.block(i)
			data := m.w.upTo(b.Addr, int(min(b.Size, look)))
			g.Add(0, b.Addr, b.Size, data)
			if m.marks[s].indirect.has(i) {
				continue
			}
			l.Direct.add(b.Size)
			l.list(b, func() string { return namer.Classify(data).String() })
		}
	}
	l.Groups = g.Groups()
	return ctx.Err()
}

// list keeps the largest direct leaks.
func (l *Leaks) list(b Block, shape func() string) {
	at := len(l.Blocks)
	for at > 0 && l.Blocks[at-1].Size < b.Size {
		at--
	}
	if at >= leaksListed {
		return
	}
	l.Blocks = append(l.Blocks, Leak{})
	copy(l.Blocks[at+1:], l.Blocks[at:])
	l.Blocks[at] = Leak{b.Addr, b.Size, shape()}
	l.Blocks = l.Blocks[:min(len(l.Blocks), leaksListed)]
}
