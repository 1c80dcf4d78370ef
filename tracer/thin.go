package tracer

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
)

// Thinning makes room in the live map without a bias: a block that was taken with probability p stays with probability
// q/p and counts 1/q from then on, where q is what a larger interval gives its size. What the books of its stack lose or
// gain by that is kept in adjustments, as only the BPF side may add to its rows.

// rowsReserve and liveReserve are the entries that the BPF side may take the place of when a map is full.
const (
	rowsReserve    = 64
	maxLiveReserve = 4096
)

// liveReserve is how many blocks may be sampled while the map is thinned.
func (o Options) liveReserve() uint32 {
	if !o.mayStepDown() {
		return 0
	}
	return min(max(o.MaxLive/4, 16), maxLiveReserve)
}

// adjustment is what thinning changed in a stack's book, with objects in the unit of its row.
type adjustment struct{ objects, bytes int64 }

// fillReserves puts in what the BPF side may take out.
func (t *Tracer) fillReserves() error {
	if t.options.Mode == Growth {
		return nil
	}
	rows, err := fill(t.programs.RowsOfStacks, rowsReserve, func(i uint32) bpf.RowKey { return bpf.RowKey{Stack: uint64(i)} }, bpf.Row{})
	if err != nil {
		return fmt.Errorf("reserve rows for stacks: %w", err)
	}
	if err := t.programs.RowsReserve.Set(rows); err != nil {
		return fmt.Errorf("reserve rows for stacks: %w", err)
	}
	return t.fillLiveReserve()
}

func (t *Tracer) fillLiveReserve() error {
	blocks, err := fill(t.programs.Live, t.options.liveReserve(), func(i uint32) bpf.LiveKey { return bpf.LiveKey{Addr: uint64(i)} }, bpf.Block{})
	if err != nil {
		return fmt.Errorf("reserve room for blocks: %w", err)
	}
	return t.programs.LiveReserve.Set(blocks)
}

// fill puts entries 1 to n into a map and returns how many there are: a full map takes fewer.
func fill[K, V any](m *ebpf.Map, n uint32, key func(uint32) K, value V) (uint32, error) {
	keys := make([]K, n)
	for i := range keys {
		keys[i] = key(uint32(i) + 1)
	}
	if _, err := m.BatchUpdate(keys, slices.Repeat([]V{value}, len(keys)), nil); err == nil {
		return n, nil
	}
	for i := uint32(1); i <= n; i++ {
		if err := m.Put(key(i), value); err != nil {
			if i > 1 && isFull(err) {
				return i - 1, nil
			}
			return 0, err
		}
	}
	return n, nil
}

// thin halves the live map. It is called when the BPF side found it full, which samples by then.
func (t *Tracer) thin() {
	t.thinning.Lock()
	defer t.thinning.Unlock()
	if err := t.thinLive(); err != nil {
		t.options.Warn(fmt.Sprintf("make room for blocks: %v", err))
	}
	if err := t.programs.Thinning.Set(uint32(0)); err != nil {
		t.options.Warn(fmt.Sprintf("make room for blocks: %v", err))
	}
}

func (t *Tracer) thinLive() error {
	sizes := map[heldSize]int{}
	blocks := 0
	err := eachEntry(t.programs.Live, func(k *bpf.LiveKey, b *bpf.Block) {
		if k.Proc != 0 {
			sizes[heldSize{bucketOf(b.Size), b.Prob}]++
			blocks++
		}
	})
	if err != nil {
		return fmt.Errorf("count blocks: %w", err)
	}
	interval := halvingInterval(sizes, blocks)
	if err := t.widen(interval); err != nil {
		return err
	}
	table := probabilities(interval)
	kept := 0
	err = eachEntry(t.programs.Live, func(k *bpf.LiveKey, b *bpf.Block) {
		if k.Proc == 0 {
			return
		}
		if t.thinBlock(k, b, &table) {
			kept++
		}
	})
	if err != nil {
		return fmt.Errorf("thin blocks: %w", err)
	}
	t.mu.Lock()
	t.announce("%d blocks in use fill the live map (--max-live): %d of them kept by chance, as one in %s of allocations",
		blocks, kept, profile.FormatBytes(interval))
	t.mu.Unlock()
	return t.fillLiveReserve()
}

