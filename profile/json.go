package profile

import (
	"encoding/json"
	"fmt"
	"io"
)

// WriteJSON writes the summary as one JSON document. docs/json.md describes its fields; it holds all stacks, not only the
// top ones. file is the profile that was written, or empty.
func WriteJSON(w io.Writer, s *Snapshot, file string) error {
	doc := documentJSON{
		Schema:       "allocsnoop/summary/1",
		Profile:      file,
		documentHead: headOf(s),
		Totals:       convert(Totals(s.Stacks), totalToJSON),
		Stacks:       []stackJSON{},
	}
	if share, ok := CompleteShare(s.Unwind); ok {
		doc.StacksComplete = &share
	}
	if r := Reconcile(s); r != nil {
		doc.Reconciliation = reconciliationToJSON(r)
	}
	groups := GroupStacks(s.Stacks)
	doc.Verdicts = convert(JudgeGroups(s, groups), verdictToJSON)
	for _, g := range groups {
		doc.Stacks = append(doc.Stacks, groupToJSON(g))
	}
	return writeJSON(w, &doc)
}

type documentJSON struct {
	Schema  string `json:"schema"`
	Profile string `json:"profile,omitempty"`
	documentHead
	StacksComplete *float64            `json:"stacks_complete,omitempty"`
	Totals         []totalJSON         `json:"totals"`
	Reconciliation *reconciliationJSON `json:"reconciliation,omitempty"`
	Verdicts       []verdictJSON       `json:"verdicts"`
	Stacks         []stackJSON         `json:"stacks"`
}

// figuresJSON are the book of a stack or a kind. The errors are half the width of the 95 % interval, 0 when exact.
type figuresJSON struct {
	InUseBytes        int64  `json:"inuse_bytes"`
	InUseObjects      int64  `json:"inuse_objects"`
	AllocBytes        int64  `json:"alloc_bytes"`
	AllocObjects      int64  `json:"alloc_objects"`
	FreeBytes         int64  `json:"free_bytes"`
	FreeObjects       int64  `json:"free_objects"`
	InUseBytesError   uint64 `json:"inuse_bytes_error"`
	InUseObjectsError uint64 `json:"inuse_objects_error"`
}

type totalJSON struct {
	Kind Kind `json:"kind"`
	figuresJSON
}

type stackJSON struct {
	Kind     Kind        `json:"kind"`
	Label    string      `json:"label,omitempty"`
	PIDs     []int       `json:"pids"`
	Complete bool        `json:"complete"`
	Owner    ownerJSON   `json:"owner"`
	Frames   []frameJSON `json:"frames"`
	figuresJSON
	Ages    *agesJSON   `json:"ages,omitempty"`
	History []pointJSON `json:"history"`
	Content []Content   `json:"content,omitempty"`
}

type verdictJSON struct {
	Class          Class     `json:"class"`
	Kind           Kind      `json:"kind"`
	Label          string    `json:"label,omitempty"`
	Owner          ownerJSON `json:"owner"`
	BytesPerMinute float64   `json:"growth_bytes_per_minute"`
	InUseBytes     int64     `json:"inuse_bytes"`
	InUseObjects   int64     `json:"inuse_objects"`
	AllocBytes     int64     `json:"alloc_bytes"`
	AllocObjects   int64     `json:"alloc_objects"`
	FreeObjects    int64     `json:"free_objects"`
	Confidence     float64   `json:"confidence"`
	Evidence       string    `json:"evidence"`
	Advice         string    `json:"advice,omitempty"`
	Stacks         int       `json:"call_stacks"`
}

func verdictToJSON(v Verdict) verdictJSON {
	return verdictJSON{
		v.Class, v.Kind, v.Label, ownerToJSON(v.Owner), finite(v.BytesPerMinute), v.InUseBytes, v.InUseObjects,
		v.AllocBytes, v.AllocObjects, v.FreeObjects, v.Confidence, v.Evidence, v.Advice, len(v.Stacks),
	}
}

type ownerJSON struct {
	Function string `json:"function"`
	Source   string `json:"source,omitempty"`
	File     string `json:"file,omitempty"`
	BuildID  string `json:"build_id,omitempty"`
}

