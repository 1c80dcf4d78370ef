package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// takeProfile makes "--stack PROFILE" mean what "--stack=PROFILE" means: pflag leaves the former among the arguments. The
// profile is known by its content, so that the two may come in any order.
func (f *inspectFlags) takeProfile(args *[]string) error {
	if len(*args) != 2 {
		return nil
	}
	if f.stack != askRunning {
		return usageErrorf("inspect takes one PID or FILE, not 2 arguments")
	}
	i := slices.IndexFunc(*args, isProfile)
	if i < 0 {
		return usageErrorf("--stack: neither %.60q nor %.60q is a profile of allocsnoop", (*args)[0], (*args)[1])
	}
	f.stack = (*args)[i]
	*args = slices.Delete(slices.Clone(*args), i, i+1)
	return nil
}

// isProfile says whether a file begins as a compressed profile does. Dumps and cores are never compressed.
func isProfile(name string) bool {
	file, err := os.Open(name)
	if err != nil {
		return false
	}
	defer file.Close()
	var magic [2]byte
	n, _ := file.Read(magic[:])
	return n == 2 && magic == [2]byte{0x1f, 0x8b}
}

// openTrace gets the stacks and blocks that --stack asks for; nil without it.
func (f *inspectFlags) openTrace(ctx context.Context, info *memory.Info, live bool) (*profile.Snapshot, error) {
	switch {
	case f.stack == "":
		return nil, nil
	case f.stack == askRunning && !live:
		return nil, usageErrorf("--stack of a dump needs a profile: --stack=PROFILE, written by allocsnoop --blocks")
	case f.stack == askRunning:
		s, err := askTraces(ctx, info.PID)
		if errors.Is(err, errNoTrace) {
			return nil, fmt.Errorf("no trace of process %d is running here: start \"allocsnoop --pid %d\" beside this one, or give "+
				"the profile of one that has ended, with --stack=PROFILE", info.PID, info.PID)
		}
		if err != nil {
			return nil, fmt.Errorf("ask the running trace of process %d: %w", info.PID, err)
		}
		return s, nil
	}
	s, err := readProfile(f.stack)
	if err != nil {
		return nil, err
	}
	if !s.HasBlocks {
		return nil, fmt.Errorf("%s has no blocks in it: trace with --blocks to ask later, or with --content to have the answer in "+
			"the profile; while a trace runs, --stack alone asks it", f.stack)
	}
	one := onlyProcess(s, info.PID)
	if len(one.Processes) == 0 {
		return nil, fmt.Errorf("%s is of %s, not of process %d", f.stack, processList(s), info.PID)
	}
	if live && info.Started.After(s.Taken.Add(time.Second)) {
		return nil, fmt.Errorf("%s ends at %s, but process %d began at %s: it is another one with the same number", f.stack,
			s.Taken.Local().Format(time.DateTime), info.PID, info.Started.Local().Format(time.DateTime))
	}
	return one, nil
}

func processList(s *profile.Snapshot) string {
	var pids []string
	for _, p := range s.Processes {
		if text := strconv.Itoa(p.PID); !slices.Contains(pids, text) {
			pids = append(pids, text)
		}
	}
	switch {
	case len(pids) == 0:
		return "no process"
	case len(pids) == 1:
		return "process " + pids[0]
	case len(pids) > 8:
		pids = append(pids[:8], "...")
	}
	return "processes " + strings.Join(pids, ", ")
}

// inspectProfile shows the content that a trace with --content has left in its profile.
func inspectProfile(out io.Writer, name string, f *inspectFlags) error {
	if f.stack != askRunning {
		return usageErrorf("--stack=%s: %s is a profile itself; name the process or the dump to look into", f.stack, name)
	}
	s, err := readProfile(name)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(s.Stacks, func(st *profile.Stack) bool { return len(st.Content) > 0 }) {
		hint := "trace with --content"
		if s.HasBlocks {
			hint = "it has blocks: allocsnoop inspect PID --stack=" + name + " looks into them"
		}
		return fmt.Errorf("%s says nothing about content: %s", name, hint)
	}
	if f.json {
		return writeJSON(out, inspectDocument{nil, stackDocuments(s)})
	}
	p := newInspectPrinter(out, f)
	p.line("%s of %s, as of %s", profile.Sanitize(name), processList(s), s.Taken.Format(time.RFC3339))
	p.stacks(s)
	return p.flush()
}

// inspectDocument is inspect --json with --stack: the report and what each stack's blocks hold.
type inspectDocument struct {
	*heap.Report
	Stacks []json.RawMessage `json:"stacks,omitempty"`
}

