package tracer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// AddBlocks fills in the blocks in use of each stack of the newest snapshot. While the trace runs they may have changed
// since the snapshot was taken.
func (t *Tracer) AddBlocks(s *profile.Snapshot) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	held := map[bookKey][]profile.Block{}
	now := t.nowNS()
	err := eachEntry(t.programs.Live, func(k *bpf.LiveKey, v *bpf.Block) {
		if age(now, v.Time) < t.options.OlderThan {
			return
		}
		b := profile.Block{Addr: k.Addr & (1<<kindShift - 1), Size: v.Size, Weight: 1}
		if v.Prob != always {
			b.Weight = (1 << 32) / float64(v.Prob)
		}
		key := bookKey{stackKey{k.Proc, v.Stack}, t.kinds.name(uint32(k.Addr >> kindShift)), ""}
		held[key] = append(held[key], b)
	})
	if err != nil {
		return fmt.Errorf("walk the blocks in use: %w", err)
	}
	for _, m := range t.members {
		for _, p := range m.regions.pieces {
			if !p.of.internal && age(now, p.of.time) >= t.options.OlderThan {
				key := regionBookKey(m, p.of.key)
				held[key] = append(held[key], profile.Block{Addr: p.start, Size: p.end - p.start, Weight: 1})
			}
		}
	}
	s.HasBlocks = true
	for _, st := range s.Stacks {
		key, ok := t.keys[st]
		if m := t.members[key.proc]; !ok || m == nil || m.execed {
			continue
		}
		st.Blocks = held[key]
		slices.SortFunc(st.Blocks, func(a, b profile.Block) int { return cmp.Compare(a.Addr, b.Addr) })
	}
	return nil
}

// ContentOptions say how AddContent reads. The zero value reads every block and hides what it holds.
type ContentOptions struct {
	NoRedact bool
	// Blocks bounds the blocks that are read of each stack, where time is short; 0 is no bound. The figures of the others
	// are scaled up from them.
	Blocks int
}

// AddContent reads the blocks in use of each stack out of the living processes, at their exact bounds, and notes what they
// hold. It takes the newest snapshot, with blocks. Blocks that a target frees meanwhile read as whatever is there now. What
// it finds is kept for processes that end: their stacks have what was found last.
func (t *Tracer) AddContent(ctx context.Context, s *profile.Snapshot, o ContentOptions) error {
	living := map[int][]*profile.Stack{}
	keys := map[*profile.Stack]bookKey{}
	t.mu.Lock()
	for _, st := range s.Stacks {
		m := t.members[t.keys[st].proc]
		if m == nil || m.execed {
			continue
		}
		keys[st] = t.keys[st]
		st.Content = t.contents[keys[st]]
		if !m.ended {
			living[m.pid] = append(living[m.pid], st)
		}
	}
	t.mu.Unlock()
	var errs []error
	for _, pid := range mostFirst(living) {
		errs = append(errs, addContent(ctx, pid, living[pid], o))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for st, key := range keys {
		if st.Content != nil {
			t.contents[key] = st.Content
		}
	}
	return errors.Join(errs...)
}

// mostFirst sorts processes by what they hold: the OOM killer's next victim comes first.
func mostFirst(stacks map[int][]*profile.Stack) []int {
	held := map[int]int64{}
	for pid, list := range stacks {
		for _, st := range list {
			held[pid] += st.InUseBytes()
		}
	}
	return slices.SortedFunc(maps.Keys(stacks), func(a, b int) int { return cmp.Compare(held[b], held[a]) })
}

func addContent(ctx context.Context, pid int, stacks []*profile.Stack, o ContentOptions) error {
	image, err := memory.OpenProcess(pid)
	if errors.Is(err, memory.ErrGone) {
		return nil // its blocks went with it
	}
	if err != nil {
		return err
	}
	defer image.Close()
	read := make([]*profile.Stack, len(stacks))
	for i, st := range stacks {
		thin := *st
		thin.Content, thin.Blocks = nil, thinned(st.Blocks, o.Blocks)
		read[i] = &thin
	}
	_, err = heap.Join(ctx, heap.NewSpace(image), nil, read, o.NoRedact)
	for i, st := range read {
		if st.Content != nil {
			stacks[i].Content = st.Content
		}
	}
	if gone(pid) {
		return nil // it ended below the reader
	}
	return err
}

// thinned takes every so manieth block, so that at most that many are left; each stands for more then.
func thinned(blocks []profile.Block, most int) []profile.Block {
	if most == 0 || len(blocks) <= most {
		return blocks
	}
	step := (len(blocks) + most - 1) / most
	few := make([]profile.Block, 0, most)
	for i := 0; i < len(blocks); i += step {
		b := blocks[i]
		b.Weight *= float64(min(step, len(blocks)-i))
		few = append(few, b)
	}
	return few
}
