package allocator

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/ulikunitz/xz"
)

// Limits for hostile files. A real symbol table beyond them is reported, not read.
const (
	maxSymbols     = 16 << 20
	maxStrings     = 256 << 20
	maxDynamic     = 1 << 16
	maxRelocations = 4 << 20
	maxFunction    = 1 << 20
	maxMatches     = 4096
	maxUnwinders   = 32
	maxSegments    = 64       // executable ones; linkers make one or two
	maxMini        = 64 << 20 // bytes of unpacked .gnu_debugdata
	maxText        = 4 << 30  // bytes of code looked through for jumps
)

// ErrNotELF is wrapped by Scan's error when the file is no 64-bit little-endian ELF file of a known architecture.
var ErrNotELF = errors.New("not a 64-bit little-endian ELF file for x86-64 or arm64")

// File is what Scan learned about one ELF file.
type File struct {
	Machine elf.Machine
	Family  Family // of the allocator in it; empty when it has none
	BuildID string // lower-case hex; empty when it has none
	SONAME  string
	Needed  []string
	// Static is an executable that brings its own C library.
	Static bool
	// Executable is a program (by its interpreter or type), not a library.
	Executable bool
	// Unwind is whether the file says how to unwind its stacks (.eh_frame).
	Unwind bool
	// Found are the functions to probe, by address; several names at one address stand once.
	Found []Found
	// Skipped are functions of the table that are defined here and need no probe.
	Skipped []Skipped
	// Unwinders are where exceptions of C++ and the like begin to unwind stacks, and where they end.
	Unwinders []Unwinder
	// Exceptions is whether its code handles exceptions; C libraries, which only clean up, do not count.
	Exceptions bool
	// OwnRuntime is whether it handles exceptions and asks no other file for an unwinder: then it brings one along.
	OwnRuntime bool
	// Notes say what cannot be seen in this file, for a person.
	Notes []string
}

// Unwinder is a function that starts to unwind a stack (Caught false) or that every exception passes once it was caught.
// An exception that leaves a function with a return probe ends the program, unless probes on both sorts put true return
// addresses back.
type Unwinder struct {
	Name   string
	Offset uint64 // in the file
	Caught bool
}

// unwinders are the unwinders' names, and whether the exception is caught by then.
var unwinders = map[string]bool{
	"_Unwind_RaiseException": false, "_Unwind_Resume_or_Rethrow": false, "_Unwind_Resume": false, "_Unwind_ForcedUnwind": false,
	"__cxa_begin_catch": true,
}

// Found is one function of the table in one file.
type Found struct {
	Function
	Family  Family
	Aliases []string // other names of the same address, with their versions
	Version string
	Address uint64 // in the file's own addresses
	Offset  uint64 // in the file, of the entry
	Length  uint64 // of its code; 0 when unknown
	// IFunc: reached through an indirect function of this name; all its candidates are probed.
	IFunc bool
	Place Placement

	code []byte // from the entry to behind the probed instruction, to compare with what is in memory
}

// AtProbe is the function with its arguments where they are when the probe is hit. BPF uses this one.
func (f Found) AtProbe() Function {
	g := f.Function
	for _, arg := range []*int{&g.Size, &g.Count, &g.Ptr, &g.Out, &g.Pool} {
		if at, moved := f.Place.Moved[*arg]; moved {
			*arg = at
		}
	}
	return g
}

// ProbeOffset is the file offset of the instruction to probe.
func (f Found) ProbeOffset() uint64 { return f.Offset + f.Place.Offset }

// Names are all names of the function, its own first.
func (f Found) Names() []string { return append([]string{f.Name}, f.Aliases...) }

// Skipped is a function that needs no probe, and why.
type Skipped struct {
	Name string `json:"name"`
	Why  string `json:"why"`
}

// Options change what Scan looks for.
type Options struct {
	Rules Rules
	// Prefixes are further prefixes of the C interface ("foo_" finds foo_malloc).
	Prefixes []string
	// Declared are functions of one's own; they are looked for by their exact names.
	Declared []Function
}

