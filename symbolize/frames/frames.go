// Package frames turns addresses of one object into functions, source lines and inlined calls, out of its DWARF (2 to 5,
// split, dwz).
//
// The trap: debug/dwarf loads every section (858 MB for one JVM library), misses split units without an error and knows no
// alternate files. This reader takes a sorted batch of addresses, finds their compile units through .debug_aranges, reads
// those units one after the other and nothing else. Every byte is foreign: offsets are checked, loops bounded, and the work
// is limited in proportion to the file's size.
package frames

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"

	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

var (
	errDamaged = errors.New("damaged DWARF")
	errWork    = errors.New("DWARF asks for more work than a file of its size can need")
)

// Frame is one function at an address.
type Frame struct {
	Function  string // mangled name if there is one
	File      string
	Line      int
	StartLine int // of the function's declaration
}

// Sections are the parts of the DWARF that are read; absent ones are nil.
type Sections struct {
	Info, Abbrev, Line, Str, LineStr, Addr, StrOffsets, Ranges, Rnglists, Aranges *section.Section
}

// Data is the DWARF of one file. It is not safe for concurrent use.
type Data struct {
	Sections
	// Alt is the file that dwz moved shared entries to (.gnu_debugaltlink); may be nil.
	Alt *Data
	// Split finds the split unit (.dwo, .dwp) that a skeleton names; may be nil.
	Split func(compDir, name string, id uint64) (*Data, error)
	// NoInlines leaves only the outermost function at an address.
	NoInlines bool
	// MaxUnit limits the size of one compile unit, which is held in memory; 0 means 64 MiB.
	MaxUnit uint64
	// Warn is told of units that could not be read; may be nil.
	Warn func(error)

	work, maxWork uint64
	abbrevs       map[abbrevKey]*abbrevTable
	abbrevSize    uint64
	scratch       []byte // of the unit being scanned
	abbrevBuf     []byte
	lineBuf       []byte
	others        []*unit // units reached through references, most recent last
	headers       []unitHeader
	headersEnd    uint64
	functions     map[uint64]*function // by offset of their entry in Info
}

type abbrevKey struct {
	off uint64
	encoding
}

const (
	minWork        = 32 << 20
	maxChain       = 256 // inlined calls at one address; compilers stay below 100
	defaultMaxUnit = 64 << 20
	maxOthers      = 16
	maxAbbrevCache = 64 << 10 // bytes of .debug_abbrev; 20 times that in memory
)

// spend accounts for n bytes about to be parsed.
func (d *Data) spend(n uint64) error {
	if d.maxWork == 0 {
		d.maxWork = minWork
		for _, s := range []*section.Section{d.Info, d.Line, d.Abbrev, d.Ranges, d.Rnglists} {
			d.maxWork += 8 * s.Size()
		}
	}
	d.work += n
	if d.work > d.maxWork {
		return errWork
	}
	return nil
}

func (d *Data) warn(err error) {
	if d.Warn != nil {
		d.Warn(err)
	}
}

// Lookup returns the frames of each address, innermost first; none for an address that the DWARF does not know.
// A frame without a function comes from a unit that has lines only (assembly). addrs must be sorted and without duplicates.
func (d *Data) Lookup(ctx context.Context, addrs []uint64) ([][]Frame, error) {
	units, err := d.unitsOf(ctx, addrs)
	if err != nil {
		return nil, fmt.Errorf("read DWARF index: %w", err)
	}
	type hit struct {
		unit uint64
		i    int
	}
	var hits []hit
	for i, u := range units {
		if u != noUnit {
			hits = append(hits, hit{u, i})
		}
	}
	slices.SortStableFunc(hits, func(a, b hit) int { return cmp.Compare(a.unit, b.unit) })
	found := make([]*located, len(addrs))
	for i := range found {
		found[i] = &located{}
	}
	d.functions = map[uint64]*function{}
	for len(hits) > 0 {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := 1
		for n < len(hits) && hits[n].unit == hits[0].unit {
			n++
		}
		in := make([]uint64, n)
		out := make([]*located, n)
		for k, h := range hits[:n] {
			in[k], out[k] = addrs[h.i], found[h.i]
		}
		if err := d.lookupUnit(hits[0].unit, in, out); err != nil {
			d.warn(fmt.Errorf("read compile unit at %#x: %w", hits[0].unit, err))
			if errors.Is(err, errWork) {
				break
			}
		}
		hits = hits[n:]
	}
	d.readNames(found)
	return d.frames(found), nil
}

// located is what is known of one address before names are read.
type located struct {
	file      string
	line      int
	hasLine   bool
	functions []site // outermost first
}

// site is a function in the chain of an address. The call place is where the one around it calls it; empty for the outermost.
type site struct {
	fn       *function
	callFile string
	callLine int
}

// function is a DIE's name and place of declaration, read when all units are done.
type function struct {
	linkage, name stringRef
	startLine     int
	resolved      string
	done          bool // resolved is read
}

// stringRef is a string not read yet: it lies at off of sec, or is s.
type stringRef struct {
	sec *section.Section
	off uint64
	s   string
}

func (r stringRef) empty() bool { return r.sec == nil && r.s == "" }

// readNames reads the strings of all functions in the order of their places: .debug_str may be compressed and large.
func (d *Data) readNames(found []*located) {
	var all []*function
	seen := map[*function]bool{}
	for _, l := range found {
		for _, s := range l.functions {
			if !seen[s.fn] && !s.fn.done {
				seen[s.fn] = true
				all = append(all, s.fn)
			}
		}
	}
	ref := func(f *function) stringRef {
		if !f.linkage.empty() {
			return f.linkage
		}
		return f.name
	}
	sort.Slice(all, func(i, j int) bool { return ref(all[i]).off < ref(all[j]).off })
	for _, f := range all {
		r := ref(f)
		f.resolved, f.done = r.s, true
		if r.sec == nil {
			continue
		}
		s, err := r.sec.String(r.off)
		if err != nil {
			d.warn(fmt.Errorf("read function name: %w", err))
			continue
		}
		if d.spend(uint64(len(s))) != nil {
			return
		}
		f.resolved = s
	}
}

func (d *Data) frames(found []*located) [][]Frame {
	out := make([][]Frame, len(found))
	for i, l := range found {
		file, line := l.file, l.line
		sites := l.functions
		if len(sites) == 0 {
			if l.hasLine {
				out[i] = []Frame{{File: file, Line: line}}
			}
			continue
		}
		if d.NoInlines {
			sites = sites[:1]
		}
		for k := len(sites) - 1; k >= 0; k-- {
			s := sites[k]
			out[i] = append(out[i], Frame{Function: s.fn.resolved, File: file, Line: line, StartLine: s.fn.startLine})
			file, line = s.callFile, s.callLine
		}
	}
	return out
}

// lookupUnit fills the places of the unit's addresses.
func (d *Data) lookupUnit(off uint64, addrs []uint64, out []*located) error {
	u, err := d.openUnit(off, true)
	if err != nil {
		return err
	}
	lines, err := u.openLines()
	if err != nil {
		d.warn(fmt.Errorf("read line table of compile unit at %#x: %w", off, err))
		lines = nil
	}
	if lines != nil {
		if err := lines.run(addrs, out); err != nil {
			d.warn(fmt.Errorf("read line table of compile unit at %#x: %w", off, err))
		}
	}
	if !u.isSkeleton() {
		return u.scan(addrs, out, lines)
	}
	split, err := u.openSplit()
	if err != nil {
		return err
	}
	err = split.scan(addrs, out, lines)
	d.readNames(out) // while the split unit's file is open
	return err
}
