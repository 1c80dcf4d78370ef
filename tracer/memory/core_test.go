package memory

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

// manyRanges is a dump in the making of a process with n ranges of two pages, the first of which is dumped everywhere.
func manyRanges(n int) *dumper {
	d := &dumper{p: &Process{pid: 942, info: Info{PID: 942, Comm: "many", Arch: "amd64"}}}
	for i := range uint64(n) {
		d.ranges = append(d.ranges, usage(i*0x3000+0x1000, i*0x3000+0x3000, PageSize, KindAnonymous))
	}
	for i := range d.ranges {
		d.pieces = append(d.pieces, piece{&d.ranges[i], d.ranges[i].Start, d.ranges[i].Start + PageSize, false})
	}
	d.base = d.coreHeaderSize()
	for i := range d.pieces {
		d.segments = append(d.segments, segment{d.pieces[i].start, d.pieces[i].end, d.base + uint64(i)*PageSize, d.pieces[i].rng})
	}
	for i := range d.segments {
		d.byAddr = append(d.byAddr, &d.segments[i])
	}
	return d
}

// TestCoreOfManyRanges has more program headers than an ELF header can count.
func TestCoreOfManyRanges(t *testing.T) {
	const n = 70001
	d := manyRanges(n)
	var err error
	if d.out, err = os.Create(filepath.Join(t.TempDir(), "many.core")); err != nil {
		t.Fatal(err)
	}
	defer d.out.Close()
	last := &d.segments[n-1]
	if _, err := d.out.WriteAt(pageOf(5, 0), int64(last.off)); err != nil {
		t.Fatal(err)
	}
	if err := d.finishCore(position{seg: n}); err != nil {
		t.Fatal(err)
	}
	stat, err := d.out.Stat()
	if err != nil {
		t.Fatal(err)
	}
	notes := make([]byte, stat.Size()-int64(d.dataEnd()))
	if _, err := d.out.ReadAt(notes, int64(d.dataEnd())); err != nil {
		t.Fatal(err)
	}
	for _, owner := range []string{noteOwner, "somebodyel"} { // with our index, and without, as other programs read it
		at := int64(d.dataEnd()) + int64(bytes.Index(notes, []byte(noteOwner)))
		if _, err := d.out.WriteAt([]byte(owner), at); err != nil {
			t.Fatal(err)
		}
		img, err := NewFileImage(d.out, stat.Size())
		if err != nil {
			t.Fatal(err)
		}
		if len(img.Ranges()) != n || img.Info().PID != 942 {
			t.Errorf("%d ranges of pid %d, want %d of 942", len(img.Ranges()), img.Info().PID, n)
		}
		checkPages(t, img, last.start, pageOf(5, 0))
		checkPages(t, img, d.segments[0].start, zeros(PageSize))
		if _, err := img.ReadAt(make([]byte, 1), int64(last.end)); err == nil {
			t.Error("the second page, which was not dumped, reads")
		}
	}
}

func TestWidenXState(t *testing.T) {
	raw := make([]byte, 2440)
	for i := range raw {
		raw[i] = byte(i)
	}
	raw[464] = 0xe7
	got := widenXState(raw)
	if len(got) != 2696 || !bytes.Equal(got[:832], raw[:832]) || !bytes.Equal(got[1088:], raw[832:]) {
		t.Errorf("%d bytes; the registers are not where Intel has them", len(got))
	}
	raw[464] = 7 // no AVX-512
	if got := widenXState(raw); len(got) != 2440 {
		t.Errorf("a state without AVX-512 became %d bytes", len(got))
	}
}
