package unwind

import (
	"bytes"
	"debug/elf"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/allocsnoop/allocsnoop/tracer/unwind/internal/ehframe"
)

func TestAreasAreTheExecutableOnes(t *testing.T) {
	const maps = `55d0a4c00000-55d0a4c02000 r--p 00000000 fe:01 131 /usr/bin/a b (deleted)
55d0a4c02000-55d0a4c06000 r-xp 00002000 fe:01 131                        /usr/bin/a  b (deleted)
7f0000000000-7f0000001000 rwxp 00000000 00:00 0 
7f0000002000-7f0000003000 r-xp 00000000 00:00 0                          [vdso]
7f0000003000-7f0000004000 --xp 00000000 00:00 0                          [uprobes]
7f0000004000-7f0000005000 --xs 00001000 00:05 99 /memfd:jit (deleted)
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
`
	got, err := parseAreas(strings.NewReader(maps))
	if err != nil {
		t.Fatal(err)
	}
	want := []area{
		{0x55d0a4c02000, 0x55d0a4c06000, 0x2000, "fe:01", 131, "/usr/bin/a  b (deleted)"},
		{0x7f0000000000, 0x7f0000001000, 0, "00:00", 0, ""},
		{0x7f0000002000, 0x7f0000003000, 0, "00:00", 0, "[vdso]"},
		{0x7f0000004000, 0x7f0000005000, 0x1000, "00:05", 99, "/memfd:jit (deleted)"},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(area{})); diff != "" {
		t.Error(diff)
	}
	if !got[1].anonymous() || got[2].anonymous() || got[3].anonymous() {
		t.Error("anonymous: the second one and no other")
	}
}

func FuzzParseAreas(f *testing.F) {
	f.Add([]byte("55d0a4c02000-55d0a4c06000 r-xp 00002000 fe:01 131 /usr/bin/a\n"))
	f.Add([]byte("7-5 r-xp 0 0 0\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		areas, err := parseAreas(bytes.NewReader(b))
		for _, a := range areas {
			if err == nil && a.end <= a.start {
				t.Errorf("%+v", a)
			}
		}
	})
}

func TestRowSpaceNeverHandsOutARowTwice(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const size = 97
		r := newRowSpace(size)
		var taken []span
		for range 40 {
			if len(taken) > 0 && rapid.Bool().Draw(t, "release") {
				i := rapid.IntRange(0, len(taken)-1).Draw(t, "which")
				r.release(taken[i].at, taken[i].n)
				taken = slices.Delete(taken, i, i+1)
				continue
			}
			n := rapid.Uint32Range(1, 40).Draw(t, "n")
			if at, ok := r.alloc(n); ok {
				taken = append(taken, span{at, n})
			}
		}
		owner := make([]bool, size)
		var used uint32
		for _, s := range slices.Concat(taken, r.free) {
			for i := s.at; i < s.at+s.n; i++ {
				if owner[i] {
					t.Fatalf("row %d is in two spans: %v and free %v", i, taken, r.free)
				}
				owner[i] = true
			}
		}
		for _, s := range taken {
			used += s.n
		}
		if slices.Contains(owner, false) || used != r.used {
			t.Fatalf("rows lost: %v and free %v, %d used", taken, r.free, r.used)
		}
		for _, s := range taken {
			r.release(s.at, s.n)
		}
		if len(r.free) != 1 || r.free[0] != (span{0, size}) {
			t.Fatalf("not one piece: %v", r.free)
		}
	})
}

func TestMappingsBeyondASlotDropAnonymousMemoryFirst(t *testing.T) {
	b := &binary{}
	var ms []Mapping
	for i := range uint64(maxMappings + 3) {
		m := Mapping{Start: i << 12, End: i<<12 + 1, bin: b}
		if i%100 == 0 {
			m.bin = nil
		}
		ms = append(ms, m)
	}
	got, over := trim(ms)
	if len(got) != maxMappings || over != 3 || !slices.IsSortedFunc(got, func(a, b Mapping) int { return int(a.Start) - int(b.Start) }) {
		t.Errorf("%d mappings, %d over", len(got), over)
	}
	anonymous := 0
	for _, m := range got {
		if m.bin == nil {
			anonymous++
		}
	}
	if anonymous != 6-3 {
		t.Errorf("%d anonymous ones left, want 3", anonymous)
	}
}

