package heap

import (
	"encoding/binary"
	"sort"
)

// The chunk of a thread's tcache_perthread_struct: 64 counts of one byte before 2.30, of two since, and 64 lists.
const (
	tcacheChunkOld = 0x250
	tcacheChunkNew = 0x290
)

// cacheCandidate is a block that may be a tcache_perthread_struct.
type cacheCandidate struct {
	chunk  uint64
	counts [tcacheBins]uint16
	heads  [tcacheBins]uint64
}

// noteCache keeps the block at chunk p when it may be a thread's cache with something in it. Few other blocks of that size
// pass: each count must agree with its list about being empty.
func (w *walker) noteCache(p, size uint64) {
	width := uint64(1)
	if size == tcacheChunkNew {
		width = 2
	}
	b := w.main.bytes(p+chunkHeader, int(tcacheBins*(width+8)))
	if b == nil {
		return
	}
	c := cacheCandidate{chunk: p}
	filled := false
	for i := range tcacheBins {
		count := uint16(b[i])
		if width == 2 {
			count = binary.LittleEndian.Uint16(b[i*2:])
		}
		head := binary.LittleEndian.Uint64(b[tcacheBins*int(width)+i*8:])
		if (count == 0) != (head == 0) || head%unit != 0 {
			return
		}
		c.counts[i], c.heads[i] = count, head
		filled = filled || count != 0
	}
	if filled {
		w.caches = append(w.caches, c)
	}
}

// mangling says how the pointers of tcache and fastbin lists are stored.
type mangling int

const (
	unknown mangling = iota
	plain            // before 2.32
	safe             // safe-linking: XORed with their own place, shifted by 12
)

func (m mangling) reveal(place, stored uint64) uint64 {
	if m == safe {
		return place>>12 ^ stored
	}
	return stored
}

// emptyCaches takes the blocks in threads' caches out of those in use.
func (w *walker) emptyCaches() {
	link := w.linkOfLists()
	for i := range w.caches {
		c := &w.caches[i]
		entries, whole := w.entriesOf(c, link)
		if !whole && len(entries) < 2 { // no cache, or one that changed below us: nothing can be said
			for _, e := range entries {
				e.s.inUse.set(e.i)
			}
			continue
		}
		if !whole {
			w.heap.problem(c.chunk, "thread cache changed or is damaged; the rest of it counts as in use")
		}
		for _, e := range entries {
			a := &w.heap.Arenas[e.s.arena]
			a.InUse.take(e.size)
			a.Tcache.add(e.size)
		}
	}
}

// cached is a block in a cache.
type cached struct {
	s       *segment
	i, size uint64
}

// entriesOf follows the lists of a cache and marks their blocks as not in use, which also ends a list that runs in a circle.
// whole is false when a list leads astray before its count is reached.
func (w *walker) entriesOf(c *cacheCandidate, link mangling) (entries []cached, whole bool) {
	for bin, count := range c.counts {
		want := uint64(minChunk + bin*unit)
		e := c.heads[bin]
		for range count {
			p := e - chunkHeader
			s, size, found := w.heap.chunk(p)
			if !found || size != want {
				return entries, false
			}
			i := (p - s.start) / unit
			if !s.inUse.has(i) {
				return entries, false
			}
			s.inUse.clear(i)
			entries = append(entries, cached{s, i, size})
			stored := words(w.space.Mem, e, 1)
			if stored == nil {
				return entries, false
			}
			e = link.reveal(e, stored[0])
		}
	}
	return entries, true
}

// maxVote is the longest list that has a say in how lists are linked. A handful of them settle it.
const (
	maxVote   = 256
	fewVoters = 64
)

// linkOfLists finds out whether lists are mangled: the last entry of a list tells, whose link is zero when plain.
func (w *walker) linkOfLists() mangling {
	votes := map[mangling]int{}
	for _, c := range w.caches {
		for bin, count := range c.counts {
			if count == 0 || count > maxVote {
				continue
			}
			if votes[plain]+votes[safe] >= fewVoters {
				break
			}
			for _, m := range []mangling{plain, safe} {
				if w.endsAfter(c.heads[bin], int(count), m) {
					votes[m]++
				}
			}
		}
	}
	switch {
	case votes[safe] > votes[plain]:
		return safe
	case votes[plain] > 0:
		return plain
	}
	return w.linkByVersion()
}

func (w *walker) endsAfter(e uint64, count int, m mangling) bool {
	for range count {
		if _, _, ok := w.heap.chunk(e - chunkHeader); !ok {
			return false
		}
		stored := words(w.space.Mem, e, 1)
		if stored == nil {
			return false
		}
		e = m.reveal(e, stored[0])
	}
	return e == 0
}

// linkByVersion is for processes without a filled cache. Where even the version is unknown, the fastbins decide.
func (w *walker) linkByVersion() mangling {
	minor, ok := minorVersion(w.libc.version)
	switch {
	case !ok:
		return unknown
	case minor >= 32:
		return safe
	}
	return plain
}

func minorVersion(version string) (minor int, ok bool) {
	if len(version) < 3 {
		return 0, false
	}
	for _, c := range version[2:] {
		minor = minor*10 + int(c-'0')
	}
	return minor, true
}

// chunk returns the segment and size of the chunk that starts at p.
func (h *Heap) chunk(p uint64) (*segment, uint64, bool) {
	n := sort.Search(len(h.segments), func(n int) bool { return h.segments[n].end > p })
	if n == len(h.segments) {
		return nil, 0, false
	}
	size, ok := h.segments[n].chunkAt(p)
	return h.segments[n], size, ok
}

// emptyFastbins takes freed blocks out of those in use that wait in fastbins.
func (w *walker) emptyFastbins() {
	link := w.linkOfLists()
	for n := w.first; n < len(w.heap.Arenas); n++ {
		a := &w.heap.Arenas[n]
		heads := words(w.space.Mem, a.Addr+a.state.fastbins, fastbinCount)
		for bin, p := range heads {
			if p == 0 {
				continue
			}
			if link == unknown {
				link = w.linkOfFastbin(p)
			}
			w.emptyFastbin(a, p, uint64(minChunk+bin*unit), link)
		}
	}
}

// linkOfFastbin tries both ways from the head of a list; only the right one leads to another chunk or to the end.
func (w *walker) linkOfFastbin(p uint64) mangling {
	stored := words(w.space.Mem, p+chunkHeader, 1)
	if stored == nil {
		return plain
	}
	next := plain.reveal(p+chunkHeader, stored[0])
	if _, _, ok := w.heap.chunk(next); ok || next == 0 {
		return plain
	}
	return safe
}

func (w *walker) emptyFastbin(a *Arena, p, want uint64, link mangling) {
	for p != 0 {
		s, size, ok := w.heap.chunk(p)
		if !ok || size != want {
			w.heap.problem(p, "list of freed blocks of %d bytes is broken here; the rest counts as in use", want)
			return
		}
		i := (p - s.start) / unit
		if !s.inUse.has(i) {
			w.heap.problem(p, "list of freed blocks of %d bytes leads to a block that is free already", want)
			return
		}
		s.inUse.clear(i)
		owner := &w.heap.Arenas[s.arena]
		owner.InUse.take(size)
		owner.Fast.add(size)
		stored, ok := w.main.word(p + chunkHeader)
		if !ok {
			w.heap.problem(p, "list of freed blocks cannot be read")
			return
		}
		p = link.reveal(p+chunkHeader, stored)
	}
}
