package symbolize

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/profile"
)

// sharedProgram is one build for all tests that look at other forms of the same file.
var sharedProgram = sync.OnceValues(func() (string, error) {
	return os.MkdirTemp("", "allocsnoop-symbolize-*")
})

func TestMain(m *testing.M) {
	code := m.Run()
	if dir, err := sharedProgram(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

var programOnce sync.Mutex

// program returns the path of the program of inlines.cc, built once by gcc with DWARF 5.
func program(t testing.TB) string {
	t.Helper()
	programOnce.Lock()
	defer programOnce.Unlock()
	dir, err := sharedProgram()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "program")
	if _, err := os.Stat(path); err != nil {
		copyFile(t, buildProgram(t, "g++", "-gdwarf-5"), path)
	}
	return path
}

func TestFormsOfOneFileGiveTheSameFrames(t *testing.T) {
	base := program(t)
	offsets, _ := randomCode(t, base, 1000, 7)
	want := withoutBuildIDs(resolveFile(t, Options{}, base, offsets))
	debugDir := t.TempDir()
	for _, tt := range []struct {
		name    string
		tools   []string
		options Options
		make    func(t testing.TB, in, out string)
	}{
		{name: "sections compressed with zlib", make: objcopy("--compress-debug-sections=zlib")},
		{name: "sections in the old GNU form of compression", make: objcopy("--compress-debug-sections=zlib-gnu")},
		{name: "sections compressed with zstd", make: objcopy("--compress-debug-sections=zstd")},
		{name: "a debug link to a file beside it", make: func(t testing.TB, in, out string) {
			objcopy("--only-keep-debug")(t, in, out+".debug")
			objcopy("--strip-all", "--add-gnu-debuglink="+out+".debug")(t, in, out)
		}},
		{name: "a debug link, no build-id: the checksum decides", make: func(t testing.TB, in, out string) {
			objcopy("--remove-section=.note.gnu.build-id")(t, in, out+".whole")
			dir := filepath.Join(filepath.Dir(out), ".debug")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			debug := filepath.Join(dir, filepath.Base(out)+".debug")
			objcopy("--only-keep-debug")(t, out+".whole", debug)
			objcopy("--strip-all", "--add-gnu-debuglink="+debug)(t, out+".whole", out)
		}},
		{name: "split off by eu-strip, found by build-id", tools: []string{"eu-strip"}, options: Options{DebugDirs: []string{debugDir}}, make: func(t testing.TB, in, out string) {
			run(t, filepath.Dir(out), "eu-strip", "-o", out, "-f", buildIDPath(t, in, debugDir), in)
		}},
		{name: "a copy of the whole file under any name in a debug directory", options: Options{DebugDirs: []string{debugDir + "-any"}}, make: func(t testing.TB, in, out string) {
			dir := filepath.Join(debugDir+"-any", "old", "builds")
			if err := os.MkdirAll(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { os.RemoveAll(debugDir + "-any") })
			copyFile(t, in, filepath.Join(dir, "program-1.0.1"))
			objcopy("--strip-all")(t, in, out)
		}},
		{name: "dwz with an alternate file", tools: []string{"dwz"}, make: func(t testing.TB, in, out string) {
			copyFile(t, in, out)
			copyFile(t, in, out+".other")
			run(t, filepath.Dir(out), "dwz", "-m", "common.debug", "-r", out, out+".other")
			if info, err := os.Stat(filepath.Join(filepath.Dir(out), "common.debug")); err != nil || info.Size() < 100_000 {
				t.Fatalf("dwz moved nothing to the alternate file: %v", err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			need(t, tt.tools...)
			file := variant(t, base, "program", tt.make)
			if diff := cmp.Diff(want, withoutBuildIDs(resolveFile(t, tt.options, file, offsets))); diff != "" {
				t.Errorf("frames differ from those of the file itself (-file +%s):\n%.2000s", tt.name, diff)
			}
		})
	}
}

// withoutBuildIDs takes them out of the names of unknown functions: one form of the file has none.
func withoutBuildIDs(lines [][]profile.Line) [][]profile.Line {
	for _, l := range lines {
		l[0].SystemName, _, _ = strings.Cut(l[0].SystemName, " [build-id")
	}
	return lines
}

// buildIDPath returns where a debug directory keeps the debug file of a program.
func buildIDPath(t testing.TB, program, dir string) string {
	t.Helper()
	id := buildIDOf(t, program)
	path := filepath.Join(dir, ".build-id", id[:2], id[2:]+".debug")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func buildIDOf(t testing.TB, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id, err := BuildID(f)
	if err != nil || id == "" {
		t.Fatalf("build-id of %s: %q, %v", file, id, err)
	}
	return id
}

// outermost returns the function of each location's outermost line.
func outermost(lines [][]profile.Line) []string {
	var names []string
	for _, l := range lines {
		names = append(names, l[len(l)-1].SystemName)
	}
	return names
}

func TestWithoutDWARFNamesComeFromSymbols(t *testing.T) {
	base := program(t)
	offsets, addrs := randomCode(t, base, 1000, 11)
	symbols := symbolsOf(t, base, addrs)
	for _, tt := range []struct {
		name  string
		tools []string
		make  func(t testing.TB, in, out string)
		// named tells whether the form still names a function of that binding.
		named func(symbol) bool
	}{
		{"DWARF stripped", nil, objcopy("--strip-debug"), func(symbol) bool { return true }},
		{"mini debug info", []string{"xz"}, miniDebugInfo, func(s symbol) bool { return s.size > 0 }},
		{"all stripped", nil, objcopy("--strip-all"), func(s symbol) bool { return s.bind != 0 && s.name != "_start" && s.size > 0 }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			need(t, tt.tools...)
			file := variant(t, base, "program", tt.make)
			named, unknown := 0, 0
			for i, got := range outermost(resolveFile(t, Options{}, file, offsets)) {
				s, ok := best(symbols[i])
				if ok && tt.named(s) {
					named++
					if got != s.name {
						t.Errorf("%#x: got %s, want %s", addrs[i], got, s.name)
					}
					continue
				}
				if ok && got == s.name { // exported through the table of dynamic symbols after all
					named++
					continue
				}
				unknown++
				if want := fmt.Sprintf("program+%#x [build-id %s]", offsets[i], buildIDOf(t, file)); got != want {
					t.Errorf("%#x: got %s, want %s", addrs[i], got, want)
				}
			}
			t.Logf("%d named, %d unknown", named, unknown)
			if named < 500 {
				t.Errorf("only %d of 1000 addresses are named", named)
			}
		})
	}
}

// miniDebugInfo makes what Fedora does: the function symbols that .dynsym lacks, in a small ELF file, xz-compressed.
func miniDebugInfo(t testing.TB, in, out string) {
	t.Helper()
	dir := filepath.Dir(out)
	mini := filepath.Join(dir, "mini")
	objcopy("--strip-debug")(t, in, mini+".symbols")
	objcopy("--only-keep-debug")(t, mini+".symbols", mini)
	run(t, dir, "xz", "-k", mini)
	objcopy("--strip-all", "--add-section=.gnu_debugdata="+mini+".xz")(t, in, out)
}

func TestWrongDebugFilesAreNotUsed(t *testing.T) {
	base := program(t)
	offsets, _ := randomCode(t, base, 101, 13)
	other := buildProgram(t, "g++", "-gdwarf-5", "-DOTHER", "-O1")
	for _, tt := range []struct{ name, warning string }{
		{"another build under the build-id's path", "its build-id is"},
		{"another build behind the debug link", "its build-id is"},
		{"other bytes behind the debug link of a file without a build-id", "its checksum is"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			file, o := filepath.Join(dir, "program"), Options{}
			var warnings []string
			o.Warn = func(w string) { warnings = append(warnings, w) }
			objcopy("--strip-all")(t, base, file)
			switch {
			case strings.Contains(tt.name, "path"):
				o.DebugDirs = []string{filepath.Join(dir, "debug")}
				copyFile(t, other, buildIDPath(t, base, o.DebugDirs[0]))
			case strings.Contains(tt.name, "bytes"):
				objcopy("--strip-all", "--remove-section=.note.gnu.build-id")(t, base, file)
				copyFile(t, base, filepath.Join(dir, "program.debug"))
				objcopy("--add-gnu-debuglink="+filepath.Join(dir, "program.debug"))(t, file, file+".linked")
				os.Rename(file+".linked", file)
				copyFile(t, other, filepath.Join(dir, "program.debug"))
			default:
				copyFile(t, other, filepath.Join(dir, "program.debug"))
				objcopy("--strip-all", "--add-gnu-debuglink="+filepath.Join(dir, "program.debug"))(t, base, file)
			}
			for _, l := range resolveFile(t, o, file, offsets) {
				if len(l) != 1 || l[0].File != "" {
					t.Fatalf("a line of the wrong file is used:%s", text(l))
				}
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0], tt.warning) {
				t.Errorf("warnings %q, want one with %q", warnings, tt.warning)
			}
		})
	}
}

func TestNoInlinesKeepsTheFunctionAndTheInnermostLine(t *testing.T) {
	base := program(t)
	offsets, addrs := randomCode(t, base, 211, 43)
	full, plain := resolveFile(t, Options{}, base, offsets), resolveFile(t, Options{NoInlines: true}, base, offsets)
	for i, got := range plain {
		inner, outer := full[i][0], full[i][len(full[i])-1]
		if len(got) != 1 || got[0].Function != outer.Function || got[0].File != inner.File || got[0].Line != inner.Line {
			t.Errorf("%#x: got%s\nwith inlined calls%s", addrs[i], text(got), text(full[i]))
		}
	}
}
