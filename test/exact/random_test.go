package exact

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

// seeds is how many seeds the differential test draws: one by default; ALLOCSNOOP_SEEDS=20 is the full test, which also
// draws a million operations from each.
func seeds(t *testing.T) int {
	text := os.Getenv("ALLOCSNOOP_SEEDS")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("ALLOCSNOOP_SEEDS=%q is no number of seeds", text)
	}
	return n
}

// What was allocated before the attach is never guessed, and its end takes nothing from the books.
func TestRandomOperationsBySeed(t *testing.T) { eachSeed(t, testRandom) }

// eachSeed runs a test of random.c with every allocator and seed.
func eachSeed(t *testing.T, test func(t *testing.T, a allocator, path string, seed int)) {
	for _, a := range allocators {
		t.Run(a.name, func(t *testing.T) {
			path := a.compileRandom(t)
			for seed := range seeds(t) {
				t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { test(t, a, path, seed) })
			}
		})
	}
}

func (a allocator) compileRandom(t *testing.T) string { return a.compile(t, "random.c", a.cxx()...) }

// everything tells whether the long forms of tests are wanted.
func everything() bool { return os.Getenv("ALLOCSNOOP_SEEDS") != "" }

func operations() int {
	if everything() {
		return 1_000_000
	}
	return 100_000
}

func testRandom(t *testing.T, a allocator, path string, seed int) {
	p := a.start(t, path, strconv.Itoa(seed), "8")
	p.Send(t, "run 50000")
	p.Expect(t, "did")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json", "--check-every", "500ms")
	p.Send(t, "attached")
	p.Expect(t, "did")
	books := run(t, p, operations())
	result := tr.Stop(t)
	live.CheckText(t, p.PID)

	requireLossless(t, result)
	a.compareBooks(t, result.Profile, books)
	for _, b := range books {
		requireDrawn(t, b)
	}
	before := summary(t, result).PreAttach
	if before.Frees == 0 || before.Reallocs == 0 || before.Inherited == 0 {
		t.Errorf("the summary says of blocks from before the attach: %+v, want frees, reallocs and inherited ones", before)
	}
	p.Send(t, "start") // verifies the blocks' contents
	p.Send(t, "drain")
	p.Expect(t, "did")
	p.Expect(t, "did")
}

// book is the ledger of one process.
type book struct {
	pid   int
	child bool
	rows  []row
}

// run lets the target draw operations and returns its ledger and those of the children it forked meanwhile.
func run(t *testing.T, p *live.Process, operations int) []book {
	t.Helper()
	var books []book
	p.Send(t, fmt.Sprintf("run %d", operations))
	for line := p.Line(t); line != "did"; line = p.Line(t) {
		child, err := strconv.Atoi(strings.TrimPrefix(line, "child "))
		if err != nil {
			t.Fatalf("the target said %.100q, want a child", line)
		}
		books = append(books, book{child, true, ledger(t, p)})
	}
	if len(books) != 4 {
		t.Errorf("%d children, want 4", len(books))
	}
	p.Send(t, "ledger")
	return append(books, book{p.PID, false, ledger(t, p)})
}

func (a allocator) compareBooks(t *testing.T, p *profile.Profile, books []book) {
	t.Helper()
	for i, b := range books {
		name := "parent"
		if b.child {
			name = fmt.Sprintf("child %d", i+1)
		}
		t.Run(name, func(t *testing.T) { a.compareBook(t, p, b) })
	}
}

func (a allocator) compareBook(t *testing.T, p *profile.Profile, b book) {
	t.Helper()
	own := live.OfProcess(p, b.pid)
	if len(own.Sample) == 0 {
		t.Errorf("the profile has nothing of process %d, child: %t", b.pid, b.child)
		return
	}
	if a.tableless() {
		compareWhole(t, own, b.rows)
	}
	for _, r := range b.rows {
		if !a.tableless() || r.Kind == "malloc" {
			compareRow(t, own, r)
		}
	}
}

// requireDrawn is the test of the test: every site that can make a block has made some, and some of them are gone.
func requireDrawn(t *testing.T, b book) {
	t.Helper()
	if b.child { // a short life
		return
	}
	for _, r := range b.rows {
		fails := strings.HasSuffix(r.Site, "_fails") || strings.HasSuffix(r.Site, "_bad_align")
		if !fails && (r.AllocBytes == 0 || r.FreeBytes == 0 || r.AllocBytes == r.FreeBytes) {
			t.Errorf("%s made %d bytes and freed %d: the test draws too little", r.Site, r.AllocBytes, r.FreeBytes)
		}
		if fails && r.AllocObjects != 0 {
			t.Errorf("%s made %d blocks", r.Site, r.AllocObjects)
		}
	}
}

// Probes come and go while eight threads allocate. When they pause and free everything, nothing may be in use, and from
// there the books are those of the program again.
func TestAttachWhileThreadsAllocate(t *testing.T) { eachSeed(t, testAttachAmidst) }

func testAttachAmidst(t *testing.T, a allocator, path string, seed int) {
	p := a.start(t, path, strconv.Itoa(seed), "8")
	p.Send(t, "start")
	p.Expect(t, "did")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json", "--check-every", "500ms")
	p.Send(t, "drain")
	p.Expect(t, "did")
	books := run(t, p, 20_000)
	p.Send(t, "start")
	p.Expect(t, "did")
	p.Send(t, "drain")
	p.Expect(t, "did")
	p.Send(t, "ledger")
	drained := ledger(t, p)
	last := run(t, p, 20_000)
	result := tr.Stop(t)
	// Return probes come after those of entries: calls of the first moments are seen to begin and not to end.
	requireLossless(t, result, "pending_stale")
	live.CheckText(t, p.PID)
	a.compareBooks(t, result.Profile, append(books[:4:4], last[:4]...))
	own := live.OfProcess(result.Profile, p.PID)
	for i, r := range last[4].rows {
		if drained[i].AllocBytes != 0 {
			t.Fatalf("%s has books after a drain: %+v", r.Site, drained[i])
		}
		if a.tableless() && r.Kind != "malloc" {
			continue
		}
		got, want := live.Sum(own, r.Kind, r.Site), r.book()
		if got.InUseBytes != want.InUseBytes || r.Kind == "malloc" && got.InUseObjects != want.InUseObjects {
			t.Errorf("of %s the profile has in use\n  %+v, the program\n  %+v\n%s", r.Site, got, want, describe(own, r.Site))
		}
	}
}
