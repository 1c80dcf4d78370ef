package symbolize

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// need skips a test whose tools are not installed; `make test` installs them.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs %s (test/packages.txt)", tool)
		}
	}
}

func run(t testing.TB, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// buildProgram compiles the program full of inlined calls in a directory of its own and returns its path.
func buildProgram(t testing.TB, compiler string, flags ...string) string {
	t.Helper()
	need(t, compiler)
	dir := t.TempDir()
	sources, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	for _, name := range []string{"inlines", "shape"} {
		wait.Go(func() {
			args := append([]string{"-std=c++17", "-O2", "-g", "-c", "-o", name + ".o", filepath.Join(sources, name+".cc")}, flags...)
			cmd := exec.Command(compiler, args...)
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s %s: %v\n%s", compiler, strings.Join(args, " "), err, out)
			}
		})
	}
	wait.Wait()
	if t.Failed() {
		t.FailNow()
	}
	run(t, dir, compiler, append([]string{"-O2", "-g", "-rdynamic", "-o", "program", "inlines.o", "shape.o"}, flags...)...)
	return filepath.Join(dir, "program")
}

// variant makes another form of a program's file beside it; addresses stay the same.
func variant(t testing.TB, program, name string, make func(t testing.TB, in, out string)) string {
	t.Helper()
	dir := t.TempDir()
	out := filepath.Join(dir, name)
	make(t, program, out)
	return out
}

func objcopy(args ...string) func(testing.TB, string, string) {
	return func(t testing.TB, in, out string) {
		t.Helper()
		run(t, filepath.Dir(out), "objcopy", append(args, in, out)...)
	}
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestCompilersAndVersionsAgreeWithLLVM(t *testing.T) {
	need(t, "llvm-symbolizer")
	for _, tt := range []struct {
		name, compiler string
		flags          []string
		pkg            bool // pack the split units into a .dwp file
	}{
		{name: "gcc, DWARF 5", compiler: "g++", flags: []string{"-gdwarf-5"}},
		{name: "gcc, DWARF 4", compiler: "g++", flags: []string{"-gdwarf-4"}},
		{name: "gcc, link-time optimization: references between units", compiler: "g++", flags: []string{"-gdwarf-5", "-flto"}},
		{name: "gcc, split DWARF 5", compiler: "g++", flags: []string{"-gdwarf-5", "-gsplit-dwarf"}},
		{name: "gcc, split DWARF 4", compiler: "g++", flags: []string{"-gdwarf-4", "-gsplit-dwarf"}},
		{name: "clang, DWARF 5: no aranges, no siblings", compiler: "clang++", flags: []string{"-gdwarf-5"}},
		{name: "clang, DWARF 4", compiler: "clang++", flags: []string{"-gdwarf-4"}},
		{name: "clang, split DWARF 5 in a package", compiler: "clang++", flags: []string{"-gdwarf-5", "-gsplit-dwarf"}, pkg: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			program := buildProgram(t, tt.compiler, tt.flags...)
			offsets, addrs := randomCode(t, program, 1000, 7)
			want := llvmSymbolizer(t, program, addrs)
			if tt.pkg {
				need(t, "llvm-dwp")
				run(t, filepath.Dir(program), "llvm-dwp", "-e", program, "-o", program+".dwp")
				units, err := filepath.Glob(filepath.Join(filepath.Dir(program), "*.dwo"))
				if err != nil || len(units) != 2 {
					t.Fatalf("split units: %v, %v", units, err)
				}
				for _, u := range units {
					os.Remove(u)
				}
			}
			compare(t, addrs, resolveFile(t, Options{}, program, offsets), want, symbolsOf(t, program, addrs))
		})
	}
}

func hexNumber(t testing.TB, s string) uint64 {
	t.Helper()
	v, err := strconv.ParseUint(s, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}
