package memory

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strconv"
	"time"
)

// The index of a dump: see docs/dump-format.md.
const (
	indexFormat  = "allocsnoop-dump"
	indexVersion = 1
	footerMagic  = "allocsnoop dump index 1\n"
	footerSize   = 64
	maxIndex     = 256 << 20
)

// hexAddr is an address in JSON, as text: not every reader of JSON has 64-bit integers.
type hexAddr uint64

func (a hexAddr) MarshalText() ([]byte, error) {
	return strconv.AppendUint([]byte("0x"), uint64(a), 16), nil
}

func (a *hexAddr) UnmarshalText(text []byte) error {
	v, err := strconv.ParseUint(string(text), 0, 64)
	*a = hexAddr(v)
	return err
}

// index is what a dump says about itself. The two lists come last in the file, an entry a line.
type index struct {
	Format   string        `json:"format"`
	Version  int           `json:"version"`
	Complete bool          `json:"complete"`
	Partial  string        `json:"partial_reason,omitempty"`
	PID      int           `json:"pid"`
	Comm     string        `json:"comm"`
	Exe      string        `json:"exe"`
	Arch     string        `json:"arch"`
	PageSize int           `json:"page_size"`
	Taken    time.Time     `json:"taken"`
	Seconds  float64       `json:"took_seconds"`
	Auxv     []byte        `json:"auxv"`
	TIDs     []int         `json:"threads"`
	Ranges   []rangeEntry  `json:"ranges,omitempty"`
	Extents  []extentEntry `json:"extents,omitempty"`
}

// rangeEntry is a range of the process, in the dump or not.
type rangeEntry struct {
	Start   hexAddr `json:"start"`
	End     hexAddr `json:"end"`
	Perms   string  `json:"perms"`
	Offset  uint64  `json:"offset"`
	Major   uint32  `json:"dev_major"`
	Minor   uint32  `json:"dev_minor"`
	Inode   uint64  `json:"inode"`
	Path    string  `json:"path"`
	Deleted bool    `json:"deleted,omitempty"`
	Kind    Kind    `json:"kind"`
}

// extentEntry is a run of addresses that the dump knows the content of.
type extentEntry struct {
	Start  hexAddr `json:"start"`
	End    hexAddr `json:"end"`
	Kind   string  `json:"kind"` // data, zero or lost
	Offset uint64  `json:"file_offset,omitempty"`
}

func newRangeEntry(r *Range) rangeEntry {
	return rangeEntry{hexAddr(r.Start), hexAddr(r.End), r.Perms.String(), r.Offset, r.Dev.Major, r.Dev.Minor, r.Inode, r.Path,
		r.Deleted, r.Kind}
}

func (e *rangeEntry) decode() (Range, error) {
	perms, ok := parsePerms([]byte(e.Perms))
	if !ok || e.Start >= e.End {
		return Range{}, fmt.Errorf("range %#x-%#x with rights %.8q makes no sense", uint64(e.Start), uint64(e.End), e.Perms)
	}
	if !e.Kind.known() {
		return Range{}, fmt.Errorf("range %#x-%#x is of unknown kind %.20q", uint64(e.Start), uint64(e.End), string(e.Kind))
	}
	return Range{Start: uint64(e.Start), End: uint64(e.End), Perms: perms, Offset: e.Offset, Dev: Dev{e.Major, e.Minor},
		Inode: e.Inode, Path: e.Path, Deleted: e.Deleted, Kind: e.Kind}, nil
}

// fileExtent is an extent with its place in the file.
type fileExtent struct {
	Extent
	off uint64
}

// writeIndex writes an index; ranges and extents are streamed, for there may be a hundred thousand.
func writeIndex(w io.Writer, head index, ranges []RangeUsage, extents []fileExtent) error {
	head.Format, head.Version, head.PageSize = indexFormat, indexVersion, PageSize
	text, err := json.Marshal(head)
	if err != nil {
		return err
	}
	out := bufio.NewWriterSize(w, 64<<10)
	out.Write(text[:len(text)-1])
	out.WriteString(",\n\"ranges\":[")
	for i := range ranges {
		if err := writeEntry(out, i, newRangeEntry(&ranges[i].Range)); err != nil {
			return err
		}
	}
	out.WriteString("],\n\"extents\":[")
	for i, e := range extents {
		if err := writeEntry(out, i, extentEntry{hexAddr(e.Start), hexAddr(e.End), e.Kind.String(), e.off}); err != nil {
			return err
		}
	}
	out.WriteString("]}\n")
	return out.Flush()
}

