package profile

import (
	"cmp"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Class is what a call path does with its memory over the run.
type Class string

const (
	// Leaking memory grows at a steady pace until the end, and its old blocks are still there.
	Leaking Class = "leaking"
	// Growing memory is still rising at the end, but it slows down, its blocks are replaced, or one block is made larger.
	Growing Class = "growing"
	// SteadyCache memory stays, and stopped growing: a cache that is full, start-up data, a pool.
	SteadyCache Class = "steady cache"
	// Churn is allocated and freed again.
	Churn Class = "churn"
)

var classOrder = []Class{Leaking, Growing, SteadyCache, Churn}

// Verdict is what became of one owner's memory.
type Verdict struct {
	Class                    Class
	Kind                     Kind
	Label                    string
	Owner                    Owner
	Stacks                   []*Group // most bytes in use first
	BytesPerMinute           float64  // growth over the later three quarters of the run, temporary blocks left out
	InUseBytes, InUseObjects int64
	AllocBytes, AllocObjects int64
	FreeObjects              int64
	History                  []Point // of all its stacks
	Confidence               float64 // 0 to 1
	Evidence                 string  // "41,210 blocks, none freed in 1m0s"
	// Advice is what would make a doubtful verdict sure; empty for a sure one.
	Advice string
}

// Figures of the rules. They are set by the labelled programs of the tests, with room on both sides.
const (
	tooFew        = 24   // blocks of a path that are judged only with the others of its owner
	minGain       = 6    // blocks that must stay before growth is more than chance
	steadyShare   = 0.05 // growth in the last quarter below this share of all growth is none
	slowing       = 0.6  // the last quarter gains less than this share of the second one: it slows down
	survivalShare = 0.6  // of the blocks in use at half time, so many must live at the end of a leak
)

// Judge classifies what every owner does, worst first. A path needs a History for a sure verdict.
//
// The traps it knows: saw-tooth programs grow at any moment but the one after their batch (so growth is that of the lower
// envelope), a cache that is turned over looks like a leak until its old blocks have been replaced (so survivors are
// counted, and blocks from before the trace that were freed), and a leak may hide under a thousand times more churn.
func Judge(s *Snapshot) []Verdict {
	return JudgeGroups(s, GroupStacks(s.Stacks))
}

// JudgeGroups is Judge for stacks that were grouped already.
func JudgeGroups(s *Snapshot, groups []*Group) []Verdict {
	if s.PartlyFollowed() {
		groups = slices.DeleteFunc(slices.Clone(groups), func(g *Group) bool { return g.Kind != KindMmap && g.Kind != KindBrk })
	}
	var judged, small buckets
	for i, class := range classes(s, groups) {
		k := ownerKeyOf(groups[i])
		if k.class = class; class == "" {
			small.put(k, groups[i])
		} else {
			judged.put(k, groups[i])
		}
	}
	// Paths with too few blocks to tell are judged together with the others of their owner.
	var c course
	for _, k := range small.order {
		list := small.groups[k]
		c.follow(s, mergeGroups(list))
		k.class = cmp.Or(c.class(0), SteadyCache)
		judged.put(k, list...)
	}
	verdicts := make([]Verdict, 0, len(judged.order))
	for _, k := range judged.order {
		verdicts = append(verdicts, newVerdict(s, k.class, judged.groups[k], &c))
	}
	slices.SortStableFunc(verdicts, worseFirst)
	return verdicts
}

// classes judges each group by itself, on all processors.
func classes(s *Snapshot, groups []*Group) []Class {
	out := make([]Class, len(groups))
	var next atomic.Int64
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			var c course // its room is used again and again
			for end := next.Add(groupsAtOnce); end-groupsAtOnce < int64(len(groups)); end = next.Add(groupsAtOnce) {
				for i := end - groupsAtOnce; i < min(end, int64(len(groups))); i++ {
					c.follow(s, groups[i])
					out[i] = c.class(tooFew)
				}
			}
		})
	}
	workers.Wait()
	return out
}