// Scan finds the functions of the table that an ELF file defines and where their probes go. The file may be hostile:
// sizes are capped and nothing in it is believed without a check.
func Scan(r io.ReaderAt, options *Options) (file *File, err error) {
	if options == nil {
		options = &Options{}
	}
	defer func() { // debug/elf has had panics on broken files
		if p := recover(); p != nil {
			file, err = nil, fmt.Errorf("read ELF file: broken: %v", p)
		}
	}()
	ef, err := elf.NewFile(r)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotELF, err)
	}
	if ef.Class != elf.ELFCLASS64 || ef.Data != elf.ELFDATA2LSB || (ef.Machine != elf.EM_X86_64 && ef.Machine != elf.EM_AARCH64) {
		return nil, ErrNotELF
	}
	s := &scanner{elf: ef, options: options, file: &File{Machine: ef.Machine}, segments: executableSegments(ef)}
	s.file.BuildID = s.readBuildID()
	s.readDynamic()
	s.collect()
	s.resolve()
	s.file.Exceptions = ef.Section(".gcc_except_table") != nil && (s.file.Static || !isC(s.file.Family))
	s.file.OwnRuntime = s.file.Exceptions && !s.asksForUnwinder()
	s.place()
	return s.file, nil
}

// symbol is a defined function of interest.
type symbol struct {
	name, version string
	address, size uint64
	local, ifunc  bool
	dynamic       bool // from .dynsym
}

type scanner struct {
	elf      *elf.File
	options  *Options
	file     *File
	matches  []symbol
	marks    map[string]int    // jemalloc prefix -> number of distinct marks seen
	imports  map[uint64]string // GOT slot -> imported symbol, filled on demand
	segments []*elf.Prog       // loaded and executable
	mini     *scanner          // the symbols in .gnu_debugdata
	stripped bool
	hints    hints
}

// hints are signs of what a file is, seen while its symbols pass by.
type hints struct {
	mimalloc, tcmalloc, luaJIT, goRuntime bool
	luaMakers                             []symbol // functions that make a Lua state
}

// asksForUnwinder: landing pads end in _Unwind_Resume, and what throws calls the runtime.
func (s *scanner) asksForUnwinder() bool {
	imported, err := s.elf.ImportedSymbols()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(imported, func(sym elf.ImportedSymbol) bool {
		return strings.HasPrefix(sym.Name, "_Unwind_") || strings.HasPrefix(sym.Name, "__cxa_throw")
	})
}

func isC(f Family) bool { return f == FamilyGlibc || f == FamilyMusl }

func (s *scanner) note(format string, args ...any) {
	s.file.Notes = append(s.file.Notes, fmt.Sprintf(format, args...))
}

func (s *scanner) readDynamic() {
	f := s.file
	f.SONAME = first(s.elf.DynString(elf.DT_SONAME))
	if needed, err := s.elf.DynString(elf.DT_NEEDED); err == nil {
		f.Needed = needed[:min(len(needed), maxDynamic)]
	}
	hasInterp := false
	for _, p := range s.elf.Progs {
		hasInterp = hasInterp || p.Type == elf.PT_INTERP
		f.Unwind = f.Unwind || p.Type == elf.PT_GNU_EH_FRAME
	}
	// A file without the header may have the table all the same (static programs of musl).
	f.Unwind = f.Unwind || s.elf.Section(".eh_frame") != nil
	pie := false
	if flags, err := s.elf.DynValue(elf.DT_FLAGS_1); err == nil && len(flags) > 0 {
		pie = elf.DynFlag1(flags[0])&elf.DF_1_PIE != 0
	}
	f.Executable = s.elf.Type == elf.ET_EXEC || pie || (hasInterp && f.SONAME == "")
	f.Static = f.Executable && !hasInterp && len(f.Needed) == 0
}

func first(values []string, err error) string {
	if err != nil || len(values) == 0 {
		return ""
	}
	return values[0]
}

// collect gathers the defined functions whose names are in the table, under the plain names and every prefix.
func (s *scanner) collect() {
	s.marks = map[string]int{}
	s.readMini()
	wanted := s.plainNames()
	seen := map[string]bool{}
	s.eachSymbol(func(name []byte, sym symbol) {
		if prefix, ok := jemallocPrefix(name); ok && !seen[string(name)] {
			seen[string(name)] = true
			s.marks[prefix]++
		}
		s.hint(name, sym)
		s.addUnwinder(name, sym)
		if wanted[string(name)] && len(s.matches) < maxMatches {
			sym.name = string(name)
			s.matches = append(s.matches, sym)
		}
	})
	prefixes := s.prefixes()
	if len(prefixes) == 0 {
		return
	}
	s.eachSymbol(func(name []byte, sym symbol) {
		for _, prefix := range prefixes {
			base, ok := bytes.CutPrefix(name, []byte(prefix))
			if !ok || wanted[string(name)] || len(s.matches) >= maxMatches {
				continue
			}
			if i, known := byName[string(base)]; known && (rows[i].group == groupC || rows[i].group == groupJemalloc) {
				sym.name = string(name)
				s.matches = append(s.matches, sym)
				return
			}
		}
	})
}

