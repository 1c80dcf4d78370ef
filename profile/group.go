package profile

import (
	"cmp"
	"encoding/binary"
	"slices"
	"strings"
)

// Group is the sum of the stacks that take the same way through the same functions: in several processes, or at several
// addresses of one function.
type Group struct {
	Kind   Kind
	Label  string
	Frames []*Location // of the stack with the most bytes in use
	Stacks []*Stack

	AllocObjects, AllocBytes       int64
	FreeObjects, FreeBytes         int64
	InUseObjectsVar, InUseBytesVar float64
	Ages                           *Ages
	History                        []Point
	Content                        []Content

	owner Owner // empty until it is known
}

// InUseObjects is the number of blocks in use at the end.
func (g *Group) InUseObjects() int64 { return g.AllocObjects - g.FreeObjects }

// InUseBytes is the number of bytes in use at the end.
func (g *Group) InUseBytes() int64 { return g.AllocBytes - g.FreeBytes }

// Owner is the function that the group's memory is put down to.
func (g *Group) Owner() Owner {
	if g.owner.Function == "" {
		return OwnerOf(g.Frames)
	}
	return g.owner
}

// PIDs lists the group's processes in ascending order.
func (g *Group) PIDs() []int {
	var pids []int
	for _, s := range g.Stacks {
		pids = append(pids, s.PID)
	}
	slices.Sort(pids)
	return slices.Compact(pids)
}

// GroupStacks sums stacks by kind and functions, most bytes in use first.
func GroupStacks(stacks []*Stack) []*Group {
	groups, _ := newNamer(placeName).group(stacks)
	return groups
}

// group returns the groups, and each by its key, the same in all snapshots that one namer groups.
func (n *namer) group(stacks []*Stack) ([]*Group, map[string]*Group) {
	byKey := make(map[string]*Group, len(stacks))
	groups := make([]*Group, 0, len(stacks))
	for _, s := range stacks {
		key := n.key(s)
		g := byKey[string(key)] // allocates nothing
		if g == nil {
			g = &Group{Kind: s.Kind, Label: s.Label}
			byKey[string(key)] = g
			groups = append(groups, g)
		}
		g.Stacks = append(g.Stacks, s)
	}
	for _, g := range groups {
		g.sum()
		g.owner = ownerOf(g.Frames, n.role)
	}
	sortGroups(groups)
	return groups, byKey
}

func sortGroups(groups []*Group) {
	slices.SortStableFunc(groups, func(a, b *Group) int {
		return cmp.Or(cmp.Compare(b.InUseBytes(), a.InUseBytes()), cmp.Compare(b.AllocBytes, a.AllocBytes))
	})
}

func (g *Group) sum() {
	top := g.Stacks[0]
	if len(g.Stacks) == 1 { // nearly all of a large profile's
		g.AllocObjects, g.AllocBytes, g.FreeObjects, g.FreeBytes = top.AllocObjects, top.AllocBytes, top.FreeObjects, top.FreeBytes
		g.InUseObjectsVar, g.InUseBytesVar = top.InUseObjectsVar, top.InUseBytesVar
		g.Frames, g.Ages, g.History, g.Content = top.Frames, top.Ages, top.History, sumContent(g.Stacks)
		return
	}
	histories := make([][]Point, 0, len(g.Stacks))
	for _, s := range g.Stacks {
		g.AllocObjects += s.AllocObjects
		g.AllocBytes += s.AllocBytes
		g.FreeObjects += s.FreeObjects
		g.FreeBytes += s.FreeBytes
		g.InUseObjectsVar += s.InUseObjectsVar
		g.InUseBytesVar += s.InUseBytesVar
		if s.InUseBytes() > top.InUseBytes() {
			top = s
		}
		if len(s.History) > 0 {
			histories = append(histories, s.History)
		}
	}
	g.Frames = top.Frames
	g.Ages = sumAges(g.Stacks)
	g.History = sumHistories(histories)
	g.Content = sumContent(g.Stacks)
}

// maxContentSamples bounds the samples of one shape.
const maxContentSamples = 3

