package section

import (
	"bytes"
	"compress/flate"
	"compress/zlib"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
)

// samples are inputs that between them use stored, fixed and dynamic blocks, long codes, long matches and overlaps.
func samples() map[string][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 100_003)
	for i := range noise {
		noise[i] = byte(rng.Uint32())
	}
	var skewed []byte // code lengths up to 15: byte values with frequencies that fall by half
	for len(skewed) < 200_003 {
		v := byte(0)
		for v < 40 && rng.Uint32()&1 == 0 {
			v++
		}
		skewed = append(skewed, v)
	}
	var records []byte
	for len(records) < 300_007 {
		records = append(records, "DW_TAG_subprogram"...)
		records = append(records, noise[rng.IntN(1000):][:rng.IntN(30)]...)
	}
	return map[string][]byte{
		"nothing": nil, "one byte": {42}, "noise": noise, "skewed": skewed, "records": records,
		"zeros": make([]byte, 200_017), "text": []byte(strings.Repeat("the quick brown fox ", 4001)),
	}
}

func deflated(t testing.TB, data []byte, level int) []byte {
	var out bytes.Buffer
	w, err := zlib.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// smallPages opens a zlib section with pages far below its size, as only very large sections have them.
func smallPages(t testing.TB, z []byte, size, page uint64) *Section {
	t.Helper()
	s, err := zlibSection("test", bytes.NewReader(z), 0, uint64(len(z)), size)
	if err != nil {
		t.Fatal(err)
	}
	zp := &zpages{size: size, pageSize: page}
	zp.in = io.NewSectionReader(bytes.NewReader(z), 2, int64(len(z))-2)
	zp.inEnd = int64(len(z)) - 2
	s = paged(size, page, zp.load)
	s.limit = 3
	return s
}

func TestZlibSectionReadsTheSameAtAnyPlaceAndOrder(t *testing.T) {
	for name, data := range samples() {
		for _, level := range []int{0, 1, 6, 9, flate.HuffmanOnly} {
			z := deflated(t, data, level)
			s := smallPages(t, z, uint64(len(data)), 20_011)
			rng := rand.New(rand.NewPCG(3, uint64(level+2)))
			for range 12 {
				off := rng.IntN(len(data) + 1)
				n := rng.IntN(min(70_000, len(data)-off) + 1)
				got, err := s.View(uint64(off), uint64(n), nil)
				if err != nil {
					t.Fatalf("%s, level %d: view %d bytes at %d: %v", name, level, n, off, err)
				}
				if !bytes.Equal(got, data[off:off+n]) {
					t.Fatalf("%s, level %d: %d bytes at %d differ", name, level, n, off)
				}
			}
		}
	}
}

func TestZlibSectionCutOffIsAnError(t *testing.T) {
	data := samples()["records"]
	z := deflated(t, data, 6)
	for _, n := range []int{len(z) / 3, len(z) / 2, len(z) - 11} {
		s := smallPages(t, z[:n], uint64(len(data)), 1<<20)
		if _, err := s.View(uint64(len(data))-1, 1, nil); err == nil {
			t.Errorf("%d of %d bytes: no error", n, len(z))
		}
	}
}

func TestClaimedSizesAreNotBelieved(t *testing.T) {
	z := deflated(t, make([]byte, 1009), 6)
	for _, size := range []uint64{1 << 60, 1 << 33, 1 << 20} {
		if _, err := zlibSection("x", bytes.NewReader(z), 0, uint64(len(z)), size); err == nil {
			t.Errorf("size %d: no error", size)
		}
	}
	s, err := zlibSection("x", bytes.NewReader(z), 0, uint64(len(z)), 1013)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(0, 1013, nil); err == nil {
		t.Error("a stream shorter than its header says: no error")
	}
}

func TestViewAndStringBounds(t *testing.T) {
	data := append(bytes.Repeat([]byte("x"), 70_001), 0, 'y')
	s := Raw(bytes.NewReader(data), uint64(len(data)))
	for _, r := range [][2]uint64{{0, 70_004}, {70_004, 0}, {1 << 63, 1 << 63}, {5, ^uint64(0)}} {
		if _, err := s.View(r[0], r[1], nil); !errors.Is(err, ErrBounds) {
			t.Errorf("view of %d bytes at %d: %v", r[1], r[0], err)
		}
	}
	if got, err := s.String(3); err != nil || len(got) != 69_998 {
		t.Errorf("string over two pages: %d bytes, %v", len(got), err)
	}
	if _, err := s.String(70_002); !errors.Is(err, ErrBounds) {
		t.Errorf("string without an end: %v", err)
	}
	var none *Section
	if _, err := none.View(0, 1, nil); !errors.Is(err, ErrBounds) {
		t.Errorf("view of no section: %v", err)
	}
}

func FuzzInflate(f *testing.F) {
	for _, data := range samples() {
		f.Add(deflated(f, data[:min(len(data), 5003)], 6)[2:])
		f.Add(deflated(f, data[:min(len(data), 503)], 1)[2:])
	}
	f.Fuzz(func(t *testing.T, z []byte) {
		want, wantErr := io.ReadAll(io.LimitReader(flate.NewReader(bytes.NewReader(z)), 1<<20))
		zp := &zpages{size: uint64(len(want)), pageSize: 1009}
		zp.in, zp.inEnd = bytes.NewReader(z), int64(len(z))
		s := paged(zp.size, zp.pageSize, zp.load)
		got, err := s.View(0, zp.size, nil)
		if err != nil {
			if wantErr == nil {
				t.Fatalf("inflate: %v, but compress/flate reads %d bytes", err, len(want))
			}
			return
		}
		if !bytes.Equal(got, want) {
			t.Fatal("inflated bytes differ from compress/flate's")
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	data := samples()["records"]
	z := deflated(b, data, 6)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		s := smallPages(b, z, uint64(len(data)), 1<<20)
		if _, err := s.View(uint64(len(data))-1, 1, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkInflateStandardLibrary(b *testing.B) {
	data := samples()["records"]
	z := deflated(b, data, 6)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := io.Copy(io.Discard, flate.NewReader(bytes.NewReader(z[2:]))); err != nil {
			b.Fatal(err)
		}
	}
}
