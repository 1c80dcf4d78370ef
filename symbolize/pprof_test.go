package symbolize

import (
	"bytes"
	"context"
	"debug/elf"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	pprof "github.com/google/pprof/profile"

	"github.com/allocsnoop/allocsnoop/profile"
)

// textSegment returns the executable segment of a file as the kernel maps it.
func textSegment(t testing.TB, file string) (offset, size uint64) {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Flags&elf.PF_X != 0 {
			offset = p.Off &^ (pageSize - 1)
			return offset, (p.Off + p.Filesz - offset + pageSize - 1) &^ (pageSize - 1)
		}
	}
	t.Fatalf("%s has no executable segment", file)
	return 0, 0
}

const loaded = 0x5600_0000_0000 // where the profile's process had the program's code

// foreignProfile is a profile of another tool: contention of a program, with labels, comments and a location of a mapping
// without a build-id; offsets become its locations.
func foreignProfile(t testing.TB, file, buildID string, offsets []uint64) *pprof.Profile {
	t.Helper()
	textOffset, size := textSegment(t, file)
	m := &pprof.Mapping{ID: 1, Start: loaded, Limit: loaded + size, Offset: textOffset, File: "/nowhere/program", BuildID: strings.ToUpper(buildID)}
	other := &pprof.Mapping{ID: 2, Start: 0x7f00_0000_0000, Limit: 0x7f00_0000_1000, File: "/nowhere/libother.so"}
	interpreted := &pprof.Function{ID: 1, Name: "handler", Filename: "app.lua"}
	p := &pprof.Profile{
		SampleType: []*pprof.ValueType{{Type: "contentions", Unit: "count"}},
		PeriodType: &pprof.ValueType{Type: "contentions", Unit: "count"}, Period: 1,
		Mapping: []*pprof.Mapping{m, other}, Function: []*pprof.Function{interpreted},
		Comments: []string{"taken by another tool"},
		Location: []*pprof.Location{
			{ID: 1, Mapping: other, Address: 0x7f00_0000_0123},
			{ID: 2, Mapping: m, Address: loaded + 1, Line: []pprof.Line{{Function: interpreted, Line: 17}}},
		},
	}
	for _, off := range offsets {
		p.Location = append(p.Location, &pprof.Location{ID: uint64(len(p.Location) + 1), Mapping: m, Address: loaded + off - textOffset})
	}
	for i, l := range p.Location {
		p.Sample = append(p.Sample, &pprof.Sample{Location: []*pprof.Location{l}, Value: []int64{int64(i + 1)}, Label: map[string][]string{"thread": {"worker"}}})
	}
	if err := p.CheckValid(); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProfilesOfOtherToolsAreCompletedByBuildID(t *testing.T) {
	base := program(t)
	offsets, _ := randomCode(t, base, 211, 17)
	want := resolveFile(t, Options{}, base, offsets)
	for _, tt := range []struct {
		name string
		make func(t testing.TB, in, out string)
	}{
		{"a debug file alone, whose segments are empty", objcopy("--only-keep-debug")},
		{"a copy of the program", copyFile},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			tt.make(t, base, buildIDPath(t, base, dir))
			p := foreignProfile(t, base, buildIDOf(t, base), offsets)
			before := p.Copy()
			var warnings []string
			s := New(Options{DebugDirs: []string{dir}, Warn: func(w string) { warnings = append(warnings, w) }})
			counts, err := s.Profile(t.Context(), p, nil)
			if err != nil {
				t.Fatal(err)
			}
			if err := p.CheckValid(); err != nil {
				t.Fatal(err)
			}
			for i, l := range p.Location[2:] {
				var got []profile.Line
				for _, line := range l.Line {
					f := line.Function
					got = append(got, profile.Line{Function: f.Name, SystemName: f.SystemName, File: f.Filename, Line: int(line.Line), StartLine: int(f.StartLine)})
				}
				expected := want[i]
				if isPlace(expected[0].Function) { // the mapping's name for the file is another one
					expected = nil
					if isPlace(got[0].Function) && strings.HasPrefix(got[0].Function, "program+0x") {
						got = nil
					}
				}
				if diff := cmp.Diff(expected, got); diff != "" {
					t.Fatalf("location %d (-want +got):\n%s", l.ID, diff)
				}
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0], "/nowhere/libother.so has no build-id") {
				t.Errorf("warnings %q, want one about the mapping without a build-id", warnings)
			}
			if counts.Locations != 213 || counts.Named < 190 || counts.Unknown != 1+211-counts.Named {
				t.Errorf("counts %+v", counts)
			}
			// All but the names must be as it was.
			for _, q := range []*pprof.Profile{p, before} {
				q.Function = nil
				for _, m := range q.Mapping {
					m.HasFunctions, m.HasFilenames, m.HasLineNumbers, m.HasInlineFrames = false, false, false, false
				}
				for _, l := range q.Location {
					l.Line = nil
				}
			}
			if before.String() != p.String() {
				t.Error("samples, labels, comments or mappings changed")
			}
		})
	}
}