// sumContent adds up what is in the blocks of several stacks, most bytes first.
func sumContent(stacks []*Stack) []Content {
	var sum []Content
	for _, s := range stacks {
		for _, c := range s.Content {
			i := slices.IndexFunc(sum, func(have Content) bool { return have.Shape == c.Shape })
			if i < 0 {
				i = len(sum)
				sum = append(sum, Content{Shape: c.Shape})
			}
			sum[i].Blocks += c.Blocks
			sum[i].Bytes += c.Bytes
			room := maxContentSamples - len(sum[i].Samples)
			sum[i].Samples = append(sum[i].Samples, c.Samples[:min(room, len(c.Samples))]...)
		}
	}
	slices.SortStableFunc(sum, func(a, b Content) int { return cmp.Compare(b.Bytes, a.Bytes) })
	return sum
}

// sumAges is exact but for the median, which is the one of the stack with the most blocks.
func sumAges(stacks []*Stack) *Ages {
	var sum *Ages
	var most int64
	for _, s := range stacks {
		a := s.Ages
		if a == nil {
			continue
		}
		if sum == nil {
			sum = &Ages{Min: a.Min, Median: a.Median, Max: a.Max}
			most = s.InUseObjects()
		}
		sum.Min, sum.Max = min(sum.Min, a.Min), max(sum.Max, a.Max)
		sum.Old += a.Old
		if n := s.InUseObjects(); n > most {
			most, sum.Median = n, a.Median
		}
	}
	return sum
}

// sumHistories adds books at the union of their moments; between two points a book stands still, before its first one it
// is empty.
func sumHistories(histories [][]Point) []Point {
	switch len(histories) {
	case 0:
		return nil
	case 1:
		return histories[0]
	}
	var sum []Point // differences at first
	for _, h := range histories {
		var last Point
		i := 0
		for _, p := range h {
			// Nearly always the next one: a trace looks at all its stacks at the same moments.
			for i < len(sum) && sum[i].At < p.At {
				i++
			}
			if i == len(sum) || sum[i].At != p.At {
				sum = slices.Insert(sum, i, Point{At: p.At})
			}
			sum[i].add(p, last)
			last = p
		}
	}
	for i := 1; i < len(sum); i++ {
		sum[i].add(sum[i-1], Point{})
	}
	return sum
}

// add adds what happened between two points.
func (p *Point) add(to, from Point) {
	p.AllocObjects += to.AllocObjects - from.AllocObjects
	p.AllocBytes += to.AllocBytes - from.AllocBytes
	p.FreeObjects += to.FreeObjects - from.FreeObjects
	p.FreeBytes += to.FreeBytes - from.FreeBytes
}

// namer makes the keys that stacks are matched by: a number for each different way to name a location, looked up once.
type namer struct {
	known map[*Location]*named
	ids   map[string]uint32
	// place names a frame without a symbol.
	place   func(*Location) string
	scratch []byte
}

type named struct {
	id   uint32
	role role
}

func newNamer(place func(*Location) string) *namer {
	return &namer{known: map[*Location]*named{}, ids: map[string]uint32{}, place: place}
}

// key is good until the next call.
func (n *namer) key(s *Stack) []byte {
	b := append(n.scratch[:0], s.Kind...)
	b = append(b, 0)
	b = append(b, s.Label...)
	b = append(b, 0)
	for _, l := range s.Frames {
		b = binary.LittleEndian.AppendUint32(b, n.of(l).id)
	}
	n.scratch = b
	return b
}

func (n *namer) of(l *Location) *named {
	k := n.known[l]
	if k == nil {
		name := strings.Join(frameNames(l, n.place), "\x00")
		id, ok := n.ids[name]
		if !ok {
			id = uint32(len(n.ids))
			n.ids[name] = id
		}
		k = &named{id, roleOf(l)}
		n.known[l] = k
	}
	return k
}

func (n *namer) role(l *Location) role { return n.of(l).role }

// frameNames are the functions of a location, innermost inlined one first.
func frameNames(l *Location, place func(*Location) string) []string {
	var names []string
	for _, line := range l.Lines {
		names = append(names, line.Function)
	}
	if l.Mark != "" {
		names = append(names, l.Mark)
	}
	if len(names) == 0 {
		names = append(names, place(l))
	}
	return names
}
