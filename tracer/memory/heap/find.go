package heap

import (
	"encoding/binary"
	"slices"
)

// libc is one glibc in the process: usually one; a program that uses dlmopen, or a static one that loads plugins, has more.
type libc struct {
	version string // empty when its banner was not readable
	state   layout
	main    uint64 // address of main_arena
	threads []uint64
	ringOK  bool // the list of arenas led back to its start
	heaps   []heapInfo
	params  *malloPar
}

// malloPar is what is used of struct malloc_par.
type malloPar struct {
	addr, sbrkBase uint64
	mmapped        Count
}

// heapInfo is the head of one heap of a thread arena.
type heapInfo struct{ addr, arena, size, first uint64 }

// maxData is the largest data segment that is searched for main_arena.
const maxData = 1 << 30

func findLibcs(space *Space) []*libc {
	var found []*libc
	heaps := findHeaps(space)
	for i, r := range space.Ranges {
		if !dataRange(space, i) || r.size() > maxData {
			continue
		}
		data := make([]byte, r.size())
		n, _ := space.Mem.ReadAt(data, int64(r.Start))
		data = data[:n]
		for _, bins := range arenaBins(data, r.Start) {
			l := newLibc(space, bins, heaps)
			if l == nil {
				continue
			}
			l.params = findParams(space, data, r.Start)
			if r.file() {
				l.version = findVersion(space, r.Path)
			}
			found = append(found, l)
		}
	}
	return found
}

// dataRange says whether range i may hold static variables: a file's writable segment, or the anonymous rest of it.
func dataRange(space *Space, i int) bool {
	r := space.Ranges[i]
	if !r.writable() {
		return false
	}
	if r.file() {
		return true
	}
	return i > 0 && r.anonymous() && space.Ranges[i-1].End == r.Start && space.Ranges[i-1].file()
}

// newLibc works out the layout of the main arena whose bins are at the given address, and lists its other arenas.
func newLibc(space *Space, bins uint64, heaps []heapInfo) *libc {
	var best *libc
	score := 0
	for _, lay := range layouts {
		l := &libc{state: lay, main: bins - lay.bins}
		l.threads, l.ringOK = ring(space, l.main, lay)
		if n := l.score(space); n > score {
			best, score = l, n
		}
	}
	if best == nil {
		return nil
	}
	best.adopt(heaps)
	return best
}

// score says how well a layout fits; 0 is not at all. A ring of arenas that leads back to its start tells where the arena
// starts, the figures at its end which of two lengths it has.
func (l *libc) score(space *Space) int {
	tail := words(space.Mem, l.main+l.state.systemMem-8, 3)
	if tail == nil {
		return 0
	}
	attached, system, most := tail[0], tail[1], tail[2]
	if system%unit != 0 || system > most || system != 0 && system < 4096 || l.state.hasThreads && attached > 1<<20 {
		return 0
	}
	n := 1
	if l.ringOK {
		n += 2
	}
	if system > 0 { // 0 may be the count of threads, in the place of an older layout
		n++
	}
	return n
}

// adopt takes the heaps that belong to this libc's arenas. With a broken ring the heaps themselves tell of the arenas.
func (l *libc) adopt(heaps []heapInfo) {
	if !l.ringOK {
		for _, h := range heaps {
			if h.arena > h.addr && h.arena < h.addr+64 && !slices.Contains(l.threads, h.arena) {
				l.threads = append(l.threads, h.arena)
			}
		}
	}
	for _, h := range heaps {
		if slices.Contains(l.threads, h.arena) {
			l.heaps = append(l.heaps, h)
		}
	}
}

// ring follows the circular list of arenas from the main one.
func ring(space *Space, main uint64, lay layout) (threads []uint64, closed bool) {
	seen := map[uint64]bool{main: true}
	at := main
	for len(seen) < 1<<16 {
		next := words(space.Mem, at+lay.next, 1)
		if next == nil {
			return threads, false
		}
		at = next[0]
		if at == main {
			return threads, true
		}
		if seen[at] || !slices.Contains(heapInfoSizes, at%heapMax) {
			return threads, false
		}
		seen[at] = true
		threads = append(threads, at)
	}
	return threads, false
}

// findHeaps lists what looks like heaps of thread arenas. They lie at multiples of 64 MiB.
func findHeaps(space *Space) []heapInfo {
	var heaps []heapInfo
	for _, r := range space.Ranges {
		if !r.anonymous() || r.Path == "[heap]" {
			continue
		}
		for a := (r.Start + heapMax - 1) &^ (heapMax - 1); a < r.End; a += heapMax {
			w := words(space.Mem, a, 4)
			if w == nil {
				continue
			}
			h := heapInfo{addr: a, arena: w[0], size: w[2]}
			valid := slices.Contains(heapInfoSizes, h.arena%heapMax) && h.size%4096 == 0 && h.size > 0 && h.size <= heapMax
			if valid && w[3] >= h.size && w[3] <= heapMax {
				heaps = append(heaps, h)
			}
		}
	}
	return heaps
}

// findParams looks for mp_ in the data segment that holds main_arena: its last field is where the heap starts. Without
// it the walk goes on; only the check of mmapped blocks falls away.
func findParams(space *Space, data []byte, addr uint64) *malloPar {
	for at := 96; at+8 <= len(data); at += 8 {
		base := binary.LittleEndian.Uint64(data[at:])
		if base == 0 || base%8 != 0 {
			continue
		}
		r, ok := space.find(base)
		if !ok || !r.anonymous() || base-r.Start > 1<<20 {
			continue
		}
		for _, lay := range paramLayouts {
			if p := lay.read(data, at); p != nil {
				p.addr, p.sbrkBase = addr+uint64(at), base
				return p
			}
		}
	}
	return nil
}

// read returns the counts when the fields before sbrk_base make sense together.
func (lay params) read(data []byte, at int) *malloPar {
	i32 := func(back uint64) int32 { return int32(binary.LittleEndian.Uint32(data[at-int(back):])) }
	u64 := func(back uint64) uint64 { return binary.LittleEndian.Uint64(data[at-int(back):]) }
	count, limit, most := i32(lay.count), i32(lay.countMax), i32(lay.countMax-4)
	bytes, mostBytes := u64(lay.mmapped), u64(lay.mmapped-8)
	if lay.mmapped == 24 && u64(8) > mostBytes<<20 { // max_total_mem, unused in threaded builds
		return nil
	}
	switch {
	case limit != 65536 && limit < most, count < 0, count > most, most > 1<<24,
		bytes%4096 != 0, bytes > mostBytes, (count == 0) != (bytes == 0), (most == 0) != (mostBytes == 0),
		limit <= 0 || limit > 1<<24:
		return nil
	}
	return &malloPar{mmapped: Count{uint64(count), bytes}}
}