func TestMappingThatDoesNotFitGivesNoNames(t *testing.T) {
	base := program(t)
	offsets, _ := randomCode(t, base, 11, 19)
	dir := t.TempDir()
	objcopy("--only-keep-debug")(t, base, buildIDPath(t, base, dir))
	p := foreignProfile(t, base, buildIDOf(t, base), offsets)
	p.Mapping[0].Limit += 7 * pageSize // of which segment is this a part?
	if _, err := New(Options{DebugDirs: []string{dir}}).Profile(t.Context(), p, nil); err != nil {
		t.Fatal(err)
	}
	for _, l := range p.Location[2:] {
		if !isPlace(l.Line[0].Function.Name) {
			t.Errorf("a name out of a guessed address: %s", l.Line[0].Function.Name)
		}
	}
}

// oneFile is a FileSource with the same file for every mapping.
type oneFile string

func (f oneFile) Open(*profile.Mapping) (File, error) { return os.Open(string(f)) }

// snapshotOf has one stack whose frames are the offsets of a mapping.
func snapshotOf(m *profile.Mapping, offsets []uint64) *profile.Snapshot {
	stack := &profile.Stack{}
	for _, off := range offsets {
		stack.Frames = append(stack.Frames, &profile.Location{Address: off - m.Offset + m.Start, Mapping: m})
	}
	return &profile.Snapshot{Stacks: []*profile.Stack{stack}}
}

func TestSnapshotSaysThatAFileWasReplaced(t *testing.T) {
	base := program(t)
	offsets, _ := randomCode(t, base, 5, 23)
	textOffset, size := textSegment(t, base)
	m := &profile.Mapping{Start: loaded, Limit: loaded + size, Offset: textOffset, File: "/srv/program", BuildID: "00112233445566778899"}
	s := snapshotOf(m, offsets)
	mark := &profile.Location{Mark: "[LuaJIT]", Mapping: m}
	s.Stacks[0].Frames = append(s.Stacks[0].Frames, mark, &profile.Location{Address: 17})
	var warnings []string
	sym := New(Options{Warn: func(w string) { warnings = append(warnings, w) }})
	if err := sym.Snapshot(t.Context(), s, oneFile(base)); err != nil {
		t.Fatal(err)
	}
	if !m.Replaced || len(warnings) != 1 || !strings.Contains(warnings[0], "/srv/program was replaced") {
		t.Errorf("replaced %v, warnings %q", m.Replaced, warnings)
	}
	for i, l := range s.Stacks[0].Frames[:5] {
		if len(l.Lines) != 1 || !isPlace(l.Lines[0].Function) {
			t.Errorf("frame %d has names of another build:%s", i, text(l.Lines))
		}
	}
	if mark.Lines != nil {
		t.Errorf("a marked frame got names:%s", text(mark.Lines))
	}
}

func TestSnapshotNamesTheVDSO(t *testing.T) {
	vdso := ownVDSO(t)
	path := filepath.Join(t.TempDir(), "vdso.so")
	if err := os.WriteFile(path, vdso, 0o600); err != nil {
		t.Fatal(err)
	}
	o, err := openELF(bytes.NewReader(vdso), "vdso")
	if err != nil {
		t.Fatal(err)
	}
	syms, err := o.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	for _, sym := range syms {
		if sym.Name != "__vdso_getcpu" {
			continue
		}
		m := &profile.Mapping{Start: loaded, Limit: loaded + 2*pageSize, File: vdsoName}
		for _, tt := range []struct {
			files      FileSource
			name, mark string
		}{{oneFile(path), "__vdso_getcpu", ""}, {nil, "", "[vdso]"}} {
			s := snapshotOf(m, []uint64{sym.Value + 1})
			l := s.Stacks[0].Frames[0]
			l.Mark = "[vdso]"
			if err := New(Options{}).Snapshot(context.Background(), s, tt.files); err != nil {
				t.Fatal(err)
			}
			name := ""
			if len(l.Lines) > 0 {
				name = l.Lines[0].SystemName
			}
			if !strings.Contains(name, strings.TrimPrefix(tt.name, "__vdso_")) || (name == "") != (tt.name == "") || l.Mark != tt.mark {
				t.Errorf("got %q with mark %q, want %q with mark %q", name, l.Mark, tt.name, tt.mark)
			}
		}
		return
	}
	t.Skip("needs a vDSO with __vdso_getcpu")
}

// ownVDSO reads the test's own vDSO.
func ownVDSO(t *testing.T) []byte {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(maps)) {
		if !strings.Contains(line, vdsoName) {
			continue
		}
		r, _, _ := strings.Cut(line, " ")
		from, to, _ := strings.Cut(r, "-")
		start, end := hexNumber(t, from), hexNumber(t, to)
		mem, err := os.Open("/proc/self/mem")
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		b := make([]byte, end-start)
		if _, err := mem.ReadAt(b, int64(start)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	t.Skip("needs a vDSO")
	return nil
}