// groupsAtOnce is the piece of work that a processor takes.
const groupsAtOnce = 512

type ownerKey struct {
	kind                     Kind
	label, library, function string
	class                    Class
}

func ownerKeyOf(g *Group) ownerKey {
	o := g.Owner()
	return ownerKey{g.Kind, g.Label, o.Library(), o.Function, ""}
}

// buckets are groups by owner, in the order of their coming.
type buckets struct {
	order  []ownerKey
	groups map[ownerKey][]*Group
}

func (b *buckets) put(k ownerKey, list ...*Group) {
	if b.groups == nil {
		b.groups = map[ownerKey][]*Group{}
	}
	if b.groups[k] == nil {
		b.order = append(b.order, k)
	}
	b.groups[k] = append(b.groups[k], list...)
}

func worseFirst(a, b Verdict) int {
	byClass := cmp.Compare(slices.Index(classOrder, a.Class), slices.Index(classOrder, b.Class))
	switch a.Class {
	case Leaking, Growing:
		return cmp.Or(byClass, cmp.Compare(b.BytesPerMinute, a.BytesPerMinute))
	case SteadyCache:
		return cmp.Or(byClass, cmp.Compare(b.InUseBytes, a.InUseBytes))
	}
	return cmp.Or(byClass, cmp.Compare(b.AllocBytes, a.AllocBytes))
}

// mergeGroups sums groups of one owner.
func mergeGroups(groups []*Group) *Group {
	if len(groups) == 1 {
		return groups[0]
	}
	sum := &Group{Kind: groups[0].Kind, Label: groups[0].Label}
	for _, g := range groups {
		sum.Stacks = append(sum.Stacks, g.Stacks...)
	}
	sum.sum()
	return sum
}

// course is how the memory of a group went, seen from the end of the run.
type course struct {
	s        *Snapshot
	g        *Group
	duration time.Duration
	at       []time.Duration
	objects  []float64 // in use at those moments
	bytes    []float64
	floor    []float64 // blocks of that moment or later ones that are never undercut again: the lower envelope
	floorB   []float64
	// points counts the moments that were measured between start and end.
	points int
	sd     float64 // of the sampled in-use objects at the end
	sdB    float64
}

func newCourse(s *Snapshot, g *Group) *course {
	c := new(course)
	c.follow(s, g)
	return c
}

// follow makes the course of a group, in the room of the one before.
func (c *course) follow(s *Snapshot, g *Group) {
	c.s, c.g, c.duration = s, g, s.Duration()
	c.sd, c.sdB = math.Sqrt(max(g.InUseObjectsVar, 0)), math.Sqrt(max(g.InUseBytesVar, 0))
	c.fillSeries()
	c.floor, c.floorB = lowerEnvelope(c.floor[:0], c.objects), lowerEnvelope(c.floorB[:0], c.bytes)
}

// fillSeries takes the history, with nothing at the start and the final book at the end. A path that came up late has no
// points before: there it held nothing.
func (c *course) fillSeries() {
	history := c.g.History
	n := len(history) + 3
	c.at, c.objects, c.bytes, c.points = slices.Grow(c.at[:0], n), slices.Grow(c.objects[:0], n), slices.Grow(c.bytes[:0], n), 0
	add := func(at time.Duration, objects, bytes int64) {
		c.at = append(c.at, at)
		c.objects = append(c.objects, float64(objects))
		c.bytes = append(c.bytes, float64(bytes))
	}
	add(0, 0, 0)
	if len(history) > 1 {
		if before := history[0].At - (history[1].At - history[0].At); before > 0 {
			add(before, 0, 0)
		}
	}
	for _, p := range history {
		if p.At <= c.at[len(c.at)-1] || p.At >= c.duration {
			continue
		}
		add(p.At, p.AllocObjects-p.FreeObjects, p.AllocBytes-p.FreeBytes)
		c.points++
	}
	if c.duration > 0 {
		add(c.duration, c.g.InUseObjects(), c.g.InUseBytes())
	}
}

