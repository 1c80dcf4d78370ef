package memory

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMapsLine(t *testing.T) {
	for _, tt := range []struct {
		name, line string
		want       Range
	}{
		{"a library", "7f0000001000-7f0000029000 r-xp 00028000 fe:01 1234567                    /usr/lib/libc.so.6",
			Range{Start: 0x7f0000001000, End: 0x7f0000029000, Offset: 0x28000, Inode: 1234567, Dev: Dev{0xfe, 1},
				Perms: Read | Exec, Path: "/usr/lib/libc.so.6", Kind: KindFile}},
		{"a path with spaces keeps all of them", "1000-2000 r--p 00000000 00:1b 7    /tmp/a  b /c ",
			Range{Start: 0x1000, End: 0x2000, Inode: 7, Dev: Dev{0, 0x1b}, Perms: Read, Path: "/tmp/a  b /c ", Kind: KindFile}},
		{"a newline in a path", `1000-2000 r--p 00000000 00:1b 7    /tmp/a\012b`,
			Range{Start: 0x1000, End: 0x2000, Inode: 7, Dev: Dev{0, 0x1b}, Perms: Read, Path: "/tmp/a\nb", Kind: KindFile}},
		{"a deleted file", "1000-2000 r--p 00000000 00:1b 7    /tmp/old.so (deleted)",
			Range{Start: 0x1000, End: 0x2000, Inode: 7, Dev: Dev{0, 0x1b}, Perms: Read, Path: "/tmp/old.so", Deleted: true, Kind: KindFile}},
		{"anonymous memory without padding", "1000-2000 rw-p 00000000 00:00 0",
			Range{Start: 0x1000, End: 0x2000, Perms: Read | Write, Kind: KindAnonymous}},
		{"anonymous memory with padding", "1000-2000 rw-p 00000000 00:00 0 ",
			Range{Start: 0x1000, End: 0x2000, Perms: Read | Write, Kind: KindAnonymous}},
		{"a device number of twelve bits", "1000-2000 rw-s 00000000 103:00005 9 /x",
			Range{Start: 0x1000, End: 0x2000, Inode: 9, Dev: Dev{0x103, 5}, Perms: Read | Write | Shared, Path: "/x", Kind: KindFile}},
		{"the top of the address space", "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]",
			Range{Start: 0xffffffffff600000, End: 0xffffffffff601000, Perms: Exec, Path: "[vsyscall]", Kind: KindKernel}},
		{"no file has this name, a file does", "1000-2000 rw-p 00000000 00:1b 7    /tmp/[heap]",
			Range{Start: 0x1000, End: 0x2000, Inode: 7, Dev: Dev{0, 0x1b}, Perms: Read | Write, Path: "/tmp/[heap]", Kind: KindLibraryData}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseMaps(strings.NewReader(tt.line + "\n"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]Range{tt.want}, got); diff != "" {
				t.Errorf("want -, got +:\n%s", diff)
			}
		})
	}
}

func TestParseMapsRejects(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"a line of something else", "hello world", "line 1"},
		{"too few fields", "1000-2000 rw-p 0 00:00", "instead of 5"},
		{"an empty range", "1000-1000 rw-p 0 00:00 0", "no range"},
		{"a range that ends before it starts", "2000-1000 rw-p 0 00:00 0", "no range"},
		{"an address of 17 digits", "10000000000000000-20000000000000000 rw-p 0 00:00 0", "no range"},
		{"strange rights", "1000-2000 rwzp 0 00:00 0", "no range"},
		{"overlapping ranges", "1000-3000 rw-p 0 00:00 0\n2000-4000 rw-p 0 00:00 0", "line 2: range 2000 overlaps"},
		{"a line that never ends", strings.Repeat("a", maxLine+1), "longer than"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseMaps(strings.NewReader(tt.text))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, %v, want an error with %q", got, err, tt.want)
			}
		})
	}
}

