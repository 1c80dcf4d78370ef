package profile

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	pprof "github.com/google/pprof/profile"
)

// Per says what makes two runs of other length or load comparable.
type Per struct {
	// By is "allocations" (the default: how often the call paths of both runs were called), "seconds" or "count".
	By string
	// Old and New are the units of work done in each run, with By "count".
	Old, New float64
}

// ParsePer reads "allocations", "seconds", "5000" (the same count in both runs) or "5000,2500" (one for each).
func ParsePer(text string) (Per, error) {
	switch text {
	case "", "allocations":
		return Per{By: "allocations"}, nil
	case "seconds":
		return Per{By: "seconds"}, nil
	}
	oldText, newText, two := strings.Cut(text, ",")
	if !two {
		newText = oldText
	}
	p := Per{By: "count"}
	var errOld, errNew error
	p.Old, errOld = strconv.ParseFloat(strings.TrimSpace(oldText), 64)
	p.New, errNew = strconv.ParseFloat(strings.TrimSpace(newText), 64)
	if errOld != nil || errNew != nil || !(p.Old > 0 && p.New > 0) || math.IsInf(p.Old+p.New, 0) {
		return p, fmt.Errorf("parse %q: want allocations, seconds, a count of requests, or two counts OLD,NEW", text)
	}
	return p, nil
}

// Diff compares two runs by what their functions hold.
type Diff struct {
	Per       Per
	Scale     float64 // NEW did so many times the work of OLD
	Libraries []LibraryChange
	// Rows are the functions whose difference is beyond noise, the largest first.
	Rows []DiffRow
	// Compared is the number of functions looked at; Noisiest the largest difference that noise explains, if any.
	Compared int
	Noisiest *DiffRow
}

// DiffRow is one function's memory in both runs.
type DiffRow struct {
	Kind     Kind
	Label    string
	Owner    Owner // of the new run where it has one
	Old, New int64 // bytes in use
	OldBlocks,
	NewBlocks int64
	Expected   float64 // bytes in use that OLD predicts for NEW's work
	Difference float64 // bytes in use beyond that
	Noise      float64 // a difference below this may be chance
	Rebuilt    bool    // its library changed build
	Stack      *Group  // the call stack with most of the difference
	Lost       bool    // Stack is of OLD
}

// PerUnit is the difference for one unit of NEW's work.
func (r *DiffRow) PerUnit(units float64) float64 {
	if units <= 0 {
		return 0
	}
	return r.Difference / units
}

// Units is how many units of work NEW did; 0 when they are not counted ones.
func (d *Diff) Units(new *Snapshot) float64 {
	switch d.Per.By {
	case "count":
		return d.Per.New
	case "seconds":
		return new.Duration().Seconds()
	}
	return 0
}

// The rules of noise. A difference counts when it is this many standard deviations wide and more than a share of the whole.
const (
	sigmas     = 4
	smallShare = 0.05
)

// Compare compares two runs. Functions are matched by name, so that two builds of one library compare.
//
// The trap: memory that is held (a cache, what is in flight) does not grow with the work done, leaked memory does, and a
// run of half the length tells nothing of which it is. So unless a verdict says it, every value between the two counts as
// expected.
func Compare(old, new *Snapshot, per Per) *Diff {
	d := &Diff{Per: per, Libraries: DiffLibraries(Libraries(old), Libraries(new))}
	if d.Per.By == "" {
		d.Per.By = "allocations"
	}
	n := newNamer(buildIndependent)
	oldSide, newSide := newSide(old, n), newSide(new, n)
	d.Scale = d.scale(old, new, oldSide, newSide)
	rebuilt := map[string]bool{}
	for _, c := range d.Libraries {
		if c.Old != nil && c.New != nil {
			rebuilt[c.Old.Name], rebuilt[c.New.Name] = true, true
		}
	}
	for _, key := range unionKeys(oldSide.owners, newSide.owners) {
		row := d.row(key, oldSide, newSide)
		row.Rebuilt = rebuilt[row.Owner.Library()]
		d.Compared++
		switch {
		case math.Abs(row.Difference) > row.Noise:
			d.Rows = append(d.Rows, row)
		case row.Difference != 0 && (d.Noisiest == nil || math.Abs(row.Difference) > math.Abs(d.Noisiest.Difference)):
			d.Noisiest = &row
		}
	}
	slices.SortStableFunc(d.Rows, func(a, b DiffRow) int {
		return cmp.Compare(math.Abs(b.Difference), math.Abs(a.Difference))
	})
	return d
}

