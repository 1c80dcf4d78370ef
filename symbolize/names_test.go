package symbolize

import (
	"bytes"
	"debug/elf"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNamesAreDemangled(t *testing.T) {
	for _, tt := range []struct{ name, mangled, want string }{
		{"C", "malloc", "malloc"},
		{"C++", "_ZN4deep2er6shapesEm", "deep::er::shapes(unsigned long)"},
		{"C++ constructor", "_ZN6CircleC2Ed", "Circle::Circle(double)"},
		{"Rust, legacy: without the hash", "_ZN5alloc3vec16Vec$LT$T$C$A$GT$4push17h1122334455667788E", "alloc::vec::Vec<T,A>::push"},
		{"Rust, v0", "_RNvNtCsbmNqQUJIY6D_4core3fmt5write", "core::fmt::write"},
		{"no valid name stays as it is", "_ZN9999x", "_ZN9999x"},
		{"a name that only looks like Rust", "_Read", "_Read"},
		{"a name that would fill the memory", "_Z1fI" + strings.Repeat("S_IS0_", 500), "_Z1fI" + strings.Repeat("S_IS0_", 500)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := demangled(tt.mangled); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
		})
	}
}

func TestRustMangledNamesAgreeWithLLVM(t *testing.T) {
	need(t, "gcc", "llvm-symbolizer")
	dir := t.TempDir()
	source, err := filepath.Abs("testdata/mangled.c")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "mangled.so")
	run(t, dir, "gcc", "-O1", "-g", "-shared", "-fPIC", "-o", file, source)
	offsets, addrs := randomCode(t, file, 1000, 37)
	lines := resolveFile(t, Options{}, file, offsets)
	want := llvmSymbolizer(t, file, addrs)
	compare(t, addrs, lines, want, symbolsOf(t, file, addrs))
}

func TestRustProgramsAgreeWithLLVM(t *testing.T) {
	need(t, "rustc", "llvm-symbolizer")
	source, err := filepath.Abs("testdata/leaf.rs")
	if err != nil {
		t.Fatal(err)
	}
	for _, mangling := range []string{"legacy", "v0"} {
		t.Run(mangling, func(t *testing.T) {
			dir := t.TempDir()
			args := []string{"-g", "-O", "-C", "symbol-mangling-version=" + mangling, "-o", "leaf", source}
			if out, err := exec.Command("sh", "-c", "cd "+dir+" && rustc "+strings.Join(args, " ")).CombinedOutput(); err != nil {
				t.Skipf("needs a rustc that knows %s: %v\n%s", mangling, err, out)
			}
			file := filepath.Join(dir, "leaf")
			offsets, addrs := randomCode(t, file, 1000, 41)
			compare(t, addrs, resolveFile(t, Options{}, file, offsets), llvmSymbolizer(t, file, addrs), symbolsOf(t, file, addrs))
		})
	}
}

// objdumpStubs returns the addresses of the stubs that objdump names.
func objdumpStubs(t *testing.T, file string) map[uint64]string {
	t.Helper()
	out, err := exec.Command("objdump", "-d", "-j", ".plt", "-j", ".plt.sec", "-j", ".plt.got", file).Output()
	if err != nil && len(out) == 0 {
		t.Fatal(err)
	}
	stubs := map[uint64]string{}
	for _, m := range regexp.MustCompile(`(?m)^([0-9a-f]+) <([^>]+@plt)>:$`).FindAllSubmatch(out, -1) {
		addr, err := strconv.ParseUint(string(m[1]), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		stubs[addr] = string(m[2])
	}
	return stubs
}

func TestStubsAreNamedAsObjdumpNamesThem(t *testing.T) {
	need(t, "gcc", "objdump")
	dir := t.TempDir()
	source := `#include <stdlib.h>
#include <string.h>
#include <stdio.h>
void *f(size_t n, const char *s) { void *(*volatile keep)(size_t) = malloc; void *p = malloc(n); puts(s); free(p); return keep(strlen(strdup(s))); }
`
	if err := os.WriteFile(filepath.Join(dir, "f.c"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, flags := range map[string][]string{
		"lazy":                     {"-Wl,-z,lazy", "-fcf-protection=none"},
		"bound at start":           {"-Wl,-z,now", "-fcf-protection=none"},
		"with branch protection":   {"-Wl,-z,lazy", "-fcf-protection=full", "-Wl,-z,ibtplt"},
		"bound at start, stripped": {"-Wl,-z,now", "-s"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, "f.so")
			run(t, dir, "gcc", append([]string{"-O1", "-shared", "-fPIC", "-fno-builtin", "-o", file, "f.c"}, flags...)...)
			stubs := objdumpStubs(t, file)
			if len(stubs) < 4 {
				t.Fatalf("objdump finds %v", stubs)
			}
			f, err := elf.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			got := map[uint64]string{}
			for addr := range stubs {
				for _, s := range f.Sections {
					if s.Type == elf.SHT_PROGBITS && addr >= s.Addr && addr < s.Addr+s.Size && s.Addr != 0 {
						lines := resolveFile(t, Options{}, file, []uint64{addr - s.Addr + s.Offset, addr - s.Addr + s.Offset + 5})
						if lines[0][0].Function != lines[1][0].Function {
							t.Errorf("%#x: %s at its start, %s inside", addr, lines[0][0].Function, lines[1][0].Function)
						}
						got[addr] = lines[0][0].Function
					}
				}
			}
			if diff := cmp.Diff(stubs, got); diff != "" {
				t.Errorf("(-objdump +got):\n%s", diff)
			}
		})
	}
}

func TestArm64StubsAreDecoded(t *testing.T) {
	// adrp x16, 0x11000; ldr x17, [x16, #16]; add x16, x16, #16; br x17 at 0x640.
	code := []byte{0x90, 0x00, 0x00, 0xf0, 0x11, 0x0a, 0x40, 0xf9, 0x10, 0x42, 0x00, 0x91, 0x20, 0x02, 0x1f, 0xd6}
	if got := arm64Slot(code, 0x640); got != 0x13010 {
		t.Errorf("got slot %#x, want 0x13010", got)
	}
	if got := arm64Slot(bytes.Repeat([]byte{0xff}, 16), 0x640); got != 0 {
		t.Errorf("slot %#x out of nothing", got)
	}
}
