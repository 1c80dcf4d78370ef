package symbolize

import (
	"cmp"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"sort"
	"strings"

	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

// symbol is an entry of a symbol table that covers an address.
type symbol struct {
	name        string
	value, size uint64
	bind        elf.SymBind
	file        string // the source file's base name, which only a local symbol has
	offset      uint64 // of an address behind a symbol without a size; then the name is a guess and marked
}

const (
	maxSymbols    = 16 << 20
	maxCandidates = 64 // aliases of one address
	maxHits       = 1 << 20
)

// symbolTable streams through a table for a sorted list of addresses: nothing is held but what covers one of them.
type symbolTable struct {
	o              *object
	entries, names *section.Section
	wide           bool
}

// symbolTables opens the tables of that type that the file has.
func (o *object) symbolTables(typ elf.SectionType, warn func(error)) []*symbolTable {
	var tables []*symbolTable
	for _, s := range o.Sections {
		if s.Type != typ || int(s.Link) >= len(o.Sections) {
			continue
		}
		entries, err := section.OpenSection(o.File, s, o.r, o.size)
		var names *section.Section
		if err == nil {
			names, err = section.OpenSection(o.File, o.Sections[s.Link], o.r, o.size)
		}
		if err != nil {
			warn(fmt.Errorf("read symbols of %s: %w", o.path, err))
			continue
		}
		tables = append(tables, &symbolTable{o: o, entries: entries, names: names, wide: o.Class == elf.ELFCLASS64})
	}
	return tables
}

type rawSymbol struct {
	name        uint32
	file        uint32 // name of the STT_FILE symbol before a local one
	info        uint8
	section     uint16
	value, size uint64
}

// each calls f with every function of the table.
func (t *symbolTable) each(f func(rawSymbol)) error {
	entry := uint64(16)
	if t.wide {
		entry = 24
	}
	n := min(t.entries.Size()/entry, maxSymbols)
	const chunk = 1024
	buf := make([]byte, chunk*entry)
	file := uint32(0)
	for i := uint64(0); i < n; i += chunk {
		b := buf[:min(chunk, n-i)*entry]
		if err := t.entries.Copy(b, i*entry); err != nil {
			return err
		}
		for ; len(b) > 0; b = b[entry:] {
			s := t.decode(b)
			switch elf.ST_TYPE(s.info) {
			case elf.STT_FILE:
				file = s.name
			case elf.STT_FUNC, elf.STT_GNU_IFUNC, elf.STT_NOTYPE:
				if s.section != 0 && t.o.executable(elf.SectionIndex(s.section)) {
					if elf.ST_BIND(s.info) == elf.STB_LOCAL {
						s.file = file
					}
					f(s)
				}
			}
		}
	}
	return nil
}

func (t *symbolTable) decode(b []byte) rawSymbol {
	le := binary.LittleEndian
	if t.wide {
		return rawSymbol{le.Uint32(b), 0, b[4], le.Uint16(b[6:]), le.Uint64(b[8:]), le.Uint64(b[16:])}
	}
	return rawSymbol{le.Uint32(b), 0, b[12], le.Uint16(b[14:]), uint64(le.Uint32(b[4:])), uint64(le.Uint32(b[8:]))}
}

// symbol reads the names of an entry.
func (t *symbolTable) symbol(raw rawSymbol) (symbol, bool) {
	name, err := t.names.String(uint64(raw.name))
	if err != nil || name == "" {
		return symbol{}, false
	}
	name, _, _ = strings.Cut(name, "@") // a version: memcpy@@GLIBC_2.14
	s := symbol{name: name, value: raw.value, size: raw.size, bind: elf.ST_BIND(raw.info)}
	if raw.file != 0 {
		s.file, _ = t.names.String(uint64(raw.file)) // without it the name is still good
	}
	return s, true
}

// find adds to found[i] the symbols that cover addrs[i].
func (t *symbolTable) find(addrs []uint64, found [][]symbol) error {
	type hit struct {
		i   int
		raw rawSymbol
	}
	var hits []hit
	err := t.each(func(s rawSymbol) {
		if s.size == 0 || s.value+s.size < s.value {
			return
		}
		i := sort.Search(len(addrs), func(i int) bool { return addrs[i] >= s.value })
		for ; i < len(addrs) && addrs[i] < s.value+s.size && len(hits) < maxHits; i++ {
			hits = append(hits, hit{i, s})
		}
	})
	if len(hits) == maxHits {
		return fmt.Errorf("%s: more than %d symbols for %d addresses", t.o.path, maxHits, len(addrs))
	}
	if err != nil {
		return err
	}
	slices.SortFunc(hits, func(a, b hit) int { return cmp.Compare(a.raw.name, b.raw.name) })
	for _, h := range hits {
		if len(found[h.i]) >= maxCandidates {
			continue
		}
		if sym, ok := t.symbol(h.raw); ok {
			found[h.i] = append(found[h.i], sym)
		}
	}
	return nil
}

// findSizeless looks for the addresses that no symbol covers: a function without a size (assembly) may be meant when no
// other symbol lies between. The names are marked as guesses.
func (t *symbolTable) findSizeless(addrs []uint64, found [][]symbol) error {
	type nearest struct {
		raw rawSymbol
		end uint64 // of the last sized symbol before the address
		ok  bool
	}
	best := make([]nearest, len(addrs))
	err := t.each(func(s rawSymbol) {
		if elf.ST_TYPE(s.info) == elf.STT_NOTYPE {
			return
		}
		i := sort.Search(len(addrs), func(i int) bool { return addrs[i] >= s.value })
		if i == len(addrs) {
			return
		}
		b := &best[i]
		if s.size != 0 {
			b.end = max(b.end, s.value+s.size)
		} else if !b.ok || s.value > b.raw.value {
			b.raw, b.ok = s, true
		}
	})
	if err != nil {
		return err
	}
	for i := 1; i < len(best); i++ { // what lies before an address lies before the next one too
		best[i].end = max(best[i].end, best[i-1].end)
		if !best[i].ok {
			best[i].raw, best[i].ok = best[i-1].raw, best[i-1].ok
		}
	}
	for i, b := range best {
		if !b.ok || b.end > b.raw.value || !t.o.sameSection(b.raw, addrs[i]) {
			continue
		}
		if sym, ok := t.symbol(b.raw); ok {
			sym.offset = addrs[i] - sym.value
			found[i] = append(found[i], sym)
		}
	}
	return nil
}

// sameSection tells whether the address lies in the symbol's section.
func (o *object) sameSection(s rawSymbol, addr uint64) bool {
	if int(s.section) >= len(o.Sections) {
		return false
	}
	sec := o.Sections[s.section]
	return addr >= sec.Addr && addr-sec.Addr < sec.Size
}

// best picks the name that people know among the aliases of an address: the innermost, then a global one, then one without
// underscores, then the shortest.
func best(symbols []symbol) (symbol, bool) {
	if len(symbols) == 0 {
		return symbol{}, false
	}
	return slices.MinFunc(symbols, func(a, b symbol) int {
		return cmp.Or(
			cmp.Compare(b.value, a.value),
			cmp.Compare(a.size, b.size),
			cmp.Compare(bindRank(a.bind), bindRank(b.bind)),
			cmp.Compare(underscores(a.name), underscores(b.name)),
			cmp.Compare(len(a.name), len(b.name)),
			cmp.Compare(a.name, b.name),
		)
	}), true
}

func bindRank(b elf.SymBind) int {
	if b == elf.STB_LOCAL {
		return 1
	}
	return 0
}

func underscores(name string) int {
	if strings.HasPrefix(name, "_Z") || strings.HasPrefix(name, "_R") || strings.HasPrefix(name, "_D") {
		return 0 // mangled
	}
	return len(name) - len(strings.TrimLeft(name, "_"))
}

// publicAlias returns the name that the C library's users know for a function whose DWARF has an internal one: malloc for
// __libc_malloc, open64 for __GI___open64. It must be a symbol of the same address: functions that the linker
// folded together share an address too, but not a name.
func publicAlias(name string, symbols []symbol) string {
	if !strings.HasPrefix(name, "__") {
		return name
	}
	if rest, ok := strings.CutPrefix(name, "__GI_"); ok && isPublic(rest, symbols) {
		name = rest
	}
	public := strings.TrimLeft(name, "_")
	public = strings.TrimLeft(strings.TrimPrefix(public, "libc_"), "_")
	if isPublic(public, symbols) {
		return public
	}
	return name
}

func isPublic(name string, symbols []symbol) bool {
	return slices.ContainsFunc(symbols, func(s symbol) bool { return s.name == name && s.bind != elf.STB_LOCAL })
}
