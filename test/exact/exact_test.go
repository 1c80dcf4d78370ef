package exact

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

// row is one call site's books, by the program's own count.
type row struct {
	Kind         string `json:"kind"`
	Function     string `json:"function"` // what the site calls; empty when it is not the allocator function itself
	Site         string `json:"site"`
	AllocObjects int64  `json:"alloc_objects"`
	AllocBytes   int64  `json:"alloc_bytes"`
	FreeObjects  int64  `json:"free_objects"`
	FreeBytes    int64  `json:"free_bytes"`
}

func (r row) book() live.Book {
	return live.Book{
		AllocObjects: r.AllocObjects,
		AllocBytes:   r.AllocBytes,
		InUseObjects: r.AllocObjects - r.FreeObjects,
		InUseBytes:   r.AllocBytes - r.FreeBytes,
	}
}

// allocator is one way to give a program its malloc.
type allocator struct {
	name     string
	compiler string   // gcc when empty
	flags    []string // of the compiler
	preload  string   // base name of a library
	// libraries are linked behind the source.
	libraries []string
}

var allocators = []allocator{
	{name: "glibc"},
	{name: "jemalloc", preload: "libjemalloc.so.2"},
	{name: "tcmalloc", preload: "libtcmalloc.so.4"},
	{name: "tcmalloc minimal", preload: "libtcmalloc_minimal.so.4"},
	{name: "jemalloc inside", libraries: []string{"-l:libjemalloc.a", "-lstdc++", "-lm"}},
	{name: "mimalloc", preload: "libmimalloc.so.2"},
	{name: "musl, static", compiler: "musl-gcc", flags: []string{"-static"}},
	{name: "glibc, static", flags: []string{"-static", "-DSTATIC"}},
	{name: "glibc, static pie", flags: []string{"-static-pie", "-DSTATIC"}},
}

func (a allocator) shared() bool { return !slices.Contains(a.flags, "-DSTATIC") && a.compiler == "" }

// tableless tells whether the C library has no unwind tables: a stack ends in the first function of it that is not the
// allocator's. The sum of all stacks is whole all the same.
func (a allocator) tableless() bool { return a.compiler == "musl-gcc" }

// compile builds a target of testdata for the allocator. Without frame pointers, as distributions do.
func (a allocator) compile(t testing.TB, source string, more ...string) string {
	t.Helper()
	flags := slices.Concat([]string{"-fomit-frame-pointer"}, a.flags, a.libraries, more)
	src := filepath.Join("testdata", source)
	if a.compiler != "" {
		return live.CompileWith(t, a.compiler, src, flags...)
	}
	return live.CompileC(t, src, flags...)
}

// start runs a compiled target until it is ready.
func (a allocator) start(t testing.TB, path string, args ...string) *live.Process {
	t.Helper()
	cmd := exec.Command(path, args...)
	cmd.Env = a.environ(t)
	p := live.StartCmd(t, cmd)
	p.Expect(t, "ready")
	return p
}

// throws tells whether operator new throws: Debian's mimalloc is built as C and aborts.
func (a allocator) throws() bool { return a.name != "mimalloc" }

// cxx are the flags for C sources that call C++ functions by their names in symbol tables.
func (a allocator) cxx() []string {
	if a.compiler != "" {
		return []string{"-DNO_CXX"}
	}
	return []string{"-lstdc++"}
}

func (a allocator) environ(t testing.TB) []string {
	t.Helper()
	if a.preload == "" {
		return os.Environ()
	}
	return append(os.Environ(), "LD_PRELOAD="+library(t, a.preload))
}

// library finds a Debian package's library.
func library(t testing.TB, name string) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/" + name)
	if err != nil || len(found) == 0 {
		t.Fatalf("find %s in /usr/lib: none; test/setup.sh installs it", name)
	}
	return found[0]
}

