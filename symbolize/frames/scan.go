package frames

import (
	"debug/dwarf"
	"fmt"
	"slices"
	"sort"
)

// scope is an entry whose children are being read.
type scope struct {
	inside []int32 // which of the unit's addresses the innermost function around covers
	known  bool    // false outside functions
}

// scanner walks a unit's entries for the functions around its addresses.
type scanner struct {
	*unit
	addrs []uint64
	out   []*located
	lines *lineTable
	all   []int32 // 0, 1, 2, ...
	// jump allows passing over the children of entries that cannot matter, and was it done?
	jump, jumped bool
	taken        []bool // of covered, all false between calls
	searching    []bool // in the second pass: the addresses without a function
}

const maxDepth = 1 << 10 // of nested entries; compilers stay below 100

// scan fills the functions of the addresses. The first pass jumps over types and functions that cover no address; a
// function nested in one of those is the rare reason for a second pass without jumps.
func (u *unit) scan(addrs []uint64, out []*located, lines *lineTable) error {
	s := scanner{unit: u, addrs: addrs, out: out, lines: lines, jump: true, all: make([]int32, len(addrs)), taken: make([]bool, len(addrs))}
	for i := range s.all {
		s.all[i] = int32(i)
	}
	if err := s.walk(); err != nil {
		return err
	}
	if !s.jumped {
		return nil
	}
	missing := false
	s.searching = make([]bool, len(addrs))
	for i, l := range out {
		if len(l.functions) == 0 {
			s.searching[i] = true
			missing = true
		}
	}
	if !missing {
		return nil
	}
	if err := u.d.spend(uint64(len(u.b))); err != nil {
		return err
	}
	s.jump = false
	return s.walk()
}

func (s *scanner) walk() error {
	c := cursor{b: s.b, p: int(s.first)}
	scopes := make([]scope, 1, 64)
	for c.p < len(c.b) {
		at := c.p
		code := c.uleb()
		if code == 0 {
			if len(scopes) == 1 {
				continue // padding
			}
			scopes = scopes[:len(scopes)-1]
			if len(scopes) == 1 {
				return nil // the root's children are done
			}
			continue
		}
		a := s.abb.get(code)
		if a == nil {
			return fmt.Errorf("entry at %#x: abbreviation %d is not in the table: %w", s.off+uint64(at), code, errDamaged)
		}
		in := scopes[len(scopes)-1]
		var sibling uint64
		switch a.tag {
		case dwarf.TagSubprogram:
			in, sibling = s.subprogram(&c, a, at)
		case dwarf.TagInlinedSubroutine:
			in, sibling = s.inlined(&c, a, at, in)
		case dwarf.TagStructType, dwarf.TagClassType, dwarf.TagUnionType, dwarf.TagEnumerationType,
			dwarf.TagArrayType, dwarf.TagSubroutineType, dwarf.TagCallSite, dwarf.TagFormalParameter:
			sibling = s.sibling(&c, a)
		default:
			s.skipAttrs(&c, a)
		}
		if c.bad {
			return fmt.Errorf("entry at %#x: %w", s.off+uint64(at), errDamaged)
		}
		if !a.children {
			continue
		}
		if s.jump && sibling > uint64(c.p) && sibling < uint64(len(s.b)) {
			c.p = int(sibling)
			s.jumped = true
			continue
		}
		if len(scopes) > maxDepth {
			return fmt.Errorf("entry at %#x: nested too deep: %w", s.off+uint64(at), errDamaged)
		}
		scopes = append(scopes, in)
	}
	return nil
}

