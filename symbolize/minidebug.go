package symbolize

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

const (
	maxMiniPacked = 8 << 20  // of .gnu_debugdata; the largest known are about 2 MB
	maxMini       = 32 << 20 // unpacked; an xz file of a few KB can stand for terabytes
)

// miniDebugInfo unpacks .gnu_debugdata, an xz-compressed ELF file with nothing but the symbol table of the functions that
// .dynsym lacks. Nil without error when there is none.
func (o *object) miniDebugInfo() (*object, error) {
	for _, s := range o.Sections {
		if s.Name != ".gnu_debugdata" {
			continue
		}
		if s.FileSize > maxMiniPacked || s.Offset > uint64(o.size) || s.FileSize > uint64(o.size)-s.Offset {
			return nil, fmt.Errorf("%s: .gnu_debugdata of %d bytes is more than the limit of %d or than the file", o.path, s.FileSize, maxMiniPacked)
		}
		packed := make([]byte, s.FileSize)
		if _, err := o.r.ReadAt(packed, int64(s.Offset)); err != nil && err != io.EOF {
			return nil, fmt.Errorf("%s: read .gnu_debugdata: %w", o.path, err)
		}
		unpacked, err := unxz(packed, maxMini)
		if err != nil {
			return nil, fmt.Errorf("%s: unpack .gnu_debugdata: %w", o.path, err)
		}
		return openELF(bytes.NewReader(unpacked), o.path+" (.gnu_debugdata)")
	}
	return nil, nil
}

var errXZ = errors.New("damaged xz data")

// unxz unpacks a stream of at most limit bytes. The container is parsed here because the library's reader allocates
// whatever dictionary the file asks for, up to 4 GiB; one larger than the output is never needed.
func unxz(b []byte, limit int) ([]byte, error) {
	const streamHeader = 12
	if len(b) < streamHeader || !bytes.HasPrefix(b, []byte("\xfd7zXZ\x00\x00")) {
		return nil, errXZ
	}
	check := b[7] & 15
	b = b[streamHeader:]
	var out []byte
	for {
		if len(b) == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if b[0] == 0 { // the index: no more blocks
			return out, nil
		}
		block, used, err := unxzBlock(b, limit-len(out), check)
		if err != nil {
			return nil, err
		}
		out = append(out, block...)
		b = b[used:]
	}
}

// unxzBlock unpacks one block and says how many bytes it took.
func unxzBlock(b []byte, limit int, check byte) ([]byte, int, error) {
	headerSize := (int(b[0]) + 1) * 4
	if len(b) < headerSize {
		return nil, 0, io.ErrUnexpectedEOF
	}
	header := b[:headerSize-4]
	if crc32.ChecksumIEEE(header) != binary.LittleEndian.Uint32(b[headerSize-4:]) {
		return nil, 0, errXZ
	}
	dict, err := blockDictionary(header)
	if err != nil {
		return nil, 0, err
	}
	in := bytes.NewReader(b[headerSize:])
	x, err := lzma.Reader2Config{DictCap: int(min(dict, int64(max(limit, lzma.MinDictCap))))}.NewReader2(in)
	if err != nil {
		return nil, 0, err
	}
	out, err := io.ReadAll(io.LimitReader(x, int64(limit)+1))
	if err != nil {
		return nil, 0, err
	}
	if len(out) > limit {
		return nil, 0, fmt.Errorf("more than %d bytes", limit)
	}
	used := len(b) - in.Len()
	used += -(used - headerSize) & 3
	sum, size := blockChecksum(check)
	if len(b)-used < size {
		return nil, 0, io.ErrUnexpectedEOF
	}
	if sum != nil {
		sum.Write(out)
		want := b[used : used+size]
		for i, v := range sum.Sum(nil) { // big-endian here, little-endian in the file
			if want[size-1-i] != v {
				return nil, 0, fmt.Errorf("checksum: %w", errXZ)
			}
		}
	}
	return out, used + size, nil
}

// blockDictionary returns the dictionary size of a block whose only filter is LZMA2.
func blockDictionary(header []byte) (int64, error) {
	flags, rest := header[1], header[2:]
	if flags&3 != 0 {
		return 0, fmt.Errorf("filters other than LZMA2: %w", errors.ErrUnsupported)
	}
	for _, sized := range []byte{0x40, 0x80} { // compressed and uncompressed size, which the data tell as well
		if flags&sized == 0 {
			continue
		}
		_, n := binary.Uvarint(rest)
		if n <= 0 {
			return 0, errXZ
		}
		rest = rest[n:]
	}
	const lzma2 = 0x21
	if len(rest) < 3 || rest[0] != lzma2 || rest[1] != 1 {
		return 0, fmt.Errorf("filters other than LZMA2: %w", errors.ErrUnsupported)
	}
	return lzma.DecodeDictCap(rest[2])
}

// blockChecksum returns the hash of a check type, nil for one that is not checked, and its size.
func blockChecksum(check byte) (hash.Hash, int) {
	switch check {
	case 1:
		return crc32.NewIEEE(), 4
	case 4:
		return crc64.New(crc64.MakeTable(crc64.ECMA)), 8
	}
	return nil, [16]int{0, 4, 4, 4, 8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64}[check]
}
