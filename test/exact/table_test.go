package exact

import (
	"bytes"
	"cmp"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

var update = flag.Bool("update", false, "rewrite the tables in docs/coverage.md")

const coverage = "../../docs/coverage.md"

// grid is a table of the document as it was measured: a row for each situation or function, a column for each allocator.
type grid struct {
	name string // of its markers
	head []string
	// rows in the document's order; each has as many leading cells as head.
	rows [][]string

	mu    sync.Mutex
	cells map[string]map[string]string // of a row's first cell and an allocator
}

func (g *grid) set(row, column, text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.cells == nil {
		g.cells = map[string]map[string]string{}
	}
	if g.cells[row] == nil {
		g.cells[row] = map[string]string{}
	}
	if old := g.cells[row][column]; old != "" && old != exact {
		return // one of several measurements of this cell was wrong
	}
	g.cells[row][column] = text
}

const exact = "exact"

func (g *grid) text() string {
	var out strings.Builder
	slices.SortStableFunc(g.rows, func(x, y []string) int {
		return cmp.Or(cmp.Compare(rank(x[0]), rank(y[0])), cmp.Compare(byName(x[0]), byName(y[0])))
	})
	head := slices.Clone(g.head)
	for _, a := range allocators {
		head = append(head, a.name)
	}
	fmt.Fprintf(&out, "| %s |\n|%s\n", strings.Join(head, " | "), strings.Repeat("---|", len(head)))
	for _, row := range g.rows {
		line := slices.Clone(row)
		for _, a := range allocators {
			line = append(line, g.cell(row[0], a.name))
		}
		fmt.Fprintf(&out, "| %s |\n", strings.Join(line, " | "))
	}
	return out.String()
}

// cell is empty for what was not measured. An allocator that was measured and did not call a function has none.
func (g *grid) cell(row, column string) string {
	if text := g.cells[row][column]; text != "" || g.cells["`malloc`"][column] == "" {
		return text
	}
	return "–"
}

// complete tells whether every cell was measured: with -run, or after a failure, some are not.
func (g *grid) complete() bool {
	if len(g.rows) == 0 {
		return false
	}
	for _, row := range g.rows {
		for _, a := range allocators {
			if g.cell(row[0], a.name) == "" {
				return false
			}
		}
	}
	return true
}

// check compares what was measured with the document, cell by cell, so that a part of the tests checks a part of it.
func (g *grid) check(t *testing.T) {
	t.Helper()
	lock, err := os.Open(coverage)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil { // of another -update
		t.Fatal(err)
	}
	data, err := os.ReadFile(coverage)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := fmt.Sprintf("<!-- %s: begin, measured -->\n", g.name), fmt.Sprintf("<!-- %s: end -->", g.name)
	_, rest, ok := strings.Cut(string(data), begin)
	old, _, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no markers %q", coverage, begin)
	}
	if *update {
		g.keep(old)
		text := bytes.Replace(data, []byte(begin+old+end), []byte(begin+g.text()+end), 1)
		if err := os.WriteFile(coverage, text, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if g.complete() && old != g.text() {
		t.Errorf("the table %q of %s is not what was measured; run with -update.\nmeasured:\n%s", g.name, coverage, g.text())
		return
	}
	parseTable(old, func(row, column, cell string) {
		if got := g.cells[row][column]; got != "" && got != cell {
			t.Errorf("%s under %s: the document says %q, measured was %q; run with -update", row, column, cell, got)
		}
	})
}

// keep fills in from the document what was not measured this time.
func (g *grid) keep(old string) {
	parseTable(old, func(row, column, cell string) {
		known := slices.ContainsFunc(g.rows, func(r []string) bool { return r[0] == row })
		if column == "Function" && !known && strings.HasPrefix(row, "`") {
			g.rows = append(g.rows, []string{row})
		}
		if cell != "–" && g.cells[row][column] == "" && slices.ContainsFunc(allocators, func(a allocator) bool { return a.name == column }) {
			g.set(row, column, cell)
		}
	})
}

func parseTable(text string, each func(row, column, cell string)) {
	var columns []string
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(line, "|\n"), "|")
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		if columns == nil {
			columns = cells
		}
		for i, cell := range cells {
			if i < len(columns) {
				each(cells[0], columns[i], cell)
			}
		}
	}
}

// functions are those that the exactness tests call, and what came out.
var functions = &functionGrid{grid: grid{name: "measured functions", head: []string{"Function"}}}

type functionGrid struct{ grid }

// record notes what a site shows of the function that it calls.
func (g *functionGrid) record(a allocator, p *profile.Profile, r row) {
	if r.Kind != "malloc" {
		return
	}
	name := "`" + r.Function + "`"
	switch site := strings.TrimPrefix(r.Site, "site_"); {
	case site == "cfree_made":
		name = "`cfree`"
	case site == "strdup", site == "xallocx":
		name = "`" + site + "`"
	case site == "after_throw":
		name = "`operator new` that throws"
	case r.Function == "":
		name = "`operator new`, `delete`"
		for _, form := range []string{"array", "aligned", "nothrow"} {
			if strings.Contains(site, form) {
				name += ", " + form
			}
		}
	}
	if !slices.ContainsFunc(g.rows, func(row []string) bool { return row[0] == name }) {
		g.rows = append(g.rows, []string{name})
	}
	cell := judge(p, r)
	switch {
	case strings.HasSuffix(r.Site, "after_throw") && !a.throws():
		cell = "n/a (4)"
	case r.Function == "" && a.tableless():
		cell = exact // in the sum of all, which is compared: the stack ends in the C library
	case cell == exact && r.AllocObjects == 0:
		return
	}
	g.set(name, a.name, cell)
}

// TestFunctionsInTheDocument runs behind the tests that record: Go goes by the names of files.
func TestFunctionsInTheDocument(t *testing.T) {
	functions.check(t)
}

// byName sorts functions and leaves numbered rows as they are.
func byName(name string) string {
	if strings.HasPrefix(name, "`") {
		return name
	}
	return ""
}

// rank puts C first, then C++, then what one allocator has.
func rank(name string) int {
	switch {
	case strings.HasPrefix(name, "`operator"):
		return 1
	case strings.HasSuffix(name, "allocx`"), strings.HasPrefix(name, "`tc_"), strings.HasPrefix(name, "`mi_"):
		return 2
	}
	return 0
}

// judge compares a site's row with the profile as compareRow does, and returns a table's cell.
func judge(p *profile.Profile, r row) string {
	want, got := r.comparable(r.book()), r.comparable(live.Sum(p, r.Kind, r.Site))
	if got != want {
		return fmt.Sprintf("%+d blocks %+d B", got.InUseObjects-want.InUseObjects, got.InUseBytes-want.InUseBytes)
	}
	if r.Function != "" && r.comparable(sumDirect(p, r)) != want {
		return "another caller"
	}
	for _, kind := range []string{"malloc", "mmap", "brk"} {
		if kind != r.Kind && live.Sum(p, kind, r.Site) != (live.Book{}) {
			return "also " + kind
		}
	}
	return exact
}