// lowerEnvelope is at each moment the least value from there on: what stays, without batches that come and go.
func lowerEnvelope(out, series []float64) []float64 {
	out = append(out, series...)
	for i := len(out) - 2; i >= 0; i-- {
		out[i] = min(out[i], out[i+1])
	}
	return out
}

// value interpolates a series at a moment.
func (c *course) value(series []float64, at time.Duration) float64 {
	i, found := slices.BinarySearch(c.at, at)
	switch {
	case found:
		return series[i]
	case i == 0:
		return series[0]
	case i == len(series):
		return series[i-1]
	}
	part := float64(at-c.at[i-1]) / float64(c.at[i]-c.at[i-1])
	return series[i-1] + part*(series[i]-series[i-1])
}

// end is where the quarters end. The last eighth of the run serves only to tell what of the growth before it stayed: at
// the very end the envelope is the curve itself, with whatever happens to be in flight.
func (c *course) end() time.Duration { return c.duration / 8 * 7 }

// gain is what the lower envelope gained in the quarter q (0 to 3).
func (c *course) gain(envelope []float64, q int) float64 {
	return c.value(envelope, c.end()*time.Duration(q+1)/4) - c.value(envelope, c.end()*time.Duration(q)/4)
}

// late is what the lower envelope gained after the first quarter, which may be start-up.
func (c *course) late(envelope []float64) float64 {
	return c.value(envelope, c.end()) - c.value(envelope, c.end()/4)
}

// class is empty when the group has too few blocks to tell.
func (c *course) class(few int64) Class {
	g := c.g
	switch {
	case g.InUseObjects() <= 0 || g.InUseBytes() <= 0:
		return Churn
	case c.points < 3:
		return c.classWithoutHistory()
	}
	if c.blocksGrow() {
		return Growing
	}
	if g.InUseObjects() < few {
		return ""
	}
	if c.stopped() {
		return c.restingClass()
	}
	if c.late(c.floor)-3*c.sd < minGain {
		if g.FreeObjects*10 > g.AllocObjects*9 {
			return c.restingClass() // a block more or less between free and malloc is no growth
		}
		return ""
	}
	if c.sustained() && !c.slowsDown() && c.oldSurvive() && !c.replacesOlder() {
		return Leaking
	}
	if g.FreeObjects*2 > g.AllocObjects && (!c.sustained() || c.comesAndGoes()) {
		return Churn
	}
	return Growing
}

// comesAndGoes is true where the growth may be that of what is on its way: no old blocks, and swings larger than what stays
// or lives of a moment.
func (c *course) comesAndGoes() bool {
	if c.oldSurvive() {
		return false
	}
	swings := c.value(c.floor, c.end()) < 0.5*slices.Max(c.objects)
	return swings || c.g.Ages.Max < c.duration/20
}

// classWithoutHistory knows the end only: a path whose blocks of the first half mostly live has not freed them.
func (c *course) classWithoutHistory() Class {
	g := c.g
	switch {
	case g.FreeObjects*2 > g.AllocObjects:
		return Churn
	case g.Ages != nil && g.Ages.Old*5 > g.InUseObjects()*4:
		return SteadyCache // all of it came early
	case g.InUseObjects() < minGain:
		return ""
	}
	return Growing
}

// blocksGrow is realloc, or an array that is copied to a larger one: the blocks become larger, not more.
func (c *course) blocksGrow() bool {
	middle := c.duration / 2
	objects, bytes := c.value(c.objects, middle), c.value(c.bytes, middle)
	now, nowBytes := float64(c.g.InUseObjects()), float64(c.g.InUseBytes())
	if objects < 1 || now > max(4, 1.1*objects) || c.g.FreeObjects == 0 {
		return false
	}
	larger := (nowBytes-3*c.sdB)/now > 1.15*bytes/objects
	return larger && c.value(c.floorB, c.duration)-c.value(c.floorB, middle) > 0.1*bytes
}

