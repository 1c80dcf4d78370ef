package profile

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// SummaryOptions says how the text summary looks. The zero value is for a pipe: 100 columns, no colour, ten stacks.
type SummaryOptions struct {
	Width   int // columns; 0 is 100
	Color   bool
	Top     int      // stacks shown; 0 is 10
	Frames  int      // frames shown of each; 0 is 12
	Profile string   // the file that was written; empty when there is none
	Notes   []string // what the reader must know beforehand, each a sentence
}

// WriteSummary writes what a person wants to know at the end of a trace, on one or two screens.
func WriteSummary(w io.Writer, s *Snapshot, opt SummaryOptions) error {
	p := newPrinter(w, opt.Width, opt.Color)
	groups := GroupStacks(s.Stacks)
	p.header(s, opt)
	p.totals(s)
	p.verdicts(s, JudgeGroups(s, groups))
	p.stacks(s, groups, cmp.Or(opt.Top, 10), cmp.Or(opt.Frames, 12))
	p.quality(s)
	p.reconciliation(Reconcile(s))
	p.opening(opt.Profile)
	return p.err
}

func (p *printer) header(s *Snapshot, opt SummaryOptions) {
	counted := "every block counted"
	switch {
	case s.Mode == "growth":
		counted = "heap and mappings only: which call paths make the process grow, not who holds the blocks or frees them"
	case s.SampleBytes > 0:
		counted = "sampled, one block per " + FormatBytes(s.SampleBytes) + " on average"
	}
	p.wrap(0, text(bold, "%s", whoOf(s.Processes)), text(plain, " traced for %s, %s", formatSpan(s.Duration()), counted))
	p.ended(s.Processes)
	for _, note := range slices.Concat(s.Notes, opt.Notes) {
		p.wrap(2, text(yellow, "%s", note))
	}
}

// maxEnded is how many processes that ended are named one by one.
const maxEnded = 8

// ended says which processes came to an end, and how; of many, only those with an end of a rarer sort are named.
func (p *printer) ended(processes []*Process) {
	byEnd := map[string][]*Process{}
	var ends []string
	for _, m := range processes {
		if !m.Exited {
			continue
		}
		end := cmp.Or(Sanitize(m.Exit), "exit status unknown")
		if byEnd[end] == nil {
			ends = append(ends, end)
		}
		byEnd[end] = append(byEnd[end], m)
	}
	slices.SortStableFunc(ends, func(a, b string) int { return cmp.Compare(len(byEnd[a]), len(byEnd[b])) })
	shown := 0
	for _, end := range ends {
		list := byEnd[end]
		if shown += len(list); shown > maxEnded {
			p.wrap(2, text(yellow, "%s processes ended: %s", count(int64(len(list))), end))
			continue
		}
		for _, m := range list {
			p.wrap(2, text(yellow, "%s (pid %d) ended: %s", Sanitize(m.Comm), m.PID, end))
		}
	}
}

// whoOf names the traced processes: "nginx (pid 942)", "4 processes: nginx (942, 947, 951), php-fpm (1003)".
func whoOf(processes []*Process) string {
	switch len(processes) {
	case 0:
		return "No process"
	case 1:
		m := processes[0]
		return fmt.Sprintf("%s (pid %d)%s", Sanitize(m.Comm), m.PID, prefixed(" in container ", shortID(Sanitize(m.Container))))
	}
	var comms []string
	pids := map[string][]string{}
	for _, m := range processes {
		if pids[m.Comm] == nil {
			comms = append(comms, m.Comm)
		}
		pids[m.Comm] = append(pids[m.Comm], strconv.Itoa(m.PID))
	}
	for i, comm := range comms {
		list := pids[comm]
		if len(list) > 8 {
			list = append(list[:8:8], fmt.Sprintf("%d more", len(list)-8))
		}
		comms[i] = fmt.Sprintf("%s (%s)", Sanitize(comm), strings.Join(list, ", "))
	}
	return fmt.Sprintf("%d processes: %s", len(processes), strings.Join(comms, ", "))
}

