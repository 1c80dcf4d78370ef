// Package section reads the bytes of an ELF section a piece at a time, compressed or not.
//
// The trap: debug sections are large (257 MB of .debug_info in one JVM library) and hostile files claim to be larger still,
// so nothing here allocates by a size that a header states: whole sections are read only below a limit, larger ones
// through a few cached pages, and compressed ones are inflated only as far as somebody looks.
package section

import (
	"bytes"
	"container/list"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
)

// ErrBounds is returned for a range outside the section.
var ErrBounds = errors.New("outside the section")

const (
	wholeLimit  = 16 << 20 // sections up to this size are held whole
	rawPage     = 16 << 10
	rawPages    = 64
	zlibPage    = 1 << 20
	zlibPages   = 8
	sizeLimit   = 4 << 30 // of an inflated section: DWARF's own 32-bit limit
	checkpoints = 512     // at most, of 32 KiB each
)

// Section is random access to the (decompressed) bytes of one section. It is not safe for concurrent use.
type Section struct {
	size     uint64
	pageSize uint64
	load     func(page uint64, buf []byte) ([]byte, error)
	direct   io.ReaderAt // uncompressed: large views bypass the pages

	pages map[uint64]*list.Element
	order *list.List // of *cached, most recently used first
	limit int        // pages kept
	last  *cached
	err   error // sticky: a damaged stream is not decoded again and again
	close func() error
}

type cached struct {
	page uint64
	data []byte
}

// Bytes is a section that is in memory already.
func Bytes(b []byte) *Section {
	s := paged(uint64(len(b)), 1, nil)
	s.pageSize = max(1, s.size)
	s.load = func(uint64, []byte) ([]byte, error) { return b, nil }
	return s
}

func paged(size, pageSize uint64, load func(uint64, []byte) ([]byte, error)) *Section {
	return &Section{size: size, pageSize: pageSize, load: load, pages: map[uint64]*list.Element{}, order: list.New(), limit: 1}
}

// Open returns the section of that name, or its .zdebug_ form; nil without error when the file has none.
// fileSize bounds what section headers may claim.
func Open(f *elf.File, r io.ReaderAt, fileSize int64, name string) (*Section, error) {
	for _, s := range f.Sections {
		if s.Type == elf.SHT_NOBITS {
			continue
		}
		if s.Name == name {
			return OpenSection(f, s, r, fileSize)
		}
		if rest, ok := strings.CutPrefix(name, ".debug_"); ok && s.Name == ".zdebug_"+rest {
			return openZdebug(s, r, fileSize)
		}
	}
	return nil, nil
}

// OpenSection opens one section of f, whose bytes r reads.
func OpenSection(f *elf.File, s *elf.Section, r io.ReaderAt, fileSize int64) (*Section, error) {
	if s.Offset > uint64(fileSize) || s.FileSize > uint64(fileSize)-s.Offset {
		return nil, fmt.Errorf("section %s: %d bytes at %d: %w: the file has %d", s.Name, s.FileSize, s.Offset, ErrBounds, fileSize)
	}
	if s.Flags&elf.SHF_COMPRESSED == 0 {
		return Raw(io.NewSectionReader(r, int64(s.Offset), int64(s.FileSize)), s.FileSize), nil
	}
	var hdr [24]byte
	n := uint64(24)
	if f.Class == elf.ELFCLASS32 {
		n = 12
	}
	if s.FileSize < n {
		return nil, fmt.Errorf("section %s: compression header cut off", s.Name)
	}
	if _, err := r.ReadAt(hdr[:n], int64(s.Offset)); err != nil {
		return nil, fmt.Errorf("section %s: read compression header: %w", s.Name, err)
	}
	kind := elf.CompressionType(f.ByteOrder.Uint32(hdr[:]))
	size := uint64(f.ByteOrder.Uint32(hdr[4:]))
	if n == 24 {
		size = f.ByteOrder.Uint64(hdr[8:])
	}
	switch kind {
	case elf.COMPRESS_ZLIB:
		return zlibSection(s.Name, r, s.Offset+n, s.FileSize-n, size)
	case elf.COMPRESS_ZSTD:
		return zstdSection(s, size)
	}
	return nil, fmt.Errorf("section %s: unknown compression %v", s.Name, kind)
}

