package memory

import (
	"errors"
	"fmt"
	"io"
	"time"
)

// Image is the memory of one process: of a live one (OpenProcess), as a dump keeps it or as an ELF core does (Open).
//
// ReadAt takes an address as its offset. It reads up to the first byte that the image does not have and then returns an
// *AbsentError; ReadSparse reads over such gaps.
type Image interface {
	io.ReaderAt
	io.Closer
	// Info says whose memory it is.
	Info() *Info
	// Ranges are all ranges of the process in ascending order, those without content in the image as well. Do not change them.
	Ranges() []Range
	// Extents tells what the image has between two addresses, in ascending order. What no extent covers is absent. Reading
	// only the data extents saves a walk over zeros, and on a live process keeps the reader from changing its page tables.
	Extents(start, end uint64) ([]Extent, error)
}

// Info is what an image knows of its process besides memory.
type Info struct {
	PID     int
	Comm    string
	Exe     string    // path as the target sees it; empty when unknown
	Arch    string    // as in GOARCH
	Started time.Time // of a live process, to a hundredth of a second; zero when unknown
	Taken   time.Time
	Auxv    []byte // as /proc/PID/auxv has it; empty when unknown
	Threads []Thread
	// Partial says why not everything that was asked for is there; empty when it is.
	Partial string
}

// Thread is a thread with its registers. Registers are in the order of the kernel's NT_PRSTATUS set (user_regs_struct) and
// empty when they are unknown, as they are of a live process.
type Thread struct {
	TID       int
	Registers []uint64
}

// ExtentKind says what is known about a run of addresses.
type ExtentKind uint8

// The kinds of extent.
const (
	Data ExtentKind = iota // read it
	Zero                   // reads as zeros
	Lost                   // was there but could not be read
)

// String names the kind as the index of a dump does.
func (k ExtentKind) String() string {
	switch k {
	case Data:
		return "data"
	case Zero:
		return "zero"
	}
	return "lost"
}

// Extent is a run of addresses of one kind.
type Extent struct {
	Start, End uint64
	Kind       ExtentKind
}

// Size is the length of the extent in bytes.
func (e Extent) Size() uint64 { return e.End - e.Start }

// ErrAbsent is what an AbsentError is.
var ErrAbsent = errors.New("not in this image of the memory")

// AbsentError says at which address a read met memory that is not there: not mapped, not readable or not in the dump.
type AbsentError struct{ Addr uint64 }

func (e *AbsentError) Error() string { return fmt.Sprintf("address %#x: %v", e.Addr, ErrAbsent) }

// Is makes errors.Is(err, ErrAbsent) true.
func (e *AbsentError) Is(target error) bool { return target == ErrAbsent }

// PageSize is the granularity in which memory can be absent. A larger real page size only makes some looks superfluous.
const PageSize = 4096

// ReadSparse fills p with memory from addr on, zeros where there is none, and says how many bytes were absent. Only an
// error that ends all reading (the process is gone, the file is damaged) is returned.
func ReadSparse(img io.ReaderAt, p []byte, addr uint64) (absent uint64, err error) {
	for len(p) > 0 {
		n, err := img.ReadAt(p, int64(addr))
		p, addr = p[n:], addr+uint64(n)
		if len(p) == 0 {
			return absent, nil
		}
		if !errors.Is(err, ErrAbsent) {
			return absent, fmt.Errorf("read memory at %#x: %w", addr, err)
		}
		gap := min(PageSize-int(addr%PageSize), len(p))
		clear(p[:gap])
		p, addr, absent = p[gap:], addr+uint64(gap), absent+uint64(gap)
	}
	return absent, nil
}

// FindRange is the range that holds addr, or nil. The ranges must be in ascending order.
func FindRange(ranges []Range, addr uint64) *Range {
	i := searchRange(len(ranges), func(i int) *Range { return &ranges[i] }, addr)
	if i < len(ranges) && ranges[i].Contains(addr) {
		return &ranges[i]
	}
	return nil
}
