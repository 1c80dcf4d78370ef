package memory

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func usage(start, end, rss uint64, kind Kind) RangeUsage {
	perms := Read | Write
	return RangeUsage{Range: Range{Start: start, End: end, Kind: kind, Perms: perms}, Usage: Usage{RSS: rss, Anonymous: rss}, Flags: FlagKnown}
}

func TestGrowth(t *testing.T) {
	for _, tt := range []struct {
		name        string
		before, now []RangeUsage
		want        []int64
	}{
		{"a heap that got longer", []RangeUsage{usage(0x1000, 0x5000, 100, KindHeap)}, []RangeUsage{usage(0x1000, 0x9000, 171, KindHeap)},
			[]int64{71}},
		{"a new range", nil, []RangeUsage{usage(0x1000, 0x2000, 7, KindAnonymous)}, []int64{7}},
		{"a range that shrank", []RangeUsage{usage(0x1000, 0x2000, 19, KindAnonymous)}, []RangeUsage{usage(0x1000, 0x2000, 8, KindAnonymous)},
			[]int64{-11}},
		{"a range that merged with a new one below it", []RangeUsage{usage(0x5000, 0x6000, 13, KindAnonymous)},
			[]RangeUsage{usage(0x3000, 0x6000, 36, KindAnonymous)}, []int64{23}},
		{"two ranges that merged", []RangeUsage{usage(0x1000, 0x2000, 3, KindAnonymous), usage(0x2000, 0x4000, 5, KindAnonymous)},
			[]RangeUsage{usage(0x1000, 0x4000, 10, KindAnonymous)}, []int64{2}},
		{"a range that was split", []RangeUsage{usage(0x1000, 0x5000, 40, KindAnonymous)},
			[]RangeUsage{usage(0x1000, 0x2000, 10, KindAnonymous), usage(0x2000, 0x5000, 31, KindAnonymous)}, []int64{0, 1}},
		{"a range that came where another had gone", []RangeUsage{usage(0x1000, 0x2000, 40, KindAnonymous)},
			[]RangeUsage{usage(0x3000, 0x4000, 5, KindAnonymous)}, []int64{5}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Growth(tt.before, tt.now)); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

func TestPick(t *testing.T) {
	ranges := []RangeUsage{
		{Range: Range{Start: 0x1000, End: 0x9000, Kind: KindFile, Path: "/bin/x", Inode: 1, Perms: Read}},
		{Range: Range{Start: 0x10000, End: 0x12000, Kind: KindLibraryData, Path: "/bin/x", Inode: 1, Perms: Read | Write}, Usage: Usage{RSS: 4096}},
		usage(0x20000, 0x30000, 0x8000, KindHeap),
		usage(0x40000, 0x50000, 0x9000, KindAnonymous),
		{Range: Range{Start: 0x50000, End: 0x60000, Kind: KindReserved}},
		{Range: Range{Start: 0x60000, End: 0x70000, Kind: KindAnonymous}, Usage: Usage{RSS: 0x10000}, Flags: FlagDontDump},
		{Range: Range{Start: 0x70000, End: 0x80000, Kind: KindShared, Path: "/dev/nvidia0"}, Flags: FlagIO},
		{Range: Range{Start: 0x80000, End: 0x82000, Kind: KindKernel, Path: "[vdso]", Perms: Read | Exec}},
		{Range: Range{Start: 0x82000, End: 0x83000, Kind: KindKernel, Path: "[vvar]", Perms: Read}},
	}
	for _, tt := range []struct {
		name string
		sel  Selection
		want []Span
	}{
		{"nothing named is what a core has, then its context", Selection{}, []Span{{0x10000, 0x12000}, {0x20000, 0x30000}, {0x40000, 0x50000},
			{0x1000, 0x2000}, {0x80000, 0x82000}}},
		{"the heap first, then the variables", Selection{Heap: true}, []Span{{0x20000, 0x30000}, {0x10000, 0x12000}}},
		{"private memory", Selection{Anon: true}, []Span{{0x20000, 0x30000}, {0x40000, 0x50000}}},
		{"all that can be read", Selection{All: true}, []Span{{0x1000, 0x9000}, {0x10000, 0x12000}, {0x20000, 0x30000}, {0x40000, 0x50000},
			{0x60000, 0x70000}, {0x80000, 0x82000}}},
		{"parts of ranges, joined", Selection{Spans: []Span{{0x21000, 0x23000}, {0x22000, 0x24000}, {0x4f000, 0x58000}, {0x25000, 0x26000}}},
			[]Span{{0x21000, 0x24000}, {0x25000, 0x26000}, {0x4f000, 0x50000}}},
		{"the two largest", Selection{Largest: 2}, []Span{{0x40000, 0x50000}, {0x60000, 0x70000}}},
		{"more than there are", Selection{Largest: 900}, []Span{{0x10000, 0x12000}, {0x20000, 0x30000}, {0x40000, 0x50000}, {0x60000, 0x70000}}},
		{"what grew", Selection{Grown: []RangeUsage{usage(0x20000, 0x30000, 0x8000, KindHeap), usage(0x40000, 0x50000, 0x8000, KindAnonymous)}},
			[]Span{{0x10000, 0x12000}, {0x40000, 0x50000}, {0x60000, 0x70000}}},
		{"a part and the whole of a range is the whole", Selection{Heap: true, Spans: []Span{{0x21000, 0x22000}}},
			[]Span{{0x20000, 0x30000}, {0x10000, 0x12000}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			pieces, err := tt.sel.pick(ranges)
			if err != nil {
				t.Fatal(err)
			}
			var got []Span
			for _, p := range pieces {
				got = append(got, Span{p.start, p.end})
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

func TestParseSpan(t *testing.T) {
	for in, want := range map[string]Span{
		"1000-2000": {0x1000, 0x2000}, "0x7F00-0x7f01": {0x7f00, 0x7f01}, " 1-2 ": {1, 2},
		"": {}, "1000": {}, "2000-1000": {}, "1000-1000": {}, "x-y": {}, "1-2-3": {}, "-1-5": {}, "11111111111111111-2": {},
	} {
		got, err := ParseSpan(in)
		if got != want || (err != nil) != (want == Span{}) {
			t.Errorf("ParseSpan(%q) = %x, %v, want %x", in, got, err, want)
		}
	}
}

func TestSnapshotRoundTrip(t *testing.T) {
	ranges := []RangeUsage{usage(0x1000, 0x5000, 8192, KindHeap), {Range: Range{Start: 0x7000, End: 0x8000, Perms: Read, Path: "/a\nb", Inode: 3,
		Dev: Dev{1, 2}, Deleted: true, Offset: 4096, Kind: KindFile}, Usage: Usage{RSS: 4096, PSS: 100, Swap: 7}}}
	text, err := json.Marshal(NewSnapshot(942, "nginx", time.Now(), ranges))
	if err != nil {
		t.Fatal(err)
	}
	doc, got, err := ReadSnapshot(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	ranges[0].Flags = 0 // not in the document
	if diff := cmp.Diff(ranges, got); diff != "" || doc.PID != 942 || doc.Comm != "nginx" {
		t.Errorf("pid %d (%s); want -, got +:\n%s", doc.PID, doc.Comm, diff)
	}
	for name, bad := range map[string]string{
		"nothing": "", "another document": `{"able": true}`, "cut off": string(text[:len(text)/2]),
		"overlapping ranges": strings.Replace(string(text), "0x7000", "0x4fff", 1), "no rights": strings.Replace(string(text), "rw-p", "rw", 1),
	} {
		if _, _, err := ReadSnapshot(strings.NewReader(bad)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func FuzzReadSnapshot(f *testing.F) {
	text, _ := json.Marshal(NewSnapshot(942, "nginx", time.Now(), []RangeUsage{usage(0x1000, 0x5000, 8192, KindHeap)}))
	f.Add(text)
	f.Fuzz(func(t *testing.T, text []byte) {
		_, usages, err := ReadSnapshot(bytes.NewReader(text))
		if err != nil {
			return
		}
		for i, u := range usages {
			if u.Start >= u.End || i > 0 && u.Start < usages[i-1].End {
				t.Errorf("range %d [%x, %x) is empty or overlaps", i, u.Start, u.End)
			}
		}
		Growth(usages, usages)
	})
}
