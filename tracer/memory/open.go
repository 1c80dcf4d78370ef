package memory

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"
)

// FileImage is the memory that a dump or core file keeps. It is safe for concurrent use.
type FileImage struct {
	file    io.ReaderAt
	closer  io.Closer
	info    Info
	ranges  []Range
	extents []fileExtent
}

var _ Image = (*FileImage)(nil)

// ErrNotImage is returned for a file that is neither a dump of allocsnoop nor an ELF core.
var ErrNotImage = errors.New("neither a dump made by allocsnoop nor an ELF core file")

// Open opens a dump or an ELF core.
func Open(path string) (*FileImage, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open dump: %w", err)
	}
	img, err := openFile(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open dump %s: %w", path, err)
	}
	img.closer = f
	return img, nil
}

func openFile(f *os.File) (*FileImage, error) {
	stat, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("%w: not a regular file", ErrNotImage)
	}
	img, err := NewFileImage(f, stat.Size())
	if err == nil && img.info.Taken.IsZero() {
		img.info.Taken = stat.ModTime()
	}
	return img, err
}

// NewFileImage reads a dump or an ELF core of size bytes from r.
func NewFileImage(r io.ReaderAt, size int64) (*FileImage, error) {
	foot, err := readFooter(r, size)
	if errors.Is(err, errNoFooter) {
		return newCoreImage(r, size)
	}
	if err != nil {
		return nil, err
	}
	text := make([]byte, foot.size)
	if _, err := r.ReadAt(text, int64(foot.off)); err != nil {
		return nil, fmt.Errorf("read index: %w", err)
	}
	if crc32.Checksum(text, castagnoli) != foot.crc {
		return nil, errors.New("read index: its checksum is wrong: the file is damaged")
	}
	parsed, err := parseIndex(text, foot.off)
	if err != nil {
		return nil, err
	}
	return &FileImage{file: r, info: parsed.info, ranges: parsed.ranges, extents: parsed.extents}, nil
}

// Close closes the file. It may be called twice.
func (img *FileImage) Close() error {
	if img.closer == nil {
		return nil
	}
	err := img.closer.Close()
	img.closer = nil
	return err
}

// Info says whose memory it is.
func (img *FileImage) Info() *Info { return &img.info }

// Ranges are all ranges that the process had.
func (img *FileImage) Ranges() []Range { return img.ranges }

// extentAt is the index of the first extent that ends above addr.
func (img *FileImage) extentAt(addr uint64) int {
	return sort.Search(len(img.extents), func(i int) bool { return img.extents[i].End > addr })
}

// ReadAt reads memory at an address.
func (img *FileImage) ReadAt(b []byte, addr int64) (int, error) {
	n, at := 0, uint64(addr)
	for i := img.extentAt(at); n < len(b); i++ {
		if i >= len(img.extents) || img.extents[i].Start > at || img.extents[i].Kind == Lost {
			return n, &AbsentError{at}
		}
		e := &img.extents[i]
		part := b[n:min(uint64(len(b)), uint64(n)+min(e.End-at, uint64(len(b))))]
		if e.Kind == Zero {
			clear(part)
		} else if m, err := img.file.ReadAt(part, int64(e.off+at-e.Start)); m < len(part) {
			return n + m, fmt.Errorf("read the dump's file: %w", err)
		}
		n, at = n+len(part), at+uint64(len(part))
	}
	return n, nil
}

// Extents tells what the file has between two addresses. Holes of the file are zeros.
func (img *FileImage) Extents(start, end uint64) ([]Extent, error) {
	var out []Extent
	for i := img.extentAt(start); i < len(img.extents) && img.extents[i].Start < end; i++ {
		e := img.extents[i]
		low, high := max(start, e.Start), min(end, e.End)
		if e.Kind != Data {
			out = appendExtent(out, Extent{low, high, e.Kind})
			continue
		}
		for _, part := range img.holes(e, low, high) {
			out = appendExtent(out, part)
		}
	}
	return out, nil
}

// holes splits a part of a data extent by what the file system stores of it.
func (img *FileImage) holes(e fileExtent, low, high uint64) []Extent {
	f, ok := img.file.(*os.File)
	if !ok {
		return []Extent{{low, high, Data}}
	}
	var parts []Extent
	toAddr := func(off int64) uint64 { return e.Start + uint64(off) - e.off }
	for at := low; at < high; {
		off := int64(e.off + at - e.Start)
		data, err := unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return append(parts, Extent{at, high, Zero})
		}
		if err != nil || data < off {
			return append(parts, Extent{at, high, Data})
		}
		if dataAt := min(toAddr(data), high); dataAt > at {
			parts = append(parts, Extent{at, dataAt, Zero})
			at = dataAt
			continue
		}
		hole, err := unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		if err != nil || hole <= data {
			return append(parts, Extent{at, high, Data})
		}
		holeAt := min(toAddr(hole), high)
		parts = append(parts, Extent{at, holeAt, Data})
		at = holeAt
	}
	return slices.Clip(parts)
}