// widen makes the trace sample, from now on at least at the interval.
func (t *Tracer) widen(interval uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.stopped.IsZero() {
		return nil
	}
	o := &t.options
	if o.Mode == Sample && interval <= o.SampleBytes {
		return nil
	}
	o.SampleBytes = max(interval, o.SampleBytes)
	exact := o.Mode == Exact
	o.Mode = Sample
	t.announce("more than --max-live %d blocks in use: sampling from now on, one block in %s of allocations", o.MaxLive,
		profile.FormatBytes(o.SampleBytes))
	if exact {
		return t.startSampling()
	}
	return t.setSampling(*o)
}

// heldSize is what the chance of a block to stay depends on.
type heldSize struct {
	bucket int
	prob   uint32
}

// halvingInterval is the smallest interval, of the powers of two, under which no more than half of the blocks stay.
func halvingInterval(held map[heldSize]int, blocks int) uint64 {
	const least, most = 64, 1 << 50
	for interval := uint64(least); interval < most; interval *= 2 {
		table := probabilities(interval)
		kept := 0.0
		for h, n := range held {
			_, chance := rethin(bucketSize(h.bucket), h.prob, &table)
			kept += float64(n) * chance
		}
		if kept <= 0.55*float64(blocks) { // twice the interval leaves a little more than half
			return interval
		}
	}
	return most
}

// rethin is the probability that a block counts by under a new table, and its chance to stay.
func rethin(size uint64, prob uint32, table *[probBuckets]uint32) (to uint32, chance float64) {
	to = table[bucketOf(size)]
	if share(to) >= share(prob) {
		return prob, 1
	}
	return to, share(to) / share(prob)
}

// share is a probability as the BPF side keeps it.
func share(prob uint32) float64 {
	if prob == always || prob == 0 {
		return 1
	}
	return float64(prob) / (1 << 32)
}

// thinBlock decides about one block; true when it stays. The target runs on meanwhile and may have freed it, and have got
// its address again. So it is looked at again right before it is changed.
func (t *Tracer) thinBlock(k *bpf.LiveKey, seen *bpf.Block, table *[probBuckets]uint32) bool {
	prob, chance := rethin(seen.Size, seen.Prob, table)
	if chance == 1 {
		return true
	}
	stays := rand.Float64() < chance
	var b bpf.Block
	if t.programs.Live.Lookup(k, &b) != nil || b.Time != seen.Time || b.Prob != seen.Prob {
		return false
	}
	if !stays {
		if t.programs.Live.Delete(k) == nil {
			t.adjust(k, &b, b.Prob, 0)
		}
		return false
	}
	b.Prob = prob
	if t.programs.Live.Update(k, &b, ebpf.UpdateExist) != nil {
		return false
	}
	t.adjust(k, &b, seen.Prob, prob)
	return true
}

// adjust notes that a block counts by another probability; to 0 is no longer.
func (t *Tracer) adjust(k *bpf.LiveKey, b *bpf.Block, from, to uint32) {
	change := adjustment{-int64(weight(from)), -int64(weightedBytes(b.Size, from))}
	if to != 0 {
		change.objects += int64(weight(to))
		change.bytes += int64(weightedBytes(b.Size, to))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	row := bpf.RowKey{Proc: k.Proc, Stack: b.Stack, Kind: uint32(k.Addr >> kindShift)}
	a := t.adjustments[row]
	a.objects += change.objects
	a.bytes += change.bytes
	t.adjustments[row] = a
}

const (
	weightShift = 20 // WEIGHT_SHIFT of bpf/types.h
	kindShift   = 57 // KIND_SHIFT
)

// weight is weight_of of bpf/books.h, to the last digit: what a free takes away must be what was added.
func weight(prob uint32) uint64 {
	if prob == always || prob == 0 {
		return 1 << weightShift
	}
	return (1 << (weightShift + 32)) / uint64(prob)
}

// weightedBytes is weighted_bytes of bpf/books.h.
func weightedBytes(size uint64, prob uint32) uint64 {
	if prob == always {
		return size
	}
	return size * weight(prob) >> weightShift
}

// isFull tells whether a map refused an entry for want of room.
func isFull(err error) bool { return errors.Is(err, unix.E2BIG) }