// kindsFixture has a line for each rule of the classification; its last column is the kind that must come out.
const kindsFixture = `
555500000000-555500001000 r--p 00000000 fe:00 11 /usr/sbin/nginx          = file
555500001000-555500002000 rw-p 00001000 fe:00 11 /usr/sbin/nginx          = library data
555500002000-555500012000 rw-p 00000000 00:00 0                           = library data
555500013000-555500913000 rw-p 00000000 00:00 0 [heap]                    = heap
7f0000000000-7f0000021000 rw-p 00000000 00:00 0                           = arena
7f0000021000-7f0004000000 ---p 00000000 00:00 0                           = reserved
7f0008000000-7f000c000000 rw-p 00000000 00:00 0                           = arena
7f0010100000-7f0014021000 rw-p 00000000 00:00 0                           = arena
7f0014021000-7f0018001000 ---p 00000000 00:00 0                           = reserved
7f0018001000-7f0018801000 rw-p 00000000 00:00 0                           = anonymous
7f0019000000-7f0019001000 ---p 00000000 00:00 0                           = reserved
7f0019001000-7f0019800000 rw-p 00000000 00:00 0                           = thread stack
7f001a000000-7f001a004000 ---p 00000000 00:00 0                           = reserved
7f001a004000-7f001a044000 rw-p 00000000 00:00 0                           = thread stack
7f001b000000-7f001b001000 ---p 00000000 00:00 0                           = reserved
7f001b001000-7f001b005000 rw-p 00000000 00:00 0                           = anonymous
7f001c000000-7f001c001000 rwxp 00000000 00:00 0                           = anonymous
7f001d000000-7f001d001000 rw-p 00000000 00:00 0 [anon: glibc: malloc arena] = arena
7f001d001000-7f001d002000 rw-p 00000000 00:00 0 [anon: glibc: pthread stack: 942] = thread stack
7f001d002000-7f001d003000 rw-p 00000000 00:00 0 [anon:Go: heap]           = anonymous
7f001d003000-7f001d004000 ---p 00000000 00:00 0 [anon:Go: heap reservation] = reserved
7f001d004000-7f001d005000 rw-p 00000000 00:00 0 [stack:943]               = thread stack
7f001e000000-7f001e001000 rw-s 00000000 00:01 4 /dev/zero (deleted)       = shared memory
7f001e001000-7f001e002000 rw-s 00000000 00:01 5 /SYSV00000000 (deleted)   = shared memory
7f001e002000-7f001e003000 rw-s 00000000 00:01 6 /memfd:x (deleted)        = shared memory
7f001e003000-7f001e004000 rw-s 00000000 00:1a 7 /dev/shm/ring             = shared memory
7f001e004000-7f001e005000 rw-s 00000000 00:00 0 [anon_shmem:ring]         = shared memory
7f001e005000-7f001e006000 rw-p 00000000 00:05 8 /dev/zero                 = anonymous
7f001e006000-7f001e206000 rw-p 00000000 00:0f 9 /anon_hugepage (deleted)  = anonymous
7f001e206000-7f001e207000 rw-s 00000000 00:0e 10 anon_inode:[perf_event]  = file
7f001f000000-7f001f001000 rw-s 00000000 fe:00 12 /srv/cache.db            = file
7f001f001000-7f001f002000 r--p 00000000 fe:00 13 /usr/lib/libenc.so       = file
7f001f002000-7f001f003000 rw-p 00000000 fe:00 13 /usr/lib/libenc.so       = library data
7f001f003000-7f001f004000 rw-p 00000000 00:00 0                           = library data
7ffc00000000-7ffc00021000 rw-p 00000000 00:00 0 [stack]                   = stack
7ffc00030000-7ffc00031000 r--p 00000000 00:00 0 [vvar]                    = kernel
7ffc00031000-7ffc00032000 r-xp 00000000 00:00 0 [vdso]                    = kernel
`

