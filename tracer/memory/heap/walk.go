package heap

import (
	"cmp"
	"context"
	"encoding/binary"
	"slices"
)

// walker walks the arenas of one libc.
type walker struct {
	heap   *Heap
	space  *Space
	libc   *libc
	main   window
	probe  window // for looks aside, so that the main window keeps its place
	caches []cacheCandidate
	first  int // index of this libc's main arena in heap.Arenas
}

const (
	chunkHeader = 16
	minChunk    = 32
	fencepost   = 16 // a chunk too small to be one: the end of a piece of heap

	flagInUse   = 1 // of the chunk before
	flagMmapped = 2
	flagArena   = 4 // not of the main arena
	flags       = 7
)

func (w *walker) walk(ctx context.Context) error {
	w.first = len(w.heap.Arenas)
	for n, addr := range append([]uint64{w.libc.main}, w.libc.threads...) {
		if err := w.arena(ctx, addr, n == 0); err != nil {
			return err
		}
	}
	if !w.libc.ringOK {
		w.heap.problem(w.libc.main, "list of arenas is broken; arenas were found by the shape of their heaps")
	}
	if err := w.mmapped(ctx); err != nil {
		return err
	}
	slices.SortFunc(w.heap.segments, func(a, b *segment) int { return cmp.Compare(a.start, b.start) })
	for _, s := range w.heap.segments {
		s.seal()
	}
	w.emptyCaches()
	w.emptyFastbins()
	return nil
}

// arena walks all pieces of one arena.
func (w *walker) arena(ctx context.Context, addr uint64, isMain bool) error {
	lay := w.libc.state
	w.heap.Arenas = append(w.heap.Arenas, Arena{Addr: addr, Main: isMain, state: lay})
	index := len(w.heap.Arenas) - 1
	a := &w.heap.Arenas[index]
	w.heap.skipped = append(w.heap.skipped, span{addr, addr + lay.stateSize})
	state := words(w.space.Mem, addr, int(lay.stateSize/8))
	if state == nil {
		w.heap.problem(addr, "arena cannot be read")
		return nil
	}
	a.System = state[lay.systemMem/8]
	top := state[lay.top/8]
	segments := w.threadSegments(index, addr)
	if isMain {
		if a.System == 0 {
			return nil // never used: all blocks are in thread arenas or mmapped
		}
		segments = w.mainSegments(index, top)
	} else {
		for _, s := range segments {
			a.Overhead += s.start % heapMax
		}
	}
	if len(segments) == 0 {
		w.heap.problem(addr, "arena's memory is not in this image")
	}
	for _, s := range segments {
		w.heap.segments = append(w.heap.segments, s)
		if err := w.segment(ctx, a, s, top); err != nil {
			return err
		}
	}
	return nil
}

// threadSegments are the heaps of a thread arena. In its first one the arena itself stands before the chunks.
func (w *walker) threadSegments(index int, arena uint64) []*segment {
	var segments []*segment
	for _, h := range w.libc.heaps {
		if h.arena != arena {
			continue
		}
		first := h.addr + arena%heapMax // the length of heap_info
		if arena-h.addr < heapMax {
			first = (arena + w.libc.state.stateSize + unit - 1) &^ (unit - 1)
		}
		if first < h.addr+h.size {
			segments = append(segments, newSegment(index, first, h.addr+h.size))
		}
	}
	return segments
}