func openZdebug(s *elf.Section, r io.ReaderAt, fileSize int64) (*Section, error) {
	if s.Offset > uint64(fileSize) || s.FileSize > uint64(fileSize)-s.Offset {
		return nil, fmt.Errorf("section %s: %w", s.Name, ErrBounds)
	}
	var hdr [12]byte
	if s.FileSize < 12 {
		return nil, fmt.Errorf("section %s: compression header cut off", s.Name)
	}
	if _, err := r.ReadAt(hdr[:], int64(s.Offset)); err != nil {
		return nil, fmt.Errorf("section %s: read compression header: %w", s.Name, err)
	}
	if string(hdr[:4]) != "ZLIB" {
		return Raw(io.NewSectionReader(r, int64(s.Offset), int64(s.FileSize)), s.FileSize), nil
	}
	return zlibSection(s.Name, r, s.Offset+12, s.FileSize-12, binary.BigEndian.Uint64(hdr[4:]))
}

// Raw is an uncompressed section.
func Raw(r io.ReaderAt, size uint64) *Section {
	s := paged(size, rawPage, nil)
	s.limit = rawPages
	s.direct = r
	s.load = func(page uint64, buf []byte) ([]byte, error) {
		off := page * s.pageSize
		buf = grow(buf, int(min(s.pageSize, size-off)))
		if _, err := r.ReadAt(buf, int64(off)); err != nil && err != io.EOF {
			return nil, err
		}
		return buf, nil
	}
	return s
}

func grow(buf []byte, n int) []byte {
	if cap(buf) < n {
		return make([]byte, n)
	}
	return buf[:n]
}

func zlibSection(name string, r io.ReaderAt, off, compressed, size uint64) (*Section, error) {
	// Deflate shrinks by at most 1032:1, so a larger claim is a lie that need not be tried.
	if size > sizeLimit || size/1032 > compressed {
		return nil, fmt.Errorf("section %s: %d compressed bytes cannot hold %d", name, compressed, size)
	}
	if compressed < 2 {
		return nil, fmt.Errorf("section %s: zlib header cut off", name)
	}
	var hdr [2]byte
	if _, err := r.ReadAt(hdr[:], int64(off)); err != nil {
		return nil, fmt.Errorf("section %s: read zlib header: %w", name, err)
	}
	if hdr[0]&15 != 8 || hdr[1]&32 != 0 || binary.BigEndian.Uint16(hdr[:])%31 != 0 {
		return nil, fmt.Errorf("section %s: no zlib header", name)
	}
	z := &zpages{size: size, pageSize: zlibPage}
	z.inflater.in = io.NewSectionReader(r, int64(off)+2, int64(compressed)-2)
	z.inflater.inEnd = int64(compressed) - 2
	if size <= wholeLimit {
		z.pageSize = max(1, size)
	}
	for size/z.pageSize > checkpoints {
		z.pageSize *= 2
	}
	s := paged(size, z.pageSize, z.load)
	s.limit = max(1, zlibPages*zlibPage/int(z.pageSize))
	s.close = func() error { z.wait(); return nil }
	return s, nil
}

// zpages inflates pages, in order as far as possible, and one ahead of a reader that goes through them in order: parsing
// and inflating then take place at the same time.
type zpages struct {
	inflater
	size, pageSize uint64
	starts         []checkpoint // of the pages up to the furthest one decoded, and of the page after it
	at             uint64       // the page that the inflater stands at the start of
	out            []byte
	read           uint64      // the page read last, plus one
	ahead          chan result // of the page after it, when it is being decoded
}

type result struct {
	data []byte
	err  error
}

