package profile

import (
	"cmp"
	"slices"
	"sort"
	"strings"
	"time"
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
}

// InUseObjects is the number of blocks in use at the end.
func (g *Group) InUseObjects() int64 { return g.AllocObjects - g.FreeObjects }

// InUseBytes is the number of bytes in use at the end.
func (g *Group) InUseBytes() int64 { return g.AllocBytes - g.FreeBytes }

// Owner is the function that the group's memory is put down to.
func (g *Group) Owner() Owner { return OwnerOf(g.Frames) }

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
func GroupStacks(stacks []*Stack) []*Group { return groupBy(stacks, newNamer().key) }

func groupBy(stacks []*Stack, key func(*Stack) string) []*Group {
	byKey := make(map[string]*Group, len(stacks))
	var groups []*Group
	for _, s := range stacks {
		k := key(s)
		g := byKey[k]
		if g == nil {
			g = &Group{Kind: s.Kind, Label: s.Label}
			byKey[k] = g
			groups = append(groups, g)
		}
		g.Stacks = append(g.Stacks, s)
	}
	for _, g := range groups {
		g.sum()
	}
	sortGroups(groups)
	return groups
}

func sortGroups(groups []*Group) {
	slices.SortStableFunc(groups, func(a, b *Group) int {
		return cmp.Or(cmp.Compare(b.InUseBytes(), a.InUseBytes()), cmp.Compare(b.AllocBytes, a.AllocBytes))
	})
}

func (g *Group) sum() {
	top := g.Stacks[0]
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
	deltas := map[time.Duration]Point{}
	for _, h := range histories {
		var last Point
		for _, p := range h {
			d := deltas[p.At]
			d.AllocObjects += p.AllocObjects - last.AllocObjects
			d.AllocBytes += p.AllocBytes - last.AllocBytes
			d.FreeObjects += p.FreeObjects - last.FreeObjects
			d.FreeBytes += p.FreeBytes - last.FreeBytes
			deltas[p.At], last = d, p
		}
	}
	out := make([]Point, 0, len(deltas))
	for at, p := range deltas {
		p.At = at
		out = append(out, p)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].At < out[j].At })
	for i := 1; i < len(out); i++ {
		out[i].AllocObjects += out[i-1].AllocObjects
		out[i].AllocBytes += out[i-1].AllocBytes
		out[i].FreeObjects += out[i-1].FreeObjects
		out[i].FreeBytes += out[i-1].FreeBytes
	}
	return out
}

// namer makes the keys that stacks are matched by. Names of a location are put together once.
type namer struct {
	names map[*Location]string
	// place names a frame without a symbol.
	place func(*Location) string
}

func newNamer() *namer { return &namer{map[*Location]string{}, placeName} }

func (n *namer) key(s *Stack) string {
	var b strings.Builder
	b.WriteString(string(s.Kind))
	b.WriteByte(0)
	b.WriteString(s.Label)
	for _, l := range s.Frames {
		b.WriteByte(0)
		b.WriteString(n.name(l))
	}
	return b.String()
}

func (n *namer) name(l *Location) string {
	name, ok := n.names[l]
	if !ok {
		name = strings.Join(frameNames(l, n.place), "\x00")
		n.names[l] = name
	}
	return name
}

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