// stopped is true when the last quarter added next to nothing to what stays.
func (c *course) stopped() bool {
	late, last := c.late(c.floor), c.gain(c.floor, 3)
	// Between two points a growth that ended there looks like one that went on: start at a point.
	begin := c.end() / 4 * 3
	if i, _ := slices.BinarySearch(c.at, begin); i < len(c.at) && c.at[i] < begin+c.end()/8 {
		last = c.value(c.floor, c.end()) - c.floor[i]
	}
	return last <= max(steadyShare*late, min(2*c.sd, 3*steadyShare*late))
}

// restingClass tells what stays from what comes and goes, once growth is out of the question.
func (c *course) restingClass() Class {
	g := c.g
	if g.FreeObjects == 0 {
		return SteadyCache
	}
	lived := g.Ages == nil || g.Ages.Old > 0 || g.Ages.Median*4 > c.duration
	stays, peak := c.value(c.floor, c.duration/2), slices.Max(c.objects)
	oldOnes := g.Ages != nil && g.Ages.Old*5 >= g.InUseObjects()*4
	switch {
	case (oldOnes || c.atRest()) && float64(g.InUseObjects()) > steadyShare*peak:
		return SteadyCache // what is left of a larger set
	case stays < 0.25*peak && g.FreeObjects*2 > g.AllocObjects:
		return Churn // a saw-tooth, caught on its way
	case lived || c.occupied():
		return SteadyCache
	}
	return Churn
}

// atRest is true for what is left of a much larger set, once nothing is made or freed any more: a batch that was caught on
// its way still works, one that waits before it frees is as large as ever.
func (c *course) atRest() bool {
	g := c.g
	if float64(g.InUseObjects()) > 0.5*slices.Max(c.objects) {
		return false
	}
	for _, p := range slices.Backward(g.History) {
		if p.At <= c.end() {
			return p.AllocObjects == g.AllocObjects && p.FreeObjects == g.FreeObjects
		}
	}
	return false
}

// occupied is true for a level that is held while its blocks change: an LRU cache, as opposed to a few blocks in flight.
func (c *course) occupied() bool {
	level := c.value(c.floor, c.duration/2)
	inFlight := 0.02 * float64(c.g.AllocObjects) / max(c.duration.Seconds(), 1) // 20 ms worth of allocations
	return level >= 16 && level > 4*inFlight && level > 0.5*slices.Max(c.objects)
}

// sustained means that each of the later quarters gained its share.
func (c *course) sustained() bool {
	q1, q2, q3 := c.gain(c.floor, 1), c.gain(c.floor, 2), c.gain(c.floor, 3)
	mean := (q1 + q2 + q3) / 3
	noise := 2*math.Sqrt(max(mean, 0)) + c.sd
	least := max(0.3*mean-noise, 0.1*mean)
	return q1 > least && q2 > least && q3 > least
}

// slowsDown is a curve that bends towards a level, beyond what chance makes of equal quarters.
func (c *course) slowsDown() bool {
	early, late := c.gain(c.floor, 1), c.gain(c.floor, 3)
	noise := 3*math.Sqrt(max(early+late, 0)) + 2*c.sd
	return late < slowing*early && early-late > noise || late < 0.8*early && early-late > 2*noise && c.bendsEarly()
}

// bendsEarly confirms a slight bend by the first half of the run.
func (c *course) bendsEarly() bool {
	q0, q1, q2, q3 := c.gain(c.floor, 0), c.gain(c.floor, 1), c.gain(c.floor, 2), c.gain(c.floor, 3)
	return q0 > q1 && q1 > q2 && q2 > q3
}

// oldSurvive compares the blocks of the first half that live at the end with what was in use at half time, or with what
// the second half added: where much is in flight, most of the former was not there to stay.
func (c *course) oldSurvive() bool {
	if c.g.Ages == nil {
		return true
	}
	half := c.value(c.floor, c.duration/2)
	return float64(c.g.Ages.Old) >= survivalShare*min(half, c.value(c.floor, c.duration)-half)
}