func (z *zpages) load(page uint64, buf []byte) ([]byte, error) {
	r, ok := z.wait()
	if !ok || page != z.read {
		r.data, r.err = z.decodePage(page)
	}
	if r.err != nil {
		return nil, r.err
	}
	if z.pageSize >= z.size {
		return r.data, nil // the only page: nothing will overwrite it
	}
	buf = grow(buf, len(r.data))
	copy(buf, r.data)
	if page == z.read && page > 0 && (page+1)*z.pageSize < z.size {
		z.ahead = make(chan result, 1)
		go func() {
			data, err := z.decodePage(page + 1)
			z.ahead <- result{data, err}
		}()
	}
	z.read = page + 1
	return buf, nil
}

// wait ends the decoding ahead and returns what came of it; false when there was none.
func (z *zpages) wait() (result, bool) {
	if z.ahead == nil {
		return result{}, false
	}
	r := <-z.ahead
	z.ahead = nil
	return r, true
}

// decodePage returns a page's bytes, which are valid until the next call.
func (z *zpages) decodePage(page uint64) ([]byte, error) {
	if len(z.starts) == 0 {
		z.starts = append(z.starts, checkpoint{})
		z.at = 0
		if err := z.seekBit(0); err != nil {
			return nil, err
		}
		z.out = make([]byte, window+int(z.pageSize)+overrun)
	}
	from := min(page, uint64(len(z.starts)-1))
	if z.at != from {
		if err := z.restore(&z.starts[from]); err != nil {
			return nil, err
		}
		z.at = from
	}
	for ; ; from++ {
		data, err := z.next()
		if err != nil {
			z.at = ^uint64(0)
			return nil, fmt.Errorf("inflate: %w", err)
		}
		if from == page {
			return data, nil
		}
	}
}

// next decodes the page that the inflater stands at; the result is valid until the next call.
func (z *zpages) next() ([]byte, error) {
	c := &z.starts[z.at]
	start := c.before
	copy(z.out, c.history)
	n := int(min(z.pageSize, z.size-z.at*z.pageSize))
	op, err := z.decode(z.out, start+c.beyond, start+n)
	if err != nil {
		return nil, err
	}
	if op < start+n {
		return nil, io.ErrUnexpectedEOF
	}
	z.at++
	if uint64(len(z.starts)) == z.at && z.at*z.pageSize < z.size {
		z.starts = append(z.starts, z.save(z.out, op, start+n))
	}
	return z.out[start : start+n], nil
}

// zstdSection decompresses up front: the standard library's zstd reader, reachable only through debug/elf, cannot seek.
// What is too large to hold goes to an unlinked temporary file.
func zstdSection(s *elf.Section, size uint64) (*Section, error) {
	if size > sizeLimit {
		return nil, fmt.Errorf("section %s: %d bytes are more than the limit of %d", s.Name, size, int64(sizeLimit))
	}
	r := io.LimitReader(s.Open(), int64(size))
	if size <= wholeLimit {
		b, err := io.ReadAll(r)
		if err != nil {
			return nil, fmt.Errorf("section %s: %w", s.Name, err)
		}
		if uint64(len(b)) < size {
			return nil, fmt.Errorf("section %s: %w", s.Name, io.ErrUnexpectedEOF)
		}
		return Bytes(b), nil
	}
	tmp, err := os.CreateTemp("", "allocsnoop-section-*")
	if err != nil {
		return nil, fmt.Errorf("section %s: %w", s.Name, err)
	}
	os.Remove(tmp.Name())
	n, err := io.Copy(tmp, r)
	if err == nil && uint64(n) < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		tmp.Close()
		return nil, fmt.Errorf("section %s: %w", s.Name, err)
	}
	sec := Raw(tmp, size)
	sec.close = tmp.Close
	return sec, nil
}

