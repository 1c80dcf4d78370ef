package symbolize

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize/frames"
	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

// memoryFile is a File in memory.
type memoryFile struct{ *bytes.Reader }

func (memoryFile) Close() error { return nil }

func inMemory(b []byte) File { return memoryFile{bytes.NewReader(b)} }

// smallObject is an assembled function with DWARF, a few KB in all.
func smallObject(t testing.TB) []byte {
	t.Helper()
	need(t, "gcc")
	dir := t.TempDir()
	source := "static inline int twice(int x) { return 2 * x; }\nint f(int x) { return x > 7 ? twice(x) : f(x + 1); }\nint g(int x) { return f(x); }\n"
	if err := os.WriteFile(filepath.Join(dir, "f.c"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, dir, "gcc", "-O1", "-g", "-gdwarf-5", "-shared", "-fPIC", "-nostdlib", "-Wl,-z,max-page-size=4096", "-o", "f.so", "f.c")
	b, err := os.ReadFile(filepath.Join(dir, "f.so"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// textOf returns the file offsets of an object's code, all of them.
func textOf(b []byte) []uint64 {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil
	}
	s := f.Section(".text")
	if s == nil {
		return nil
	}
	var offsets []uint64
	for i := range min(s.Size, 64) {
		offsets = append(offsets, s.Offset+i)
	}
	return offsets
}

// bounded runs f and fails when it takes memory or time out of all proportion.
func bounded(t testing.TB, f func()) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	f()
	runtime.ReadMemStats(&after)
	const limit = 200 << 20
	if n := after.TotalAlloc - before.TotalAlloc; n > limit {
		t.Errorf("%d bytes were allocated, the limit is %d", n, limit)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("it took %v", d)
	}
}

// patchSection changes a field of a section's header: its offset, size or flags.
func patchSection(t testing.TB, b []byte, name string, patch func(h *elf.Section64)) []byte {
	t.Helper()
	out := slices.Clone(b)
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	table := binary.LittleEndian.Uint64(b[40:])
	for i, s := range f.Sections {
		if s.Name != name {
			continue
		}
		var h elf.Section64
		at := out[table+uint64(i)*64:]
		if _, err := binary.Decode(at, binary.LittleEndian, &h); err != nil {
			t.Fatal(err)
		}
		patch(&h)
		if _, err := binary.Encode(at, binary.LittleEndian, &h); err != nil {
			t.Fatal(err)
		}
		return out
	}
	t.Fatalf("no section %s", name)
	return nil
}

func TestHostileSectionsAreErrorsWithinTheMemoryCap(t *testing.T) {
	good := smallObject(t)
	offsets := textOf(good)
	for _, tt := range []struct {
		name string
		make func() []byte
	}{
		{"a section of 2^60 bytes", func() []byte {
			return patchSection(t, good, ".debug_info", func(h *elf.Section64) { h.Size = 1 << 60 })
		}},
		{"a section at 2^63", func() []byte {
			return patchSection(t, good, ".debug_info", func(h *elf.Section64) { h.Off = 1 << 63 })
		}},
		{"a compressed section that claims 2^60 bytes", func() []byte {
			b := patchSection(t, good, ".debug_info", func(h *elf.Section64) { h.Flags |= uint64(elf.SHF_COMPRESSED) })
			f, _ := elf.NewFile(bytes.NewReader(good))
			at := b[f.Section(".debug_info").Offset:]
			binary.LittleEndian.PutUint64(at, uint64(elf.COMPRESS_ZLIB))
			binary.LittleEndian.PutUint64(at[8:], 1<<60)
			return b
		}},
		{"a symbol table of 2^60 bytes", func() []byte {
			return patchSection(t, good, ".symtab", func(h *elf.Section64) { h.Size = 1 << 60 })
		}},
		{"names in the program's code", func() []byte {
			return patchSection(t, good, ".strtab", func(h *elf.Section64) { h.Off, h.Size = 0, 16 })
		}},
		{"DWARF of zeros", func() []byte {
			return overwrite(t, good, ".debug_info", func(s []byte) { clear(s) })
		}},
		{"abbreviations without an end", func() []byte {
			return overwrite(t, good, ".debug_abbrev", func(s []byte) {
				for i := range s {
					s[i] = 0x81
				}
			})
		}},
		{"a unit of 4 GB", func() []byte {
			return overwrite(t, good, ".debug_info", func(s []byte) { binary.LittleEndian.PutUint32(s, 0xffffffef) })
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := tt.make()
			bounded(t, func() {
				warned := 0
				s := New(Options{Warn: func(string) { warned++ }})
				lines, err := s.Resolve(t.Context(), Object{Path: "f.so", File: inMemory(b)}, offsets)
				if err != nil {
					t.Fatal(err)
				}
				if warned == 0 && tt.name != "names in the program's code" {
					t.Error("no warning")
				}
				for _, l := range lines {
					if name := l[0].SystemName; !slices.Contains([]string{"f", "g", "twice"}, name) && !strings.HasPrefix(name, "f.so+0x") {
						t.Errorf("name %q", name)
					}
				}
			})
		})
	}
}

func overwrite(t testing.TB, b []byte, name string, with func([]byte)) []byte {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	out := slices.Clone(b)
	s := f.Section(name)
	with(out[s.Offset : s.Offset+s.FileSize])
	return out
}

// xzBomb is 100 MB of zeros in 15 KB.
func xzBomb(t testing.TB) []byte {
	t.Helper()
	need(t, "xz")
	cmd := exec.Command("sh", "-c", "head -c 100000000 /dev/zero | xz -1")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestXZBombsAndDictionariesAreBounded(t *testing.T) {
	bomb := xzBomb(t)
	bounded(t, func() {
		if _, err := unxz(bomb, 1<<20); err == nil || !strings.Contains(err.Error(), "more than") {
			t.Errorf("a bomb: %v", err)
		}
	})
	huge := slices.Clone(bomb)
	// The block header follows the stream header: size, flags, filter 0x21, property size 1, dictionary.
	at := bytes.Index(huge[12:], []byte{0x21, 1}) + 12 + 2
	huge[at] = 40 // 4 GiB - 1
	size := (int(huge[12]) + 1) * 4
	binary.LittleEndian.PutUint32(huge[12+size-4:], crc32.ChecksumIEEE(huge[12:12+size-4]))
	bounded(t, func() {
		if _, err := unxz(huge, 1<<20); err == nil {
			t.Error("a bomb with a huge dictionary: no error")
		}
	})
	for n := range 60 {
		if _, err := unxz(bomb[:n], 1<<20); err == nil {
			t.Errorf("%d bytes of a stream: no error", n)
		}
	}
}

func FuzzMiniDebugInfo(f *testing.F) {
	packed := func(args ...string) []byte {
		cmd := exec.Command("xz", args...)
		cmd.Stdin = strings.NewReader(strings.Repeat("symbols ", 1000))
		out, err := cmd.Output()
		if err != nil {
			f.Skipf("needs xz: %v", err)
		}
		return out
	}
	f.Add(packed("-c"))
	f.Add(packed("-c", "--check=crc32", "--block-size=3000"))
	f.Add(packed("-c", "--check=none", "-9"))
	f.Fuzz(func(t *testing.T, b []byte) {
		out, err := unxz(b, 1<<16)
		if err == nil && len(out) > 1<<16 {
			t.Errorf("%d bytes came out of a limit of %d", len(out), 1<<16)
		}
	})
}

func FuzzELF(f *testing.F) {
	good := smallObject(f)
	f.Add(good)
	for _, name := range []string{".debug_info", ".debug_abbrev", ".debug_line", ".symtab", ".dynsym"} {
		f.Add(patchSection(f, good, name, func(h *elf.Section64) { h.Size = 1 << 60 }))
	}
	offsets := append(textOf(good), 0, 1<<40, 1<<63)
	f.Fuzz(func(t *testing.T, b []byte) {
		s := New(Options{CacheDir: "/nonexistent", DebugDirs: []string{"/nonexistent"}})
		lines, err := s.Resolve(t.Context(), Object{Path: "f.so", File: inMemory(b)}, offsets)
		if err != nil {
			t.Fatal(err)
		}
		for i, l := range lines {
			if len(l) == 0 || l[0].Function == "" {
				t.Errorf("offset %#x: no name at all: %v", offsets[i], []profile.Line(l))
			}
		}
	})
}

// FuzzDWARF changes the DWARF's sections, which a fuzzer of whole files rarely reaches.
func FuzzDWARF(f *testing.F) {
	good := smallObject(f)
	file, err := elf.NewFile(bytes.NewReader(good))
	if err != nil {
		f.Fatal(err)
	}
	get := func(name string) []byte {
		s := file.Section(name)
		if s == nil {
			return nil
		}
		b, err := s.Data()
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	f.Add(get(".debug_info"), get(".debug_abbrev"), get(".debug_line"), get(".debug_rnglists"), get(".debug_aranges"))
	f.Add(get(".debug_info"), get(".debug_abbrev"), get(".debug_line"), get(".debug_rnglists"), []byte{})
	str, lineStr := get(".debug_str"), get(".debug_line_str")
	text := file.Section(".text")
	var addrs []uint64
	for a := text.Addr; a < text.Addr+text.Size; a++ {
		addrs = append(addrs, a)
	}
	f.Fuzz(func(t *testing.T, info, abbrev, line, rnglists, aranges []byte) {
		d := frames.Data{Sections: frames.Sections{
			Info: section.Bytes(info), Abbrev: section.Bytes(abbrev), Line: section.Bytes(line), Str: section.Bytes(str),
			LineStr: section.Bytes(lineStr), Rnglists: section.Bytes(rnglists), Ranges: section.Bytes(rnglists), Aranges: section.Bytes(aranges),
		}}
		d.Alt = &frames.Data{Sections: d.Sections}
		d.Split = func(string, string, uint64) (*frames.Data, error) { return &frames.Data{Sections: d.Sections}, nil }
		start := time.Now()
		if _, err := d.Lookup(t.Context(), addrs); err != nil {
			return
		}
		if took := time.Since(start); took > 20*time.Second {
			t.Errorf("%d bytes took %v", len(info)+len(line), took)
		}
	})
}
