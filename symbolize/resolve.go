package symbolize

import (
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize/frames"
)

// resolver is everything found about one object.
type resolver struct {
	s       *Symbolizer
	object  *Object
	main    *object // the object itself; nil when only a debug file was found
	debug   *object // with the DWARF or the full symbol table; may be main, may be nil
	closers []func() error
}

func (r *resolver) Close() error {
	var errs []error
	for _, c := range slices.Backward(r.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

func (r *resolver) own(o *object) *object {
	if o != nil {
		r.closers = append(r.closers, o.Close)
	}
	return o
}

func (r *resolver) warn(err error) { r.s.warn("%v", err) }

// open finds the files of an object.
func (s *Symbolizer) open(ctx context.Context, of *Object) (*resolver, error) {
	r := &resolver{s: s, object: of}
	if of.File != nil {
		o, err := openELF(of.File, of.Path)
		switch {
		case err != nil:
			s.warn("%v", err)
		case of.BuildID != "" && o.buildID != of.BuildID:
			s.warn("%s is not used: its build-id is %s, not %s", of.Path, orNone(o.buildID), of.BuildID)
		default:
			r.main = o
		}
	}
	id := of.BuildID
	if r.main == nil {
		r.main = r.own(s.findByID(id, ""))
	}
	if r.main == nil {
		r.main = r.own(s.findInDirs(id, func(o *object) bool { return !o.emptySegments() }))
	}
	if r.main != nil && id == "" {
		id = r.main.buildID
		of.BuildID = id
	}
	r.debug = r.main
	if r.main == nil || !r.main.has(".debug_info") {
		if d := r.own(s.findDebug(ctx, r.main, of.Path, id)); d != nil {
			r.debug = d
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// address turns a file offset into an address of the symbols and the DWARF.
func (r *resolver) address(offset uint64) (uint64, bool) {
	if r.main != nil {
		return r.main.address(offset)
	}
	if r.debug != nil {
		return r.debug.addressInDebugFile(offset, r.object.TextOffset, r.object.TextSize)
	}
	return 0, false
}

// resolve returns the lines of each offset.
func (r *resolver) resolve(ctx context.Context, offsets []uint64) ([][]profile.Line, error) {
	addrs := make([]uint64, 0, len(offsets))
	for _, off := range offsets {
		if a, ok := r.address(off); ok {
			addrs = append(addrs, a)
		}
	}
	slices.Sort(addrs)
	addrs = slices.Compact(addrs)
	known, err := r.resolveAddresses(ctx, addrs)
	if err != nil {
		return nil, err
	}
	out := make([][]profile.Line, len(offsets))
	for i, off := range offsets {
		if a, ok := r.address(off); ok {
			out[i] = slices.Clone(known[a])
		}
		if len(out[i]) == 0 {
			out[i] = []profile.Line{{}}
		}
		if len(out[i]) == 1 && out[i][0].SystemName == "" {
			unknown := r.object.Unknown(off)
			out[i][0].Function, out[i][0].SystemName = unknown.Function, unknown.SystemName
		}
	}
	return out, nil
}

func (r *resolver) resolveAddresses(ctx context.Context, addrs []uint64) (map[uint64][]profile.Line, error) {
	out := map[uint64][]profile.Line{}
	if len(addrs) == 0 {
		return out, nil
	}
	var stubs map[uint64]string
	if r.main != nil {
		stubs = r.main.pltNames(addrs, r.warn)
	}
	// Stubs are taken out first: the DWARF knows nothing of them but would be read in full to learn that.
	addrs = slices.DeleteFunc(addrs, func(a uint64) bool {
		if r.main == nil || r.main.pltSection(a) == nil {
			return false
		}
		if name := stubs[a]; name != "" {
			out[a] = []profile.Line{{Function: name, SystemName: name}}
		}
		return true
	})
	symbols := r.symbols(addrs)
	found, err := r.dwarf(ctx, addrs)
	if err != nil {
		return nil, err
	}
	for i, a := range addrs {
		var fs []frames.Frame
		if found != nil {
			fs = found[i]
		}
		if lines := compose(fs, symbols[i]); lines != nil {
			out[a] = lines
		}
	}
	return out, nil
}

// compose makes the lines of an address from its DWARF frames, innermost first, and its symbols.
func compose(fs []frames.Frame, symbols []symbol) []profile.Line {
	sym, hasSymbol := best(symbols)
	var lines []profile.Line
	for i, f := range fs {
		name := f.Function
		if i == len(fs)-1 {
			name = publicAlias(name, symbols)
		}
		line := profile.Line{Function: demangled(name), SystemName: name, File: f.File, Line: f.Line, StartLine: f.StartLine}
		if name == "" {
			if i < len(fs)-1 || !hasSymbol {
				line.Function, line.SystemName = "[no name]", ""
			} else {
				s := sym.line()
				line.Function, line.SystemName = s.Function, s.SystemName
			}
		}
		lines = append(lines, line)
	}
	if lines == nil && hasSymbol {
		return []profile.Line{sym.line()}
	}
	return lines
}

// symbols returns the symbols that cover each address, from every table there is.
func (r *resolver) symbols(addrs []uint64) [][]symbol {
	found := make([][]symbol, len(addrs))
	var tables []*symbolTable
	if r.debug != nil {
		tables = append(tables, r.debug.symbolTables(elf.SHT_SYMTAB, r.warn)...)
	}
	if r.main != nil && r.main != r.debug {
		tables = append(tables, r.main.symbolTables(elf.SHT_SYMTAB, r.warn)...)
	}
	if r.main != nil && len(tables) == 0 {
		mini, err := r.main.miniDebugInfo()
		if err != nil {
			r.warn(err)
		}
		if mini != nil {
			tables = append(tables, mini.symbolTables(elf.SHT_SYMTAB, r.warn)...)
		}
	}
	if r.main != nil {
		tables = append(tables, r.main.symbolTables(elf.SHT_DYNSYM, r.warn)...)
	}
	for _, t := range tables {
		if err := t.find(addrs, found); err != nil {
			r.warn(fmt.Errorf("read symbols of %s: %w", t.o.path, err))
		}
	}
	for _, t := range tables {
		r.sizeless(t, addrs, found)
	}
	return found
}

// sizeless tries the addresses without a symbol again.
func (r *resolver) sizeless(t *symbolTable, addrs []uint64, found [][]symbol) {
	var missing []uint64
	var at []int
	for i, f := range found {
		if len(f) == 0 {
			missing, at = append(missing, addrs[i]), append(at, i)
		}
	}
	if missing == nil {
		return
	}
	guesses := make([][]symbol, len(missing))
	if err := t.findSizeless(missing, guesses); err != nil {
		r.warn(fmt.Errorf("read symbols of %s: %w", t.o.path, err))
	}
	for k, g := range guesses {
		found[at[k]] = g
	}
}

const bigDebugInfo = 32 << 20 // of one object: then no other is read at the same time

// dwarf returns the frames of each address; nil when there is no DWARF that can be read.
func (r *resolver) dwarf(ctx context.Context, addrs []uint64) ([][]frames.Frame, error) {
	if r.debug == nil || len(addrs) == 0 || !r.debug.has(".debug_info") {
		return nil, nil
	}
	data := r.openDWARF(r.debug, "")
	defer closeSections(data)
	if data.Info.Size() > bigDebugInfo {
		r.s.big.Lock()
		defer r.s.big.Unlock()
	}
	if alt := r.s.findAlt(r.debug); alt != nil {
		r.own(alt)
		data.Alt = r.openDWARF(alt, "")
		defer closeSections(data.Alt)
	}
	split := &splitFinder{r: r, skeleton: data}
	defer split.Close()
	data.Split = split.find
	data.NoInlines = r.s.options.NoInlines
	found, err := data.Lookup(ctx, addrs)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		r.s.warn("%s: %v: names come from symbols", r.debug.path, err)
	}
	return found, nil
}

// openDWARF opens the sections of a file; suffix is ".dwo" for those of a split unit.
func (r *resolver) openDWARF(o *object, suffix string) *frames.Data {
	d := &frames.Data{MaxUnit: r.s.options.MaxMemory / 2}
	d.Warn = func(err error) { r.s.warn("%s: %v", filepath.Base(o.path), err) }
	for name, sec := range sectionsByName(&d.Sections) {
		*sec = o.section(name+suffix, d.Warn)
	}
	return d
}
