package heap

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/content"
)

// Joined says what became of the blocks in a trace's books in the memory where they are looked for. The figures are of
// the blocks that the trace followed, not scaled up where it sampled.
type Joined struct {
	Held      Count `json:"held"`      // still in use by the heap's own books
	Unchecked Count `json:"unchecked"` // readable, but in no heap that is known: they may have been freed
	Gone      Count `json:"gone"`      // freed since, or not in this memory
	// Untraced are the blocks in use that no stack of the trace made: from before it, or of functions without a probe.
	Untraced       *Count          `json:"untraced,omitempty"`
	UntracedGroups []content.Group `json:"untraced_groups,omitempty"`

	addrs []uint64 // of the malloc blocks that are held, ascending
}

const (
	// maxJoinedGroups bounds the shapes of all stacks that are told apart.
	maxJoinedGroups = 1 << 16
	// maxShapes is how many shapes of one stack are listed; the rest is summed up.
	maxShapes = 16
	// joinJob is how many blocks a worker reads at a time.
	joinJob = 4096
)

// tracedBlock is a block of one of the stacks.
type tracedBlock struct {
	profile.Block
	stack int
}

// Join reads the blocks of each stack at their exact bounds and fills in the stacks' Content. With a heap (nil when there
// is none that is known), blocks that it does not hold any more are left out.
func Join(ctx context.Context, space *Space, h *Heap, stacks []*profile.Stack, noRedact bool) (*Joined, error) {
	j := &Joined{}
	blocks := j.held(h, stacks)
	const workers = 2
	all := make([]*joiner, workers)
	var next atomic.Int64
	var wait sync.WaitGroup
	for i := range all {
		opt := space.ContentOptions(noRedact)
		opt.MaxGroups, opt.NoStrings = maxJoinedGroups, true
		all[i] = &joiner{grouper: content.NewGrouper(opt), window: window{mem: space.Mem}}
		wait.Go(func() {
			for ctx.Err() == nil {
				from := (int(next.Add(1)) - 1) * joinJob
				if from >= len(blocks) {
					return
				}
				all[i].read(blocks[from:min(from+joinJob, len(blocks))])
			}
		})
	}
	wait.Wait()
	if err := cmp.Or(ctx.Err(), space.err()); err != nil {
		return nil, fmt.Errorf("read the blocks of the trace: %w", err)
	}
	for _, w := range all[1:] {
		all[0].grouper.Merge(w.grouper)
		all[0].lost = append(all[0].lost, w.lost...)
	}
	for _, b := range all[0].lost {
		j.drop(h, stacks, &b)
	}
	fillContent(stacks, all[0].grouper.Groups())
	return j, nil
}

// held lists the blocks that are in use as far as the heap knows, in order of address.
func (j *Joined) held(h *Heap, stacks []*profile.Stack) []tracedBlock {
	var blocks []tracedBlock
	for i, s := range stacks {
		for _, b := range s.Blocks {
			switch known, inUse := h.judge(s.Kind, b); {
			case known && !inUse:
				j.Gone.add(b.Size)
				continue
			case known:
				j.Held.add(b.Size)
				if s.Kind == profile.KindMalloc {
					j.addrs = append(j.addrs, b.Addr)
				}
			default:
				j.Unchecked.add(b.Size)
			}
			blocks = append(blocks, tracedBlock{b, i})
		}
	}
	slices.SortFunc(blocks, func(a, b tracedBlock) int { return cmp.Compare(a.Addr, b.Addr) })
	slices.Sort(j.addrs)
	return blocks
}

// judge says whether the heap knows about a block's address, and whether the block is in use. A block of a pool lies inside
// one of malloc's.
func (h *Heap) judge(kind profile.Kind, b profile.Block) (known, inUse bool) {
	if h == nil || kind == profile.KindMmap || kind == profile.KindBrk {
		return false, false
	}
	if _, _, ok := h.locateSegment(b.Addr); !ok {
		return false, false
	}
	found, ok := h.Find(b.Addr)
	if kind == profile.KindMalloc {
		return true, ok && found.Addr == b.Addr && found.Size >= b.Size
	}
	return true, ok && b.Addr+b.Size <= found.Addr+found.Size
}

// drop takes a block that could not be read out of those that are there.
func (j *Joined) drop(h *Heap, stacks []*profile.Stack, b *tracedBlock) {
	if known, _ := h.judge(stacks[b.stack].Kind, b.Block); known {
		j.Held.take(b.Size)
	} else {
		j.Unchecked.take(b.Size)
	}
	j.Gone.add(b.Size)
}

// joiner reads blocks for one goroutine.
type joiner struct {
	grouper *content.Grouper
	window  window
	lost    []tracedBlock
}

func (w *joiner) read(blocks []tracedBlock) {
	for _, b := range blocks {
		data := w.window.upTo(b.Addr, int(min(b.Size, look)))
		if len(data) == 0 && b.Size > 0 {
			w.lost = append(w.lost, b)
			continue
		}
		w.grouper.AddWeighted(uint64(b.stack)+1, b.Addr, b.Size, b.Weight, data)
	}
}

// fillContent hands the groups, most bytes first, to their stacks.
func fillContent(stacks []*profile.Stack, groups []content.Group) {
	for _, s := range stacks {
		s.Content = nil
	}
	for _, g := range groups {
		if g.Key == 0 { // too many shapes altogether to tell whose these are
			continue
		}
		s := stacks[g.Key-1]
		if len(s.Content) < maxShapes {
			s.Content = append(s.Content, profile.Content{
				Shape: g.Shape.String(), Blocks: int64(g.Count), Bytes: int64(g.Bytes), Samples: g.Samples,
			})
			continue
		}
		rest := &s.Content[maxShapes-1]
		if rest.Shape != otherShapes {
			*rest = profile.Content{Shape: otherShapes, Blocks: rest.Blocks, Bytes: rest.Bytes}
		}
		rest.Blocks += int64(g.Count)
		rest.Bytes += int64(g.Bytes)
	}
}

const otherShapes = "other shapes"

// made says whether the trace saw a block made.
func (j *Joined) made(b Block) bool {
	_, ok := slices.BinarySearch(j.addrs, b.Addr)
	return ok
}
