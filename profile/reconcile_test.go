package profile

import (
	"regexp"
	"strconv"
	"testing"

	"pgregory.net/rapid"
)

func TestReconciliationReadsWell(t *testing.T) {
	for _, c := range []struct {
		name string
		r    Reconciliation
		want string
	}{
		{"as in the README", Reconciliation{Change: 85_249_229, Parts: []RSSPart{{"in use by traced stacks", 67_108_864}, {"allocator slack and free chunks", 9_542_041}, {"thread stacks", 209_715}}, Unexplained: 8_388_609},
			"RSS (resident memory) +81.3 MiB = 64.0 in use by traced stacks + 9.1 allocator slack and free chunks + 0.2 thread stacks + 8.0 unexplained"},
		{"what shrank comes with a minus", Reconciliation{Change: -4096, Parts: []RSSPart{{"blocks from before the trace, freed", -5120}}, Unexplained: 1024},
			"RSS (resident memory) -4.0 KiB = - 5.0 blocks from before the trace, freed + 1.0 unexplained"},
		{"nothing changed", Reconciliation{}, "RSS (resident memory) +0 B = 0 unexplained"},
		{"too small for its unit", Reconciliation{Change: 1<<20 + 17, Parts: []RSSPart{{"in use by traced stacks", 1 << 20}, {"files", 17}}},
			"RSS (resident memory) +1.0 MiB = 1.0 in use by traced stacks + 0.0 unexplained"},
		{"rounding down three times is made up for", Reconciliation{Change: 3 * 46_000, Parts: []RSSPart{{"a", 46_000}, {"b", 46_000}, {"c", 46_000}}},
			"RSS (resident memory) +134.8 KiB = 45.0 a + 44.9 b + 44.9 c + 0.0 unexplained"},
	} {
		if got := c.r.String(); got != c.want {
			t.Errorf("%s:\ngot  %s\nwant %s", c.name, got, c.want)
		}
	}
}

var figure = regexp.MustCompile(`([-+]?) ?(\d+(?:\.\d)?) `)

// Whoever adds up what is printed gets the printed sum.
func TestPrintedReconciliationAddsUp(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.Int64Range(-1<<40, 1<<40)
		r := Reconciliation{Unexplained: size.Draw(t, "unexplained")}
		r.Change = r.Unexplained
		for range rapid.IntRange(0, 7).Draw(t, "parts") {
			p := RSSPart{"part", size.Draw(t, "part")}
			r.Parts = append(r.Parts, p)
			r.Change += p.Bytes
		}
		text := r.String()
		var tenths []int64
		for _, m := range figure.FindAllStringSubmatch(text, -1) {
			v, err := strconv.ParseFloat(m[1]+m[2], 64)
			if err != nil {
				t.Fatal(err)
			}
			tenths = append(tenths, int64(v*10+map[bool]float64{true: -0.5, false: 0.5}[v < 0]))
		}
		sum := tenths[0]
		for _, v := range tenths[1:] {
			sum -= v
		}
		if sum != 0 {
			t.Errorf("%s: off by %d tenths", text, sum)
		}
	})
}
