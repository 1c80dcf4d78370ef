package heap

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/allocsnoop/allocsnoop/profile"
)

// The blocks of objects.cc, handed to two made-up stacks, with some that are not there.
func TestJoinReadsBlocksAtTheirBoundsAndLeavesOutWhatIsGone(t *testing.T) {
	pid, _ := start(t, nil, build(t, "testdata/objects.cc"))
	img := openProcess(t, pid)
	h := walkProcess(t, pid)
	json := &profile.Stack{Kind: profile.KindMalloc}
	rest := &profile.Stack{Kind: profile.KindMalloc}
	inPool := &profile.Stack{Kind: "pool"}
	mapped := &profile.Stack{Kind: profile.KindMmap}
	group, err := Inspect(t.Context(), img, InspectOptions{Live: true})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for b := range h.Blocks {
		head := make([]byte, 7)
		if _, err := img.ReadAt(head, int64(b.Addr)); err != nil {
			t.Fatal(err)
		}
		to := rest
		if string(head) == `{"uid":` {
			to = json
			if n++; n == 1 { // larger than the block; in its middle; nowhere
				to.Blocks = append(to.Blocks, profile.Block{Addr: b.Addr, Size: b.Size + 1, Weight: 1}, profile.Block{Addr: b.Addr + 8, Size: 8, Weight: 1})
				inPool.Blocks = []profile.Block{{Addr: b.Addr + 8, Size: 8, Weight: 1}, {Addr: b.Addr + 8, Size: b.Size, Weight: 1}}
				mapped.Blocks = []profile.Block{{Addr: b.Addr &^ 4095, Size: 4096, Weight: 1}, {Addr: 4096, Size: 4096, Weight: 1}}
				continue
			}
		}
		to.Blocks = append(to.Blocks, profile.Block{Addr: b.Addr, Size: b.Size, Weight: 1})
	}
	stacks := []*profile.Stack{json, {Kind: profile.KindMalloc}, rest, inPool, mapped}
	report, err := Inspect(t.Context(), img, InspectOptions{Live: true, Stacks: stacks})
	if err != nil {
		t.Fatal(err)
	}
	if got := json.Content; len(got) != 1 || got[0].Shape != "JSON {uid, token, payload}" || got[0].Blocks != 1008 {
		t.Errorf("the stack of the JSON holds %+v, want 1,008 blocks", got)
	}
	j := report.Trace
	held := uint64(len(rest.Blocks)) + 1008 + 1
	if j.Held.Blocks != held || j.Gone.Blocks != 4 || j.Unchecked.Blocks != 1 {
		t.Errorf("%+v, want %d held, 4 gone, 1 unchecked", j, held)
	}
	if j.Untraced == nil || j.Untraced.Blocks != 1 || len(j.UntracedGroups) != 1 || j.UntracedGroups[0].String() != "JSON {uid, token, payload}" {
		t.Errorf("untraced are %+v %+v, want the one JSON block that was left out", j.Untraced, j.UntracedGroups)
	}
	if d := cmp.Diff(group.Groups, report.Groups, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("the groups of all blocks changed by the join: %s", d)
	}
}

func TestJoinScalesSampledBlocksAndSumsUpRareShapes(t *testing.T) {
	mem, stack := &fakeMemory{}, &profile.Stack{Kind: profile.KindMmap}
	data := mem.add(0x10000, 23*4096, "rw-p", "")
	for i := range 23 { // shapes, of which the first has the most blocks
		text := fmt.Sprintf(`{"key%c":%d,"other":true}`, 'a'+i, i)
		for n := range 1 + (22-i)/22 {
			at := i*4096 + n*256
			copy(data[at:], text)
			addr := uint64(0x10000 + at)
			stack.Blocks = append(stack.Blocks, profile.Block{Addr: addr, Size: uint64(len(text)), Weight: 2.5})
		}
	}
	if _, err := Join(t.Context(), &Space{Mem: mem, Ranges: mem.ranges}, nil, []*profile.Stack{stack}, false); err != nil {
		t.Fatal(err)
	}
	if len(stack.Content) != maxShapes {
		t.Fatalf("%d shapes are listed, want %d", len(stack.Content), maxShapes)
	}
	first, last := stack.Content[0], stack.Content[maxShapes-1]
	if first.Shape != "JSON {keya, other}" || first.Blocks != 5 {
		t.Errorf("the first shape is %+v, want the one with 2 blocks of weight 2.5", first)
	}
	if last.Shape != otherShapes || last.Blocks != 8*3 { // 2.5 is rounded shape by shape
		t.Errorf("the last shape is %+v, want 8 others", last)
	}
}