func TestKinds(t *testing.T) {
	var text strings.Builder
	var want []Kind
	for line := range strings.Lines(strings.TrimSpace(kindsFixture)) {
		columns, kind, _ := strings.Cut(strings.TrimSpace(line), " = ")
		text.WriteString(strings.TrimRight(columns, " ") + "\n")
		want = append(want, Kind(strings.TrimSpace(kind)))
	}
	ranges, err := ParseMaps(strings.NewReader(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range ranges {
		if r.Kind != want[i] {
			t.Errorf("%x %s %s: %q, want %q", r.Start, r.Perms, r.Path, r.Kind, want[i])
		}
	}
	// The stack above the arena's reserve, whose guard merged with it, is known by its thread's stack pointer only.
	at := func(i int) *Range { return &ranges[i] }
	markThreadStacks(len(ranges), at, []uint64{0x7f0018800f00, 0x555500013100, 0xdead, 0})
	if got := FindRange(ranges, 0x7f0018001000).Kind; got != KindThreadStack {
		t.Errorf("a range with a stack pointer in it is %q", got)
	}
	if got := FindRange(ranges, 0x555500013100).Kind; got != KindHeap {
		t.Errorf("the heap with a coroutine's stack in it is %q", got)
	}
}

const smapsFixture = `555500013000-555500913000 rw-p 00000000 00:00 0                          [heap]
Size:               9216 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                8123 kB
Pss:                8121 kB
Pss_Dirty:          8123 kB
Shared_Clean:          2 kB
Shared_Dirty:          3 kB
Private_Clean:         5 kB
Private_Dirty:      8113 kB
Referenced:         8123 kB
Anonymous:          8123 kB
KSM:                   0 kB
LazyFree:              7 kB
AnonHugePages:      2048 kB
ShmemPmdMapped:       11 kB
FilePmdMapped:        13 kB
Shared_Hugetlb:       17 kB
Private_Hugetlb:      19 kB
Swap:                 23 kB
SwapPss:              29 kB
Locked:               31 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr mr mw me ac dd
7f0000000000-7f0000001000 r--s 00000000 00:00 4                          /dev/nvidia0
Rss:                   0 kB
VmFlags: rd sh io pf
`

func TestParseSmaps(t *testing.T) {
	got, err := ParseSmaps(strings.NewReader(smapsFixture))
	if err != nil {
		t.Fatal(err)
	}
	const k = 1024
	want := []RangeUsage{
		{Range{Start: 0x555500013000, End: 0x555500913000, Perms: Read | Write, Path: "[heap]", Kind: KindHeap},
			Usage{RSS: 8123 * k, PSS: 8121 * k, SharedClean: 2 * k, SharedDirty: 3 * k, PrivateClean: 5 * k, PrivateDirty: 8113 * k,
				Referenced: 8123 * k, Anonymous: 8123 * k, LazyFree: 7 * k, AnonHugePages: 2048 * k, FileHugePages: 24 * k,
				Hugetlb: 36 * k, Swap: 23 * k, SwapPSS: 29 * k, Locked: 31 * k}, FlagKnown | FlagDontDump},
		{Range{Start: 0x7f0000000000, End: 0x7f0000001000, Perms: Read | Shared, Path: "/dev/nvidia0", Inode: 4, Kind: KindFile},
			Usage{}, FlagKnown | FlagIO},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	for name, text := range map[string]string{
		"figures before a range": "Rss: 4 kB\n",
		"a size in words":        "1000-2000 rw-p 0 00:00 0\nRss: four kB\n",
		"a size without a unit":  "1000-2000 rw-p 0 00:00 0\nRss: 4\n",
		"a size beyond 64 bits":  "1000-2000 rw-p 0 00:00 0\nRss: 18014398509481984 kB\n",
	} {
		if got, err := ParseSmaps(strings.NewReader(text)); err == nil {
			t.Errorf("%s: got %v, want an error", name, got)
		}
	}
}

func TestLiveSmapsAgreeWithMaps(t *testing.T) {
	dir := t.TempDir()
	file := dir + "/two  spaces\nand a line"
	if err := os.WriteFile(file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	tgt := startTarget(t, "2000000", file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	maps, err := FS{}.Maps(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	smaps, err := FS{}.Smaps(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	var fromSmaps []Range
	var sum Usage
	for i := range smaps {
		fromSmaps = append(fromSmaps, smaps[i].Range)
		sum.Add(&smaps[i].Usage)
	}
	if diff := cmp.Diff(maps, fromSmaps); diff != "" {
		t.Errorf("maps -, smaps +:\n%s", diff)
	}
	rollup, err := FS{}.Rollup(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	if rollup.RSS != sum.RSS || rollup.Anonymous != sum.Anonymous || sum.RSS == 0 {
		t.Errorf("rollup %+v, sum of smaps %+v", rollup, sum)
	}
	for name, want := range map[string]Kind{
		"heap": KindHeap, "arena": KindArena, "thread1": KindThreadStack, "thread2": KindThreadStack, "data": KindLibraryData,
		"bss": KindLibraryData, "mapped": KindAnonymous, "hidden": KindReserved, "shared": KindShared, "file": KindFile,
	} {
		r := FindRange(maps, tgt.addr[name])
		if r == nil || r.Kind != want {
			t.Errorf("%s at %#x is %+v, want kind %q", name, tgt.addr[name], r, want)
		}
	}
	if r := FindRange(maps, tgt.addr["file"]); r != nil && (r.Path != file || !r.Deleted) {
		t.Errorf("mapped file is %q, deleted %v, want %q, true", r.Path, r.Deleted, file)
	}
	kinds, err := RSSByKind(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	var total uint64
	for _, rss := range kinds {
		total += rss
	}
	if total != sum.RSS || kinds["heap"] < 2_000_000 {
		t.Errorf("by kind %v: sum %d, want %d", kinds, total, sum.RSS)
	}
}

func FuzzParseMaps(f *testing.F) {
	f.Add([]byte(smapsFixture[:80]))
	f.Add([]byte(strings.ReplaceAll(kindsFixture, "= ", "")))
	f.Add([]byte("1000-2000 rw-p 0 00:00 0 /a\\012b (deleted) (deleted)\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		ranges, err := ParseMaps(bytes.NewReader(text))
		if err != nil {
			return
		}
		checkRanges(t, ranges)
		var again strings.Builder
		for _, r := range ranges {
			deleted := ""
			if r.Deleted {
				deleted = " (deleted)"
			}
			fmt.Fprintf(&again, "%08x-%08x %s %08x %s %d %s%s\n", r.Start, r.End, r.Perms, r.Offset, r.Dev, r.Inode,
				strings.ReplaceAll(r.Path, "\n", `\012`), deleted)
		}
		same, err := ParseMaps(strings.NewReader(again.String()))
		if err != nil {
			t.Fatalf("what was printed from a good file does not parse: %v", err)
		}
		if diff := cmp.Diff(ranges, same); diff != "" {
			t.Errorf("first -, printed and parsed again +:\n%s", diff)
		}
	})
}

func FuzzParseSmaps(f *testing.F) {
	f.Add([]byte(smapsFixture))
	f.Add([]byte("Rss: 1 kB\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		usages, err := ParseSmaps(bytes.NewReader(text))
		if err != nil {
			return
		}
		var ranges []Range
		for _, u := range usages {
			ranges = append(ranges, u.Range)
		}
		checkRanges(t, ranges)
		if _, err := ParseSmapsRollup(bytes.NewReader(text)); err != nil && len(usages) > 0 && !strings.Contains(err.Error(), "no figures") {
			t.Errorf("smaps parses, the same text as a rollup does not: %v", err)
		}
	})
}

func checkRanges(t *testing.T, ranges []Range) {
	t.Helper()
	for i, r := range ranges {
		if r.Start >= r.End || i > 0 && r.Start < ranges[i-1].End {
			t.Errorf("range %d [%x, %x) is empty or overlaps", i, r.Start, r.End)
		}
		if r.Kind == "" {
			t.Errorf("range %x has no kind", r.Start)
		}
	}
}