// side is one of the two runs, prepared for look-up by names that are the same in both.
type side struct {
	snapshot *Snapshot
	owners   map[diffKey]*Group
	stacks   map[diffKey][]callPath
	paths    map[string]*Group
}

// callPath comes with the key that it has in both runs.
type callPath struct {
	key   string
	group *Group
}

// diffKey is a function without its library: a library may have been renamed.
type diffKey struct {
	kind            Kind
	label, function string
}

// buildIndependent names an unnamed frame by its library only: an offset means nothing in another build.
func buildIndependent(l *Location) string {
	if name := baseName(l.Mapping); name != "" {
		return stem(name) + " (no symbols)"
	}
	return "(unknown)"
}

func newSide(s *Snapshot, n *namer) *side {
	out := &side{s, map[diffKey]*Group{}, map[diffKey][]callPath{}, nil}
	groups, byKey := n.group(s.Stacks)
	out.paths = byKey
	byOwner := map[diffKey][]*Group{}
	for _, g := range groups {
		o := g.Owner()
		key := diffKey{g.Kind, g.Label, o.Function}
		if o.Mapping != nil && strings.HasPrefix(o.Function, o.Library()+"+0x") {
			key.function = stem(o.Library()) + " (no symbols)"
		}
		byOwner[key] = append(byOwner[key], g)
		out.stacks[key] = append(out.stacks[key], callPath{string(n.key(g.Stacks[0])), g})
	}
	for key, groups := range byOwner {
		out.owners[key] = mergeGroups(groups)
	}
	return out
}

func unionKeys(a, b map[diffKey]*Group) []diffKey {
	var keys []diffKey
	for k := range a {
		keys = append(keys, k)
	}
	for k := range b {
		if a[k] == nil {
			keys = append(keys, k)
		}
	}
	slices.SortFunc(keys, func(x, y diffKey) int {
		return cmp.Or(cmp.Compare(x.kind, y.kind), cmp.Compare(x.label, y.label), cmp.Compare(x.function, y.function))
	})
	return keys
}

// scale is the ratio of the work done.
func (d *Diff) scale(old, new *Snapshot, oldSide, newSide *side) float64 {
	ratio := 1.0
	switch d.Per.By {
	case "count":
		ratio = d.Per.New / d.Per.Old
	case "seconds":
		ratio = new.Duration().Seconds() / old.Duration().Seconds()
	default:
		ratio = callRatio(oldSide, newSide)
	}
	if math.IsNaN(ratio) || math.IsInf(ratio, 0) || ratio <= 0 {
		return 1
	}
	return ratio
}

// callRatio is how much more often the call paths of both runs allocated: the median, weighted by calls, because the paths
// that changed between the builds are just the ones that must not count.
func callRatio(old, new *side) float64 {
	type pair struct{ ratio, weight float64 }
	var pairs []pair
	var total float64
	for path, o := range old.paths {
		n := new.paths[path]
		if n == nil || o.AllocObjects <= 0 || n.AllocObjects <= 0 || o.Kind != KindMalloc {
			continue
		}
		// The root keeps one busy path from outvoting all the others.
		p := pair{float64(n.AllocObjects) / float64(o.AllocObjects), math.Sqrt(float64(min(o.AllocObjects, n.AllocObjects)))}
		pairs = append(pairs, p)
		total += p.weight
	}
	if len(pairs) == 0 {
		return new.snapshot.Duration().Seconds() / old.snapshot.Duration().Seconds()
	}
	slices.SortFunc(pairs, func(a, b pair) int { return cmp.Compare(a.ratio, b.ratio) })
	var sum float64
	for _, p := range pairs {
		if sum += p.weight; sum >= total/2 {
			return p.ratio
		}
	}
	return 1
}