// traceGo traces a ready target exactly, lets it work, and returns its ledger and what allocsnoop wrote.
func traceGo(t testing.TB, p *live.Process, args ...string) ([]row, *live.Result) {
	t.Helper()
	tr := live.Trace(t, p.PID, append([]string{"--mode", "exact", "--json"}, args...)...)
	p.Send(t, "go")
	rows := ledger(t, p)
	result := tr.Stop(t)
	live.CheckText(t, p.PID)
	if !p.Alive() {
		t.Error("the target ended during the trace")
	}
	return rows, result
}

func ledger(t testing.TB, p *live.Process) []row {
	t.Helper()
	var rows []row
	line := p.Line(t)
	if err := json.Unmarshal([]byte(line), &rows); err != nil {
		t.Fatalf("read the ledger %.100q: %v", line, err)
	}
	if len(rows) == 0 {
		t.Fatal("the ledger is empty")
	}
	return rows
}

// requireLossless fails when allocsnoop itself says that figures are not whole. tolerated are counters that say otherwise.
func requireLossless(t testing.TB, result *live.Result, tolerated ...string) {
	t.Helper()
	if result.ExitCode != 130 && result.ExitCode != 0 {
		t.Fatalf("exit code %d\nstderr: %s", result.ExitCode, result.Stderr)
	}
	if result.Profile == nil {
		t.Fatalf("no profile was written\nstderr: %s", result.Stderr)
	}
	for _, loss := range summary(t, result).Losses {
		if slices.Contains(tolerated, loss.Name) {
			continue
		}
		t.Errorf("allocsnoop says it lost: %s %d (%s)", loss.Name, loss.Count, loss.Meaning)
	}
}

// document is the part of --json that these tests read.
type document struct {
	Losses    []loss `json:"losses"`
	PreAttach struct {
		Frees        uint64 `json:"frees"`
		Reallocs     uint64 `json:"reallocs"`
		ReallocBytes uint64 `json:"realloc_bytes"`
		Inherited    uint64 `json:"inherited"`
	} `json:"pre_attach"`
}

type loss struct {
	Name    string `json:"name"`
	Count   uint64 `json:"count"`
	Meaning string `json:"meaning"`
}

func summary(t testing.TB, result *live.Result) document {
	t.Helper()
	var doc document
	if err := json.Unmarshal([]byte(result.Stdout), &doc); err != nil {
		t.Fatalf("read the JSON summary %.200q: %v\nstderr: %s", result.Stdout, err, result.Stderr)
	}
	return doc
}

// compare checks every row in a subtest of its own.
func (a allocator) compare(t *testing.T, p *profile.Profile, rows []row) {
	t.Helper()
	if a.tableless() {
		compareWhole(t, p, rows)
	}
	for _, r := range rows {
		functions.record(a, p, r)
		if a.tableless() && (r.Function == "" || r.Kind != "malloc") {
			continue // the stack ends in strdup, or in mmap
		}
		t.Run(strings.TrimPrefix(r.Site, "site_"), func(t *testing.T) { compareRow(t, p, r) })
	}
}

// compareWhole checks the sum of each kind. Nothing but the sites allocates in a static program after "go".
func compareWhole(t *testing.T, p *profile.Profile, rows []row) {
	t.Helper()
	for _, kind := range []string{"malloc", "mmap", "brk"} {
		sum := row{Kind: kind}
		for _, r := range rows {
			if r.Kind == kind {
				sum.AllocObjects += r.AllocObjects
				sum.AllocBytes += r.AllocBytes
				sum.FreeObjects += r.FreeObjects
				sum.FreeBytes += r.FreeBytes
			}
		}
		if got, want := sum.comparable(live.Sum(p, kind)), sum.comparable(sum.book()); got != want {
			t.Errorf("of kind %s the profile has\n  %+v, the program did\n  %+v\n%s", kind, got, want, leaves(p))
		}
	}
}

