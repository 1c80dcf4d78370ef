package main

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// inspectPrinter writes what inspect found for a person. Every line is cut to the width.
type inspectPrinter struct {
	out   io.Writer
	b     strings.Builder
	width int
	f     *inspectFlags
}

const plainWidth = 100

func newInspectPrinter(out io.Writer, f *inspectFlags) *inspectPrinter {
	width, _ := terminal(out)
	if width < 40 {
		width = plainWidth
	}
	return &inspectPrinter{out: out, width: width, f: f}
}

func (p *inspectPrinter) line(format string, args ...any) {
	text := strings.TrimRight(fmt.Sprintf(format, args...), " ")
	if utf8.RuneCountInString(text) > p.width {
		runes := []rune(text)
		text = string(runes[:p.width-3]) + "..."
	}
	p.b.WriteString(text + "\n")
}

func (p *inspectPrinter) flush() error {
	_, err := io.WriteString(p.out, p.b.String())
	return err
}

func (p *inspectPrinter) report(r *heap.Report, old *heap.Report, trace *profile.Snapshot) {
	p.title(r)
	if r.Heap == nil {
		p.line("no allocator that is known (glibc and jemalloc 5.3 are): showing pages instead of blocks")
	} else {
		p.account(r)
		p.exactness(r)
	}
	if old != nil {
		p.difference(r, old)
		return
	}
	if r.Leaks != nil {
		p.leaks(r.Leaks)
		return
	}
	if trace != nil {
		p.joined(r, trace)
		return
	}
	p.groups("blocks in use, by shape", "blocks", r.Groups)
	if r.Unreadable.Blocks > 0 {
		p.line("%s blocks (%s) could not be read", thousands(r.Unreadable.Blocks), profile.FormatBytes(r.Unreadable.Bytes))
	}
	title := "anonymous memory outside of the heap, by page of 4 KiB"
	if r.OutsideSample > 1 {
		title += fmt.Sprintf(" (one in %d looked at)", r.OutsideSample)
	}
	p.groups(title, "pages", r.Outside)
}

func (p *inspectPrinter) title(r *heap.Report) {
	name := profile.Sanitize(r.Comm)
	if r.PID != 0 {
		name += fmt.Sprintf(" (pid %d)", r.PID)
	}
	if r.Heap != nil {
		name += fmt.Sprintf(", %s, %s", r.Heap.Allocator, plural(len(r.Heap.Arenas), "arena"))
	}
	if r.Live {
		p.line("%s, running: read in %s without a stop", name, seconds(r.Seconds))
	} else {
		p.line("%s, as of %s", name, r.Taken.Format(time.RFC3339))
	}
	if r.Partial != "" {
		p.line("the dump is not complete: %s", profile.Sanitize(r.Partial))
	}
}

func seconds(s float64) time.Duration {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond)
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return thousands(uint64(n)) + " " + what + "s"
}

// account shows where the heap's memory is, and says in a sentence whether the program holds it.
func (p *inspectPrinter) account(r *heap.Report) {
	t := r.Total
	used := heap.Count{Blocks: t.InUse.Blocks + r.Heap.Mmapped.Blocks, Bytes: t.InUse.Bytes + r.Heap.Mmapped.Bytes}
	cached := heap.Count{Blocks: t.Tcache.Blocks + t.Fast.Blocks, Bytes: t.Tcache.Bytes + t.Fast.Bytes}
	p.line("")
	p.line("%14s %12s", "blocks", "bytes")
	row := func(c heap.Count, text string) {
		p.line("%14s %12s  %s", thousands(c.Blocks), profile.FormatBytes(c.Bytes), text)
	}
	names := accountNames(r.Heap)
	row(used, names[0])
	if r.Heap.Mmapped.Blocks > 0 {
		row(r.Heap.Mmapped, "of these with a mapping of their own")
	}
	row(cached, names[1])
	row(t.Free, names[2])
	row(t.Top, names[3])
	if t.Lost > 0 {
		row(heap.Count{Bytes: t.Lost}, "not understood, see below")
	}
	all := t.System + r.Heap.Mmapped.Bytes
	if all == 0 {
		return
	}
	share := float64(used.Bytes) / float64(all)
	verdict := "the program holds its heap: look for who allocates, not for fragmentation"
	switch {
	case share < 0.5:
		verdict = "most of the heap is free memory that the allocator keeps: not a leak now"
	case share < 0.8:
		verdict = "a good part of the heap is free memory that the allocator keeps"
	}
	p.line("%.0f %% of %s in use: %s", share*100, profile.FormatBytes(all), verdict)
}