func writeEntry(out *bufio.Writer, i int, entry any) error {
	text, err := json.Marshal(entry)
	if err != nil {
		return err
	}
	if i > 0 {
		out.WriteByte(',')
	}
	out.WriteByte('\n')
	out.Write(text)
	return nil
}

// checked is an index whose lists were found to be in order.
type checked struct {
	info    Info
	ranges  []Range
	extents []fileExtent
}

// parseIndex reads an index of a file whose content ends at dataEnd.
func parseIndex(text []byte, dataEnd uint64) (*checked, error) {
	var in index
	if err := json.Unmarshal(text, &in); err != nil {
		return nil, fmt.Errorf("parse index: %w", err)
	}
	if in.Format != indexFormat || in.Version != indexVersion {
		return nil, fmt.Errorf("parse index: format %.40q version %d, this program knows %q version %d", in.Format, in.Version,
			indexFormat, indexVersion)
	}
	out := &checked{info: Info{PID: in.PID, Comm: in.Comm, Exe: in.Exe, Arch: in.Arch, Taken: in.Taken, Auxv: in.Auxv,
		Partial: in.Partial}}
	if !in.Complete && in.Partial == "" {
		out.info.Partial = "the dump was not finished"
	}
	for _, tid := range in.TIDs {
		out.info.Threads = append(out.info.Threads, Thread{TID: tid})
	}
	for i := range in.Ranges {
		r, err := in.Ranges[i].decode()
		if err != nil {
			return nil, fmt.Errorf("parse index: %w", err)
		}
		out.ranges = append(out.ranges, r)
		if err := checkOrder(out.ranges); err != nil {
			return nil, fmt.Errorf("parse index: %w", err)
		}
	}
	var err error
	if out.extents, err = decodeExtents(in.Extents, dataEnd); err != nil {
		return nil, fmt.Errorf("parse index: %w", err)
	}
	return out, nil
}

func decodeExtents(entries []extentEntry, dataEnd uint64) ([]fileExtent, error) {
	kinds := map[string]ExtentKind{"data": Data, "zero": Zero, "lost": Lost}
	var last uint64
	extents := make([]fileExtent, 0, len(entries))
	for _, e := range entries {
		kind, ok := kinds[e.Kind]
		extent := fileExtent{Extent{uint64(e.Start), uint64(e.End), kind}, e.Offset}
		switch {
		case !ok:
			return nil, fmt.Errorf("extent %#x is of unknown kind %.20q", extent.Start, e.Kind)
		case extent.Start >= extent.End, extent.Start < last:
			return nil, fmt.Errorf("extent %#x-%#x is out of order", extent.Start, extent.End)
		case kind == Data && (extent.off > dataEnd || extent.Size() > dataEnd-extent.off):
			return nil, fmt.Errorf("extent %#x-%#x lies beyond the file's end", extent.Start, extent.End)
		}
		last = extent.End
		extents = append(extents, extent)
	}
	return extents, nil
}

// footer ends a dump file.
type footer struct {
	off, size uint64 // of the index
	crc       uint32
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (f *footer) encode() []byte {
	b := make([]byte, footerSize)
	copy(b, footerMagic)
	binary.LittleEndian.PutUint64(b[24:], f.off)
	binary.LittleEndian.PutUint64(b[32:], f.size)
	binary.LittleEndian.PutUint32(b[40:], f.crc)
	return b
}

var errNoFooter = errors.New("no index at its end")

// readFooter reads the footer of a file of a size.
func readFooter(r io.ReaderAt, size int64) (*footer, error) {
	var b [footerSize]byte
	if size < footerSize {
		return nil, errNoFooter
	}
	if _, err := r.ReadAt(b[:], size-footerSize); err != nil {
		return nil, fmt.Errorf("read footer: %w", err)
	}
	if string(b[:len(footerMagic)]) != footerMagic {
		return nil, errNoFooter
	}
	f := &footer{binary.LittleEndian.Uint64(b[24:]), binary.LittleEndian.Uint64(b[32:]), binary.LittleEndian.Uint32(b[40:])}
	room := uint64(size - footerSize)
	if f.off > room || f.size != room-f.off || f.size > maxIndex {
		return nil, fmt.Errorf("read footer: an index of %d bytes at %d does not fit a file of %d bytes", f.size, f.off, size)
	}
	return f, nil
}

// crcWriter counts and sums up what passes.
type crcWriter struct {
	w   io.Writer
	n   uint64
	crc uint32
}

func (c *crcWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += uint64(n)
	c.crc = crc32.Update(c.crc, castagnoli, b[:n])
	return n, err
}
