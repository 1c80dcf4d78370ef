// Package view shows a profile, or the comparison of two, as a web page: served on loopback beside pprof's own views, or as
// one file that stands alone.
//
// The trap: everything in a profile was written by the traced program (its paths, names and symbols). The page gets it as
// data and puts it into the document as text, never as markup.
package view

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Input is what is shown: one profile, or two as a comparison.
type Input struct {
	Name string
	New  *profile.Snapshot
	// OldName and Old are the other profile of a comparison; Old may be nil.
	OldName string
	Old     *profile.Snapshot
	Per     profile.Per
}

// Bounds of what a page carries: it has to open at once for 100,000 stacks.
const (
	maxRows      = 400      // verdicts, and call stacks in the table
	minNodeShare = 1. / 4e3 // a box of the flame graph narrower than this is not drawn at any zoom that matters
	maxNodes     = 60_000
	maxPoints    = 120
)

type page struct {
	Name       string          `json:"name"`
	OldName    string          `json:"oldName,omitempty"`
	Served     bool            `json:"served"` // pprof's views are beside the page
	Command    string          `json:"command"`
	Started    time.Time       `json:"started,omitzero"`
	Seconds    float64         `json:"seconds"`
	Sampled    uint64          `json:"sampled"`
	Scale      float64         `json:"scale"`
	Compared   int             `json:"compared"`
	Processes  []processRow    `json:"processes"`
	Totals     []totalRow      `json:"totals"`
	Quality    []string        `json:"quality"`
	Losses     []string        `json:"losses"`
	Verdicts   []verdictRow    `json:"verdicts"`
	Changes    []differenceRow `json:"differences"`
	Stacks     []stackRow      `json:"stacks"`
	StackCount int             `json:"stackCount"`
	Libraries  []libraryRow    `json:"libraries"`
	Frames     [][3]string     `json:"frames"` // function, library, source
	Tree       tree            `json:"tree"`
}

type processRow struct {
	PID  int    `json:"pid"`
	Comm string `json:"comm"`
	Exe  string `json:"exe"`
	Exit string `json:"exit,omitempty"`
}

type totalRow struct {
	Kind   string   `json:"kind"`
	Values [4]int64 `json:"values"`
	Error  uint64   `json:"error"`
}

type verdictRow struct {
	Class      string       `json:"class"`
	Kind       string       `json:"kind"`
	Function   string       `json:"function"`
	Library    string       `json:"library"`
	BuildID    string       `json:"build"`
	Growth     float64      `json:"growth"`
	InUse      int64        `json:"inuse"`
	Blocks     int64        `json:"blocks"`
	Evidence   string       `json:"evidence"`
	Advice     string       `json:"advice,omitempty"`
	Confidence float64      `json:"confidence"`
	Sure       string       `json:"sure"`
	Course     [][2]float64 `json:"course"` // seconds, bytes in use
	Frames     []int        `json:"frames"`
}

type differenceRow struct {
	Function   string  `json:"function"`
	Library    string  `json:"library"`
	Kind       string  `json:"kind"`
	Old        int64   `json:"old"`
	New        int64   `json:"new"`
	Difference float64 `json:"difference"`
	Noise      float64 `json:"noise"`
	Rebuilt    bool    `json:"rebuilt"`
	Frames     []int   `json:"frames"`
}

type stackRow struct {
	Kind   string       `json:"kind"`
	Values [4]int64     `json:"values"`
	Owner  string       `json:"owner"`
	Error  uint64       `json:"error"`
	Course [][2]float64 `json:"course"`
	Frames []int        `json:"frames"` // innermost first
}

type libraryRow struct {
	Name     string `json:"name"`
	File     string `json:"file"`
	BuildID  string `json:"build"`
	OldBuild string `json:"oldBuild,omitempty"`
	Version  string `json:"version,omitempty"`
	Changed  string `json:"changed,omitempty"`
	State    string `json:"state,omitempty"`
}

