package view

import (
	"slices"
	"strconv"

	"github.com/allocsnoop/allocsnoop/profile"
)

// tree is the flame graph: node i is a call of Frame[i] by node Parent[i]; parents come before their children, node 0 is the
// root. Values has the four figures of each node (its callees included), Old those of the other profile, times scale.
type tree struct {
	Frame  []int      `json:"frame"`
	Parent []int      `json:"parent"`
	Values [][4]int64 `json:"values"`
	Old    [][4]int64 `json:"old,omitempty"`
	// Left is how many boxes were too small to be drawn.
	Left int `json:"left"`
}

type node struct {
	frame    int
	values   [4]int64
	old      [4]int64
	children map[int]*node
}

func (n *node) child(frame int) *node {
	c := n.children[frame]
	if c == nil {
		c = &node{frame: frame}
		if n.children == nil {
			n.children = make(map[int]*node, 1)
		}
		n.children[frame] = c
	}
	return c
}

// tree merges the stacks from their outer end. Each kind is a child of the root, since kinds are never added up by a reader.
func (b *builder) tree(groups, old []*profile.Group, scale float64) tree {
	root := &node{frame: b.named("all")}
	for _, g := range groups {
		b.grow(root, g, func(n *node, v [4]int64) {
			for i := range v {
				n.values[i] += v[i]
			}
		})
	}
	for _, g := range old {
		b.grow(root, g, func(n *node, v [4]int64) {
			for i := range v {
				n.old[i] += int64(float64(v[i]) * scale)
			}
		})
	}
	return flatten(root, old != nil)
}

func (b *builder) named(name string) int {
	k := frameKey{name, "", ""}
	id, ok := b.frameIDs[k]
	if !ok {
		id = len(b.table)
		b.frameIDs[k] = id
		b.table = append(b.table, [3]string{name, "", ""})
	}
	return id
}

func (b *builder) grow(root *node, g *profile.Group, add func(*node, [4]int64)) {
	v := [4]int64{g.AllocObjects, g.AllocBytes, g.InUseObjects(), g.InUseBytes()}
	for i := range v {
		v[i] = max(v[i], 0)
	}
	n := root
	add(n, v)
	n = n.child(b.named(string(g.Kind)))
	add(n, v)
	for i := len(g.Frames) - 1; i >= 0; i-- {
		ids := b.location(g.Frames[i])
		for j := len(ids) - 1; j >= 0; j-- {
			n = n.child(ids[j])
			add(n, v)
		}
	}
}

// flatten goes breadth first, leaves out what is too small in every figure, and stops at a bound.
func flatten(root *node, compared bool) tree {
	var t tree
	type entry struct {
		n      *node
		parent int
	}
	var least [4]int64
	for i := range least {
		least[i] = int64(float64(max(root.values[i], root.old[i])) * minNodeShare)
	}
	queue := []entry{{root, -1}}
	for len(queue) > 0 {
		e := queue[0]
		queue = queue[1:]
		if len(t.Frame) >= maxNodes {
			t.Left++
			continue
		}
		id := len(t.Frame)
		t.Frame = append(t.Frame, e.n.frame)
		t.Parent = append(t.Parent, e.parent)
		t.Values = append(t.Values, e.n.values)
		if compared {
			t.Old = append(t.Old, e.n.old)
		}
		frames := make([]int, 0, len(e.n.children))
		for f := range e.n.children {
			frames = append(frames, f)
		}
		slices.Sort(frames)
		for _, f := range frames {
			if c := e.n.children[f]; worthDrawing(c, least) {
				queue = append(queue, entry{c, id})
			} else {
				t.Left++
			}
		}
	}
	return t
}

func worthDrawing(n *node, least [4]int64) bool {
	for i := range least {
		if v := max(n.values[i], n.old[i]); v > 0 && v >= least[i] {
			return true
		}
	}
	return false
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