// mainSegments are the runs of memory that brk gave to the main arena, and those that mmap did when brk failed.
func (w *walker) mainSegments(index int, top uint64) []*segment {
	var segments []*segment
	starts := []uint64{top}
	if p := w.libc.params; p != nil {
		starts = append(starts, p.sbrkBase)
	}
	for _, r := range w.space.Ranges {
		if r.Path == "[heap]" {
			starts = append(starts, r.Start)
		}
	}
	var runs []span
	for _, a := range starts {
		r, _ := w.space.find(a)
		run, ok := w.run(r)
		if !ok || slices.Contains(runs, run) {
			continue
		}
		runs = append(runs, run)
		start := run.start
		if p := w.libc.params; p != nil && p.sbrkBase > start && p.sbrkBase < run.end {
			start = (p.sbrkBase + unit - 1) &^ (unit - 1)
			w.heap.Arenas[index].Overhead += start - p.sbrkBase
		}
		s := newSegment(index, start, run.end)
		s.brk = r.Path == "[heap]" || w.libc.params != nil && s.start < w.libc.params.sbrkBase+unit && s.end > w.libc.params.sbrkBase
		segments = append(segments, s)
	}
	return segments
}

// run is the stretch of adjacent anonymous ranges around r; the kernel splits a heap where permissions once differed.
func (w *walker) run(r Range) (span, bool) {
	if !r.anonymous() {
		return span{}, false
	}
	run := span{r.Start, r.End}
	for {
		next, ok := w.space.find(run.end)
		if !ok || !next.anonymous() || next.Path != r.Path {
			break
		}
		run.end = next.End
	}
	for run.start > 0 {
		prev, ok := w.space.find(run.start - 1)
		if !ok || !prev.anonymous() || prev.Path != r.Path {
			break
		}
		run.start = prev.Start
	}
	return run, true
}

// checkEvery is how many chunks pass between looks at the context.
const checkEvery = 1 << 16

// segment follows the chain of chunks from the start of a segment to its end. Where the chain breaks, it looks for the next
// place from which a chain leads on, and counts what lies between as lost.
func (w *walker) segment(ctx context.Context, a *Arena, s *segment, top uint64) error {
	p := s.start
	retried := uint64(0)
	for n := 0; p+chunkHeader <= s.end; n++ {
		if n%checkEvery == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		head, readable := w.main.word(p + 8)
		size := head &^ flags
		s.starts.set((p - s.start) / unit)
		switch {
		case !readable:
		case p == top && size >= fencepost && size <= s.end-p:
			a.Top.add(size)
			next := w.afterTop(a, s, p+size)
			if next == s.end {
				s.cut(p + size)
				return nil
			}
			p = next
			continue
		case size == fencepost:
			next := w.fence(a, s, p)
			if next == s.end {
				return nil
			}
			p = next
			continue
		case validHead(head, s.end-p, a.Main):
			if next, ok := w.main.word(p + size + 8); ok {
				w.chunk(a, s, p, size, next)
				p += size
				continue
			}
		}
		if retried != p { // a live process may have moved its books since this window was read
			retried = p
			w.main.forget()
			continue
		}
		next := w.nextChain(s, p+unit, top)
		if p != s.start || next == s.end || w.libc.params != nil {
			w.lost(a, p, next, head, readable)
		}
		p = next
	}
	return nil
}

// cut shortens a segment whose end was not known before its last chunk.
func (s *segment) cut(end uint64) {
	s.end = end
	units := (end - s.start + unit - 1) / unit
	s.starts, s.inUse = s.starts[:(units+63)/64], s.inUse[:(units+63)/64]
}

// chunk books one chunk. The one after it says whether it is in use.
func (w *walker) chunk(a *Arena, s *segment, p, size, next uint64) {
	if next&flagInUse == 0 {
		a.Free.add(size)
		if prevSize, ok := w.main.word(p + size); ok && prevSize != size {
			w.heap.problem(p, "free chunk of %d bytes, but the next one says %d", size, prevSize)
		}
		return
	}
	a.InUse.add(size)
	s.inUse.set((p - s.start) / unit)
	if size == tcacheChunkOld || size == tcacheChunkNew {
		w.noteCache(p, size)
	}
}

