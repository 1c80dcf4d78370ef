package allocator

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the generated parts of docs/coverage.md")

const coverageFile = "../../docs/coverage.md"

// TestCoverageDocumentIsTrue holds the document's tables to the table in this package and the shipped definitions.
func TestCoverageDocumentIsTrue(t *testing.T) {
	data, err := os.ReadFile(coverageFile)
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, part := range []struct {
		name, want string
	}{
		{"functions", functionsTable()},
		{"shipped", shippedText(t)},
	} {
		begin, end := "<!-- "+part.name+": begin, generated -->\n", "<!-- "+part.name+": end -->"
		before, rest, ok := strings.Cut(text, begin)
		got, after, ok2 := strings.Cut(rest, end)
		if !ok || !ok2 {
			t.Fatalf("%s has no part %q", coverageFile, part.name)
		}
		if *update {
			text = before + begin + part.want + end + after
			continue
		}
		if diff := cmp.Diff(part.want, got); diff != "" {
			t.Errorf("part %s differs; run go test ./tracer/allocator -run Coverage -update\n%s", part.name, diff)
		}
	}
	if *update {
		if err := os.WriteFile(coverageFile, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

var groupTitles = map[group]string{
	groupC: "any allocator; with a jemalloc's prefix too", groupSibling: "glibc, musl, tcmalloc, mimalloc",
	groupJemalloc: "jemalloc, any prefix", groupTcmalloc: "tcmalloc", groupMimalloc: "mimalloc",
	groupCxx: "C++ runtimes and allocators", groupLua: "LuaJIT",
}

// functionsTable prints the table, functions of one meaning in one line, in the table's order.
func functionsTable() string {
	var out strings.Builder
	out.WriteString("| Functions | Found in | Operation | Block | Size | Success |\n|---|---|---|---|---|---|\n")
	type key struct {
		Function
		group group
	}
	names := map[key][]string{}
	var order []key
	for _, r := range rows {
		k := key{r.Function, r.group}
		k.Name = ""
		if names[k] == nil {
			order = append(order, k)
		}
		names[k] = append(names[k], "`"+r.Name+"`")
	}
	for _, k := range order {
		fmt.Fprintf(&out, "| %s | %s | %s | %s | %s | %s |\n", strings.Join(names[k], " "), groupTitles[k.group], k.Op,
			blockOf(k.Function), sizeOf(k.Function), successOf(k.Function))
	}
	return out.String()
}

func blockOf(f Function) string {
	switch {
	case f.Flags&PtrIsOut != 0:
		return fmt.Sprintf("*arg %d", f.Ptr)
	case f.Ptr != 0:
		return fmt.Sprintf("arg %d", f.Ptr)
	case f.Out != 0:
		return fmt.Sprintf("*arg %d", f.Out)
	}
	return "result"
}

func sizeOf(f Function) string {
	switch {
	case f.Size == 0:
		return ""
	case f.Count != 0:
		return fmt.Sprintf("arg %d x arg %d", f.Count, f.Size)
	}
	return fmt.Sprintf("arg %d", f.Size)
}

func successOf(f Function) string {
	switch {
	case !f.Op.NeedsReturn():
		return "always"
	case f.Flags&StatusZero != 0:
		return "result 0"
	case f.Flags&ExpandReturnsSize != 0:
		return "result >= size"
	case f.Flags&MayThrow != 0:
		return "no exception"
	case f.Flags&FreesOnFailure != 0:
		return "result not NULL; else the block is freed"
	}
	return "result not NULL"
}

func shippedText(t *testing.T) string {
	var out strings.Builder
	for _, name := range Shipped() {
		data, err := shippedFiles.ReadFile("functions/" + name)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "`--functions %s`:\n```\n%s```\n", name, data)
	}
	return out.String()
}