// Total is the book of one kind.
type Total struct {
	Kind                           Kind
	AllocObjects, AllocBytes       int64
	FreeObjects, FreeBytes         int64
	InUseObjectsVar, InUseBytesVar float64
}

// Totals sums stacks by kind, malloc first. Sums over kinds mean nothing: they may be the same bytes.
func Totals(stacks []*Stack) []Total {
	byKind := map[Kind]*Total{}
	for _, s := range stacks {
		t := byKind[s.Kind]
		if t == nil {
			t = &Total{Kind: s.Kind}
			byKind[s.Kind] = t
		}
		t.AllocObjects += s.AllocObjects
		t.AllocBytes += s.AllocBytes
		t.FreeObjects += s.FreeObjects
		t.FreeBytes += s.FreeBytes
		t.InUseObjectsVar += s.InUseObjectsVar
		t.InUseBytesVar += s.InUseBytesVar
	}
	totals := make([]Total, 0, len(byKind))
	for _, t := range byKind {
		totals = append(totals, *t)
	}
	order := []Kind{KindMalloc, KindMmap, KindBrk}
	place := func(k Kind) int {
		if i := slices.Index(order, k); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortFunc(totals, func(a, b Total) int {
		return cmp.Or(cmp.Compare(place(a.Kind), place(b.Kind)), cmp.Compare(a.Kind, b.Kind))
	})
	return totals
}

func (p *printer) totals(s *Snapshot) {
	p.blank()
	totals := Totals(s.Stacks)
	if len(totals) == 0 {
		p.wrap(0, text(bold, "Nothing was allocated."))
		return
	}
	p.line(text(bold, "%-10s%14s%13s%15s%15s%14s%10s", "", "in use", "blocks", "allocated", "blocks", "rate", "freed"))
	for _, t := range totals {
		p.line(text(plain, "%-10s", Sanitize(string(t.Kind))),
			text(bold, "%14s", signedBytes(t.AllocBytes-t.FreeBytes)),
			text(plain, "%13s%15s%15s%14s%10s", count(t.AllocObjects-t.FreeObjects), signedBytes(t.AllocBytes), count(t.AllocObjects),
				perSecond(t.AllocBytes, s.Duration()), percent(t.FreeBytes, t.AllocBytes)))
		if t.InUseBytesVar > 0 {
			p.line(text(dim, "%-10s%14s%13s", "", "± "+FormatBytes(ErrorBar(t.AllocBytes-t.FreeBytes, t.InUseBytesVar)),
				"± "+count(int64(ErrorBar(t.AllocObjects-t.FreeObjects, t.InUseObjectsVar)))),
				text(dim, "   (95 of 100 times the truth is inside)"))
		}
	}
	if len(totals) > 1 {
		p.line(text(dim, "Kinds may be the same bytes seen twice; do not add them up."))
	}
}

// ErrorBar is half the width of the 95 % interval about an estimate, 0 when it is exact. Few samples make the estimate skew:
// it comes out low more easily than high, and is then sure of itself, as its variance is low too. Hence the interval is
// that of an estimate with one sampled block more, and wider by that block on either side: with 7 samples or with 1,000, the
// truth is within in 95.5 to 97.5 of 100 cases, where two standard errors alone hold it in 92 to 95.
func ErrorBar(estimate int64, variance float64) uint64 {
	if variance <= 0 || estimate <= 0 {
		return uint64(math.Round(2 * math.Sqrt(max(variance, 0))))
	}
	block := variance / float64(estimate)
	return uint64(math.Round(2*math.Sqrt(variance+block*block) + block))
}

func (p *printer) stacks(s *Snapshot, groups []*Group, top, frames int) {
	if len(groups) == 0 {
		return
	}
	shown := groups[:min(top, len(groups))]
	p.blank()
	p.line(text(bold, "Most bytes in use, by call stack"), text(dim, " (%d of %s)", len(shown), count(int64(len(groups)))))
	severalKinds, severalPIDs := len(Totals(s.Stacks)) > 1, len(s.Processes) > 1
	for i, g := range shown {
		p.stackHead(i+1, g, s, severalKinds, severalPIDs)
		p.stackFrames(g, frames)
		p.stackContent(g)
	}
}

func (p *printer) stackHead(rank int, g *Group, s *Snapshot, kinds, pids bool) {
	bar := ""
	if g.InUseBytesVar > 0 {
		bar = " ± " + FormatBytes(ErrorBar(g.InUseBytes(), g.InUseBytesVar))
	}
	owner := g.Owner()
	where := Sanitize(owner.Library())
	if id := owner.ShortBuildID(); id != "" {
		where += " (build " + Sanitize(id) + ")"
		where = strings.ReplaceAll(where, " ", nbsp)
	}
	rest := fmt.Sprintf(" in %s, %s allocated, %s freed", blocks(g.InUseObjects()), perSecond(g.AllocBytes, s.Duration()), percent(g.FreeBytes, g.AllocBytes))
	if kinds {
		rest += ", " + Sanitize(string(g.Kind)) + prefixed(" ", Sanitize(g.Label))
	}
	if pids {
		rest += ", " + pidList(g.PIDs())
	}
	p.wrap(5, text(bold, "%3d. %s%s", rank, signedBytes(g.InUseBytes()), bar), text(plain, "%s", rest), text(cyan, "   %s", where))
}

// maxContentShown bounds the shapes shown of one stack.
const maxContentShown = 4

func (p *printer) stackContent(g *Group) {
	for i, c := range g.Content {
		if i == maxContentShown {
			p.wrap(7, text(dim, "     and %d other shapes", len(g.Content)-i))
			return
		}
		p.wrap(7, text(plain, "     content: %s, %s, ", blocks(c.Blocks), FormatBytes(uint64(c.Bytes))), text(bold, "%s", Sanitize(c.Shape)))
		for _, sample := range c.Samples[:min(len(c.Samples), 1)] {
			line := []rune(Sanitize(sample))
			if room := max(p.width-12, 8); len(line) > room {
				line = append(line[:room-3], '.', '.', '.')
			}
			p.line(text(dim, "       e.g. %s", string(line)))
		}
	}
}

func pidList(pids []int) string {
	if len(pids) == 1 {
		return fmt.Sprintf("pid %d", pids[0])
	}
	return fmt.Sprintf("in %d processes", len(pids))
}

// Frame is one function of a stack, for display.
type Frame struct {
	Function string
	Library  string // file name
	Source   string // "session.c:42"
	Inlined  bool
}

// FrameNames are the functions of a location, innermost inlined one first; a mark or a place stands where none is known.
func FrameNames(l *Location) []Frame {
	library := baseName(l.Mapping)
	out := make([]Frame, 0, len(l.Lines)+1)
	for i, line := range l.Lines {
		out = append(out, Frame{line.Function, library, source(line), i < len(l.Lines)-1})
	}
	switch {
	case l.Mark != "":
		out = append(out, Frame{Function: l.Mark, Library: library})
	case len(l.Lines) == 0:
		out = append(out, Frame{Function: placeName(l), Library: library})
	}
	return out
}

type frameLine struct{ name, library, source, note string }

func (p *printer) stackFrames(g *Group, most int) {
	lines := frameLines(g.Frames)
	owner := g.Owner()
	skipped := 0
	if len(lines) > most {
		skipped = len(lines) - most
		lines = lines[:most]
	}
	nameWidth, libraryWidth := 12, 8
	for _, l := range lines {
		nameWidth = max(nameWidth, min(runes(l.name), p.width-46))
		libraryWidth = max(libraryWidth, min(runes(l.library), 24))
	}
	marked := false
	for _, l := range lines {
		marker, style := "  ", plain
		if !marked && l.name == Sanitize(owner.Function) {
			marker, style, marked = "> ", bold, true
		}
		p.line(text(plain, "     %s", marker), text(style, "%s", pad(l.name, nameWidth)),
			text(dim, "  %s  %s%s", pad(l.library, libraryWidth), l.source, l.note))
	}
	if skipped > 0 {
		p.line(text(dim, "       ... %d more frames", skipped))
	}
}

func frameLines(frames []*Location) []frameLine {
	var out []frameLine
	for _, l := range frames {
		for _, f := range FrameNames(l) {
			line := frameLine{Sanitize(f.Function), Sanitize(f.Library), Sanitize(f.Source), ""}
			if f.Inlined {
				line.note = " (inlined)"
			}
			out = append(out, line)
		}
	}
	return out
}

// quality says how far the figures can be trusted and what they cost.
func (p *printer) quality(s *Snapshot) {
	p.blank()
	if share, ok := CompleteShare(s.Unwind); ok {
		style := plain
		if share < 0.99 {
			style = yellow
		}
		p.line(text(style, "stacks complete: %s", CompleteText(share)))
		for _, c := range s.Unwind {
			if c.Name != "complete" {
				p.wrap(4, text(dim, "  %s ended: %s", count(int64(c.Count)), Sanitize(c.Name)))
			}
		}
	}
	p.probes(s.Probes)
	if f := s.PreAttach; f != (PreAttach{}) {
		p.wrap(2, text(plain, "blocks from before the trace: %s freed, %s reallocated (now %s); not in the figures",
			count(int64(f.Frees)), count(int64(f.Reallocs)), FormatBytes(f.ReallocBytes)))
	}
	p.events(s.Events)
	for _, c := range s.Losses {
		if c.Count > 0 {
			p.wrap(4, text(red, "lost: %s %s", count(int64(c.Count)), Sanitize(c.Name)), text(plain, "%s", prefixed(", ", Sanitize(c.Meaning))))
		}
	}
	if s.LossStated {
		p.wrap(2, text(red, "The losses exceed the stated limit: the figures are too low (exit code 3)."))
	}
	if o := s.Overhead; o != nil {
		p.wrap(4, text(plain, "%s", OverheadText(o, s.Duration())))
		p.wrap(4, text(dim, "allocsnoop itself: %s of CPU time, %s of memory, %s of kernel maps",
			formatSpan(o.TracerCPU), FormatBytes(o.TracerRSS), FormatBytes(o.MapBytes)))
	}
}

// maxEvents is how many events are shown: the first half of them and the last.
const maxEvents = 16

func (p *printer) events(events []Event) {
	for i, e := range events {
		if skipped := len(events) - maxEvents; skipped > 0 && i >= maxEvents/2 && i < maxEvents/2+skipped {
			if i == maxEvents/2 {
				p.wrap(4, text(dim, "... %d more, which the profile and --json name", skipped))
			}
			continue
		}
		p.wrap(4, text(plain, "at %s: %s", formatSpan(e.At), Sanitize(e.Text)))
	}
}

// CompleteShare is the part of the stacks that were unwound to their end; false when there were none.
func CompleteShare(unwind []Counter) (float64, bool) {
	var complete, all uint64
	for _, c := range unwind {
		all += c.Count
		if c.Name == "complete" {
			complete += c.Count
		}
	}
	if all == 0 {
		return 0, false
	}
	return float64(complete) / float64(all), true
}

// CompleteText is a share in percent that never rounds up to 100 %.
func CompleteText(share float64) string {
	if share == 1 {
		return "100 %"
	}
	return fmt.Sprintf("%.2f %%", math.Floor(share*1e4)/100)
}

// OverheadText is what the trace cost the target, in one line.
func OverheadText(o *Overhead, d time.Duration) string {
	rate := 0.0
	if d > 0 {
		rate = float64(o.Hits) / d.Seconds()
	}
	text := fmt.Sprintf("overhead: %s hits/s x %.2f us = %.1f %% of the target's CPU",
		metric(rate), float64(o.CostPerHit.Nanoseconds())/1000, 100*o.CPUFraction)
	if o.Budget > 0 {
		text += fmt.Sprintf(" (budget %s %%)", strconv.FormatFloat(100*o.Budget, 'f', -1, 64))
	}
	return text
}

func (p *printer) probes(probes []Probe) {
	type file struct{ name, build string }
	var files []file
	functions := map[file][]string{}
	var hits uint64
	for _, probe := range probes {
		f := file{probe.File[strings.LastIndexByte(probe.File, '/')+1:], shortID(probe.BuildID)}
		if functions[f] == nil {
			files = append(files, f)
		}
		functions[f] = append(functions[f], probe.Function)
		hits += probe.Hits
	}
	for _, f := range files {
		p.wrap(4, text(plain, "probed in %s%s: ", Sanitize(f.name), prefixed(" ", Sanitize(f.build))), text(dim, "%s", Sanitize(strings.Join(functions[f], ", "))))
	}
	if len(probes) > 0 && hits == 0 {
		p.wrap(2, text(red, "No probe was hit: the target called none of these functions, or its allocator is another one."))
	}
}

func (p *printer) reconciliation(r *Reconciliation) {
	if r == nil {
		return
	}
	p.wrap(4, text(plain, "%s", r.String()))
}

// String is the line "RSS (resident memory) +81.3 MiB = 64.0 in use by traced stacks + ... + 4.0 unexplained". All figures are
// in the unit of the largest, and rounded so that a reader who adds them up gets the sum.
func (r *Reconciliation) String() string {
	parts := append(slices.Clone(r.Parts), RSSPart{"unexplained", r.Unexplained})
	largest := magnitude(r.Change)
	for _, p := range parts {
		largest = max(largest, magnitude(p.Bytes))
	}
	unit, name := unitOf(largest)
	tenths := roundToSum(parts, r.Change, unit/10)
	text := func(t int64) string {
		if unit == 1 {
			return strconv.FormatInt(t/10, 10)
		}
		return fmt.Sprintf("%d.%d", t/10, t%10)
	}
	signs := map[bool]string{true: "-", false: "+"}
	var b strings.Builder
	whole := int64(0)
	for _, t := range tenths {
		whole += t
	}
	fmt.Fprintf(&b, "RSS (resident memory) %s%s %s =", signs[whole < 0], text(int64(magnitude(whole))), name)
	first := true
	for i, p := range parts {
		t := tenths[i]
		if t == 0 && p.Name != "unexplained" {
			continue
		}
		if !first || t < 0 {
			b.WriteString(" " + signs[t < 0])
		}
		fmt.Fprintf(&b, " %s %s", text(int64(magnitude(t))), p.Name)
		first = false
	}
	return b.String()
}

// roundToSum rounds parts to multiples of step so that they add up to the rounded sum: those nearest to a half give way.
func roundToSum(parts []RSSPart, sum int64, step float64) []int64 {
	out := make([]int64, len(parts))
	rest := int64(math.Round(float64(sum) / step))
	for i, p := range parts {
		out[i] = int64(math.Round(float64(p.Bytes) / step))
		rest -= out[i]
	}
	for range parts { // each is off by half a step at most
		one := int64(cmp.Compare(rest, 0))
		nearest, most := 0, math.Inf(-1)
		for i, p := range parts {
			if missed := (float64(p.Bytes)/step - float64(out[i])) * float64(one); missed > most {
				nearest, most = i, missed
			}
		}
		out[nearest] += one
		rest -= one
	}
	return out
}

func sortParts(parts []RSSPart) {
	slices.SortFunc(parts, func(a, b RSSPart) int {
		return cmp.Or(cmp.Compare(magnitude(b.Bytes), magnitude(a.Bytes)), cmp.Compare(a.Name, b.Name))
	})
}

func (p *printer) opening(file string) {
	if file == "" {
		return
	}
	p.blank()
	p.plainLine("open it: allocsnoop view " + shellQuote(file))
	p.plainLine("     or: go tool pprof -http=: " + shellQuote(file))
}

// shellQuote makes a word that can be pasted into a shell.
func shellQuote(word string) string {
	plainWord := word != "" && strings.IndexFunc(word, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-./:=+@%,", r))
	}) < 0
	if plainWord {
		return word
	}
	return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
}
