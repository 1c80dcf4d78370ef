package exact

import (
	"fmt"
	"os"
	"strconv"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
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
func TestRandomOperationsBySeed(t *testing.T) {
	for _, a := range allocators {
		t.Run(a.name, func(t *testing.T) {
			path := a.compile(t, "random.c")
			for seed := range seeds(t) {
				t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { testRandom(t, a, path, seed) })
			}
		})
	}
}

func testRandom(t *testing.T, a allocator, path string, seed int) {
	operations := 100_000
	if os.Getenv("ALLOCSNOOP_SEEDS") != "" {
		operations = 1_000_000
	}
	p := a.start(t, path, strconv.Itoa(seed), "8")
	p.Send(t, "run 50000")
	p.Expect(t, "did")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
	p.Send(t, "attached")
	p.Expect(t, "did")
	p.Send(t, fmt.Sprintf("run %d", operations))
	p.Expect(t, "did")
	p.Send(t, "ledger")
	rows := ledger(t, p)
	result := tr.Stop(t)
	live.CheckText(t, p.PID)

	requireLossless(t, result)
	for _, r := range rows {
		compareRow(t, result.Profile, r)
	}
	before := summary(t, result).PreAttach
	if before.Frees == 0 || before.Reallocs == 0 {
		t.Errorf("the summary says of blocks from before the attach: %+v, want frees and reallocs", before)
	}
	p.Send(t, "run 10000") // verifies the blocks' contents
	p.Expect(t, "did")
}