func newPage(in Input, served bool) *page {
	s := in.New
	groups := profile.GroupStacks(s.Stacks)
	judged := make(chan []profile.Verdict, 1)
	go func() { judged <- profile.JudgeGroups(s, groups) }()
	b := builder{frameIDs: map[frameKey]int{}, lines: map[*profile.Location][]int{}}
	p := &page{
		Name: in.Name, OldName: in.OldName, Served: served, Command: s.Command, Started: s.Started, Seconds: s.Duration().Seconds(),
		Sampled: s.SampleBytes, Scale: 1, StackCount: len(groups),
		Quality: quality(s), Losses: losses(s),
	}
	for _, m := range s.Processes {
		p.Processes = append(p.Processes, processRow{m.PID, m.Comm, m.Exe, m.Exit})
	}
	for _, t := range profile.Totals(s.Stacks) {
		p.Totals = append(p.Totals, totalRow{
			string(t.Kind), [4]int64{t.AllocObjects, t.AllocBytes, t.AllocObjects - t.FreeObjects, t.AllocBytes - t.FreeBytes},
			profile.ErrorBar(t.AllocBytes-t.FreeBytes, t.InUseBytesVar),
		})
	}
	for _, g := range groups[:min(len(groups), maxRows)] {
		p.Stacks = append(p.Stacks, stackRow{
			string(g.Kind), [4]int64{g.AllocObjects, g.AllocBytes, g.InUseObjects(), g.InUseBytes()}, g.Owner().String(),
			profile.ErrorBar(g.InUseBytes(), g.InUseBytesVar), course(g.History, s.Duration(), g.InUseBytes()), b.frames(g.Frames),
		})
	}
	var old []*profile.Group
	if in.Old != nil {
		d := profile.Compare(in.Old, s, in.Per)
		p.Scale, p.Compared = d.Scale, d.Compared
		p.Libraries = changedLibraries(s, d.Libraries)
		for _, r := range d.Rows {
			p.Changes = append(p.Changes, b.difference(r))
		}
		old = profile.GroupStacks(in.Old.Stacks)
	} else {
		p.Libraries = changedLibraries(s, nil)
	}
	p.Tree = b.tree(groups, old, p.Scale)
	verdicts := <-judged
	for _, v := range verdicts[:min(len(verdicts), maxRows)] {
		p.Verdicts = append(p.Verdicts, b.verdict(v, s.Duration()))
	}
	p.Frames = b.table
	return p
}

func quality(s *profile.Snapshot) []string {
	var out []string
	if share, ok := profile.CompleteShare(s.Unwind); ok {
		out = append(out, "stacks complete: "+profile.CompleteText(share))
	}
	if s.Overhead != nil {
		out = append(out, profile.OverheadText(s.Overhead, s.Duration()))
	}
	if r := profile.Reconcile(s); r != nil {
		out = append(out, r.String())
	}
	return out
}

func losses(s *profile.Snapshot) []string {
	var out []string
	for _, c := range s.Losses {
		if c.Count > 0 {
			out = append(out, c.String())
		}
	}
	return out
}

type frameKey struct{ function, library, source string }

type builder struct {
	frameIDs map[frameKey]int
	table    [][3]string
	lines    map[*profile.Location][]int
}

// frames are indices into the table, innermost function first.
func (b *builder) frames(frames []*profile.Location) []int {
	out := make([]int, 0, len(frames)+4)
	for _, l := range frames {
		out = append(out, b.location(l)...)
	}
	return out
}

func (b *builder) location(l *profile.Location) []int {
	if ids, ok := b.lines[l]; ok {
		return ids
	}
	var ids []int
	for _, f := range profile.FrameNames(l) {
		k := frameKey{profile.Sanitize(f.Function), profile.Sanitize(f.Library), profile.Sanitize(f.Source)}
		id, ok := b.frameIDs[k]
		if !ok {
			id = len(b.table)
			b.frameIDs[k] = id
			b.table = append(b.table, [3]string{k.function, k.library, k.source})
		}
		ids = append(ids, id)
	}
	b.lines[l] = ids
	return ids
}

