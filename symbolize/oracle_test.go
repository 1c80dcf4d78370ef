package symbolize

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

// oracleFrame is a function at an address as another tool sees it.
type oracleFrame struct {
	Function  string `json:"FunctionName"`
	File      string `json:"FileName"`
	Line      int    `json:"Line"`
	StartLine int    `json:"StartLine"`
}

// llvmSymbolizer returns the frames that llvm-symbolizer finds at each address, innermost first.
func llvmSymbolizer(t testing.TB, file string, addrs []uint64, args ...string) [][]oracleFrame {
	t.Helper()
	var in strings.Builder
	for _, a := range addrs {
		fmt.Fprintf(&in, "%#x\n", a)
	}
	cmd := exec.Command("llvm-symbolizer", append([]string{"--obj=" + file, "--output-style=JSON", "--no-demangle", "--inlines"}, args...)...)
	cmd.Stdin = strings.NewReader(in.String())
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("llvm-symbolizer: %v", err)
	}
	var frames [][]oracleFrame
	for line := range bytes.Lines(out) {
		var answer []struct{ Symbol []oracleFrame }
		if line[0] == '{' {
			line = append(append([]byte{'['}, bytes.TrimSpace(line)...), ']')
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			t.Fatalf("llvm-symbolizer: %v in %.200s", err, line)
		}
		for _, a := range answer {
			frames = append(frames, a.Symbol)
		}
	}
	if len(frames) != len(addrs) {
		t.Fatalf("llvm-symbolizer: %d answers to %d addresses", len(frames), len(addrs))
	}
	return frames
}

// randomCode returns n sorted file offsets in the executable sections of a file, and their addresses.
func randomCode(t testing.TB, file string, n int, seed uint64) (offsets, addrs []uint64) {
	t.Helper()
	f, err := elf.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var code []*elf.Section
	total := uint64(0)
	for _, s := range f.Sections {
		if s.Flags&elf.SHF_EXECINSTR != 0 && s.Type == elf.SHT_PROGBITS && !strings.HasPrefix(s.Name, ".plt") {
			code = append(code, s)
			total += s.Size
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	for range n {
		k := rng.Uint64N(total)
		for _, s := range code {
			if k < s.Size {
				offsets, addrs = append(offsets, s.Offset+k), append(addrs, s.Addr+k)
				break
			}
			k -= s.Size
		}
	}
	return offsets, addrs
}

func resolveFile(t testing.TB, o Options, file string, offsets []uint64) [][]profile.Line {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if o.Warn == nil {
		o.Warn = func(w string) { t.Errorf("warning: %s", w) }
	}
	lines, err := New(o).Resolve(t.Context(), Object{Path: file, File: f}, offsets)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func text(lines []profile.Line) string {
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "\n\t%s %s:%d (from line %d)", l.SystemName, l.File, l.Line, l.StartLine)
	}
	return b.String()
}

func oracleText(frames []oracleFrame) string {
	var b strings.Builder
	for _, f := range frames {
		fmt.Fprintf(&b, "\n\t%s %s:%d (from line %d)", f.Function, f.File, f.Line, f.StartLine)
	}
	return b.String()
}

// comparison counts how frames differ from an oracle's.
type comparison struct {
	total, differ int
	aliases       int // the oracle prints another symbol of the same function
	unnamed       int // the oracle misses a function that the symbol table has
}

// compare checks the lines of each address against llvm-symbolizer's and reports the differences that are not its errors:
//   - it replaces the DWARF's name of the outermost function by any symbol of the same address (longjmp for siglongjmp);
//   - it gives no name where .symtab has a function that covers the address.
func compare(t *testing.T, addrs []uint64, got [][]profile.Line, want [][]oracleFrame, symbols [][]symbol) {
	t.Helper()
	var c comparison
	for i := range addrs {
		c.total++
		if c.same(got[i], want[i], symbols[i]) {
			continue
		}
		c.differ++
		if c.differ <= 5 {
			t.Logf("%#x: got%s\nllvm-symbolizer has%s", addrs[i], text(got[i]), oracleText(want[i]))
		}
	}
	t.Logf("%d addresses: %d differ, %d under another symbol of the same function, %d without a name there", c.total, c.differ, c.aliases, c.unnamed)
	if c.differ*1000 > c.total {
		t.Errorf("%d of %d addresses differ: more than 0.1 %%", c.differ, c.total)
	}
}

func (c *comparison) same(got []profile.Line, want []oracleFrame, symbols []symbol) bool {
	if len(got) != len(want) {
		return false
	}
	for k, g := range got {
		w := want[k]
		last := k == len(got)-1
		if g.Line != w.Line || g.StartLine != w.StartLine || w.File != "" && path.Clean(w.File) != g.File || w.File == "" && g.File != "" {
			return false
		}
		switch {
		case g.SystemName == w.Function:
		case last && w.Function != "" && slices.ContainsFunc(symbols, func(s symbol) bool { return s.name == strings.SplitN(w.Function, "@", 2)[0] }):
			c.aliases++
		case last && w.Function == "" && strings.Contains(g.SystemName, "+0x"):
		case last && w.Function == "" && slices.ContainsFunc(symbols, func(s symbol) bool { return s.name == g.SystemName }):
			c.unnamed++
		default:
			return false
		}
	}
	return true
}

// symbolsOf returns the symbols of a file and its debug file at each address.
func symbolsOf(t *testing.T, file string, addrs []uint64) [][]symbol {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := New(Options{}).open(t.Context(), &Object{Path: file, File: f})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	order := make([]int, len(addrs))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return cmp.Compare(addrs[a], addrs[b]) })
	sorted := make([]uint64, len(addrs))
	for k, i := range order {
		sorted[k] = addrs[i]
	}
	out := make([][]symbol, len(addrs))
	for k, s := range r.symbols(sorted) {
		out[order[k]] = s
	}
	return out
}

func TestSystemLibrariesAgreeWithLLVM(t *testing.T) {
	for _, file := range []string{
		"/lib/x86_64-linux-gnu/libc.so.6",                 // compressed debug file found by build-id
		"/usr/lib/x86_64-linux-gnu/debug/libstdc++.so.6",  // DWARF in the file
		"/usr/lib/x86_64-linux-gnu/libpython3.11d.so.1.0", // likewise, C
		"/usr/lib/x86_64-linux-gnu/libkrb5.so.3",          // dwz: an alternate file
	} {
		t.Run(path.Base(file), func(t *testing.T) {
			if _, err := os.Stat(file); err != nil {
				t.Skipf("needs the package that has %s (test/packages.txt)", file)
			}
			offsets, addrs := randomCode(t, file, 1000, 1)
			compare(t, addrs, resolveFile(t, Options{}, file, offsets), llvmSymbolizer(t, file, addrs), symbolsOf(t, file, addrs))
		})
	}
}
