package heap

import (
	"bytes"
	"encoding/binary"
	"regexp"
)

// layout is where a build of glibc keeps its books; 64-bit only. The three layouts cover 2.17 to 2.41. Which one a process
// has is read from the structures themselves, since the library on disk may have been replaced or be out of reach.
type layout struct {
	name       string
	fastbins   uint64 // offsets inside struct malloc_state
	top        uint64
	bins       uint64
	next       uint64
	systemMem  uint64
	stateSize  uint64
	hasThreads bool // attached_threads stands before system_mem (2.23)
}

const (
	fastbinCount = 10
	binCount     = 127
	tcacheBins   = 64
	heapMax      = 64 << 20 // of one heap of a thread arena, and its alignment
)

var layouts = []layout{
	{name: "2.17-2.22", fastbins: 8, top: 88, bins: 104, next: 2152, systemMem: 2168, stateSize: 2184},
	{name: "2.23-2.26", fastbins: 8, top: 88, bins: 104, next: 2152, systemMem: 2176, stateSize: 2192, hasThreads: true},
	{name: "2.27-2.41", fastbins: 16, top: 96, bins: 112, next: 2160, systemMem: 2184, stateSize: 2200, hasThreads: true},
}

// heapInfoSizes are the lengths of struct heap_info, at the start of each heap of a thread arena: 2.35 added pagesize.
var heapInfoSizes = []uint64{32, 48}

// params are the offsets of struct malloc_par's fields back from sbrk_base, which anchors the search.
type params struct{ count, countMax, mmapped uint64 }

var paramLayouts = []params{
	{count: 36, countMax: 32, mmapped: 16}, // from 2.35
	{count: 32, countMax: 28, mmapped: 16}, // 2.24 to 2.34
	{count: 40, countMax: 36, mmapped: 24}, // up to 2.23: max_total_mem stands between
}

// arenaBins looks for the bins of an arena in data that was read from addr: 127 list heads, of which the last is never
// used and points to itself. The addresses of all that are found come back; there are two when a process has two libcs.
func arenaBins(data []byte, addr uint64) []uint64 {
	var found []uint64
	const length = binCount * 16
	for at := 0; at+length <= len(data); at += 8 {
		a := addr + uint64(at)
		last := at + length - 16
		self := a + length - 32 // a list head is seen as a chunk, whose fd is at +16
		if binary.LittleEndian.Uint64(data[last:]) != self || binary.LittleEndian.Uint64(data[last+8:]) != self {
			continue
		}
		if !plausibleBins(data[at:at+length], a) {
			continue
		}
		if n := len(found); n > 0 && a-found[n-1] < length {
			found[n-1] = a // the same bins, seen a few list heads early
			continue
		}
		found = append(found, a)
	}
	return found
}

// plausibleBins allows for a few wrong heads, so that a damaged arena is still found.
func plausibleBins(data []byte, a uint64) bool {
	good := 0
	for i := range uint64(binCount) {
		fd, bk := binary.LittleEndian.Uint64(data[i*16:]), binary.LittleEndian.Uint64(data[i*16+8:])
		self := a + i*16 - 16
		empty := fd == self && bk == self
		full := fd != self && bk != self && fd%unit == 0 && bk%unit == 0 && fd != 0 && bk != 0
		if empty || full {
			good++
		}
	}
	return good >= binCount-8
}

var versionText = regexp.MustCompile(`GNU C Library \([^)\n]{0,64}\) (?:stable|development) release version (2\.\d{1,3})`)

// findVersion looks for glibc's version banner in the read-only data of the file that holds the arena.
func findVersion(s *Space, path string) string {
	for _, r := range s.Ranges {
		if r.Path != path || r.writable() || r.size() > 64<<20 || r.Perms[0] != 'r' {
			continue
		}
		b := make([]byte, r.size())
		n, _ := s.Mem.ReadAt(b, int64(r.Start))
		if !bytes.Contains(b[:n], []byte("GNU C Library (")) {
			continue
		}
		if m := versionText.FindSubmatch(b[:n]); m != nil {
			return string(m[1])
		}
	}
	return ""
}