// frameJSON is one function of a stack; those of one address follow each other, all but the last are inlined.
type frameJSON struct {
	Address    string `json:"address"`
	Function   string `json:"function,omitempty"`
	SystemName string `json:"system_name,omitempty"`
	Source     string `json:"source,omitempty"`
	Line       int    `json:"line,omitempty"`
	Inlined    bool   `json:"inlined,omitempty"`
	Mark       string `json:"mark,omitempty"`
	File       string `json:"file,omitempty"`
	BuildID    string `json:"build_id,omitempty"`
	FileOffset string `json:"file_offset,omitempty"`
}

type agesJSON struct {
	Min    seconds `json:"min_seconds"`
	Median seconds `json:"median_seconds"`
	Max    seconds `json:"max_seconds"`
	Old    int64   `json:"from_first_half"`
}

type pointJSON struct {
	At           seconds `json:"at_seconds"`
	AllocObjects int64   `json:"alloc_objects"`
	AllocBytes   int64   `json:"alloc_bytes"`
	FreeObjects  int64   `json:"free_objects"`
	FreeBytes    int64   `json:"free_bytes"`
}

type reconciliationJSON struct {
	Change      int64            `json:"rss_change_bytes"`
	Parts       map[string]int64 `json:"parts"`
	Unexplained int64            `json:"unexplained_bytes"`
	Ranges      map[string]int64 `json:"change_by_range"`
	Estimated   bool             `json:"allocator_slack_estimated"`
}

func figures(ao, ab, fo, fb int64, varObjects, varBytes float64) figuresJSON {
	return figuresJSON{ab - fb, ao - fo, ab, ao, fb, fo, ErrorBar(ab-fb, varBytes), ErrorBar(ao-fo, varObjects)}
}

func totalToJSON(t Total) totalJSON {
	return totalJSON{t.Kind, figures(t.AllocObjects, t.AllocBytes, t.FreeObjects, t.FreeBytes, t.InUseObjectsVar, t.InUseBytesVar)}
}

func reconciliationToJSON(r *Reconciliation) *reconciliationJSON {
	out := &reconciliationJSON{r.Change, map[string]int64{}, r.Unexplained, map[string]int64{}, r.Estimated}
	for _, p := range r.Parts {
		out.Parts[p.Name] = p.Bytes
	}
	for _, p := range r.Ranges {
		out.Ranges[p.Name] = p.Bytes
	}
	return out
}

// GroupJSON is a group as it stands among the stacks of WriteJSON's document.
func GroupJSON(g *Group) (json.RawMessage, error) { return json.Marshal(groupToJSON(g)) }

func groupToJSON(g *Group) stackJSON {
	out := stackJSON{
		Kind: g.Kind, Label: g.Label, PIDs: g.PIDs(), Complete: true,
		Owner: ownerToJSON(g.Owner()), Frames: framesToJSON(g.Frames),
		figuresJSON: figures(g.AllocObjects, g.AllocBytes, g.FreeObjects, g.FreeBytes, g.InUseObjectsVar, g.InUseBytesVar),
		History: convert(g.History, func(p Point) pointJSON {
			return pointJSON{seconds(p.At), p.AllocObjects, p.AllocBytes, p.FreeObjects, p.FreeBytes}
		}),
	}
	out.Content = g.Content
	for _, stack := range g.Stacks {
		out.Complete = out.Complete && stack.Complete
	}
	if a := g.Ages; a != nil {
		out.Ages = &agesJSON{seconds(a.Min), seconds(a.Median), seconds(a.Max), a.Old}
	}
	return out
}

func ownerToJSON(o Owner) ownerJSON {
	out := ownerJSON{Function: o.Function, Source: o.Source}
	if o.Mapping != nil {
		out.File, out.BuildID = o.Mapping.File, o.Mapping.BuildID
	}
	return out
}

func framesToJSON(frames []*Location) []frameJSON {
	out := []frameJSON{}
	for _, l := range frames {
		base := frameJSON{Address: fmt.Sprintf("%#x", l.Address)}
		if m := l.Mapping; m != nil {
			base.File, base.BuildID = m.File, m.BuildID
			base.FileOffset = fmt.Sprintf("%#x", l.Address-m.Start+m.Offset)
		}
		for i, line := range l.Lines {
			f := base
			f.Function, f.SystemName, f.Source, f.Line, f.Inlined = line.Function, line.SystemName, line.File, line.Line, i < len(l.Lines)-1
			out = append(out, f)
		}
		if l.Mark != "" || len(l.Lines) == 0 {
			base.Mark = l.Mark
			out = append(out, base)
		}
	}
	return out
}