// fence handles the small chunks that end a piece of heap, and returns where the next piece starts. A thread arena
// has one piece a heap. The main arena goes on behind memory that somebody else took with brk, which it counts as its
// own, or, when brk fails, with pieces from mmap, the newest of which has the lowest address.
func (w *walker) fence(a *Arena, s *segment, p uint64) uint64 {
	if !a.Main {
		a.Overhead += s.end - p
		return s.end
	}
	end := p + fencepost // two as a rule, three where the rest of the old top was too small for a chunk
	for head, ok := w.main.word(end + 8); ok && head&^flags == fencepost && end < p+3*fencepost; head, ok = w.main.word(end + 8) {
		end += fencepost
	}
	next := w.nextPiece(s, end)
	if s.brk {
		a.Overhead += next - p
	} else {
		a.Overhead += end - p
	}
	if next > end {
		s.starts.set((end - s.start) / unit)
	}
	return next
}

// nextPiece finds where the main arena's next piece starts: anywhere after foreign brk memory, at a page after mmap.
func (w *walker) nextPiece(s *segment, p uint64) uint64 {
	top := w.topOf(&w.heap.Arenas[s.arena])
	if s.brk {
		return w.nextChain(s, p, top)
	}
	for p = (p + 4095) &^ 4095; p+minChunk <= s.end; p += 4096 {
		head, ok := w.main.word(p + 8)
		if p == top || ok && validHead(head, s.end-p, true) && w.isChain(s, p, top, true) {
			return p
		}
	}
	return s.end
}

// afterTop returns where chunks go on behind the top chunk, if the arena says that it has more.
func (w *walker) afterTop(a *Arena, s *segment, p uint64) uint64 {
	if !a.Main || a.known() >= a.System || p == s.end {
		return s.end
	}
	s.starts.set((p - s.start) / unit)
	return w.nextPiece(s, p)
}

func (w *walker) topOf(a *Arena) uint64 {
	if t := words(w.space.Mem, a.Addr+a.state.top, 1); t != nil {
		return t[0]
	}
	return 0
}

func (w *walker) lost(a *Arena, p, next, head uint64, readable bool) {
	a.Lost += next - p
	if !readable {
		w.heap.problem(p, "chunk cannot be read; %d bytes skipped", next-p)
		return
	}
	w.heap.problem(p, "lost the chain of chunks at a head of %#x; %d bytes skipped", head, next-p)
}

func validHead(head, room uint64, isMain bool) bool {
	size := head &^ flags
	if size < minChunk || size%unit != 0 || size > room-chunkHeader || head&flagMmapped != 0 {
		return false
	}
	return !isMain || head&flagArena == 0
}

// chainLength is how many chunks in a row are taken for a chain, not for chance.
const chainLength = 16

// nextChain returns the first address from p on where a chain starts, or the segment's end.
func (w *walker) nextChain(s *segment, p, top uint64) uint64 {
	isMain := w.heap.Arenas[s.arena].Main
	for ; p+minChunk <= s.end; p += unit {
		head, ok := w.main.word(p + 8)
		if !ok {
			p = p&^4095 + 4096 - unit // the next page may be readable
			continue
		}
		if p == top || validHead(head, s.end-p, isMain) && w.isChain(s, p, top, isMain) {
			return p
		}
	}
	return s.end
}

// isChain says whether chunks lead on from p: chainLength of them or up to the end, each free one confirmed by the next.
func (w *walker) isChain(s *segment, p, top uint64, isMain bool) bool {
	for range chainLength {
		if p == top {
			return true
		}
		b := w.probe.bytes(p, chunkHeader)
		if b == nil {
			return false
		}
		head := binary.LittleEndian.Uint64(b[8:])
		size := head &^ flags
		if size == fencepost {
			return true
		}
		if !validHead(head, s.end-p, isMain) {
			return false
		}
		next := w.probe.bytes(p+size, chunkHeader)
		if next == nil {
			return false
		}
		prevSize, nextHead := binary.LittleEndian.Uint64(next), binary.LittleEndian.Uint64(next[8:])
		if nextHead&flagInUse == 0 && prevSize != size {
			return false
		}
		p += size
	}
	return true
}
