package heap

import (
	"context"
	"errors"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// Report is what Inspect found out. Its JSON form is the document of allocsnoop inspect --json.
type Report struct {
	PID     int       `json:"pid"`
	Comm    string    `json:"comm"`
	Exe     string    `json:"exe"`
	Taken   time.Time `json:"taken"`
	Live    bool      `json:"live"`              // read from a process that was not stopped
	Partial string    `json:"partial,omitempty"` // why the dump is not complete

	// Heap is nil when there is no allocator that is known; then only Outside is filled.
	Heap  *Heap `json:"heap"`
	Total Arena `json:"total"`
	Exact bool  `json:"exact"`

	Groups     []content.Group `json:"groups"` // blocks in use by shape
	Unreadable Count           `json:"unreadable"`

	// Outside is anonymous memory that belongs to no block: other allocators, pools, JIT compilers; in pages of 4 KiB.
	Outside       []content.Group `json:"outside"`
	OutsidePages  uint64          `json:"outside_pages"`  // that hold something
	OutsideSample uint64          `json:"outside_sample"` // one page in so many was looked at

	Leaks *Leaks `json:"leaks,omitempty"`
	// New are the blocks that were not in use in the image that InspectOptions.Since names.
	New      []content.Group `json:"new,omitempty"`
	NewTotal *Count          `json:"new_total,omitempty"`
	Gone     *Count          `json:"gone_total,omitempty"` // in use there, but not any more
	// Trace is filled when there are InspectOptions.Stacks; what their blocks hold is in the stacks.
	Trace *Joined `json:"trace,omitempty"`

	Seconds float64 `json:"seconds"`
}

// InspectOptions say what Inspect does. The zero value walks the heap and groups its blocks.
type InspectOptions struct {
	NoRedact  bool
	Reachable bool     // look for blocks that nothing points to
	Threads   []Thread // of a live process, see LiveThreads
	Live      bool
	Workers   int // 0 means 2
	// Since is the heap of an older image: blocks that were not in use there are grouped by themselves.
	Since *Heap
	// Stacks are those of a trace, with their blocks: Inspect fills in their Content.
	Stacks []*profile.Stack
}

// look is how much of a block is read to recognize it.
const look = 64 << 10

// Inspect walks the heap of an image and says what is in its blocks.
func Inspect(ctx context.Context, img memory.Image, opt InspectOptions) (*Report, error) {
	began := time.Now()
	info := img.Info()
	r := &Report{PID: info.PID, Comm: info.Comm, Exe: info.Exe, Taken: info.Taken, Live: opt.Live, Partial: info.Partial}
	space := NewSpace(img)
	if opt.Threads != nil {
		space.Threads = opt.Threads
	}
	h, err := Walk(ctx, space)
	switch {
	case err == nil:
		r.Heap, r.Total, r.Exact = h, h.Total(), h.Exact()
	case !errors.Is(err, ErrNoAllocator):
		return nil, err
	}
	if opt.Stacks != nil {
		if r.Trace, err = Join(ctx, space, h, opt.Stacks, opt.NoRedact); err != nil {
			return nil, err
		}
	}
	if h != nil {
		if err := r.group(ctx, opt); err != nil {
			return nil, err
		}
	}
	if err := r.outside(ctx, space, opt); err != nil {
		return nil, err
	}
	if opt.Reachable && h != nil {
		if r.Leaks, err = h.Leaks(ctx, opt.NoRedact); err != nil {
			return nil, err
		}
	}
	if err := space.err(); err != nil {
		return nil, err
	}
	r.Seconds = time.Since(began).Seconds()
	return r, nil
}

// ContentOptions lets a Grouper of the caller's see which words are pointers and name C++ classes, as Inspect does. They are
// for one goroutine.
func (s *Space) ContentOptions(noRedact bool) content.Options {
	return content.Options{NoRedact: noRedact, Pointer: s.NewPointers().Is, Class: s.NewClasses().Name}
}

func newGrouper(space *Space, noRedact bool) *content.Grouper {
	return content.NewGrouper(space.ContentOptions(noRedact))
}

// group classifies all blocks in use.
func (r *Report) group(ctx context.Context, opt InspectOptions) error {
	n := opt.Workers
	if n <= 0 {
		n = 2
	}
	all := make([]*worker, n)
	workers := make([]func(Block, []byte), n)
	for i := range all {
		all[i] = &worker{all: newGrouper(r.Heap.space, opt.NoRedact)}
		switch {
		case opt.Since != nil:
			all[i].old = opt.Since.same
		case r.Trace != nil:
			all[i].old = r.Trace.made
		}
		if all[i].old != nil {
			all[i].fresh = newGrouper(r.Heap.space, opt.NoRedact)
		}
		workers[i] = all[i].add
	}
	if err := r.Heap.Read(ctx, look, workers); err != nil {
		return err
	}
	for _, w := range all[1:] {
		all[0].merge(w)
	}
	r.Groups, r.Unreadable = all[0].all.Groups(), all[0].lost
	switch {
	case opt.Since != nil:
		r.New, r.NewTotal = all[0].fresh.Groups(), &all[0].freshCount
		r.Gone = opt.Since.missing(r.Heap)
	case r.Trace != nil:
		r.Trace.UntracedGroups, r.Trace.Untraced = all[0].fresh.Groups(), &all[0].freshCount
	}
	return nil
}

// worker groups the blocks of one goroutine.
type worker struct {
	all, fresh       *content.Grouper
	old              func(Block) bool // blocks that do not belong to fresh
	lost, freshCount Count
}

func (w *worker) add(b Block, data []byte) {
	if w.old != nil && !w.old(b) {
		w.freshCount.add(b.Size)
		w.fresh.Add(0, b.Addr, b.Size, data)
	}
	if len(data) == 0 {
		w.lost.add(b.Size)
		return
	}
	w.all.Add(0, b.Addr, b.Size, data)
}

func (w *worker) merge(o *worker) {
	w.all.Merge(o.all)
	w.lost.sum(o.lost)
	w.freshCount.sum(o.freshCount)
	if w.fresh != nil {
		w.fresh.Merge(o.fresh)
	}
}

// same says whether a block of the same address and size is in use here.
func (h *Heap) same(b Block) bool {
	found, ok := h.Find(b.Addr)
	return ok && found == b
}

// missing counts the blocks in use that are not in the newer heap.
func (h *Heap) missing(newer *Heap) *Count {
	gone := &Count{}
	for b := range h.Blocks {
		if !newer.same(b) {
			gone.add(b.Size)
		}
	}
	return gone
}

// maxOutside is how many pages outside of the heap are looked at; of more, every second, third, ... one is.
const maxOutside = 1 << 16

const pageSize = 4096

// outside classifies the pages of anonymous memory that no block of the heap lies in.
func (r *Report) outside(ctx context.Context, space *Space, opt InspectOptions) error {
	var pages []span
	h := r.Heap
	if h == nil {
		h = &Heap{}
	}
	for _, s := range outside(h, space) {
		if rg, ok := space.find(s.start); !ok || rg.Kind == memory.KindThreadStack || rg.Kind == memory.KindLibraryData {
			continue
		}
		filled, err := space.filled(s.start, s.end)
		if err != nil {
			return err
		}
		for _, e := range filled {
			pages = append(pages, e)
			r.OutsidePages += (e.end - e.start) / pageSize
		}
	}
	r.OutsideSample = r.OutsidePages/maxOutside + 1
	g := newGrouper(space, opt.NoRedact)
	w := &window{mem: space.Mem}
	n := uint64(0)
	for _, e := range pages {
		for a := e.start; a+pageSize <= e.end; a += pageSize {
			if n++; n%r.OutsideSample != 0 {
				continue
			}
			if n%1024 == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			if b := w.bytes(a, pageSize); b != nil {
				g.Add(0, a, pageSize, b)
			}
		}
	}
	r.Outside = g.Groups()
	return nil
}
