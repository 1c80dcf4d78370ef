package memory

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rawDump is a small dump: 16 bytes of data at 0x1000, a hole that was lost, zeros, and a range that was not dumped.
func rawDump(t testing.TB, change func(*index)) []byte {
	t.Helper()
	var out bytes.Buffer
	out.WriteString("0123456789abcdef")
	head := index{Complete: true, PID: 942, Comm: "nginx", Exe: "/usr/sbin/nginx", Arch: "amd64", TIDs: []int{942, 943}}
	if change != nil {
		change(&head)
	}
	ranges := []RangeUsage{
		{Range: Range{Start: 0x1000, End: 0x2000, Perms: Read | Write, Path: "[heap]", Kind: KindHeap}},
		{Range: Range{Start: 0x3000, End: 0x4000, Perms: Read | Exec, Inode: 7, Dev: Dev{254, 1}, Path: "/a b\nc", Deleted: true, Kind: KindFile}},
	}
	extents := []fileExtent{
		{Extent{0x1000, 0x1010, Data}, 0}, {Extent{0x1010, 0x1020, Zero}, 0}, {Extent{0x1020, 0x1030, Lost}, 0},
		{Extent{0x1030, 0x1034, Data}, 12},
	}
	w := &crcWriter{w: &out}
	if err := writeIndex(w, head, ranges, extents); err != nil {
		t.Fatal(err)
	}
	out.Write((&footer{16, w.n, w.crc}).encode())
	return out.Bytes()
}

func TestOpenRawDump(t *testing.T) {
	raw := rawDump(t, nil)
	img, err := NewFileImage(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		t.Fatal(err)
	}
	want := []Range{
		{Start: 0x1000, End: 0x2000, Perms: Read | Write, Path: "[heap]", Kind: KindHeap},
		{Start: 0x3000, End: 0x4000, Perms: Read | Exec, Inode: 7, Dev: Dev{254, 1}, Path: "/a b\nc", Deleted: true, Kind: KindFile},
	}
	if diff := cmp.Diff(want, img.Ranges()); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	extents, _ := img.Extents(0x1008, 0x1032)
	wantExtents := []Extent{{0x1008, 0x1010, Data}, {0x1010, 0x1020, Zero}, {0x1020, 0x1030, Lost}, {0x1030, 0x1032, Data}}
	if diff := cmp.Diff(wantExtents, extents); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	for _, tt := range []struct {
		name   string
		addr   int64
		want   string
		absent uint64 // 0: none
	}{
		{"data and the zeros behind it", 0x100e, "ef\x00\x00", 0},
		{"up to what was lost", 0x101e, "\x00\x00", 0x1020},
		{"data behind what was lost", 0x1031, "def", 0x1034},
		{"a range that was not dumped", 0x3000, "", 0x3000},
		{"an address of no range", 0x9000, "", 0x9000},
		{"the last address there is", -8, "", ^uint64(7)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := make([]byte, 4)
			n, err := img.ReadAt(got, tt.addr)
			var absent *AbsentError
			if errors.As(err, &absent) && absent.Addr != tt.absent || (err == nil) != (tt.absent == 0) || string(got[:n]) != tt.want {
				t.Errorf("got %q, %v, want %q, absent from %#x", got[:n], err, tt.want, tt.absent)
			}
		})
	}
}