func (d *Diff) row(key diffKey, oldSide, newSide *side) DiffRow {
	o, n := oldSide.owners[key], newSide.owners[key]
	row := DiffRow{Kind: key.kind, Label: key.label}
	if o != nil {
		row.Owner, row.Old, row.OldBlocks = o.Owner(), o.InUseBytes(), o.InUseObjects()
	}
	if n != nil {
		row.Owner, row.New, row.NewBlocks = n.Owner(), n.InUseBytes(), n.InUseObjects()
	}
	low, high := d.expected(oldSide.snapshot, o)
	row.Expected = min(max(float64(row.New), low), high)
	row.Difference = float64(row.New) - row.Expected
	if row.Difference != 0 {
		variance := d.Scale*d.Scale*noise(oldSide.snapshot, o) + noise(newSide.snapshot, n)
		if d.Scale < 1 {
			variance = noise(oldSide.snapshot, o) + noise(newSide.snapshot, n)
		}
		row.Noise = sigmas*math.Sqrt(variance) + smallShare*max(math.Abs(row.Expected), math.Abs(float64(row.New)))
		row.Stack, row.Lost = d.mainStack(key, oldSide, newSide)
	}
	return row
}

// expected is the range of bytes in use that a function of OLD would hold after NEW's work.
func (d *Diff) expected(s *Snapshot, g *Group) (low, high float64) {
	if g == nil {
		return 0, 0
	}
	held := float64(g.InUseBytes())
	scaled := held * d.Scale
	switch newCourse(s, g).class(0) {
	case Leaking:
		return scaled, scaled
	case SteadyCache:
		if g.FreeObjects > 0 { // turned over and held: a level
			return held, held
		}
	}
	return min(held, scaled), max(held, scaled)
}

// noise is the variance of a group's bytes in use: that of sampling, that of counting independent blocks, and how much the
// level swung during the run.
func noise(s *Snapshot, g *Group) float64 {
	if g == nil || g.AllocObjects <= 0 {
		return 0
	}
	size := float64(g.AllocBytes) / float64(g.AllocObjects)
	blocks := math.Abs(float64(g.InUseObjects()))
	swing := swingOf(newCourse(s, g))
	return g.InUseBytesVar + size*size*blocks + swing*swing
}

// swingOf is the standard deviation of the bytes in use around their own course: each point against the mean of its
// neighbours.
func swingOf(c *course) float64 {
	if c.points < 3 {
		return 0
	}
	var sum float64
	var n int
	for i := 2; i < len(c.bytes)-1; i++ { // the first interval is start-up
		r := c.bytes[i] - (c.bytes[i-1]+c.bytes[i+1])/2
		sum += r * r
		n++
	}
	if n == 0 {
		return 0
	}
	return math.Sqrt(sum / float64(n) / 1.5) // the mean of two neighbours adds half a variance
}

// mainStack is the call stack with the largest difference.
func (d *Diff) mainStack(key diffKey, oldSide, newSide *side) (main *Group, lost bool) {
	var most float64
	consider := func(g *Group, change float64, of bool) {
		if main == nil || math.Abs(change) > math.Abs(most) {
			main, most, lost = g, change, of
		}
	}
	for _, p := range oldSide.stacks[key] {
		var now float64
		if n := newSide.paths[p.key]; n != nil {
			now = float64(n.InUseBytes())
		}
		consider(p.group, now-d.Scale*float64(p.group.InUseBytes()), true)
	}
	for _, p := range newSide.stacks[key] {
		if oldSide.paths[p.key] == nil {
			consider(p.group, float64(p.group.InUseBytes()), false)
		}
	}
	return main, lost
}

// EncodeDiff is NEW minus OLD (times scale) as one pprof profile, with the label that makes `go tool pprof` compute shares
// of OLD, as its -diff_base does.
func EncodeDiff(old, new *Snapshot, scale float64) (*pprof.Profile, error) {
	base, err := Encode(old)
	if err != nil {
		return nil, err
	}
	now, err := Encode(new)
	if err != nil {
		return nil, err
	}
	base.SetLabel("pprof::base", []string{"true"})
	base.Scale(-scale)
	base.Comments, now.Comments = nil, nil
	base.Period = now.Period
	sum, err := pprof.Merge([]*pprof.Profile{now, base})
	if err != nil {
		return nil, fmt.Errorf("merge profiles: %w", err)
	}
	sum.Comments = []string{
		"Difference: NEW minus OLD x " + strconv.FormatFloat(scale, 'g', 4, 64), "OLD: " + Sanitize(old.Command), "NEW: " + Sanitize(new.Command),
	}
	return sum, nil
}
