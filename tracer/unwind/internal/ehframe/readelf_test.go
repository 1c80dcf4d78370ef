package ehframe

import (
	"bufio"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.opentelemetry.io/ebpf-profiler/support"
)

// want is a row of readelf -wF: the state of the three columns that matter.
type want struct {
	vaddr        uint64
	cfa, rbp, ra string
	last         bool // of its FDE
	end          uint64
}

var fdeLine = regexp.MustCompile(`FDE .*pc=([0-9a-f]+)\.\.([0-9a-f]+)`)

// parseReadelf reads the interpreted frame section. Columns differ from FDE to FDE and follow their heading.
func parseReadelf(r io.Reader) ([]want, error) {
	var rows []want
	var columns []string
	var end uint64
	inFDE := false
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		f := slices.DeleteFunc(strings.Fields(line), func(s string) bool { return s[0] == '(' }) // "r10 (r10)" is one column
		switch {
		case strings.Contains(line, " CIE "):
			inFDE = false
		case fdeLine.MatchString(line):
			m := fdeLine.FindStringSubmatch(line)
			end, _ = strconv.ParseUint(m[2], 16, 64)
			inFDE = true
		case len(f) > 0 && f[0] == "LOC":
			columns = f
		case inFDE && len(f) >= 2 && len(f[0]) == 16 && len(columns) > 0:
			vaddr, err := strconv.ParseUint(f[0], 16, 64)
			if err != nil {
				return nil, fmt.Errorf("line %q: %w", line, err)
			}
			w := want{vaddr: vaddr, end: end}
			for i, c := range columns {
				if i >= len(f) {
					break
				}
				switch c {
				case "CFA":
					w.cfa = f[i]
				case "rbp":
					w.rbp = f[i]
				case "ra":
					w.ra = f[i]
				}
			}
			rows = append(rows, w)
		}
	}
	return rows, sc.Err()
}

func TestTablesAgreeWithReadelf(t *testing.T) {
	for _, pattern := range []string{"/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2",
		"/lib/x86_64-linux-gnu/libstdc++.so.6", "/lib/x86_64-linux-gnu/libcrypto.so.3", "/lib/x86_64-linux-gnu/libluajit-5.1.so.2",
		"/usr/sbin/nginx", "/usr/bin/python3.11", "/usr/bin/git", "/lib/x86_64-linux-gnu/libgmp.so.10"} {
		t.Run(filepath.Base(pattern), func(t *testing.T) {
			if _, err := os.Stat(pattern); err != nil {
				t.Skip(err)
			}
			compareWithReadelf(t, pattern)
		})
	}
}

func compareWithReadelf(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("readelf", "-wF", path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rows, err := parseReadelf(out)
	cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := Extract(f, elf.EM_X86_64)
	if err != nil {
		t.Fatal(err)
	}
	bad, gaveUp := 0, 0
	for _, w := range rows {
		if w.vaddr >= w.end {
			continue // an advance past the end of the function
		}
		rule, ok := table.Lookup(uint32(w.vaddr))
		if ok && isCommand(rule, cmdInvalid) {
			gaveUp++
			continue
		}
		if !ok || !agrees(rule, w) {
			bad++
			if bad < 10 {
				t.Errorf("%#x: CFA %s rbp %q ra %s, table has %+v", w.vaddr, w.cfa, w.rbp, w.ra, rule)
			}
		}
	}
	t.Logf("%d rows of readelf, %d differ, %d without a usable rule; %d rows and %d rules here", len(rows), bad, gaveUp, len(table.Rows), len(table.Rules))
	if len(rows) == 0 || gaveUp > len(rows)/20 {
		t.Errorf("%d of %d rows have no usable rule", gaveUp, len(rows))
	}
}

func isCommand(r Rule, command int32) bool { return r.Flags&FlagCommand != 0 && r.Param == command }

func agrees(r Rule, w want) bool {
	switch {
	case isCommand(r, cmdStop):
		return w.ra == "u"
	case isCommand(r, cmdSignal):
		return w.cfa == "exp"
	case isCommand(r, cmdPLT):
		return w.cfa == "exp"
	case w.ra == "u":
		return false
	}
	if r.Flags&support.UnwindFlagRegisterRA != 0 {
		return strings.HasPrefix(w.ra, "r") || w.ra == "exp"
	}
	if w.ra != "c-8" {
		return false
	}
	if r.Flags&support.UnwindFlagDerefCfa != 0 {
		if w.cfa != "exp" {
			return false
		}
	} else if w.cfa != cfaText(r) {
		return false
	}
	switch {
	case w.rbp == "" || w.rbp == "u" || w.rbp == "s":
		return r.Aux == support.UnwindRegInvalid
	case w.rbp == "exp":
		return true
	}
	if w.rbp[0] != 'c' {
		return true
	}
	var slot int32
	fmt.Sscanf(w.rbp, "c%d", &slot)
	if r.Base == RegSP && r.Flags == 0 && slot < -r.Param {
		return r.Aux == support.UnwindRegInvalid // popped already: the slot is below the stack's top
	}
	return r.Aux == RegCFA && r.AuxParam == slot
}

func cfaText(r Rule) string {
	name := map[uint8]string{support.UnwindRegSp: "rsp", support.UnwindRegFp: "rbp", support.UnwindRegX86RAX: "rax",
		support.UnwindRegX86RDI: "rdi", support.UnwindRegX86R8: "r8", support.UnwindRegX86R9: "r9",
		support.UnwindRegX86R11: "r11", support.UnwindRegX86R13: "r13", support.UnwindRegX86R15: "r15"}[r.Base]
	return fmt.Sprintf("%s%+d", name, r.Param)
}