func (b *builder) verdict(v profile.Verdict, d time.Duration) verdictRow {
	main := v.Stacks[0]
	return verdictRow{
		Class: string(v.Class), Kind: string(v.Kind) + prefixed(" ", v.Label), Function: profile.Sanitize(v.Owner.Function),
		Library: profile.Sanitize(v.Owner.Library()), BuildID: v.Owner.ShortBuildID(), Growth: v.BytesPerMinute,
		InUse: v.InUseBytes, Blocks: v.InUseObjects, Evidence: v.Evidence, Advice: v.Advice, Confidence: v.Confidence,
		Sure: v.ConfidenceWord(), Course: course(v.History, d, v.InUseBytes), Frames: b.frames(main.Frames),
	}
}

func (b *builder) difference(r profile.DiffRow) differenceRow {
	out := differenceRow{
		profile.Sanitize(r.Owner.Function), profile.Sanitize(r.Owner.Library()), string(r.Kind) + prefixed(" ", r.Label),
		r.Old, r.New, r.Difference, r.Noise, r.Rebuilt, []int{},
	}
	if r.Stack != nil {
		out.Frames = b.frames(r.Stack.Frames)
	}
	return out
}

func prefixed(prefix, text string) string {
	if text == "" {
		return ""
	}
	return prefix + text
}

// course thins a history out to what a chart can show.
func course(history []profile.Point, d time.Duration, now int64) [][2]float64 {
	out := [][2]float64{}
	if len(history) == 0 {
		return out
	}
	step := max(1, len(history)/maxPoints)
	for i := 0; i < len(history); i += step {
		h := history[i]
		out = append(out, [2]float64{h.At.Seconds(), float64(h.AllocBytes - h.FreeBytes)})
	}
	return append(out, [2]float64{d.Seconds(), float64(now)})
}

func changedLibraries(s *profile.Snapshot, changes []profile.LibraryChange) []libraryRow {
	byNew := map[[2]string]profile.LibraryChange{}
	rows := []libraryRow{}
	for _, c := range changes {
		if c.New != nil {
			byNew[[2]string{c.New.File, c.New.BuildID}] = c
		} else {
			rows = append(rows, libraryRowOf(*c.Old, "only in OLD", ""))
		}
	}
	for _, l := range profile.Libraries(s) {
		state, oldBuild := "", ""
		if c, ok := byNew[[2]string{l.File, l.BuildID}]; ok {
			state = "only in NEW"
			if c.Old != nil {
				state, oldBuild = "another build", c.Old.BuildID
			}
		}
		rows = append(rows, libraryRowOf(l, state, oldBuild))
	}
	slices.SortStableFunc(rows, func(a, b libraryRow) int { return cmp.Compare(rank(a.State), rank(b.State)) })
	return rows
}

func rank(state string) int {
	return slices.Index([]string{"another build", "only in OLD", "only in NEW", "replaced on disk", ""}, state)
}

func libraryRowOf(l profile.Library, state, oldBuild string) libraryRow {
	row := libraryRow{
		Name: profile.Sanitize(l.Name), File: profile.Sanitize(l.File), BuildID: profile.Sanitize(l.BuildID), OldBuild: profile.Sanitize(oldBuild),
		Version: profile.Sanitize(l.Version), State: state,
	}
	if !l.ModTime.IsZero() {
		row.Changed = l.ModTime.UTC().Format("2006-01-02 15:04")
	}
	if state == "" && l.Replaced {
		row.State = "replaced on disk"
	}
	return row
}

// Folded writes the lines that other flame graph tools read: "outer;inner 4096", bytes in use by default.
func Folded(s *profile.Snapshot, value func(*profile.Group) int64) []string {
	sums := map[string]int64{}
	var order []string
	for _, g := range profile.GroupStacks(s.Stacks) {
		v := value(g)
		if v <= 0 {
			continue
		}
		var names []string
		for _, l := range g.Frames {
			for _, f := range profile.FrameNames(l) {
				names = append(names, strings.ReplaceAll(profile.Sanitize(f.Function), ";", ":"))
			}
		}
		names = append(names, string(g.Kind)) // kinds are never added up: each is a root of its own
		slices.Reverse(names)
		key := strings.Join(names, ";")
		if _, ok := sums[key]; !ok {
			order = append(order, key)
		}
		sums[key] += v
	}
	lines := make([]string, 0, len(order))
	for _, key := range order {
		lines = append(lines, key+" "+itoa(sums[key]))
	}
	return lines
}
