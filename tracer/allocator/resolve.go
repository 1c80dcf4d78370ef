package allocator

import (
	"cmp"
	"debug/elf"
	"slices"
	"strings"
)

// resolve turns the matching symbols into functions to probe: one per address, forwarders left out.
func (s *scanner) resolve() {
	s.file.Family = s.family()
	byAddress := map[uint64]*Found{}
	for _, sym := range s.matches {
		function, family, ok := s.meaning(sym)
		if !ok {
			continue
		}
		if sym.ifunc {
			s.resolveIFunc(byAddress, sym, function, family)
			continue
		}
		s.add(byAddress, sym, function, family)
	}
	s.findLuaJIT(byAddress)
	found := make([]*Found, 0, len(byAddress))
	for _, f := range byAddress {
		found = append(found, f)
	}
	slices.SortFunc(found, func(a, b *Found) int { return cmp.Compare(a.Address, b.Address) })
	for _, f := range found {
		if why := s.forwards(f, byAddress); why != "" {
			for _, name := range f.Names() {
				s.file.Skipped = append(s.file.Skipped, Skipped{name, why})
			}
			continue
		}
		s.file.Found = append(s.file.Found, *f)
	}
	s.explainNothing()
}

// meaning says what a symbol's function does here, and refuses names that only look like an allocator's.
func (s *scanner) meaning(sym symbol) (Function, Family, bool) {
	for _, d := range s.options.Declared {
		if d.Name == sym.name {
			return d, FamilyDeclared, true
		}
	}
	if sym.name == "__libc_malloc_impl" {
		f, _ := Lookup("malloc")
		f.Name = sym.name
		return f, FamilyMusl, s.file.Family == FamilyMusl
	}
	family := s.file.Family
	i, known := byName[sym.name]
	if !known {
		for _, prefix := range s.prefixes() {
			if base, ok := strings.CutPrefix(sym.name, prefix); ok {
				if i, known = byName[base]; known {
					if s.marks[prefix] >= 4 {
						family = FamilyJemalloc
					}
					break
				}
			}
		}
		if !known {
			return Function{}, "", false
		}
	}
	r := rows[i]
	switch r.group {
	case groupJemalloc:
		if family != FamilyJemalloc {
			return Function{}, "", false
		}
	case groupMimalloc:
		family = FamilyMimalloc
	case groupTcmalloc:
		family = FamilyTcmalloc
	case groupLua:
		family = FamilyLuaJIT
	case groupC, groupSibling:
		// A local "free" of a program that takes its C library from elsewhere is no allocator.
		if sym.local && !s.file.Static && sym.name == r.Name && !s.defines("malloc", "free") {
			return Function{}, "", false
		}
	}
	f := r.Function
	f.Name = sym.name
	if (f.Op == Realloc) && family.zeroSizeFrees() {
		f.Flags |= ZeroSizeFrees
	}
	return f, family, true
}

// defines reports whether all names are defined here.
func (s *scanner) defines(names ...string) bool {
	for _, name := range names {
		if !slices.ContainsFunc(s.matches, func(m symbol) bool { return m.name == name }) {
			return false
		}
	}
	return true
}

// family recognizes the allocator by what the file defines; its name on disk plays no part.
func (s *scanner) family() Family {
	switch {
	case s.marks[""] >= 4 || len(s.jemallocPrefixes()) > 0 && !s.defines("__libc_malloc"):
		return FamilyJemalloc
	case s.hints.mimalloc:
		return FamilyMimalloc
	case s.hints.tcmalloc:
		return FamilyTcmalloc
	case s.isMusl():
		return FamilyMusl
	// The names alone do not prove it: interposers, Chromium's among them, define __libc_malloc too.
	case s.defines("malloc", "free", "__libc_malloc") && (s.file.Static || strings.HasPrefix(s.file.SONAME, "libc.so")):
		return FamilyGlibc
	case s.defines("malloc", "free"):
		return FamilyOther
	case s.defines("_Znwm", "_ZdlPv"):
		return FamilyCxx
	}
	return familyUndecided
}

func (s *scanner) jemallocPrefixes() []string {
	var prefixes []string
	for prefix, n := range s.marks {
		if n >= 4 {
			prefixes = append(prefixes, prefix)
		}
	}
	return prefixes
}

// isMusl: musl's allocator defines malloc but neither pvalloc nor cfree; its loader and its libc are one file, and a
// static program has the functions behind the public ones.
func (s *scanner) isMusl() bool {
	if s.defines("__libc_malloc_impl") {
		return true
	}
	if s.file.Executable || !s.defines("malloc", "free", "aligned_alloc") || s.defines("pvalloc") || s.defines("__libc_malloc") {
		return false
	}
	return s.definesDynamic("__libc_start_main", "__dls3") || s.definesDynamic("__libc_start_main", "_dlstart")
}

// definesDynamic looks for any symbols by name, also beyond the table.
func (s *scanner) definesDynamic(names ...string) bool {
	missing := map[string]bool{}
	for _, n := range names {
		missing[n] = true
	}
	s.symbolTable(elf.SHT_DYNSYM, func(name []byte, _ symbol) { delete(missing, string(name)) })
	return len(missing) == 0
}

// add books a symbol under its address. Where the names of one address mean different things (a linker may fold equal
// code), the one with the fewest arguments is true for all.
func (s *scanner) add(byAddress map[uint64]*Found, sym symbol, function Function, family Family) {
	segment := s.executable(sym.address)
	if segment == nil {
		return
	}
	known := byAddress[sym.address]
	if known == nil {
		byAddress[sym.address] = &Found{
			Function: function, Family: family, Version: sym.version, Address: sym.address,
			Offset: sym.address - segment.Vaddr + segment.Off, Length: min(sym.size, maxFunction),
		}
		return
	}
	if known.Name == function.Name {
		return
	}
	alias := function.Name
	throws := (known.Flags | function.Flags) & MayThrow
	if better(function, known.Function) {
		alias = known.Name
		known.Function, known.Family, known.Version = function, family, sym.version
	}
	known.Flags |= throws
	if !slices.Contains(known.Aliases, alias) {
		known.Aliases = append(known.Aliases, alias)
		slices.Sort(known.Aliases)
	}
	known.Length = max(known.Length, min(sym.size, maxFunction))
}

// better orders the names of one address: fewer arguments, then the table's order, which starts with the plain names.
func better(a, b Function) bool {
	if len(a.Args()) != len(b.Args()) {
		return len(a.Args()) < len(b.Args())
	}
	return tableIndex(a.Name) < tableIndex(b.Name)
}

func tableIndex(name string) int {
	if i, ok := byName[name]; ok {
		return i
	}
	return len(rows)
}

// explainNothing says why no allocator was found where a person would expect one.
func (s *scanner) explainNothing() {
	if len(s.file.Found) > 0 {
		return
	}
	switch {
	case s.hints.goRuntime:
		s.note("a Go program: its heap comes from mmap and is seen as kind mmap")
	case s.file.Static && s.stripped:
		s.note("static and stripped: its allocator has no symbols and cannot be probed; its heap is seen as kinds brk and mmap")
	case s.file.Static:
		s.note("static, and none of its symbols is a known allocator function; its heap is seen as kinds brk and mmap")
	}
}