// accountNames says what the rows mean for an allocator: in use, cached, free, and at the end.
func accountNames(h *heap.Heap) [4]string {
	if strings.HasPrefix(h.Allocator, "jemalloc") {
		return [4]string{"in use by the program", "freed, kept in threads' caches", "freed, between blocks of the same size",
			"freed, whole pages not yet given back"}
	}
	return [4]string{"in use by the program (with 8 bytes of header a block)", "freed, kept in caches (threads' caches, fastbins)",
		"freed, between blocks in use", "not used yet, at the end of arenas"}
}

const problemsShown = 5

func (p *inspectPrinter) exactness(r *heap.Report) {
	h := r.Heap
	if r.Exact {
		p.line("walk: exact: all bytes of all arenas are accounted for")
		if h.MmappedSaid == nil && strings.HasPrefix(h.Allocator, "glibc") {
			p.line("  blocks with a mapping of their own were found by their shape; glibc's count of them was not")
		}
		return
	}
	p.line("walk: not exact, %s%s", plural(len(h.Problems)+int(h.Hidden), "problem"), map[bool]string{
		true: " (blocks may have moved while the process ran)"}[r.Live])
	for i, problem := range h.Problems {
		if i == problemsShown {
			p.line("  ... all in --json")
			break
		}
		p.line("  %#x: %s", problem.Addr, problem.Text)
	}
}

// groups prints a table of groups, with samples below each.
func (p *inspectPrinter) groups(title, unit string, groups []content.Group) {
	if len(groups) == 0 {
		return
	}
	p.line("")
	p.line("%s:", title)
	p.line("%14s %12s  %-15s shape", unit, "bytes", "size")
	var rest content.Group
	for i, g := range groups {
		if i >= p.f.top {
			rest.Count += g.Count
			rest.Bytes += g.Bytes
			continue
		}
		p.group(&g)
	}
	if rest.Count > 0 {
		p.line("%14s %12s  %-15s %s", thousands(rest.Count), profile.FormatBytes(rest.Bytes), "",
			plural(len(groups)-p.f.top, "more group")+" (--top)")
	}
}

func (p *inspectPrinter) group(g *content.Group) {
	p.line("%14s %12s  %-15s %s", thousands(g.Count), profile.FormatBytes(g.Bytes), sizes(g), profile.Sanitize(g.String()))
	for _, s := range g.Samples {
		p.line("%8s| %s", "", s)
	}
	if len(g.Strings) == 0 {
		return
	}
	var often []string
	for _, s := range g.Strings {
		often = append(often, fmt.Sprintf("%q %s times", s.Text, thousands(s.Count)))
	}
	where := ""
	if g.Looked < g.Count {
		where = fmt.Sprintf(" (in %s of them)", thousands(g.Looked))
	}
	p.line("%8soften%s: %s", "", where, strings.Join(often, ", "))
}

func sizes(g *content.Group) string {
	if g.MinSize == g.MaxSize {
		return profile.FormatBytes(g.MinSize)
	}
	low, high := profile.FormatBytes(g.MinSize), profile.FormatBytes(g.MaxSize)
	lowNumber, lowUnit, _ := strings.Cut(low, " ")
	_, highUnit, _ := strings.Cut(high, " ")
	if lowUnit == highUnit {
		return lowNumber + "-" + high
	}
	return strings.ReplaceAll(low, " ", "") + "-" + strings.ReplaceAll(high, " ", "")
}