func stackDocuments(s *profile.Snapshot) []json.RawMessage {
	if s == nil {
		return nil
	}
	var list []json.RawMessage
	for _, g := range profile.GroupStacks(s.Stacks) {
		if text, err := profile.GroupJSON(g); err == nil {
			list = append(list, text)
		}
	}
	return list
}

// joined says how the trace's blocks relate to the heap, and then what they hold, stack by stack.
func (p *inspectPrinter) joined(r *heap.Report, s *profile.Snapshot) {
	j := r.Trace
	followed := heap.Count{
		Blocks: j.Held.Blocks + j.Unchecked.Blocks + j.Gone.Blocks, Bytes: j.Held.Bytes + j.Unchecked.Bytes + j.Gone.Bytes,
	}
	p.line("")
	mode := s.Mode
	if s.SampleBytes > 0 {
		mode += fmt.Sprintf(", a block per %s: figures of stacks are estimates", profile.FormatBytes(s.SampleBytes))
	}
	p.line("trace of %v until %s (%s): %s, %s", s.Duration().Round(100*time.Millisecond), s.Taken.Local().Format(time.TimeOnly), mode,
		plural(int(followed.Blocks), "block"), profile.FormatBytes(followed.Bytes))
	row := func(c heap.Count, text string) {
		if c.Blocks > 0 {
			p.line("%14s %12s  %s", thousands(c.Blocks), profile.FormatBytes(c.Bytes), text)
		}
	}
	row(j.Held, "still in use")
	row(j.Unchecked, "read, in no heap that is known: they may have been freed since")
	row(j.Gone, "freed since")
	if j.Untraced != nil {
		row(*j.Untraced, "in use, not made in the trace: older, or by functions without a probe")
	}
	p.stacks(s)
	p.groups("blocks in use that were not made in the trace, by shape", "blocks", j.UntracedGroups)
}

// stacks lists call stacks by the bytes that were found in their blocks.
func (p *inspectPrinter) stacks(s *profile.Snapshot) {
	groups := slices.DeleteFunc(profile.GroupStacks(s.Stacks), func(g *profile.Group) bool { return len(g.Content) == 0 })
	if len(groups) == 0 {
		p.line("no stack has blocks in use")
		return
	}
	p.line("")
	p.line("what the blocks hold, by call stack:")
	kinds := len(profile.Totals(s.Stacks)) > 1
	for i, g := range groups {
		if i == p.f.top {
			p.line("     and %s (--top)", plural(len(groups)-i, "more stack"))
			break
		}
		p.stack(i+1, g, kinds)
	}
}

const (
	shapesShown = 4
	callersLeft = 6
)

// stack prints "1. session_new in libenc.so: 41,210 blocks, 28 MiB, JSON {uid, token, payload}".
func (p *inspectPrinter) stack(rank int, g *profile.Group, kinds bool) {
	owner := g.Owner()
	name := profile.Sanitize(owner.Function)
	if library := profile.Sanitize(owner.Library()); library != "" && !strings.HasPrefix(name, library) {
		name += " in " + library
	}
	var blocks, bytes int64
	for _, c := range g.Content {
		blocks, bytes = blocks+c.Blocks, bytes+c.Bytes
	}
	what := "block"
	if kinds {
		what = profile.Sanitize(string(g.Kind)) + " block"
	}
	text := fmt.Sprintf("%3d. %s: %s, %s", rank, name, plural(int(blocks), what), profile.FormatBytes(uint64(bytes)))
	if len(g.Content) == 1 {
		text += ", " + profile.Sanitize(g.Content[0].Shape)
	}
	p.line("%s", text)
	if callers := callersOf(g.Frames, owner.Function); callers != "" {
		p.line("     called by %s", callers)
	}
	for i, c := range g.Content {
		if i == shapesShown {
			p.line("%14s %12s  %s", "", "", plural(len(g.Content)-i, "more shape"))
			break
		}
		if len(g.Content) > 1 {
			p.line("%14s %12s  %s", thousands(uint64(c.Blocks)), profile.FormatBytes(uint64(c.Bytes)), profile.Sanitize(c.Shape))
		}
		for _, sample := range c.Samples[:min(len(c.Samples), 2)] {
			p.line("%8s| %s", "", profile.Sanitize(sample))
		}
	}
}

// callersOf names the functions that lead to a stack's owner, the nearest first.
func callersOf(frames []*profile.Location, owner string) string {
	var names []string
	found := false
	for _, l := range frames {
		for _, f := range profile.FrameNames(l) {
			if found {
				names = append(names, profile.Sanitize(f.Function))
			}
			found = found || f.Function == owner
		}
	}
	if len(names) > callersLeft {
		names = append(names[:callersLeft], "...")
	}
	return strings.Join(names, " < ")
}