// replacesOlder is the cache that was full when the trace began: each new block pushes out one that the books do not know.
// Resident memory that grew along says it is a leak all the same.
func (c *course) replacesOlder() bool {
	gained := c.floor[len(c.floor)-1]
	if float64(c.s.PreAttach.Frees+c.s.PreAttach.Reallocs) < 0.5*gained {
		return false
	}
	return c.s.RSS == nil || float64(c.s.RSS.total()) < 0.5*c.floorB[len(c.floorB)-1]
}

func newVerdict(s *Snapshot, class Class, groups []*Group, c *course) Verdict {
	sortGroups(groups)
	g := mergeGroups(groups)
	c.follow(s, g)
	v := Verdict{
		Class: class, Kind: g.Kind, Label: g.Label, Owner: g.Owner(), Stacks: groups,
		InUseBytes: g.InUseBytes(), InUseObjects: g.InUseObjects(),
		AllocBytes: g.AllocBytes, AllocObjects: g.AllocObjects, FreeObjects: g.FreeObjects, History: g.History,
	}
	if c.duration > 0 && (class == Leaking || class == Growing) {
		v.BytesPerMinute = c.growthPerMinute()
	}
	v.Confidence, v.Advice = c.confidence(class)
	v.Evidence = c.evidence(class)
	return v
}

func (c *course) growthPerMinute() float64 {
	if c.points < 3 {
		return float64(c.g.InUseBytes()) / c.duration.Minutes()
	}
	return c.late(c.floorB) / (c.end() - c.end()/4).Minutes()
}

// confidence starts at 1 and is cut by whatever is missing; the advice is against the worst cut.
func (c *course) confidence(class Class) (float64, string) {
	sure, worst, advice := 0.98, 1.0, ""
	cut := func(when bool, factor float64, what string) {
		if !when {
			return
		}
		sure *= factor
		if factor < worst {
			worst, advice = factor, what
		}
	}
	g := c.g
	cut(c.points < 3, 0.5, "trace with an interval, so that the course is known")
	cut(c.points >= 3 && c.points < 8, 0.85, "trace longer")
	cut(c.duration < 10*time.Second, 0.7, "trace longer than 10s")
	cut(c.s.LossStated, 0.75, "see the losses")
	cut(c.sd > 0 && 3*c.sd > float64(g.InUseObjects()), 0.6, "use a smaller --sample-bytes")
	if class == Leaking || class == Growing {
		cut(c.floor[len(c.floor)-1] < 20, 0.75, "trace longer: few blocks so far")
		cut(g.Ages == nil, 0.9, "")
		cut(c.replacesOlder(), 0.55, "as many blocks from before the trace were freed: trace longer than the cache needs to turn over")
	}
	if class == Growing {
		cut(true, 0.85, "trace longer to see whether it levels off")
	}
	if class == SteadyCache {
		cut(c.wentIdle(), 0.6, "the path was idle at the end: trace under load")
	}
	return sure, advice
}

// wentIdle is true for a path that allocated before and not at all in the last quarter.
func (c *course) wentIdle() bool {
	h := c.g.History
	if len(h) < 4 || c.g.FreeObjects > 0 {
		return false
	}
	for _, p := range h {
		if p.At >= c.duration/2 {
			return p.AllocObjects < c.g.AllocObjects
		}
	}
	return false
}

func (c *course) evidence(class Class) string {
	g := c.g
	words := []string{blocks(g.InUseObjects()), c.freedWords()}
	if class == Churn {
		words = []string{signedBytes(g.AllocBytes) + " allocated", c.freedWords()}
	}
	if a := g.Ages; a != nil && g.InUseObjects() > 0 && class != Churn {
		words = append(words, c.ageWords(a))
	}
	switch {
	case class == SteadyCache && c.points >= 3:
		if since, ok := c.levelSince(); ok {
			words = append(words, "no growth since "+formatSpan(since))
		}
	case class == Growing && c.points >= 3 && c.blocksGrow():
		words = append(words, "blocks that are made larger")
	case class == Growing && c.points >= 3 && c.slowsDown():
		words = append(words, "slowing down")
	case class == Growing && !c.oldSurvive():
		words = append(words, "its blocks are replaced by more new ones")
	}
	return strings.Join(words, ", ")
}