func (s *scanner) addUnwinder(name []byte, sym symbol) {
	caught, ok := unwinders[string(name)]
	segment := s.executable(sym.address)
	if !ok || segment == nil || len(s.file.Unwinders) >= maxUnwinders {
		return
	}
	u := Unwinder{Name: string(name), Offset: sym.address - segment.Vaddr + segment.Off, Caught: caught}
	if !slices.Contains(s.file.Unwinders, u) {
		s.file.Unwinders = append(s.file.Unwinders, u)
	}
}

func (s *scanner) plainNames() map[string]bool {
	wanted := make(map[string]bool, len(rows)+len(s.options.Declared))
	for _, r := range rows {
		wanted[r.Name] = true
	}
	for _, d := range s.options.Declared {
		wanted[d.Name] = true
	}
	// musl's malloc proper, behind malloc and the libc's own calls.
	wanted["__libc_malloc_impl"] = true
	return wanted
}

// prefixes are those of the jemallocs in the file (at least four of the marks must be there) and the caller's.
func (s *scanner) prefixes() []string {
	prefixes := slices.Clone(s.options.Prefixes)
	for prefix, n := range s.marks {
		if n >= 4 && prefix != "" {
			prefixes = append(prefixes, prefix)
		}
	}
	// The longest first: _rjem_je_malloc is not the malloc of the prefix _rjem_.
	slices.SortFunc(prefixes, func(a, b string) int { return cmp.Or(cmp.Compare(len(b), len(a)), cmp.Compare(a, b)) })
	return slices.Compact(prefixes)
}

func (s *scanner) hint(name []byte, sym symbol) {
	switch string(name) {
	case "mi_malloc":
		s.hints.mimalloc = true
	case "tc_malloc", "MallocExtension_ReleaseFreeMemory", "TCMalloc_Internal_GetStats":
		s.hints.tcmalloc = true
	case "lua_newstate", "luaL_newstate", "lj_state_newstate":
		if len(s.hints.luaMakers) < 8 {
			s.hints.luaMakers = append(s.hints.luaMakers, sym)
		}
	case "luaJIT_setmode":
		s.hints.luaJIT = true
	case "runtime.mallocgc":
		s.hints.goRuntime = true
	}
}

// eachSymbol calls f for every defined function of .dynsym and .symtab. The name is valid only during the call: big
// programs have millions of symbols, of which a dozen matter.
func (s *scanner) eachSymbol(f func(name []byte, sym symbol)) {
	s.symbolTable(elf.SHT_DYNSYM, f)
	s.symbolTable(elf.SHT_SYMTAB, f)
	if s.mini != nil {
		s.mini.symbolTable(elf.SHT_SYMTAB, f)
	}
}

// readMini opens the symbols that Fedora and its kin leave in stripped files: an ELF file with nothing but a .symtab,
// compressed, in .gnu_debugdata.
func (s *scanner) readMini() {
	section := s.elf.Section(".gnu_debugdata")
	if section == nil || section.Type != elf.SHT_PROGBITS || section.FileSize > maxMini {
		return
	}
	in, err := xz.ReaderConfig{DictCap: maxMini, SingleStream: true}.NewReader(section.Open())
	if err != nil {
		return
	}
	data, err := io.ReadAll(io.LimitReader(in, maxMini))
	if err != nil {
		return
	}
	file, err := elf.NewFile(bytes.NewReader(data))
	if err != nil || file.Class != elf.ELFCLASS64 || file.Data != elf.ELFDATA2LSB {
		return
	}
	s.mini = &scanner{elf: file, options: s.options, file: s.file}
}

const symbolSize = 24

func (s *scanner) symbolTable(kind elf.SectionType, f func(name []byte, sym symbol)) {
	section := s.elf.SectionByType(kind)
	if section == nil || section.Type == elf.SHT_NOBITS || int(section.Link) >= len(s.elf.Sections) {
		if kind == elf.SHT_SYMTAB {
			s.stripped = true
		}
		return
	}
	table := s.elf.Sections[section.Link]
	if table.FileSize > maxStrings || section.FileSize/symbolSize > maxSymbols {
		s.noteOnce("%s has %d bytes of names and %d symbols, more than is read", section.Name, table.FileSize, section.FileSize/symbolSize)
		return
	}
	names, err := readAt(table, table.FileSize)
	if err != nil {
		return
	}
	versions := s.versions(kind)
	buffer := make([]byte, symbolSize*4096)
	for done := uint64(0); done < section.FileSize; {
		n := min(uint64(len(buffer)), section.FileSize-done)
		got, err := section.ReadAt(buffer[:n], int64(done))
		for i := 0; i+symbolSize <= got; i += symbolSize {
			raw := buffer[i : i+symbolSize]
			index := (int(done) + i) / symbolSize
			s.oneSymbol(raw, names, func(name []byte, sym symbol) {
				sym.dynamic = kind == elf.SHT_DYNSYM
				if index < len(versions) {
					sym.version = versions[index]
				}
				f(name, sym)
			})
		}
		if err != nil || got == 0 {
			return
		}
		done += uint64(got - got%symbolSize)
		if got < symbolSize {
			return
		}
	}
}

