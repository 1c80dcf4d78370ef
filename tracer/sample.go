package tracer

import (
	"fmt"
	"math"
	"math/bits"
)

const probBuckets = 2048 // PROB_BUCKETS of bpf/types.h

// setSampling gives the BPF side the probability of each size.
func (t *Tracer) setSampling(o Options) error {
	if !o.mayStepDown() {
		return nil
	}
	if err := t.programs.SampleProb.Set(probabilities(o.SampleBytes)); err != nil {
		return fmt.Errorf("set sampling probabilities: %w", err)
	}
	if err := t.programs.MaySample.Set(uint32(1)); err != nil {
		return fmt.Errorf("allow sampling: %w", err)
	}
	if o.Mode != Sample {
		return nil
	}
	if err := t.programs.Sampling.Set(uint32(1)); err != nil {
		return fmt.Errorf("switch sampling on: %w", err)
	}
	t.useSessions = t.useSessions || t.programs.haveSession && t.started.IsZero()
	if t.useSessions {
		return t.programs.Sessions.Set(uint32(1))
	}
	return nil
}

// probabilities is p = 1 - exp(-size/interval) of each size bucket's least size, in units of 2^-32. A block of no bytes
// counts as one of one byte, or it could never be seen.
func probabilities(interval uint64) [probBuckets]uint32 {
	var table [probBuckets]uint32
	for i := range table {
		p := -math.Expm1(-float64(max(bucketSize(i), 1)) / float64(interval))
		table[i] = uint32(min(max(math.Round(p*(1<<32)), 1), always))
	}
	return table
}

// bucketOf is size_bucket of bpf/sample.h.
func bucketOf(size uint64) int {
	if size < 32 {
		return int(size)
	}
	shift := bits.Len64(size) - 6
	return (shift+1)<<5 + int(size>>shift&31)
}

// bucketSize is the least size of a bucket: the inverse of size_bucket in bpf/sample.h.
func bucketSize(bucket int) uint64 {
	if bucket < 32 {
		return uint64(bucket)
	}
	shift := bucket>>5 - 1
	if shift > 58 {
		return math.MaxUint64
	}
	return uint64(32+bucket&31) << shift
}