func (c *course) freedWords() string {
	g := c.g
	switch {
	case g.FreeObjects == 0:
		return "none freed in " + formatSpan(c.duration)
	case g.InUseObjects() == 0:
		return "all freed"
	}
	return percent(g.FreeObjects, g.AllocObjects) + " freed"
}

func (c *course) ageWords(a *Ages) string {
	if a.Old > 0 {
		return fmt.Sprintf("%s of them older than %s", count(a.Old), formatSpan(c.duration/2))
	}
	return "the oldest " + formatSpan(a.Max)
}

// levelSince finds when 95 % of the level was reached.
func (c *course) levelSince() (time.Duration, bool) {
	level := c.floor[len(c.floor)-1]
	for i, v := range c.floor {
		if v >= 0.95*level {
			return c.at[i], c.at[i] < c.duration
		}
	}
	return 0, false
}

// ConfidenceWord is the figure in words.
func (v *Verdict) ConfidenceWord() string {
	switch {
	case v.Confidence >= 0.8:
		return "high"
	case v.Confidence >= 0.5:
		return "medium"
	}
	return "low"
}

// The summary shows so many verdicts of a class; churn is told in one line.
const verdictsShown = 8

func (p *printer) verdicts(s *Snapshot, verdicts []Verdict) {
	partly := s.PartlyFollowed()
	if len(verdicts) == 0 && !partly {
		return
	}
	p.blank()
	p.line(text(bold, "Verdict"))
	if partly {
		p.line(text(plain, "  none on allocator calls, which were followed for a part of the time only: see what is unfollowed"))
	}
	if len(verdicts) == 0 {
		return
	}
	byClass := map[Class][]Verdict{}
	for _, v := range verdicts {
		byClass[v.Class] = append(byClass[v.Class], v)
	}
	if len(byClass[Leaking])+len(byClass[Growing]) == 0 {
		p.line(text(green, "  no leak"), text(plain, ": nothing grew until the end"))
	}
	for _, class := range classOrder[:3] {
		list := byClass[class]
		most := verdictsShown
		if class == SteadyCache {
			most = 3
		}
		for _, v := range list[:min(most, len(list))] {
			p.verdict(v)
		}
		if rest := list[min(most, len(list)):]; len(rest) > 0 {
			p.line(text(dim, "  %-12s  %d smaller ones", class, len(rest)))
		}
	}
	if churn := byClass[Churn]; len(churn) > 0 {
		p.line(text(dim, "  %-12s  %s", Churn, plural(len(churn), "function that frees what it allocates", "functions that free what they allocate")))
	}
}

var classStyle = map[Class]style{Leaking: red, Growing: yellow, SteadyCache: plain, Churn: dim}

func (p *printer) verdict(v Verdict) {
	name := Sanitize(v.Owner.String())
	figure := signedBytes(v.InUseBytes)
	if v.Class == Leaking || v.Class == Growing {
		figure = FormatByteChange(int64(v.BytesPerMinute)) + "/min, " + figure
	}
	what := fmt.Sprintf(" %s in %s", figure, v.Evidence)
	if v.Kind != KindMalloc {
		what += ", " + Sanitize(string(v.Kind)) + prefixed(" ", Sanitize(v.Label))
	}
	if len(v.Stacks) > 1 {
		what += fmt.Sprintf(", %d call stacks", len(v.Stacks))
	}
	sure := " (confidence " + v.ConfidenceWord() + prefixed("; ", v.Advice) + ")"
	if v.Class == SteadyCache {
		sure = prefixed(" (", v.Advice) + map[bool]string{true: ")"}[v.Advice != ""]
	}
	p.wrap(16, text(classStyle[v.Class], "  %-12s  ", strings.ReplaceAll(string(v.Class), " ", nbsp)), text(bold, "%s:", name), text(plain, "%s", what), text(dim, "%s", sure))
}
