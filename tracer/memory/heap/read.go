package heap

import (
	"context"
	"sync"
	"sync/atomic"
)

// jobSize is how much of a segment one worker reads at a time.
const jobSize = 8 << 20

// job is a part of a segment: the blocks whose chunks start in [from, to).
type job struct {
	s        *segment
	from, to uint64 // in units
}

func (h *Heap) jobs() []job {
	var jobs []job
	for _, s := range h.segments {
		units := uint64(1)
		if !s.mmapped {
			units = (s.end - s.start + unit - 1) / unit
		}
		for from := uint64(0); from < units; from += jobSize / unit {
			jobs = append(jobs, job{s, from, min(from+jobSize/unit, units)})
		}
	}
	return jobs
}

// Read hands the blocks in use with their bytes, of each at most limit, to workers that run at the same time. Each gets its
// blocks in rising order of address; the bytes are its own until it returns. A block of which nothing could be read comes
// with no bytes. The memory used does not depend on the heap's size.
func (h *Heap) Read(ctx context.Context, limit int, workers []func(Block, []byte)) error {
	jobs := h.jobs()
	var next atomic.Int64
	var wait sync.WaitGroup
	for _, work := range workers {
		wait.Go(func() {
			w := &window{mem: h.space.Mem}
			for ctx.Err() == nil {
				n := int(next.Add(1)) - 1
				if n >= len(jobs) {
					return
				}
				jobs[n].read(w, limit, work)
			}
		})
	}
	wait.Wait()
	return ctx.Err()
}

func (j job) read(w *window, limit int, work func(Block, []byte)) {
	for i, ok := j.s.inUse.next(j.from); ok && i < j.to; i, ok = j.s.inUse.next(i + 1) {
		b := j.s.block(i)
		work(b, w.upTo(b.Addr, int(min(b.Size, uint64(limit)))))
	}
}

// upTo returns up to n bytes at addr, as many as can be read.
func (w *window) upTo(addr uint64, n int) []byte {
	if b := w.bytes(addr, n); b != nil {
		return b
	}
	if addr != w.base {
		return nil
	}
	return w.buf[:min(w.n, n)]
}
