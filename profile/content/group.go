package content

import (
	"bytes"
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Options configure a Grouper. The zero value groups by shape with everything redacted.
type Options struct {
	NoRedact bool
	// Pointer and Class are the Classifier's.
	Pointer func(word uint64) bool
	Class   func(word uint64) string
	// MaxGroups bounds how many groups are told apart; 0 means 4096. Blocks beyond are counted in groups named "other".
	MaxGroups int
	// NoStrings leaves out the most frequent strings, which are most of a group's memory.
	NoStrings bool
}

const (
	defaultMaxGroups = 4096
	samplesKept      = 3
	stringsKept      = 48 // candidates; the most frequent few are shown
	stringsShown     = 5
	maxString        = 48
)

// Group is a set of blocks of the same key and shape.
type Group struct {
	Key uint64 `json:"key,omitempty"`
	Shape
	// ID is the same for the same shape in every run, so that two results can be compared.
	ID      string   `json:"id"`
	Count   uint64   `json:"blocks"`
	Bytes   uint64   `json:"bytes"`
	MinSize uint64   `json:"min_size"` // of a block
	MaxSize uint64   `json:"max_size"`
	Samples []string `json:"samples,omitempty"`
	// Strings are those that occur most in the Looked blocks that were searched for strings.
	Strings []StringCount `json:"strings,omitempty"`
	Looked  uint64        `json:"looked"`
}

// StringCount is a string and in how many places it was seen, at least.
type StringCount struct {
	Text  string `json:"text"`
	Count uint64 `json:"count"`
}

// Grouper sorts blocks into groups. Its memory is bounded by Options.MaxGroups, however many blocks it is given.
type Grouper struct {
	opt     Options
	c       Classifier
	max     int
	groups  map[groupKey]*group
	last    *group
	lastID  groupKey
	scratch []byte
}

type groupKey struct {
	key, identity, size uint64
	kind                Kind
}

// String is the shape's part of the key.
func (k groupKey) String() string { return fmt.Sprintf("%s-%x-%d", k.kind, k.identity, k.size) }

// group is what is kept of a Group while blocks come in.
type group struct {
	shape    Shape
	count    uint64
	bytes    uint64
	estimate [2]float64 // blocks and bytes that weighted blocks add to count and bytes
	min, max uint64
	looked   uint64
	samples  []rawSample
	strings  map[string]uint64
}

// rawSample is a block chosen as a sample: those with the smallest hashes of their addresses, so that the choice is spread
// over all blocks, and the same in every order and on every run.
type rawSample struct {
	rank uint64
	text string
}

// NewGrouper makes a Grouper.
func NewGrouper(opt Options) *Grouper {
	g := &Grouper{opt: opt, max: opt.MaxGroups, groups: map[groupKey]*group{}}
	g.c = Classifier{Pointer: opt.Pointer, Class: opt.Class}
	if g.max <= 0 {
		g.max = defaultMaxGroups
	}
	return g
}

// Add counts one block: its address, its size, and its bytes or the first of them. The bytes are not kept.
func (g *Grouper) Add(key, addr, size uint64, b []byte) { g.AddWeighted(key, addr, size, 1, b) }

// AddWeighted counts a block of a sample, which stands for weight blocks.
func (g *Grouper) AddWeighted(key, addr, size uint64, weight float64, b []byte) {
	f := g.c.find(b)
	gr := g.group(key, size, &f)
	gr.count++
	gr.bytes += size
	gr.min, gr.max = min(gr.min, size), max(gr.max, size)
	if weight != 1 {
		gr.estimate[0] += weight - 1
		gr.estimate[1] += (weight - 1) * float64(size)
	}
	g.addSample(gr, mix(addr), &f, b)
	if !g.opt.NoStrings && (gr.looked < 256 || gr.count%32 == 0) {
		gr.looked++
		g.addStrings(gr, &f, b)
	}
}

func (g *Grouper) group(key, size uint64, f *finding) *group {
	id := groupKey{key: key, kind: f.kind, identity: f.identity()}
	if f.kind.sizeTells() {
		id.size = sizeClass(size)
	}
	if g.last != nil && id == g.lastID { // neighbours are often alike
		return g.last
	}
	if gr, ok := g.groups[id]; ok {
		g.last, g.lastID = gr, id
		return gr
	}
	shape := Shape{Kind: f.kind, Detail: f.detail(), Header: f.header}
	if len(g.groups) >= g.max { // too many different ones: first give up detail, then everything
		id.identity, id.size, shape.Detail = 0, 0, "(other)"
		if len(g.groups) >= g.max*2 {
			id, shape = groupKey{kind: Other}, Shape{Kind: Other}
		}
		if gr, ok := g.groups[id]; ok {
			return gr
		}
	}
	gr := &group{shape: shape, min: ^uint64(0)}
	g.groups[id] = gr
	return gr
}

// sizeClass keeps sizes up to 1 KiB apart; above, where arrays grow, those within an eighth of a power of two are one.
func sizeClass(size uint64) uint64 {
	if size <= 1024 {
		return size
	}
	return size >> (bits.Len64(size) - 4) << (bits.Len64(size) - 4)
}

func (g *Grouper) addSample(gr *group, rank uint64, f *finding, b []byte) {
	if len(gr.samples) == samplesKept && rank >= gr.samples[samplesKept-1].rank {
		return
	}
	text := g.c.sample(f, b, g.opt.NoRedact)
	gr.insert(rawSample{rank, text})
}

// insert keeps the samples of the lowest ranks, and of equal texts one.
func (gr *group) insert(s rawSample) {
	at, _ := slices.BinarySearchFunc(gr.samples, s, func(a, b rawSample) int { return cmp.Compare(a.rank, b.rank) })
	if at < len(gr.samples) && gr.samples[at].rank == s.rank {
		return
	}
	gr.samples = slices.Insert(gr.samples, at, s)
	gr.samples = gr.samples[:min(len(gr.samples), samplesKept)]
}

// addStrings counts the strings of a block with the Misra-Gries sketch: what occurs in more than 1/stringsKept of all
// places is sure to stay, with a count that is too low rather than too high.
func (g *Grouper) addStrings(gr *group, f *finding, b []byte) {
	if gr.strings == nil {
		gr.strings = make(map[string]uint64, stringsKept)
	}
	eachString(f, b, func(s []byte) {
		s = bytes.TrimSpace(s[:min(len(s), maxString)])
		if len(s) < 3 {
			return
		}
		if !g.opt.NoRedact {
			g.scratch = append(g.scratch[:0], redactText(s)...)
			s = g.scratch
		}
		gr.count1(s, 1)
	})
}

func (gr *group) count1(s []byte, n uint64) {
	if old, ok := gr.strings[string(s)]; ok {
		gr.strings[string(s)] = old + n
		return
	}
	if len(gr.strings) < stringsKept {
		gr.strings[string(s)] = n
		return
	}
	least := n
	for _, v := range gr.strings {
		least = min(least, v)
	}
	for k, v := range gr.strings {
		if v <= least {
			delete(gr.strings, k)
		} else {
			gr.strings[k] = v - least
		}
	}
	if n > least {
		gr.strings[string(s)] = n - least
	}
}

// eachString calls yield with strings of at least three bytes: JSON's values, the first line of text, runs of text in
// anything else.
func eachString(f *finding, b []byte, yield func([]byte)) {
	payload := b[min(f.header, len(b)):]
	payload = payload[:min(len(payload), f.length, statsLook)]
	kind := f.kind
	if kind == LuaString {
		kind = f.inner
	}
	switch kind {
	case JSON:
		eachJSONString(payload, yield)
	case Text, URL, XML, HTML, SQL, HTTPRequest, HTTPResponse, Form, UUID:
		line, _, _ := bytes.Cut(payload, []byte("\n"))
		if line = bytes.TrimSpace(line); len(line) >= 3 {
			yield(line)
		}
	case Structure, Pointers, Binary, Integers, Object:
		for i := 0; i < len(payload); {
			n := asciiRun(payload[i:])
			if n >= 6 {
				yield(payload[i : i+n])
			}
			i += n + 1
		}
	}
}

func asciiRun(b []byte) int {
	for i, c := range b {
		if !textBytes[c] {
			return i
		}
	}
	return len(b)
}

func eachJSONString(b []byte, yield func([]byte)) {
	p := jsonParser{b: b}
	for p.i < len(b) {
		if b[p.i] != '"' {
			p.i++
			continue
		}
		text, ok := p.str()
		if !ok {
			return
		}
		p.space()
		isKey := p.i < len(b) && b[p.i] == ':'
		if !isKey && len(text) >= 3 {
			yield(text)
		}
	}
}

// Merge adds what another Grouper with the same options counted. The other one must not be used afterwards.
func (g *Grouper) Merge(other *Grouper) {
	for id, o := range other.groups {
		gr, ok := g.groups[id]
		if !ok && len(g.groups) < 2*g.max {
			g.groups[id] = o
			continue
		}
		if !ok {
			id = groupKey{kind: Other}
			if gr, ok = g.groups[id]; !ok {
				gr = &group{shape: Shape{Kind: Other}, min: ^uint64(0)}
				g.groups[id] = gr
			}
		}
		gr.merge(o)
	}
}

func (gr *group) merge(o *group) {
	gr.count += o.count
	gr.bytes += o.bytes
	gr.looked += o.looked
	gr.estimate[0] += o.estimate[0]
	gr.estimate[1] += o.estimate[1]
	gr.min, gr.max = min(gr.min, o.min), max(gr.max, o.max)
	if o.shape.Detail < gr.shape.Detail { // two orders of the same keys: choose without regard to who came first
		gr.shape.Detail = o.shape.Detail
	}
	for _, s := range o.samples {
		gr.insert(s)
	}
	if gr.strings == nil {
		gr.strings = o.strings
		return
	}
	for s, n := range o.strings {
		gr.count1([]byte(s), n)
	}
}

// Groups returns all groups, those with the most bytes first.
func (g *Grouper) Groups() []Group {
	out := make([]Group, 0, len(g.groups))
	for id, gr := range g.groups {
		one := Group{
			Key: id.key, Shape: gr.shape, ID: id.String(), Count: gr.count + round(gr.estimate[0]), Bytes: gr.bytes + round(gr.estimate[1]), MinSize: gr.min, MaxSize: gr.max,
			Looked: gr.looked, Strings: gr.topStrings(),
		}
		for _, s := range gr.samples {
			if !slices.Contains(one.Samples, s.text) {
				one.Samples = append(one.Samples, s.text)
			}
		}
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(b.Count, a.Count), cmp.Compare(a.Kind, b.Kind),
			cmp.Compare(a.Detail, b.Detail), cmp.Compare(a.Key, b.Key), cmp.Compare(a.MinSize, b.MinSize))
	})
	return out
}

func round(v float64) uint64 { return uint64(math.Round(max(v, 0))) }

func (gr *group) topStrings() []StringCount {
	var top []StringCount
	for s, n := range gr.strings {
		if n > 1 {
			top = append(top, StringCount{profile.Sanitize(s), n})
		}
	}
	slices.SortFunc(top, func(a, b StringCount) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Text, b.Text))
	})
	return top[:min(len(top), stringsShown)]
}
