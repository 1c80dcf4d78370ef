// Package heap finds out which blocks of a process's heap are in use by reading the allocator's own books out of its
// memory: of a live process that is not stopped, or of a dump. It needs no symbols and no help from the process.
//
// The traps: a block in a thread's cache (tcache) or in a fastbin looks in use to its neighbours; a block's usable size
// reaches eight bytes into the next chunk's header; and a process that runs moves its books while they are read, so a walk
// of one is exact only in a quiet process. Every way in which a walk came out less than exact is in Heap.Problems.
package heap

import (
	"encoding/binary"
	"io"
	"sort"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// Range is one mapping of the address space.
type Range struct {
	Start, End uint64
	Perms      string // as in /proc/PID/maps: "rw-p"
	Path       string // file, "[heap]", "[stack]", "[anon:name]"; empty for plain anonymous memory
	Kind       memory.Kind
}

func (r Range) size() uint64      { return r.End - r.Start }
func (r Range) writable() bool    { return strings.HasPrefix(r.Perms, "rw") }
func (r Range) file() bool        { return r.Path != "" && r.Path[0] != '[' }
func (r Range) has(a uint64) bool { return a >= r.Start && a < r.End }

// anonymous says whether the range may be a heap of some allocator: private memory without a file.
func (r Range) anonymous() bool {
	named := r.Path == "" || r.Path == "[heap]" || strings.HasPrefix(r.Path, "[anon")
	return named && r.writable() && strings.HasSuffix(r.Perms, "p")
}

// Space is memory to walk: ranges, and their bytes at offsets that are addresses.
type Space struct {
	Mem    io.ReaderAt
	Ranges []Range // sorted by Start
	// Threads tells where stacks end; only Leaks needs them.
	Threads []Thread
	// Extents lists the parts of a range that hold something; nil when that is not known.
	Extents func(start, end uint64) ([]memory.Extent, error)
}

// filled lists the parts of [start, end) that hold something.
func (s *Space) filled(start, end uint64) ([]span, error) {
	if s.Extents == nil {
		return []span{{start, end}}, nil
	}
	extents, err := s.Extents(start, end)
	if err != nil {
		return nil, err
	}
	var spans []span
	for _, e := range extents {
		if e.Kind == memory.Data {
			spans = append(spans, span{e.Start, e.End})
		}
	}
	return spans, nil
}

// absent says whether nothing of a range is in the image, as in a dump of other ranges.
func (s *Space) absent(r Range) (bool, error) {
	if s.Extents == nil {
		return false, nil
	}
	extents, err := s.Extents(r.Start, r.End)
	return len(extents) == 0, err
}

// find returns the range that holds address a.
func (s *Space) find(a uint64) (Range, bool) {
	i := sort.Search(len(s.Ranges), func(i int) bool { return s.Ranges[i].End > a })
	if i == len(s.Ranges) || s.Ranges[i].Start > a {
		return Range{}, false
	}
	return s.Ranges[i], true
}

// windowSize is how much memory one read brings in: large enough that the system call costs nothing beside the copy,
// small enough to stay in the second-level cache.
const windowSize = 1 << 20

// near is how far a visit may lie ahead of the last read to count as going on from it.
const near = 32 << 10

// window reads memory that is visited in rising order of addresses. It reads ahead the more, the longer the visits stay near
// to each other; a jump costs one small read.
type window struct {
	mem   io.ReaderAt
	buf   []byte
	base  uint64
	n     int
	ahead int
}

// bytes returns n bytes at addr, or nil when they cannot be read. The slice holds until the next call.
func (w *window) bytes(addr uint64, n int) []byte {
	if addr >= w.base && addr-w.base+uint64(n) <= uint64(w.n) {
		return w.buf[addr-w.base:][:n]
	}
	return w.fill(addr, n)
}

func (w *window) fill(addr uint64, n int) []byte {
	if addr < w.base || addr > w.base+uint64(w.n)+near {
		w.ahead = 4096 - int(addr&4095)
	} else {
		w.ahead = min(max(w.ahead, 4096)*4, windowSize)
	}
	size := max(w.ahead, n)
	if cap(w.buf) < size {
		w.buf = make([]byte, max(size, windowSize))
	}
	w.base, w.n = addr, 0
	if int64(addr) < 0 {
		return nil // no address of a user process; ReadAt takes signed offsets
	}
	w.n, _ = w.mem.ReadAt(w.buf[:size], int64(addr)) // a short read is judged by its length
	if w.n < n {
		return nil
	}
	return w.buf[:n]
}

// forget makes the next call read afresh.
func (w *window) forget() { w.n = 0 }

func (w *window) word(addr uint64) (uint64, bool) {
	b := w.bytes(addr, 8)
	if b == nil {
		return 0, false
	}
	return binary.LittleEndian.Uint64(b), true
}

// words reads n words at once; nil when they cannot be read.
func words(mem io.ReaderAt, addr uint64, n int) []uint64 {
	if int64(addr) < 0 {
		return nil
	}
	b := make([]byte, n*8)
	if got, _ := mem.ReadAt(b, int64(addr)); got < len(b) {
		return nil
	}
	w := make([]uint64, n)
	for i := range w {
		w[i] = binary.LittleEndian.Uint64(b[i*8:])
	}
	return w
}
