package budget

import (
	"encoding/json"
	"math"
	"strconv"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// summary is what these tests read of the --json document.
type summary struct {
	Mode   string
	Losses []struct{ Name string }
	Events []struct {
		At   float64 `json:"at_seconds"`
		Text string
	}
	Totals []struct {
		Kind            string
		InUseBytes      float64 `json:"inuse_bytes"`
		InUseBytesError float64 `json:"inuse_bytes_error"`
	}
}

func readSummary(t *testing.T, r *live.Result) summary {
	t.Helper()
	var s summary
	if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
		t.Fatalf("read the JSON summary: %v\n%s\n%s", err, r.Stdout, r.Stderr)
	}
	return s
}

func order(t *testing.T, target *live.Process, line string) float64 {
	t.Helper()
	target.Send(t, line)
	n, err := strconv.ParseFloat(target.Line(t), 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Thirty times as many blocks as fit, some of them freed, before and after the map is thinned.
func TestMoreBlocksThanFitAreThinnedWithoutABias(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
	}{
		{"from exact figures", []string{"--max-overhead", "100%"}},
		{"from sampled ones", []string{"--mode", "sample", "--sample-bytes", "1KiB", "--max-overhead", "100%"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			target := live.Start(t, live.CompileC(t, "testdata/growing.c"))
			target.Expect(t, "ready")
			tr := live.Trace(t, target.PID, append(tt.args, "--json", "--max-live", "1009")...)
			truth := 0.0
			for range 5 {
				truth += order(t, target, "leak 4001")
				order(t, target, "hold 2003")
				truth += order(t, target, "leak 1009")
				order(t, target, "drop")
			}
			s := readSummary(t, tr.Stop(t))
			if len(s.Losses) != 0 {
				t.Errorf("losses: %v", s.Losses)
			}
			if s.Mode != "sample" {
				t.Errorf("the mode is %q at the end", s.Mode)
			}
			if !strings.Contains(text(s), "fill the live map") {
				t.Errorf("the log does not say that the map was thinned:\n%s", text(s))
			}
			for _, total := range s.Totals {
				if total.Kind != "malloc" {
					continue
				}
				t.Logf("truth %.0f, estimate %.0f ± %.0f", truth, total.InUseBytes, total.InUseBytesError)
				// The bar is a 95 % interval: twice it is not left once in ten thousand runs.
				if off := math.Abs(total.InUseBytes - truth); off == 0 || off > 2*total.InUseBytesError {
					t.Errorf("%.0f bytes in use, want %.0f within twice %.0f", total.InUseBytes, truth, total.InUseBytesError)
				}
			}
		})
	}
}

func text(s summary) string {
	var lines []string
	for _, e := range s.Events {
		lines = append(lines, e.Text)
	}
	return strings.Join(lines, "\n")
}

// What is pinned to be exact is not thinned: blocks beyond the limit are counted as a loss.
func TestExactModeCountsWhatDoesNotFit(t *testing.T) {
	target := live.Start(t, live.CompileC(t, "testdata/growing.c"))
	target.Expect(t, "ready")
	tr := live.Trace(t, target.PID, "--mode", "exact", "--json", "--max-live", "1009")
	order(t, target, "leak 2003")
	s := readSummary(t, tr.Stop(t))
	if s.Mode != "exact" || len(s.Losses) != 1 || s.Losses[0].Name != "live_full" {
		t.Errorf("mode %q, losses %v", s.Mode, s.Losses)
	}
}