func TestBiasHoldsForSegmentsThatShareAPageWithAnother(t *testing.T) {
	b := &binary{}
	b.info.Store(&fileInfo{segments: []segment{{Off: 0x1234, VAddr: 0x2234, FileSize: 0x5000}}})
	bias, ok := b.bias(Mapping{Start: 0x7f0000001000, End: 0x7f0000007000, Offset: 0x1000})
	if want := uint64(0x7f0000001000 - 0x2000); !ok || bias != want {
		t.Errorf("%#x, want %#x", bias, want)
	}
	if _, ok := b.bias(Mapping{Start: 0x7f0000001000, End: 0x7f0000002000, Offset: 0x9000}); ok {
		t.Error("a mapping outside all segments has a bias")
	}
}

func TestFramesAreTakenApart(t *testing.T) {
	for _, tt := range []struct {
		raw, addr uint64
		mark      string
	}{
		{0x401000, 0x400fff, ""},
		{0x401000 | FrameExact, 0x401000, ""},
		{FrameMark | MarkLuaJIT, 0, "[LuaJIT]"},
	} {
		if addr, mark := Frame(tt.raw); addr != tt.addr || mark != tt.mark {
			t.Errorf("%#x: %#x %q", tt.raw, addr, mark)
		}
	}
}

const libluajit = "/usr/lib/x86_64-linux-gnu/libluajit-5.1.so.2"

func TestLuaJITsLayoutIsReadFromItsCode(t *testing.T) {
	f, err := os.Open(libluajit)
	if err != nil {
		t.Skip("needs libluajit2-5.1-2: ", err)
	}
	defer f.Close()
	table, err := ehframe.Extract(f, elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	l := findLua(f, table)
	if l == nil {
		t.Fatal("not recognized")
	}
	t.Logf("%+v", *l)
	if l.cframe != 0x50 || l.size != 80 {
		t.Errorf("%+v", *l)
	}
}

func TestLuaLayoutIsRefusedWhenTheCodeIsAnother(t *testing.T) {
	f, err := os.Open("/lib/x86_64-linux-gnu/libc.so.6")
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	table, err := ehframe.Extract(f, elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	if l := findLua(f, table); l != nil {
		t.Errorf("the C library is LuaJIT: %+v", *l)
	}
	for name, code := range map[string][]byte{
		"nothing":                nil,
		"returns":                {0xc3},
		"stores before it loads": {0x48, 0xc7, 0x85, 0x70, 1, 0, 0, 0, 0, 0, 0, 0xc3},
		"stores one": {0x48, 0x8b, 0x6f, 0x10, 0x48, 0x8b, 0x9d, 0xc0, 0, 0, 0, 0x48, 0xc7, 0x85, 0x70, 1, 0, 0, 1, 0, 0, 0,
			0x48, 0xc7, 0x43, 0x50, 0, 0, 0, 0, 0xc3},
	} {
		if l := deriveLua(code); l != nil {
			t.Errorf("%s: %+v", name, *l)
		}
	}
}

func FuzzDeriveLua(f *testing.F) {
	f.Add([]byte{0x48, 0x8b, 0x6f, 0x10, 0x48, 0x8b, 0x9d, 0xc0, 0, 0, 0, 0x48, 0xc7, 0x85, 0x70, 1, 0, 0, 0, 0, 0, 0, 0x48, 0xc7, 0x43, 0x50, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, code []byte) {
		if l := deriveLua(code); l != nil && (l.cur == 0 || l.cframe == 0 || l.cur > 4096 || l.cframe > 256) {
			t.Errorf("%+v", *l)
		}
	})
}