func compareRow(t *testing.T, p *profile.Profile, r row) {
	t.Helper()
	normalize := func(b live.Book) live.Book { return r.comparable(b) }
	want, through := normalize(r.book()), normalize(live.Sum(p, r.Kind, r.Site))
	if through != want {
		t.Errorf("through %s the profile has\n  %+v, the program did\n  %+v\n%s", r.Site, through, want, describe(p, r.Site))
	}
	for _, kind := range []string{"malloc", "mmap", "brk"} {
		if other := live.Sum(p, kind, r.Site); kind != r.Kind && other != (live.Book{}) {
			t.Errorf("%s, which makes blocks of kind %s, has kind %s too: %+v", r.Site, r.Kind, kind, other)
		}
	}
	if r.Function == "" {
		return
	}
	if direct := normalize(sumDirect(p, r)); direct != want {
		t.Errorf("as %s called by %s the profile has\n  %+v, the program did\n  %+v\n%s",
			r.Function, r.Site, direct, want, describe(p, r.Site))
	}
}

// comparable takes away what is a matter of taste: into how many objects a mapping falls when it is cut or grown, and
// whether a block that changes its size in place is a new one.
func (r row) comparable(b live.Book) live.Book {
	if r.Kind != "malloc" {
		return live.Book{InUseBytes: b.InUseBytes}
	}
	if r.Site == "site_xallocx" {
		b.AllocObjects, b.AllocBytes = 0, 0
	}
	return b
}

// sumDirect is what the site holds by the allocator function it called, under any of that function's names.
func sumDirect(p *profile.Profile, r row) live.Book {
	var sum live.Book
	for _, name := range namesOf(r.Function) {
		b := live.Sum(p, r.Kind, name, r.Site)
		sum.AllocObjects += b.AllocObjects
		sum.AllocBytes += b.AllocBytes
		sum.InUseObjects += b.InUseObjects
		sum.InUseBytes += b.InUseBytes
	}
	return sum
}

// namesOf is the names under which one function stands in symbol tables: aliases share an address. A function that ends
// in a jump to another one has left no frame: libc's reallocarray does that, and much of mimalloc.
func namesOf(function string) []string {
	base := strings.TrimPrefix(strings.TrimPrefix(function, "mi_"), "tc_")
	var names []string
	for _, prefix := range []string{"", "__", "__libc_", "je_", "tc_", "mi_", "mi_heap_"} {
		names = append(names, prefix+base)
	}
	if base == "malloc" || base == "realloc" {
		names = append(names, "__libc_"+base+"_impl") // musl's
	}
	switch base {
	case "aligned_alloc", "malloc_aligned":
		names = append(names, "memalign", "__libc_memalign", "mi_memalign", "tc_memalign", "mi_heap_malloc_aligned")
	case "memalign", "valloc": // valloc is a jump to it in musl
		names = append(names, "aligned_alloc", "mi_heap_malloc_aligned")
	case "reallocarray", "reallocn":
		names = append(names, "realloc", "__libc_realloc", "mi_realloc", "mi_heap_realloc")
	case "mmap":
		names = append(names, "mmap64", "__mmap64", "__GI___mmap64")
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// describe lists the stacks through a site, for the message of a failure.
func describe(p *profile.Profile, site string) string {
	var text strings.Builder
	for _, sample := range p.Sample {
		functions := live.Functions(sample)
		if slices.Contains(functions, site) {
			fmt.Fprintf(&text, "    %s %v %s\n", sample.Label["kind"], sample.Value, strings.Join(functions, " < "))
		}
	}
	if text.Len() == 0 {
		return "  no stack of the profile has " + site + "; its stacks begin with\n" + leaves(p)
	}
	return text.String()
}

func leaves(p *profile.Profile) string {
	var text strings.Builder
	for i, sample := range p.Sample {
		if i == 10 {
			break
		}
		functions := live.Functions(sample)
		fmt.Fprintf(&text, "    %s %v %s\n", sample.Label["kind"], sample.Value, strings.Join(functions[:min(len(functions), 5)], " < "))
	}
	return text.String()
}
