package heap

import (
	"context"
	"regexp"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// Match is a place where a pattern was found.
type Match struct {
	Addr    uint64
	Length  int
	Range   Range
	Block   Block  // that holds it
	InBlock bool   // it lies in a block in use
	Around  []byte // the bytes of the match and some before and after it
	At      int    // where in Around the match starts
}

const (
	searchStep    = 1 << 20
	searchOverlap = 4096 // the longest match that is found for sure
	around        = 48
)

// Search looks for a pattern in all memory of an image that can be written, and calls found in order of address until it
// returns false. h may be nil; then no blocks are known.
func Search(ctx context.Context, img memory.Image, h *Heap, re *regexp.Regexp, found func(Match) bool) error {
	space := NewSpace(img)
	buf := make([]byte, searchStep+searchOverlap)
	for _, r := range space.Ranges {
		if !r.writable() {
			continue
		}
		filled, err := space.filled(r.Start, r.End)
		if err != nil {
			return err
		}
		for _, s := range filled {
			for at := s.start; at < s.end; at += searchStep {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				n, _ := space.Mem.ReadAt(buf[:min(uint64(len(buf)), s.end-at)], int64(at))
				if !searchWindow(h, r, re, buf[:n], at, found) {
					return nil
				}
			}
		}
	}
	return space.err()
}

// searchWindow reports the matches that start in the first searchStep bytes; the next window has the others.
func searchWindow(h *Heap, r Range, re *regexp.Regexp, b []byte, addr uint64, found func(Match) bool) bool {
	for _, loc := range re.FindAllIndex(b, -1) {
		if loc[0] >= searchStep || loc[1] == loc[0] {
			continue
		}
		from, to := max(loc[0]-around, 0), min(loc[1]+around, len(b))
		m := Match{Addr: addr + uint64(loc[0]), Length: loc[1] - loc[0], Range: r, Around: b[from:to], At: loc[0] - from}
		if h != nil {
			m.Block, m.InBlock = h.Find(m.Addr)
		}
		if !found(m) {
			return false
		}
	}
	return true
}
