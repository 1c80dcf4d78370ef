package tracer

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

func TestHalvingIntervalHalves(t *testing.T) {
	for _, tt := range []struct {
		name string
		held map[heldSize]int
		want uint64
	}{
		{"small blocks, all counted", map[heldSize]int{{bucketOf(64), always}: 1009}, 128},
		{"large blocks", map[heldSize]int{{bucketOf(1 << 20), always}: 997}, 2 << 20},
		{"blocks that were sampled already", map[heldSize]int{{bucketOf(64), probabilities(4096)[bucketOf(64)]}: 503}, 8192},
		{"none", nil, 64},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n := 0
			for _, count := range tt.held {
				n += count
			}
			if got := halvingInterval(tt.held, n); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}

// Over 1,000 seeds: blocks come, some go, the map is thinned to half whenever it is full, and the estimate of what is in
// use stays right on average, its stated interval as wide as it says.
func TestThinnedFiguresAreUnbiasedAndTheirErrorBarsHold(t *testing.T) {
	const seeds = 1000
	for _, tt := range []struct {
		name     string
		interval uint64 // 0: exact until the map is full
		room     int
		size     func(r *rand.Rand) uint64
		n        int
	}{
		{"from exact figures, once and again", 0, 503, func(r *rand.Rand) uint64 { return 16 + r.Uint64N(3000) }, 2003},
		{"from sampled ones", 2048, 503, func(r *rand.Rand) uint64 { return 16 + r.Uint64N(3000) }, 4001},
		{"one small size", 0, 997, func(*rand.Rand) uint64 { return 97 }, 5003},
		{"from tiny to larger than any interval", 0, 503, func(r *rand.Rand) uint64 { return uint64(math.Exp(r.Float64() * 11)) }, 2003},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var sum, squares float64
			covered, thinnings := 0, 0
			for seed := range uint64(seeds) {
				m := &modelMap{r: rand.New(rand.NewPCG(seed, 11)), interval: tt.interval, room: tt.room}
				m.run(tt.n, tt.size)
				e, bar := m.result()
				sum += e
				squares += e * e
				if math.Abs(e) <= bar {
					covered++
				}
				thinnings += m.thinnings
			}
			if thinnings < seeds {
				t.Fatalf("the map was thinned %d times in %d runs", thinnings, seeds)
			}
			mean, se := sum/seeds, math.Sqrt(squares)/seeds
			t.Logf("mean error %.5f, standard error %.5f, covered %d, thinned %.1f times", mean, se, covered, float64(thinnings)/seeds)
			if math.Abs(mean) > 2*se {
				t.Errorf("mean error %.5f, want 0 within %.5f", mean, 2*se)
			}
			if covered < 930 || covered > 970 {
				t.Errorf("the stated interval covers the truth in %.1f %% of the runs, want 93 to 97", float64(covered)/10)
			}
		})
	}
}

// modelMap does to numbers what the BPF side and thin do to a live map.
type modelMap struct {
	r         *rand.Rand
	interval  uint64
	room      int
	table     [probBuckets]uint32 // of the interval
	held      []modelBlock
	books     float64 // allocated + adjusted - freed
	truth     float64
	thinnings int
}

type modelBlock struct {
	size uint64
	prob uint32
}

func (m *modelMap) run(n int, size func(*rand.Rand) uint64) {
	if m.interval > 0 {
		m.table = probabilities(m.interval)
	}
	for range n {
		b := modelBlock{size(m.r), always}
		m.truth += float64(b.size)
		if m.interval > 0 {
			b.prob = m.table[bucketOf(b.size)]
		}
		// One in three is freed again, taken or not.
		short := m.r.IntN(3) == 0
		if short {
			m.truth -= float64(b.size)
		}
		if b.prob != always && m.r.Uint32() >= b.prob {
			continue
		}
		m.books += float64(weightedBytes(b.size, b.prob))
		m.held = append(m.held, b)
		if len(m.held) == m.room {
			m.thin()
		}
		if short && len(m.held) > 0 && m.held[len(m.held)-1] == b {
			m.books -= float64(weightedBytes(b.size, b.prob))
			m.held = m.held[:len(m.held)-1]
		} else if short {
			m.freeThinned(b)
		}
	}
}

// freeThinned frees a block that thinning has just changed or dropped.
func (m *modelMap) freeThinned(b modelBlock) {
	if len(m.held) == 0 || m.held[len(m.held)-1].size != b.size {
		return
	}
	last := m.held[len(m.held)-1]
	m.books -= float64(weightedBytes(last.size, last.prob))
	m.held = m.held[:len(m.held)-1]
}

func (m *modelMap) thin() {
	m.thinnings++
	sizes := map[heldSize]int{}
	for _, b := range m.held {
		sizes[heldSize{bucketOf(b.size), b.prob}]++
	}
	m.interval = max(m.interval, halvingInterval(sizes, len(m.held)))
	m.table = probabilities(m.interval)
	var kept []modelBlock
	for _, b := range m.held {
		to, chance := rethin(b.size, b.prob, &m.table)
		m.books -= float64(weightedBytes(b.size, b.prob))
		if m.r.Float64() < chance {
			kept = append(kept, modelBlock{b.size, to})
			m.books += float64(weightedBytes(b.size, to))
		}
	}
	m.held = kept
}

// result is the relative error and the stated half-width of the 95 % interval.
func (m *modelMap) result() (e, bar float64) {
	var variance float64
	for _, b := range m.held {
		p := share(b.prob)
		variance += float64(b.size) * float64(b.size) * (1 - p) / (p * p)
	}
	return (m.books - m.truth) / m.truth, float64(profile.ErrorBar(int64(m.books), variance)) / m.truth
}
