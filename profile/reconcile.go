package profile

// Reconciliation explains the change of resident memory by what the books know. The parts and Unexplained add up to Change.
type Reconciliation struct {
	Change      int64
	Parts       []RSSPart
	Unexplained int64
	// Ranges are the changes by kind of range, the largest first.
	Ranges []RSSPart
	// Estimated is true when the allocator's free chunks could not be read and its slack is what the heap grew beyond the
	// blocks in use; then the heap explains itself and the unexplained part is that of the other ranges.
	Estimated bool
}

// RSSPart is a summand.
type RSSPart struct {
	Name  string
	Bytes int64
}

// mmapThreshold is the size from which glibc gives a block a mapping of its own, outside heap and arenas.
const mmapThreshold = 128 << 10

// Reconcile closes the books against the resident memory; nil when it was not read.
//
// Traps: a block in use need not be resident (never touched), blocks from before the trace may have been freed (their
// sizes are unknown), and a large block lies in an anonymous mapping, not in the heap.
func Reconcile(s *Snapshot) *Reconciliation {
	if s.RSS == nil {
		return nil
	}
	change := s.RSS.byRange()
	r := &Reconciliation{Estimated: s.RSS.AllocatorFree == nil}
	for name, v := range change {
		r.Change += v
		r.Ranges = append(r.Ranges, RSSPart{name, v})
	}
	sortParts(r.Ranges)
	books := bookOf(s)
	r.heap(change["heap"]+change["arena"], books, s)
	r.mappings(change["anonymous"], books)
	r.add("thread stacks", change["thread stack"])
	r.add("files", change["file"])
	r.Unexplained = r.Change
	for _, p := range r.Parts {
		r.Unexplained -= p.Bytes
	}
	return r
}

type rssBooks struct{ small, large, brk, mmap, chunks, unfollowed int64 }

func bookOf(s *Snapshot) rssBooks {
	var b rssBooks
	for _, stack := range s.Stacks {
		bytes, blocks := stack.InUseBytes(), stack.InUseObjects()
		switch {
		case stack.Kind == KindMmap && stack.Label == "":
			b.mmap += bytes
		case stack.Kind == KindBrk:
			b.brk += bytes
		case stack.Kind == KindUnfollowed && stack.Label == "":
			b.unfollowed += bytes
		case stack.Kind != KindMalloc:
		case blocks > 0 && bytes/blocks >= mmapThreshold:
			b.large += bytes
		default:
			b.small += bytes
			b.chunks += blocks
		}
	}
	return b
}

// heap explains the ranges that the allocator cuts blocks from.
func (r *Reconciliation) heap(change int64, b rssBooks, s *Snapshot) {
	r.add("in use by traced stacks", b.small+b.large)
	r.add("brk", b.brk)
	rest := change - b.small - b.brk
	if s.PartlyFollowed() {
		r.add("in use when a window ended", b.unfollowed)
		r.add("while the probes were out", rest-b.unfollowed)
		return
	}
	if r.Estimated {
		r.addHeapRest(rest, s.PreAttach.Frees > 0)
		return
	}
	slack := *s.RSS.AllocatorFree + chunkOverhead(b)
	r.add("allocator slack and free chunks", slack)
	if over := rest - slack; over < 0 {
		r.addHeapRest(over, s.PreAttach.Frees > 0)
	}
}

func (r *Reconciliation) addHeapRest(rest int64, freedBefore bool) {
	switch {
	case rest >= 0:
		r.add("allocator slack and free chunks", rest)
	case freedBefore:
		r.add("blocks from before the trace, freed", rest)
	default:
		r.add("in use but never touched", rest)
	}
}

// chunkOverhead is what malloc's headers and rounding add to small blocks: 8 bytes and half of the 16-byte step.
func chunkOverhead(b rssBooks) int64 { return 16 * b.chunks }

// mappings explains the anonymous ranges: large blocks were named above, so only what is not resident of them counts here.
func (r *Reconciliation) mappings(change int64, b rssBooks) {
	rest := change - b.large
	if rest < 0 {
		r.add("in use but never touched", rest)
		return
	}
	r.add("mmap", min(rest, max(b.mmap, 0)))
}

func (r *Reconciliation) add(name string, bytes int64) {
	if bytes == 0 {
		return
	}
	for i := range r.Parts {
		if r.Parts[i].Name == name {
			r.Parts[i].Bytes += bytes
			return
		}
	}
	r.Parts = append(r.Parts, RSSPart{name, bytes})
}

// byRange is what each kind of range gained.
func (r *RSSChange) byRange() map[string]int64 {
	change := map[string]int64{}
	for name, v := range r.After {
		change[name] += int64(v)
	}
	for name, v := range r.Before {
		change[name] -= int64(v)
	}
	return change
}

func (r *RSSChange) total() int64 {
	var sum int64
	for _, v := range r.byRange() {
		sum += v
	}
	return sum
}
