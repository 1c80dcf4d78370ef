package tracer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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
		const kindShift = 57
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

// AddContent reads the blocks in use of each stack out of the living processes, at their exact bounds, and notes what they
// hold. It takes a snapshot with blocks, best after Stop: blocks that the target has freed since read as whatever is there now.
func (t *Tracer) AddContent(ctx context.Context, s *profile.Snapshot, noRedact bool) error {
	stacks := map[int][]*profile.Stack{}
	t.mu.Lock()
	for _, st := range s.Stacks {
		if m := t.members[t.keys[st].proc]; m != nil && !m.ended && !m.execed {
			stacks[m.pid] = append(stacks[m.pid], st)
		}
	}
	t.mu.Unlock()
	var errs []error
	for pid, of := range stacks {
		errs = append(errs, addContent(ctx, pid, of, noRedact))
	}
	return errors.Join(errs...)
}

func addContent(ctx context.Context, pid int, stacks []*profile.Stack, noRedact bool) error {
	image, err := memory.OpenProcess(pid)
	if errors.Is(err, memory.ErrGone) {
		return nil // its blocks went with it
	}
	if err != nil {
		return err
	}
	defer image.Close()
	_, err = heap.Join(ctx, heap.NewSpace(image), nil, stacks, noRedact)
	return err
}