func (s *scanner) noteOnce(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if !slices.Contains(s.file.Notes, text) {
		s.file.Notes = append(s.file.Notes, text)
	}
}

func (s *scanner) oneSymbol(raw, names []byte, f func(name []byte, sym symbol)) {
	info, section := raw[4], binary.LittleEndian.Uint16(raw[6:])
	kind := elf.ST_TYPE(info)
	ifunc := kind == elf.STT_GNU_IFUNC
	address := binary.LittleEndian.Uint64(raw[8:])
	if (kind != elf.STT_FUNC && !ifunc) || section == uint16(elf.SHN_UNDEF) || address == 0 {
		return
	}
	at := binary.LittleEndian.Uint32(raw)
	if uint64(at) >= uint64(len(names)) {
		return
	}
	name := names[at:]
	end := bytes.IndexByte(name[:min(len(name), 256)], 0)
	if end <= 0 {
		return // nameless, or longer than any name of interest
	}
	f(name[:end], symbol{
		address: address, size: binary.LittleEndian.Uint64(raw[16:]),
		local: elf.ST_BIND(info) == elf.STB_LOCAL, ifunc: ifunc,
	})
}

// versions maps the index of a dynamic symbol to its version, "@@" in front of a default one.
func (s *scanner) versions(kind elf.SectionType) []string {
	if kind != elf.SHT_DYNSYM {
		return nil
	}
	section := s.elf.SectionByType(elf.SHT_GNU_VERSYM)
	if section == nil || section.FileSize > maxSymbols {
		return nil
	}
	raw, err := readAt(section, section.FileSize)
	if err != nil {
		return nil
	}
	defined, err := s.elf.DynamicVersions()
	if err != nil {
		return nil
	}
	byIndex := map[uint16]string{}
	for _, v := range defined {
		byIndex[v.Index] = v.Name
	}
	versions := make([]string, len(raw)/2)
	for i := range versions {
		v := binary.LittleEndian.Uint16(raw[2*i:])
		name := byIndex[v&0x7fff]
		if v&0x7fff < 2 || name == "" {
			continue
		}
		if v&0x8000 != 0 {
			versions[i] = "@" + name
		} else {
			versions[i] = "@@" + name
		}
	}
	return versions
}

// readAt reads the first size bytes. A header may claim more than the file has, so the memory is taken at once only if
// the last byte is there.
func readAt(r io.ReaderAt, size uint64) ([]byte, error) {
	if size == 0 {
		return nil, nil
	}
	var last [1]byte
	if n, _ := r.ReadAt(last[:], int64(size-1)); n == 0 {
		return io.ReadAll(io.NewSectionReader(r, 0, int64(size)))
	}
	data := make([]byte, size)
	n, err := r.ReadAt(data, 0)
	if n == len(data) {
		err = nil
	}
	return data[:n], err
}

// executable returns the loaded, executable segment that holds an address.
func (s *scanner) executable(address uint64) *elf.Prog {
	for _, p := range s.segments {
		if address >= p.Vaddr && address-p.Vaddr < p.Filesz {
			return p
		}
	}
	return nil
}

func executableSegments(f *elf.File) []*elf.Prog {
	var segments []*elf.Prog
	for _, p := range f.Progs {
		// The end must not wrap around, nor lie beyond any file.
		sane := p.Filesz < 1<<40 && p.Vaddr < 1<<56 && p.Off < 1<<56
		if p.Type == elf.PT_LOAD && p.Flags&elf.PF_X != 0 && sane && len(segments) < maxSegments {
			segments = append(segments, p)
		}
	}
	return segments
}

// text reads code around [address-before, address+after), cut at the segment's borders.
func (s *scanner) text(address, before, after uint64) (code []byte, base uint64) {
	p := s.executable(address)
	if p == nil {
		return nil, 0
	}
	start := address - min(before, address-p.Vaddr)
	size := min(address+after, p.Vaddr+p.Filesz) - start
	code = make([]byte, size)
	n, _ := p.ReadAt(code, int64(start-p.Vaddr))
	return code[:n], start
}
