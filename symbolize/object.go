package symbolize

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"

	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

// object is an ELF file that is open for reading.
type object struct {
	*elf.File
	r       io.ReaderAt
	size    int64
	path    string // for messages and for finding what lies beside the file
	buildID string
	close   func() error
}

var errNoELF = errors.New("no ELF file")

func openELF(r io.ReaderAt, path string) (*object, error) {
	size, err := sizeOf(r)
	if err != nil {
		return nil, fmt.Errorf("size of %s: %w", path, err)
	}
	f, err := elf.NewFile(io.NewSectionReader(r, 0, size))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w: %w", path, errNoELF, err)
	}
	if f.Data != elf.ELFDATA2LSB {
		return nil, fmt.Errorf("read %s: big-endian files are not supported", path)
	}
	o := &object{File: f, r: r, size: size, path: path}
	o.buildID = o.readBuildID()
	return o, nil
}

// Close closes the file if the object owns it.
func (o *object) Close() error {
	if o == nil || o.close == nil {
		return nil
	}
	return o.close()
}

// sizeOf asks the file for its size or finds it by trying.
func sizeOf(r io.ReaderAt) (int64, error) {
	switch f := r.(type) {
	case interface{ Size() int64 }:
		return f.Size(), nil
	case interface{ Stat() (fs.FileInfo, error) }:
		info, err := f.Stat()
		if err != nil {
			return 0, err
		}
		if info.Mode().IsRegular() {
			return info.Size(), nil
		}
	}
	var b [1]byte
	has := func(off int64) bool { n, _ := r.ReadAt(b[:], off); return n == 1 }
	if !has(0) {
		return 0, nil
	}
	low, high := int64(0), int64(1) // low can be read
	for has(high) {
		if high > math.MaxInt64/2 {
			return 0, errNoELF
		}
		low, high = high, high*2
	}
	for low+1 < high {
		if mid := low + (high-low)/2; has(mid) {
			low = mid
		} else {
			high = mid
		}
	}
	return high, nil
}

// BuildID returns the GNU build-id of an ELF file in lower-case hex; empty when it has none.
func BuildID(r io.ReaderAt) (string, error) {
	o, err := openELF(r, "file")
	if err != nil {
		return "", err
	}
	return o.buildID, nil
}

const maxNotes = 64 << 10

func (o *object) readBuildID() string {
	for _, p := range o.Progs {
		if p.Type == elf.PT_NOTE {
			if id := noteBuildID(o.at(p.Off, p.Filesz), p.Align); id != "" {
				return id
			}
		}
	}
	for _, s := range o.Sections {
		if s.Type == elf.SHT_NOTE {
			if id := noteBuildID(o.at(s.Offset, s.FileSize), s.Addralign); id != "" {
				return id
			}
		}
	}
	return ""
}

// at reads a small part of the file; nil when it cannot be read.
func (o *object) at(off, n uint64) []byte {
	if off > uint64(o.size) || n > uint64(o.size)-off || n > maxNotes {
		return nil
	}
	b := make([]byte, n)
	if _, err := o.r.ReadAt(b, int64(off)); err != nil && err != io.EOF {
		return nil
	}
	return b
}

func noteBuildID(b []byte, align uint64) string {
	if align != 8 {
		align = 4
	}
	for len(b) >= 12 {
		name, desc, kind := uint64(binary.LittleEndian.Uint32(b)), uint64(binary.LittleEndian.Uint32(b[4:])), binary.LittleEndian.Uint32(b[8:])
		descAt := (12 + name + align - 1) &^ (align - 1)
		if descAt+desc > uint64(len(b)) {
			return ""
		}
		if kind == 3 && bytes.Equal(b[12:12+name], []byte("GNU\x00")) {
			return hex.EncodeToString(b[descAt : descAt+desc])
		}
		next := (descAt + desc + align - 1) &^ (align - 1)
		if next > uint64(len(b)) {
			return ""
		}
		b = b[next:]
	}
	return ""
}

// section opens a section by name, which counts as absent when it cannot be read; warn says why.
func (o *object) section(name string, warn func(error)) *section.Section {
	s, err := section.Open(o.File, o.r, o.size, name)
	if err != nil {
		warn(fmt.Errorf("read %s: %w", o.path, err))
		return nil
	}
	return s
}

func (o *object) has(name string) bool {
	for _, s := range o.Sections {
		if s.Type != elf.SHT_NOBITS && (s.Name == name || ".z"+strings.TrimPrefix(name, ".") == s.Name) {
			return true
		}
	}
	return false
}

const pageSize = 4096

// address turns a file offset into the address that the file's symbols and DWARF use.
func (o *object) address(offset uint64) (uint64, bool) {
	for _, executable := range []bool{true, false} {
		for _, p := range o.Progs {
			if p.Type != elf.PT_LOAD || (p.Flags&elf.PF_X != 0) != executable {
				continue
			}
			if offset >= p.Off&^(pageSize-1) && offset < p.Off+p.Filesz {
				return offset - p.Off + p.Vaddr, true
			}
		}
	}
	return 0, false
}

// addressInDebugFile does the same for a debug file, whose segments are empty: the executable mapping as the process had it
// (its file offset and length) tells where the segment lay. A mapping that fits no segment gives no address.
func (o *object) addressInDebugFile(offset, textOffset, textSize uint64) (uint64, bool) {
	if !o.emptySegments() {
		return o.address(offset)
	}
	for _, p := range o.Progs {
		if p.Type != elf.PT_LOAD || p.Flags&elf.PF_X == 0 {
			continue
		}
		start := p.Vaddr &^ (pageSize - 1)
		if size := (p.Vaddr + p.Memsz - start + pageSize - 1) &^ (pageSize - 1); textSize != size {
			continue
		}
		if offset < textOffset || offset-textOffset >= textSize {
			return 0, false
		}
		return start + offset - textOffset, true
	}
	return 0, false
}

// emptySegments tells a file made by objcopy --only-keep-debug.
func (o *object) emptySegments() bool {
	for _, p := range o.Progs {
		if p.Type == elf.PT_LOAD && p.Flags&elf.PF_X != 0 {
			return p.Filesz == 0 && p.Memsz > 0
		}
	}
	return true
}

// executable tells whether the section of that index holds code.
func (o *object) executable(index elf.SectionIndex) bool {
	if index == elf.SHN_UNDEF || index >= elf.SHN_LORESERVE {
		return index == elf.SHN_XINDEX
	}
	return int(index) < len(o.Sections) && o.Sections[index].Flags&elf.SHF_EXECINSTR != 0
}
