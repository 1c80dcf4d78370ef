package ehframe

import (
	"bytes"
	"debug/elf"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	sdtypes "go.opentelemetry.io/ebpf-profiler/nativeunwind/stackdeltatypes"
)

func compile(t testing.TB, source string, flags ...string) []byte {
	t.Helper()
	dir := t.TempDir()
	in, out := filepath.Join(dir, "a.c"), filepath.Join(dir, "a.out")
	if err := os.WriteFile(in, []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	if b, err := exec.Command("gcc", append([]string{"-O2", "-o", out, in}, flags...)...).CombinedOutput(); err != nil {
		t.Fatalf("gcc: %v\n%s", err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

const library = `
#include <stdlib.h>
int sum(int *p, int n) { int s = 0; while (n--) s += p[n]; return s; }
void *make(int n) { char a[64]; for (int i = 0; i < 64; i++) a[i] = n + i; void *p = malloc(a[n & 63]); return p; }
`

func TestFlatteningFillsGapsAndDropsRepeats(t *testing.T) {
	sp := func(n int32) sdtypes.UnwindInfo { return sdtypes.UnwindInfo{BaseReg: RegSP, Param: n} }
	in := &sdtypes.IntervalData{}
	in.Add(sdtypes.BasicBlock{Start: 0x100, End: 0x140, Deltas: sdtypes.StackDeltaArray{{Offset: 0, Info: sp(8)}, {Offset: 4, Info: sp(16)}}})
	in.Add(sdtypes.BasicBlock{Start: 0x14f, End: 0x180, Deltas: sdtypes.StackDeltaArray{{Offset: 0, Info: sp(16)}}}) // 15 bytes on: padding
	in.Add(sdtypes.BasicBlock{Start: 0x190, End: 0x1a0, Deltas: sdtypes.StackDeltaArray{{Offset: 0, Info: sp(16)}}}) // 16: a gap
	in.Add(sdtypes.BasicBlock{Start: 0x1a0, End: 0x1b0, Deltas: sdtypes.StackDeltaArray{{Offset: 0, Info: sdtypes.UnwindInfoSignal}}})
	table := &Table{}
	if err := table.flatten(in, code{f: &elf.File{}}); err != nil {
		t.Fatal(err)
	}
	type row struct {
		VAddr uint32
		Rule  Rule
	}
	var got []row
	for _, r := range table.Rows {
		got = append(got, row{r.VAddr, table.Rules[r.Rule]})
	}
	signal := Rule{Flags: FlagCommand, Param: cmdSignal}
	want := []row{{0x100, Rule{Base: RegSP, Param: 8}}, {0x104, Rule{Base: RegSP, Param: 16}}, {0x180, None},
		{0x190, Rule{Base: RegSP, Param: 16}}, {0x19f, signal}, {0x1b0, None}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(Rule{})); diff != "" {
		t.Error(diff)
	}
}

func TestCodeAboveFourGigabytesIsRefused(t *testing.T) {
	in := &sdtypes.IntervalData{}
	in.Add(sdtypes.BasicBlock{Start: 1 << 32, End: 1<<32 + 16, Deltas: sdtypes.StackDeltaArray{{Info: sdtypes.UnwindInfoStop}}})
	table := &Table{}
	if err := table.flatten(in, code{f: &elf.File{}}); !errors.Is(err, ErrTooHigh) || len(table.Rows) != 0 {
		t.Errorf("%v, %d rows", err, len(table.Rows))
	}
}

func TestFilesThatAreNoUseSaySo(t *testing.T) {
	so := compile(t, library, "-shared", "-fPIC")
	other := bytes.Clone(so)
	other[18] = byte(elf.EM_AARCH64)
	for _, tt := range []struct {
		name string
		file []byte
		want error
		text string
	}{
		{"empty", nil, nil, "read ELF header"},
		{"text", []byte(strings.Repeat("hello, world\n", 99)), nil, "read ELF header"},
		{"another machine's", other, ErrMachine, ""},
		{"cut in the middle", so[:len(so)/2], nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			table, err := Extract(bytes.NewReader(tt.file), elf.EM_X86_64)
			if err == nil || table == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestEachKindOfLinkageTableKeepsItsOwnOffset(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flags []string
		want  int32
	}{
		{"jump, push", []string{"-fcf-protection=none", "-Wl,-z,lazy"}, 11},
		{"endbr64, push", []string{"-fcf-protection=full", "-Wl,-z,ibtplt,-z,lazy"}, 9},
	} {
		t.Run(tt.name, func(t *testing.T) {
			so := compile(t, library, append(tt.flags, "-shared", "-fPIC")...)
			table, err := Extract(bytes.NewReader(so), elf.EM_X86_64)
			if err != nil {
				t.Fatal(err)
			}
			i := slices.IndexFunc(table.Rules, func(r Rule) bool { return isCommand(r, cmdPLT) })
			if i < 0 || table.Rules[i].AuxParam != tt.want {
				t.Errorf("rules %+v", table.Rules)
			}
		})
	}
}

func TestBuildIDIsTheNotes(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef01234567"
	so := compile(t, library, "-shared", "-fPIC", "-Wl,--build-id=0x"+id)
	if got := BuildID(bytes.NewReader(so)); got != id {
		t.Errorf("%q", got)
	}
	if got := BuildID(bytes.NewReader(compile(t, library, "-shared", "-fPIC", "-Wl,--build-id=none"))); got != "" {
		t.Errorf("%q of a file without one", got)
	}
}

// FuzzExtract damages a real library. Whatever comes, the table must be sorted and its rules in range.
func FuzzExtract(f *testing.F) {
	so := compile(f, library, "-shared", "-fPIC")
	file, err := elf.NewFile(bytes.NewReader(so))
	if err != nil {
		f.Fatal(err)
	}
	eh := file.Section(".eh_frame")
	f.Add(uint32(0), uint64(0), uint32(len(so)))
	f.Add(uint32(0x20), uint64(0xffffffffffffffff), uint32(len(so)))
	f.Add(uint32(eh.Offset), uint64(0xfffffff0ffffffff), uint32(len(so)))
	f.Add(uint32(eh.Offset)+17, uint64(0x7fffffff), uint32(len(so)))
	f.Add(uint32(eh.Offset)+40, uint64(0x0f0f0f0f0f0f0f0f), uint32(len(so)))
	f.Add(uint32(0), uint64(0), uint32(eh.Offset)+24)
	f.Fuzz(func(t *testing.T, at uint32, value uint64, size uint32) {
		b := bytes.Clone(so[:min(int(size), len(so))])
		for i := range 8 {
			if j := int(at) + i; j < len(b) {
				b[j] ^= byte(value >> (8 * i))
			}
		}
		table, err := Extract(bytes.NewReader(b), elf.EM_X86_64)
		if err != nil && len(table.Rows) != 0 {
			t.Errorf("rows beside the error %v", err)
		}
		for i, r := range table.Rows {
			if int(r.Rule) >= len(table.Rules) || i > 0 && r.VAddr <= table.Rows[i-1].VAddr {
				t.Fatalf("row %d: %+v", i, r)
			}
		}
		BuildID(bytes.NewReader(b))
	})
}

func FuzzBuildIDNote(f *testing.F) {
	f.Add([]byte("\x04\x00\x00\x00\x04\x00\x00\x00\x03\x00\x00\x00GNU\x00abcd"))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\x03\x00\x00\x00GNU\x00abcd"))
	f.Fuzz(func(t *testing.T, b []byte) { buildIDNote(b) })
}

// An unknown expression for the CFA leaves no rule, rather than the one before; a root stays a root.
func TestFunctionsThatTheLibraryMisunderstandsGetNoRule(t *testing.T) {
	so := compile(t, `
__asm__(".text\n.globl odd\n.type odd,@function\nodd:\n.cfi_startproc\n.cfi_escape 0x0f,0x04,0x77,0x08,0x12,0x22\n"
	"nop\nnop\nret\n.cfi_endproc\n.size odd,.-odd\n"
	".globl root\n.type root,@function\nroot:\n.cfi_startproc\n.cfi_undefined rip\nnop\nhlt\n.cfi_endproc\n.size root,.-root\n");
`+library, "-shared", "-fPIC")
	table, err := Extract(bytes.NewReader(so), elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	f, err := elf.NewFile(bytes.NewReader(so))
	if err != nil {
		t.Fatal(err)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]Rule{"odd": Invalid, "root": {Flags: FlagCommand, Param: cmdStop}}
	for _, s := range symbols {
		rule, ok := want[s.Name]
		if !ok {
			continue
		}
		delete(want, s.Name)
		if got, _ := table.Lookup(uint32(s.Value)); got != rule {
			t.Errorf("%s: %+v, want %+v", s.Name, got, rule)
		}
	}
	if len(want) > 0 {
		t.Errorf("not found: %v", want)
	}
}