func TestOpenRejects(t *testing.T) {
	good := rawDump(t, nil)
	damage := func(f func([]byte) []byte) []byte { return f(bytes.Clone(good)) }
	reindex := func(b []byte, old, new string) []byte { // keeps the checksum right
		foot := footer{off: 16}
		text := bytes.Replace(b[16:len(b)-footerSize], []byte(old), []byte(new), 1)
		if bytes.Equal(text, b[16:len(b)-footerSize]) {
			t.Fatalf("no %q in the index", old)
		}
		foot.size, foot.crc = uint64(len(text)), crc32.Checksum(text, castagnoli)
		return append(append(b[:16:16], text...), foot.encode()...)
	}
	for _, tt := range []struct {
		name string
		raw  []byte
		want string
	}{
		{"nothing", nil, "neither a dump"},
		{"text", []byte(strings.Repeat("hello world\n", 50)), "neither a dump"},
		{"a dump cut off", good[:len(good)-1], "neither a dump"},
		{"a damaged index", damage(func(b []byte) []byte { b[20] ^= 1; return b }), "checksum"},
		{"an index beyond the file", damage(func(b []byte) []byte {
			binary.LittleEndian.PutUint64(b[len(b)-footerSize+24:], 1<<62)
			return b
		}), "does not fit"},
		{"an index of nearly 2^64 bytes", damage(func(b []byte) []byte {
			binary.LittleEndian.PutUint64(b[len(b)-footerSize+32:], ^uint64(0))
			return b
		}), "does not fit"},
		{"a later version", damage(func(b []byte) []byte { return reindex(b, `"version":1`, `"version":9`) }), "version 9"},
		{"no JSON", damage(func(b []byte) []byte { return reindex(b, `{`, `[`) }), "parse index"},
		{"data beyond the file", damage(func(b []byte) []byte { return reindex(b, `"file_offset":12`, `"file_offset":13`) }), "beyond the file"},
		{"an offset that overflows", damage(func(b []byte) []byte {
			return reindex(b, `"file_offset":12`, `"file_offset":18446744073709551615`)
		}), "beyond the file"},
		{"overlapping extents", damage(func(b []byte) []byte { return reindex(b, `"start":"0x1010"`, `"start":"0x100f"`) }), "out of order"},
		{"an extent of no kind", damage(func(b []byte) []byte { return reindex(b, `"lost"`, `"gone"`) }), "unknown kind"},
		{"overlapping ranges", damage(func(b []byte) []byte { return reindex(b, `"start":"0x3000"`, `"start":"0x1fff"`) }), "overlaps"},
		{"strange rights", damage(func(b []byte) []byte { return reindex(b, `"r-xp"`, `"zzzz"`) }), "makes no sense"},
		{"a 32-bit ELF file", elfHeader(func(b []byte) { b[4] = 1 }), "64-bit"},
		{"a program instead of a core", elfHeader(func(b []byte) { b[16] = 2 }), "ET_EXEC"},
		{"a core of a strange machine", elfHeader(func(b []byte) { b[18] = 8 }), "EM_MIPS"},
		{"a core with more segments than bytes", elfHeader(func(b []byte) { b[56], b[57] = 0xfe, 0xff }), "do not fit"},
		{"a core without memory", elfHeader(nil), "no memory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := NewFileImage(bytes.NewReader(tt.raw), int64(len(tt.raw)))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrNotImage) {
		t.Errorf("a directory: %v", err)
	}
}

// elfHeader is the header of a core without segments.
func elfHeader(change func([]byte)) []byte {
	b := make([]byte, 128)
	copy(b, "\x7fELF\x02\x01\x01")
	b[16], b[18], b[54] = 4, 62, 56 // ET_CORE, EM_X86_64, size of a program header
	b[32] = 64                      // where they start
	if change != nil {
		change(b)
	}
	return b
}

func TestUnfinishedDumpSaysSo(t *testing.T) {
	raw := rawDump(t, func(i *index) { i.Complete = false })
	img, err := NewFileImage(bytes.NewReader(raw), int64(len(raw)))
	if err != nil || img.Info().Partial == "" {
		t.Errorf("%v, %v", img, err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(rawDump(f, nil))
	f.Add(elfHeader(nil))
	tgt := startTarget(f)
	path := filepath.Join(f.TempDir(), "seed.core")
	at := tgt.addr["mapped"]
	opts := DumpOptions{Core: true, Selection: Selection{Spans: []Span{{at, at + PageSize}}}}
	if _, err := (FS{}).Dump(context.Background(), tgt.pid, path, opts); err != nil {
		f.Fatal(err)
	}
	core, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(core)
	f.Add(bytes.ReplaceAll(core, []byte(noteOwner), []byte("somebodyel"))) // the way of foreign cores
	f.Fuzz(func(t *testing.T, raw []byte) {
		checkImage(t, raw)
		// Behind a right checksum lies more to find.
		foot := footer{uint64(len(raw) / 2), uint64(len(raw) - len(raw)/2), crc32.Checksum(raw[len(raw)/2:], castagnoli)}
		checkImage(t, append(bytes.Clone(raw), foot.encode()...))
	})
}

func checkImage(t *testing.T, raw []byte) {
	t.Helper()
	img, err := NewFileImage(bytes.NewReader(raw), int64(len(raw)))
	if err != nil {
		return
	}
	checkRanges(t, img.Ranges())
	buf := make([]byte, 3*PageSize)
	for _, r := range img.Ranges()[:min(len(img.Ranges()), 50)] {
		if _, err := ReadSparse(img, buf, r.Start); err != nil {
			t.Errorf("read %#x of an image that opened: %v", r.Start, err)
		}
		extents, err := img.Extents(r.Start, r.End)
		if err != nil {
			t.Error(err)
		}
		for _, e := range extents {
			if e.Start >= e.End || e.Start < r.Start || e.End > r.End {
				t.Errorf("extent %x-%x of %x-%x", e.Start, e.End, r.Start, r.End)
			}
		}
	}
}