// thousands prints 41210 as 41,210.
func thousands(n uint64) string {
	s := strconv.FormatUint(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

func (p *inspectPrinter) leaks(l *heap.Leaks) {
	p.line("")
	if l.Unreachable.Blocks == 0 {
		p.line("every block in use is reachable from a variable, a stack or another block")
	} else {
		p.line("%s in use (%s) that no variable, stack or reachable block points to,",
			plural(int(l.Unreachable.Blocks), "block"), profile.FormatBytes(l.Unreachable.Bytes))
		p.line("%s of them (%s) that no other one of them points to either", thousands(l.Direct.Blocks),
			profile.FormatBytes(l.Direct.Bytes))
	}
	for _, note := range l.Notes {
		p.line("note: %s", note)
	}
	p.groups("unreachable blocks, by shape", "blocks", l.Groups)
	if len(l.Blocks) == 0 {
		return
	}
	p.line("")
	p.line("the largest (see --hex ADDR):")
	for i, b := range l.Blocks {
		if i == p.f.top {
			break
		}
		p.line("%#18x %12s  %s", b.Addr, profile.FormatBytes(b.Size), profile.Sanitize(b.Shape))
	}
}

// change is how a group grew between two reports.
type change struct {
	group         content.Group
	blocks, bytes int64
}

func changes(now, before []content.Group) (list []change) {
	old := map[string]*content.Group{}
	for i := range before {
		old[before[i].ID] = &before[i]
	}
	for _, g := range now {
		c := change{g, int64(g.Count), int64(g.Bytes)}
		if o := old[g.ID]; o != nil {
			c.blocks -= int64(o.Count)
			c.bytes -= int64(o.Bytes)
			delete(old, g.ID)
		}
		list = append(list, c)
	}
	for _, o := range old {
		list = append(list, change{*o, -int64(o.Count), -int64(o.Bytes)})
	}
	list = slices.DeleteFunc(list, func(c change) bool { return c.blocks == 0 && c.bytes == 0 })
	slices.SortFunc(list, func(a, b change) int {
		return cmp.Or(cmp.Compare(b.bytes, a.bytes), cmp.Compare(b.blocks, a.blocks), cmp.Compare(a.group.ID, b.group.ID))
	})
	return list
}

func (p *inspectPrinter) difference(r, old *heap.Report) {
	between := r.Taken.Sub(old.Taken).Round(time.Second)
	p.line("")
	p.line("since %s (%s before):", old.Taken.Format(time.RFC3339), between)
	p.changes("blocks", changes(r.Groups, old.Groups))
	if outside := changes(r.Outside, old.Outside); len(outside) > 0 && r.OutsideSample == old.OutsideSample {
		p.line("")
		p.line("outside of the heap:")
		p.changes("pages", outside)
	}
	if r.NewTotal == nil {
		return
	}
	p.line("")
	p.line("%s (%s) in use now that were not in use there; %s (%s) gone",
		plural(int(r.NewTotal.Blocks), "block"), profile.FormatBytes(r.NewTotal.Bytes),
		thousands(r.Gone.Blocks), profile.FormatBytes(r.Gone.Bytes))
	p.groups("new blocks, by shape", "blocks", r.New)
}

func (p *inspectPrinter) changes(unit string, list []change) {
	if len(list) == 0 {
		p.line("no group has changed")
		return
	}
	p.line("%14s %12s  %-15s shape", unit, "bytes", "size")
	for i, c := range list {
		if i == p.f.top {
			p.line("%14s %12s  %-15s %s", "", "", "", plural(len(list)-i, "more group")+" (--top)")
			break
		}
		sign := "+"
		if c.blocks < 0 {
			sign = "-"
		}
		p.line("%14s %12s  %-15s %s", sign+thousands(uint64(max(c.blocks, -c.blocks))), profile.FormatByteChange(c.bytes),
			sizes(&c.group), profile.Sanitize(c.group.String()))
		if c.bytes > 0 && len(c.group.Samples) > 0 {
			p.line("%8s| %s", "", c.group.Samples[0])
		}
	}
}

func (p *inspectPrinter) matches(matches []grepMatch, total, inBlocks int) {
	noun := "matches"
	if total == 1 {
		noun = "match"
	}
	p.line("%s %s, %s in blocks in use", thousands(uint64(total)), noun, thousands(uint64(inBlocks)))
	for _, m := range matches {
		where := profile.Sanitize(m.Range) + ", in no block in use"
		if m.Block != 0 {
			where = fmt.Sprintf("block %#x of %s", m.Block, profile.FormatBytes(m.BlockSize))
		}
		p.line("%#x  %s", m.Address, where)
		p.line("%8s| %s", "", m.Text)
	}
	if total > len(matches) {
		p.line("... %s more (--top)", thousands(uint64(total-len(matches))))
	}
}

// showText makes bytes printable on one line.
func showText(b []byte, noRedact bool) string {
	if !noRedact {
		return content.Redact(b)
	}
	out := make([]byte, len(b))
	for i, c := range b {
		out[i] = printable(c)
	}
	return string(out)
}

func printable(c byte) byte {
	if c < ' ' || c > '~' {
		return '.'
	}
	return c
}

// hexDump is the answer to --hex.
type hexDump struct {
	Range string    `json:"range"`
	Block uint64    `json:"block,omitempty"`
	Size  uint64    `json:"size,omitempty"`
	Shape string    `json:"shape,omitempty"`
	Lines []hexLine `json:"lines"`
}

type hexLine struct {
	Address uint64 `json:"address"`
	Hex     string `json:"hex"`
	Text    string `json:"text"`
}

func newHexDump(space *heap.Space, block heap.Block, inUse bool, r *memory.Range, start uint64, data []byte, noRedact bool) *hexDump {
	d := &hexDump{Range: rangeName(heap.Range{Path: r.Path, Kind: r.Kind})}
	pointers := space.NewPointers()
	if inUse {
		c := content.Classifier{Pointer: pointers.Is, Class: space.NewClasses().Name}
		d.Block, d.Size, d.Shape = block.Addr, block.Size, c.Classify(data).String()
	}
	for at := 0; at < len(data); at += 16 {
		line := data[at:min(at+16, len(data))]
		l := hexLine{Address: start + uint64(at), Text: showText(line, noRedact)}
		if !noRedact {
			l.Text = strings.Map(func(r rune) rune { return map[bool]rune{true: r, false: 'x'}[r < 0x80] }, l.Text)
		}
		for i := 0; i < len(line); i += 8 {
			word := line[i:min(i+8, len(line))]
			if i > 0 {
				l.Hex += " "
			}
			l.Hex += hexWord(word, pointers.Is, noRedact)
		}
		d.Lines = append(d.Lines, l)
	}
	return d
}

// hexWord shows eight bytes. Redacted, only what is no content is shown: pointers, zero and small numbers; of the rest just
// whether a byte is a letter (78), a digit (39) or anything else (..).
func hexWord(b []byte, isPointer func(uint64) bool, noRedact bool) string {
	if noRedact {
		return fmt.Sprintf("% x", b)
	}
	if len(b) == 8 {
		if v := binary.LittleEndian.Uint64(b); v < 1<<16 || isPointer(v) {
			return fmt.Sprintf("% x", b)
		}
	}
	parts := make([]string, len(b))
	for i, c := range b {
		switch {
		case c == 0:
			parts[i] = "00"
		case c >= '0' && c <= '9':
			parts[i] = "39"
		case c|0x20 >= 'a' && c|0x20 <= 'z':
			parts[i] = "78"
		case c >= ' ' && c <= '~':
			parts[i] = fmt.Sprintf("%02x", c)
		default:
			parts[i] = ".."
		}
	}
	return strings.Join(parts, " ")
}

func (p *inspectPrinter) hex(d *hexDump) {
	if d.Block != 0 {
		p.line("block %#x of %s in use: %s", d.Block, profile.FormatBytes(d.Size), profile.Sanitize(d.Shape))
	} else {
		p.line("in no block in use; %s", profile.Sanitize(d.Range))
	}
	for _, l := range d.Lines {
		p.line("%#x  %-48s %s", l.Address, l.Hex, l.Text)
	}
	if d.Size > maxHex {
		p.line("... %s more", profile.FormatBytes(d.Size-maxHex))
	}
}