// Close releases what the section holds; a nil section may be closed.
func (s *Section) Close() error {
	if s == nil {
		return nil
	}
	s.pages, s.last = map[uint64]*list.Element{}, nil
	s.order.Init()
	if s.close == nil {
		return nil
	}
	err := s.close()
	s.close = nil
	return err
}

// Size is the number of bytes; 0 for a nil section.
func (s *Section) Size() uint64 {
	if s == nil {
		return 0
	}
	return s.size
}

func (s *Section) page(i uint64) ([]byte, error) {
	if s.last != nil && s.last.page == i {
		return s.last.data, nil
	}
	if e, ok := s.pages[i]; ok {
		s.order.MoveToFront(e)
		s.last = e.Value.(*cached)
		return s.last.data, nil
	}
	if s.err != nil {
		return nil, s.err
	}
	var buf []byte
	if s.order.Len() >= s.limit {
		old := s.order.Remove(s.order.Back()).(*cached)
		delete(s.pages, old.page)
		s.last = nil
		buf = old.data[:0]
	}
	data, err := s.load(i, buf)
	if err != nil {
		s.err = err
		return nil, err
	}
	s.last = &cached{i, data}
	s.pages[i] = s.order.PushFront(s.last)
	return data, nil
}

// View returns the bytes [off, off+n). They are valid only until the next call of a method; buf may be reused for them.
// The caller bounds n: the section's size is only what the file claims.
func (s *Section) View(off, n uint64, buf []byte) ([]byte, error) {
	if s == nil || off > s.size || n > s.size-off {
		return nil, ErrBounds
	}
	if n == 0 {
		return nil, nil
	}
	first := off / s.pageSize
	if (off+n-1)/s.pageSize == first {
		p, err := s.page(first)
		if err != nil {
			return nil, err
		}
		return p[off-first*s.pageSize:][:n], nil
	}
	buf = grow(buf, int(n))
	return buf, s.Copy(buf, off)
}

// Copy fills dst with the bytes from off on.
func (s *Section) Copy(dst []byte, off uint64) error {
	if s == nil || off > s.size || uint64(len(dst)) > s.size-off {
		return ErrBounds
	}
	if s.direct != nil && uint64(len(dst)) >= s.pageSize {
		_, err := s.direct.ReadAt(dst, int64(off))
		if err == io.EOF {
			err = nil
		}
		return err
	}
	for len(dst) > 0 {
		i := off / s.pageSize
		p, err := s.page(i)
		if err != nil {
			return err
		}
		n := copy(dst, p[off-i*s.pageSize:])
		dst = dst[n:]
		off += uint64(n)
	}
	return nil
}

// Slice is a part of s as a section of its own; the parts of a .dwp file are such slices.
func Slice(s *Section, off, n uint64) (*Section, error) {
	if s == nil || off > s.size || n > s.size-off {
		return nil, ErrBounds
	}
	part := paged(n, rawPage, nil)
	part.limit = rawPages
	part.load = func(page uint64, buf []byte) ([]byte, error) {
		at := page * part.pageSize
		buf = grow(buf, int(min(part.pageSize, n-at)))
		return buf, s.Copy(buf, off+at)
	}
	return part, nil
}

// maxString bounds a name: mangled C++ names of 100 KB exist, longer ones are garbage.
const maxString = 1 << 20

// String returns the zero-terminated string at off.
func (s *Section) String(off uint64) (string, error) {
	if s == nil || off >= s.size {
		return "", ErrBounds
	}
	var joined []byte
	for off < s.size && len(joined) < maxString {
		i := off / s.pageSize
		p, err := s.page(i)
		if err != nil {
			return "", err
		}
		p = p[off-i*s.pageSize:]
		if end := bytes.IndexByte(p, 0); end >= 0 {
			if joined == nil {
				return string(p[:min(end, maxString)]), nil
			}
			return string(append(joined, p[:end]...)), nil
		}
		joined = append(joined, p...)
		off += uint64(len(p))
	}
	return "", fmt.Errorf("string without an end: %w", ErrBounds)
}
