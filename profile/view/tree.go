package view

import (
	"cmp"
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

// calls is the whole tree while it is made. A node comes after its parent.
type calls struct {
	nodes []node
	old   [][4]int64 // beside nodes; empty where nothing is compared
	index map[edge]int32
}

type node struct {
	edge
	depth  int32
	values [4]int64
}

type edge struct{ parent, frame int32 }

func (c *calls) child(e edge) int32 {
	i, ok := c.index[e]
	if ok {
		return i
	}
	i = int32(len(c.nodes))
	n := node{edge: e}
	if e.parent >= 0 {
		n.depth = c.nodes[e.parent].depth + 1
	}
	c.nodes = append(c.nodes, n)
	c.index[e] = i
	return i
}

// tree merges the stacks from their outer end. Each kind is a child of the root, since kinds are never added up by a reader.
func (b *builder) tree(groups, old []*profile.Group, scale float64) tree {
	c := &calls{index: make(map[edge]int32, 4*len(groups))}
	c.child(edge{-1, int32(b.named("all"))})
	for _, g := range groups {
		v := figures(g)
		b.walk(c, g, func(i int32) {
			for k := range v {
				c.nodes[i].values[k] += v[k]
			}
		})
	}
	if old != nil {
		c.old = make([][4]int64, len(c.nodes))
	}
	for _, g := range old {
		v := figures(g)
		b.walk(c, g, func(i int32) {
			if int(i) == len(c.old) {
				c.old = append(c.old, [4]int64{})
			}
			for k := range v {
				c.old[i][k] += int64(float64(v[k]) * scale)
			}
		})
	}
	return c.flatten()
}

func figures(g *profile.Group) [4]int64 {
	return [4]int64{max(g.AllocObjects, 0), max(g.AllocBytes, 0), max(g.InUseObjects(), 0), max(g.InUseBytes(), 0)}
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

// walk visits the nodes of a stack from the root, and makes those that are not there yet.
func (b *builder) walk(c *calls, g *profile.Group, visit func(int32)) {
	visit(0)
	at := c.child(edge{0, int32(b.named(string(g.Kind)))})
	visit(at)
	for i := len(g.Frames) - 1; i >= 0; i-- {
		ids := b.location(g.Frames[i])
		for j := len(ids) - 1; j >= 0; j-- {
			at = c.child(edge{at, int32(ids[j])})
			visit(at)
		}
	}
}

// flatten leaves out what is too small in every figure, and of what is left the innermost calls beyond a bound.
func (c *calls) flatten() tree {
	var t tree
	least := c.most(0)
	for k := range least {
		least[k] = int64(float64(least[k]) * minNodeShare)
	}
	var drawn []int32
	id := make([]int32, len(c.nodes)) // 1: drawn; later the place in the tree
	for i, n := range c.nodes {
		switch {
		case i > 0 && id[n.parent] == 0:
		case i == 0 || worthDrawing(c.most(i), least):
			drawn = append(drawn, int32(i))
			id[i] = 1
		default:
			t.Left++
		}
	}
	slices.SortStableFunc(drawn, func(a, b int32) int { return cmp.Compare(c.nodes[a].depth, c.nodes[b].depth) })
	t.Left += max(len(drawn)-maxNodes, 0)
	drawn = drawn[:min(len(drawn), maxNodes)]
	for place, i := range drawn {
		id[i] = int32(place)
		n := c.nodes[i]
		t.Frame = append(t.Frame, int(n.frame))
		t.Parent = append(t.Parent, -1)
		if place > 0 {
			t.Parent[place] = int(id[n.parent])
		}
		t.Values = append(t.Values, n.values)
		if c.old != nil {
			t.Old = append(t.Old, c.old[i])
		}
	}
	return t
}

// most is the larger of both profiles in each figure.
func (c *calls) most(i int) [4]int64 {
	v := c.nodes[i].values
	if c.old != nil {
		for k := range v {
			v[k] = max(v[k], c.old[i][k])
		}
	}
	return v
}

func worthDrawing(values, least [4]int64) bool {
	for i, v := range values {
		if v > 0 && v >= least[i] {
			return true
		}
	}
	return false
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
