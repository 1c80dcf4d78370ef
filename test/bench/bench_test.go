package bench

import (
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/go-cmp/cmp"
)

// Every benchmark runs once with almost nothing to do, so that none is found broken on the day it is needed.
func TestSmoke(t *testing.T) {
	live.RequireBPF(t)
	for _, b := range Benchmarks() {
		t.Run(b.Name, func(t *testing.T) {
			section, err := b.Run(t.Context(), Smoke(live.Allocsnoop(t)))
			if err != nil {
				t.Fatal(err)
			}
			for _, contender := range []string{"growth", "sample", "exact", budgetedName, sampleFloor, exactFloor} {
				if strings.Contains(section.Text, "| "+contender+" | allocsnoop") {
					t.Errorf("%s could not be measured:\n%s", contender, section.Text)
				}
			}
			t.Logf("%s\n%s", section.Title, section.Text)
		})
	}
}

func TestRatiosAreTakenRoundByRound(t *testing.T) {
	got := ratios([]float64{10, 30, 80, 7}, []float64{5, 10, 0})
	if diff := cmp.Diff([]float64{2, 3}, got); diff != "" {
		t.Error(diff)
	}
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		name   string
		values []float64
		want   float64
	}{
		{"none", nil, 0},
		{"one", []float64{7}, 7},
		{"an odd number", []float64{11, 3, 7}, 7},
		{"an even number", []float64{11, 3, 7, 5}, 6},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := median(tt.values); got != tt.want {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestTableDividesByEachBaseline(t *testing.T) {
	all := []series{
		{name: "alone", values: []float64{10, 20, 30}},
		{name: "exact", baseline: "alone", values: []float64{30, 40, 150}},
		{name: "slow tool", baseline: "alone", values: []float64{120, 160, 300}},
		{name: "missing", baseline: "alone", note: "not | installed\nhere"},
	}
	want := `| | ns | ratio to its baseline | spread of the ratio | of slow tool |
|---|---|---|---|---|
| alone | 20 | | | 0.1 |
| exact | 40 | 3 x alone | 2 to 5 | 0.25 |
| slow tool | 160 | 10 x alone | 8 to 12 | 1 |
| missing | not / installed here |
`
	if diff := cmp.Diff(want, compareTable(all, "ns", "slow tool")); diff != "" {
		t.Error(diff)
	}
}

func TestGoalsSayWhetherTheyAreMet(t *testing.T) {
	all := []series{{name: "alone", values: []float64{10, 20, 40}}, {name: "exact", values: []float64{20, 50, 80}}}
	want := `- a: 2 (2 to 2.5), goal at most 2: met
- b: 2 (2 to 2.5), goal at most 1.9: **missed**
- c: 2 (2 to 2.5), goal at least 2.1: **missed**
- d: not measured
`
	got := goals([]goal{
		atMost("a", all, "exact", "alone", 2), atMost("b", all, "exact", "alone", 1.9), atLeast("c", all, "exact", "alone", 2.1),
		atMost("d", all, "heaptrack", "alone", 1),
	})
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSectionReplacesItselfOnly(t *testing.T) {
	first := replaceSection("# Benchmarks\n\nBy hand.\n", Section{Name: "a", Title: "A", Text: "one"}, "today")
	both := replaceSection(first, Section{Name: "b", Title: "B", Text: "two"}, "today")
	again := replaceSection(both, Section{Name: "a", Title: "A", Text: "three"}, "tomorrow")
	want := `# Benchmarks

By hand.

<!-- bench a -->
## A

Measured tomorrow.

three
<!-- end of bench a -->

<!-- bench b -->
## B

Measured today.

two
<!-- end of bench b -->
`
	if diff := cmp.Diff(want, again); diff != "" {
		t.Error(diff)
	}
}

func TestModelMultipliesThePriceOfAPair(t *testing.T) {
	all := []series{
		{name: "alone", values: []float64{20}},
		{name: "growth", values: []float64{19}},
		{name: "exact", values: []float64{2020}},
	}
	text := model(all)
	for _, want := range []string{"| growth | 0 (0 %) |", "| exact | 0.1 (0.16 %) | 1 (1.6 %) | 10 (16 %) |", "64 cores, 500 workers", "at 3.2 cores"} {
		if !strings.Contains(text, want) {
			t.Errorf("the model has no %q:\n%s", want, text)
		}
	}
}
