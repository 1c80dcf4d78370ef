package tracer

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

const (
	// maxContentBlocks bounds the blocks that are read of one stack; the figures of more are scaled up from them.
	maxContentBlocks = 50_000
	// maxContentRead is how much of a block says enough.
	maxContentRead = 16 << 10
	// maxContentShapes is how many shapes of one stack are kept.
	maxContentShapes = 16
)

// heldBlock is a block in use: where it is and which stack made it.
type heldBlock struct {
	addr, size uint64
}

// AddContent reads the blocks in use of each stack of a snapshot out of the living processes, at their exact bounds, and
// notes what they hold. To be called after Stop; blocks that the target has freed since read as whatever is there now.
func (t *Tracer) AddContent(s *profile.Snapshot, noRedact bool) error {
	held := map[stackKey]map[profile.Kind][]heldBlock{}
	err := eachEntry(t.programs.Live, func(k *bpf.LiveKey, v *bpf.Block) {
		const kindShift = 57
		key := stackKey{k.Proc, v.Stack}
		if held[key] == nil {
			held[key] = map[profile.Kind][]heldBlock{}
		}
		kind := t.kinds.name(uint32(k.Addr >> kindShift))
		held[key][kind] = append(held[key][kind], heldBlock{k.Addr & (1<<kindShift - 1), v.Size})
	})
	if err != nil {
		return fmt.Errorf("walk the blocks in use: %w", err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	images := map[int]*memory.Process{}
	defer func() {
		for _, image := range images {
			_ = image.Close()
		}
	}()
	var errs []error
	for _, st := range s.Stacks {
		key, ok := t.keys[st]
		blocks := held[key][st.Kind]
		m := t.members[key.proc]
		if !ok || len(blocks) == 0 || m == nil || m.ended {
			continue
		}
		if images[m.pid] == nil {
			image, err := memory.OpenProcess(m.pid)
			if err != nil {
				errs = append(errs, err)
				m.ended = m.ended || errors.Is(err, memory.ErrGone)
				continue
			}
			images[m.pid] = image
		}
		st.Content = contentOf(images[m.pid], blocks, noRedact)
	}
	return errors.Join(errs...)
}

func contentOf(image *memory.Process, blocks []heldBlock, noRedact bool) []profile.Content {
	// In the order of addresses the target's memory is read once through.
	slices.SortFunc(blocks, func(a, b heldBlock) int { return cmp.Compare(a.addr, b.addr) })
	step := (len(blocks) + maxContentBlocks - 1) / maxContentBlocks
	grouper := content.NewGrouper(heap.NewSpace(image).ContentOptions(noRedact))
	buffer := make([]byte, maxContentRead)
	for i := 0; i < len(blocks); i += step {
		b := blocks[i]
		n, err := image.ReadAt(buffer[:min(b.size, maxContentRead)], int64(b.addr))
		if err != nil && n == 0 && b.size > 0 {
			continue
		}
		grouper.Add(0, b.addr, b.size, buffer[:n])
	}
	var shapes []profile.Content
	for _, g := range grouper.Groups() {
		if len(shapes) == maxContentShapes {
			break
		}
		shapes = append(shapes, profile.Content{
			Shape: g.Shape.String(), Blocks: int64(g.Count) * int64(step), Bytes: int64(g.Bytes) * int64(step), Samples: g.Samples,
		})
	}
	return shapes
}
