package tracer

import (
	"math"
	"math/rand/v2"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

func TestBucketsHoldTheirSizes(t *testing.T) {
	for _, size := range []uint64{0, 1, 31, 32, 33, 63, 64, 65, 127, 997, 4096, 4097, 1<<20 - 1, 1 << 20, 1<<40 + 12345} {
		b := bucketOf(size)
		if low, next := bucketSize(b), bucketSize(b+1); size < low || size >= next {
			t.Errorf("size %d is in bucket %d, which holds %d to %d", size, b, low, next)
		}
	}
}

func TestProbabilitiesRiseWithSizeAndEndAtOne(t *testing.T) {
	table := probabilities(512 << 10)
	for i := 1; i < len(table); i++ {
		if table[i] < table[i-1] {
			t.Fatalf("bucket %d has probability %d, below %d of the one before", i, table[i], table[i-1])
		}
	}
	if p := table[bucketOf(512<<10)]; math.Abs(float64(p)/(1<<32)-(1-1/math.E)) > 0.02 {
		t.Errorf("a block of the mean interval is taken with %v, want 1-1/e", float64(p)/(1<<32))
	}
	if p := table[bucketOf(64<<20)]; p != always {
		t.Errorf("a block of 128 intervals has probability %d, want always", p)
	}
}

// Over 1,000 seeds the estimate of a stack's bytes is right on average, and the interval that is stated with it covers the
// truth as often as it says.
func TestSampledFiguresAreUnbiasedAndTheirErrorBarsHold(t *testing.T) {
	const seeds, interval = 1000, 64 << 10
	table := probabilities(interval)
	for _, tt := range []struct {
		name  string
		sizes func(r *rand.Rand) uint64
		n     int
	}{
		{"many blocks of one small size", func(*rand.Rand) uint64 { return 997 }, 20011},
		{"blocks of all sizes", func(r *rand.Rand) uint64 { return uint64(math.Exp(r.Float64()*10)) + 16 }, 5003},
		{"blocks about the interval", func(r *rand.Rand) uint64 { return 32<<10 + r.Uint64N(64<<10) }, 503},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var errors, squares float64
			covered := 0
			for seed := range uint64(seeds) {
				r := rand.New(rand.NewPCG(seed, 7))
				var truth, estimate, variance float64
				for range tt.n {
					size := tt.sizes(r)
					truth += float64(size)
					prob := table[bucketOf(size)]
					p := float64(prob) / (1 << 32)
					if prob != always && r.Uint32() >= prob {
						continue
					}
					estimate += float64(size) / p
					variance += float64(size) * float64(size) * (1 - p) / (p * p)
				}
				e := (estimate - truth) / truth
				errors += e
				squares += e * e
				if math.Abs(estimate-truth) <= float64(profile.ErrorBar(int64(estimate), variance)) {
					covered++
				}
			}
			mean := errors / seeds
			if se := math.Sqrt(squares/seeds) / math.Sqrt(seeds); math.Abs(mean) > 2*se {
				t.Errorf("mean error %.5f, want 0 within %.5f", mean, 2*se)
			}
			if share := float64(covered) / seeds; share < 0.93 || share > 0.97 {
				t.Errorf("the stated interval covers the truth in %.1f %% of the runs, want 93 to 97", 100*share)
			}
		})
	}
}
