package budget

import (
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// A target that suddenly allocates fifty times as much is above the budget, under counting and under sampling too. How soon
// the budget holds again is printed, not asserted, as the machine may have other work.
func TestABurstIsMetStepByStepAndSaid(t *testing.T) {
	target := live.Start(t, live.CompileC(t, "../bench/target/pairs.c"), "3", "1", "1")
	target.Expect(t, "ready")
	tr := live.Trace(t, target.PID, "--json")
	attached := time.Now()
	if n := order(t, target, "pace 200 2"); n != 400 {
		t.Fatalf("%v calm pairs, want 400", n)
	}
	burst := time.Since(attached)
	if n := order(t, target, "pace 10000 5"); n != 50_000 {
		t.Fatalf("%v pairs of the burst, want 50,000", n)
	}
	s := readSummary(t, tr.Stop(t))
	if len(s.Losses) != 0 {
		t.Errorf("losses: %+v", s.Losses)
	}
	steps := []string{"sampling from now on", "probes out"}
	for _, e := range s.Events {
		if len(steps) > 0 && strings.Contains(e.Text, steps[0]) {
			t.Logf("%.2f s after the burst began: %s", e.At-burst.Seconds(), e.Text)
			steps = steps[1:]
		}
	}
	if len(steps) > 0 {
		t.Errorf("no step %q among %+v", steps, s.Events)
	}
}