// sibling parses an entry only for where its next sibling is; 0 when it does not say.
func (s *scanner) sibling(c *cursor, a *abbrev) uint64 {
	if len(a.attrs) == 0 || !a.children || a.attrs[0].attr != dwarf.AttrSibling {
		// gcc, the one compiler to write it, puts it last in types: look there too.
		if n := len(a.attrs); n > 0 && a.children && a.attrs[n-1].attr == dwarf.AttrSibling && s.fixedSize(a.attrs[n-1].form) > 0 {
			s.skipAttrs(c, a)
			if c.bad {
				return 0
			}
			back := cursor{b: c.b, p: c.p - s.fixedSize(a.attrs[n-1].form)}
			return s.read(&back, a.attrs[n-1]).u - s.off
		}
		s.skipAttrs(c, a)
		return 0
	}
	var to uint64
	for i, spec := range a.attrs {
		v := s.read(c, spec)
		if i == 0 && v.kind == kindRef {
			to = v.u - s.off
		}
	}
	return to
}

// subprogram starts a chain for each address that the function covers.
func (s *scanner) subprogram(c *cursor, a *abbrev, at int) (scope, uint64) {
	var where span
	var sibling uint64
	for _, spec := range a.attrs {
		v := s.read(c, spec)
		where.set(spec.attr, v)
		if spec.attr == dwarf.AttrSibling && v.kind == kindRef {
			sibling = v.u - s.off
		}
	}
	if c.bad {
		return scope{}, 0
	}
	inside := s.covered(&where, s.all)
	var kept []int32
	for _, i := range inside {
		if len(s.out[i].functions) > 0 || s.searching != nil && !s.searching[i] {
			continue // a second function at the same address: a folded copy
		}
		s.out[i].functions = append(s.out[i].functions, site{fn: s.function(s.off + uint64(at))})
		kept = append(kept, i)
	}
	if len(kept) > 0 {
		sibling = 0
	}
	return scope{kept, true}, sibling
}

// inlined adds a call to the chains of the addresses it covers.
func (s *scanner) inlined(c *cursor, a *abbrev, at int, around scope) (scope, uint64) {
	if len(around.inside) == 0 || s.d.NoInlines {
		s.skipAttrs(c, a)
		return scope{known: true}, 0
	}
	var where span
	var sibling, callLine, callFile uint64
	for _, spec := range a.attrs {
		v := s.read(c, spec)
		where.set(spec.attr, v)
		switch spec.attr {
		case dwarf.AttrCallLine:
			callLine = v.u
		case dwarf.AttrCallFile:
			callFile = v.u
		case dwarf.AttrSibling:
			if v.kind == kindRef {
				sibling = v.u - s.off
			}
		}
	}
	if c.bad {
		return scope{}, 0
	}
	inside := s.covered(&where, around.inside)
	if len(inside) == 0 {
		return scope{known: true}, sibling
	}
	called := site{fn: s.function(s.off + uint64(at)), callLine: clampLine(callLine)}
	if s.lines != nil {
		called.callFile = s.lines.path(callFile)
	}
	for _, i := range inside {
		if len(s.out[i].functions) < maxChain {
			s.out[i].functions = append(s.out[i].functions, called)
		}
	}
	return scope{inside, true}, 0
}

// covered returns those of the addresses that lie in the entry's ranges.
func (s *scanner) covered(where *span, among []int32) []int32 {
	if where.ranges.kind == kindNone && (where.low.kind == kindNone || where.high.kind == kindNone) {
		return nil
	}
	var in []int32
	first := true
	err := s.eachRange(where.low, where.low.kind != kindNone, where.high, where.ranges, func(low, high uint64) {
		from := sort.Search(len(among), func(k int) bool { return s.addrs[among[k]] >= low })
		to := from
		for to < len(among) && s.addrs[among[to]] < high {
			to++
		}
		if from == to || len(in) == len(among) {
			return
		}
		if first { // mostly there is one range, and nothing needs to be copied
			in, first = among[from:to:to], false
			return
		}
		for _, i := range in {
			s.taken[i] = true
		}
		for _, i := range among[from:to] {
			if !s.taken[i] {
				in = append(in, i)
			}
		}
		for _, i := range in {
			s.taken[i] = false
		}
	})
	slices.Sort(in)
	if err != nil {
		s.d.warn(fmt.Errorf("address ranges in the compile unit at %#x: %w", s.off, err))
	}
	return in
}
