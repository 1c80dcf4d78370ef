package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/allocsnoop/allocsnoop/symbolize/frames"
	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

func sectionsByName(s *frames.Sections) map[string]**section.Section {
	return map[string]**section.Section{
		".debug_info": &s.Info, ".debug_abbrev": &s.Abbrev, ".debug_line": &s.Line, ".debug_str": &s.Str,
		".debug_line_str": &s.LineStr, ".debug_addr": &s.Addr, ".debug_str_offsets": &s.StrOffsets,
		".debug_ranges": &s.Ranges, ".debug_rnglists": &s.Rnglists, ".debug_aranges": &s.Aranges,
	}
}

func closeSections(d *frames.Data) {
	for _, s := range sectionsByName(&d.Sections) {
		(*s).Close()
	}
}

// splitFinder opens the split units of one object: from its .dwp package if there is one, else from the .dwo files.
type splitFinder struct {
	r        *resolver
	skeleton *frames.Data
	opened   *object // the last .dwo
	data     *frames.Data
	dwp      *object
	looked   bool // for the .dwp
	packages *frames.Data
	index    map[uint64]contribution
}

// Close releases what find returned last.
func (f *splitFinder) Close() error {
	f.closeUnit()
	if f.packages != nil {
		closeSections(f.packages)
	}
	return f.dwp.Close()
}

func (f *splitFinder) closeUnit() {
	if f.data != nil {
		closeSections(f.data)
	}
	f.opened.Close()
	f.opened, f.data = nil, nil
}

// find returns the split unit's DWARF, which is valid until the next call.
func (f *splitFinder) find(compDir, name string, id uint64) (*frames.Data, error) {
	f.closeUnit()
	if !f.looked {
		f.looked = true
		f.openPackage()
	}
	if c, ok := f.index[id]; ok {
		return f.fromPackage(c)
	}
	path := name
	if !filepath.IsAbs(path) {
		path = filepath.Join(compDir, name)
	}
	beside := filepath.Join(filepath.Dir(f.r.debug.path), filepath.Base(name))
	o, err := openPath(path)
	if err != nil {
		if o, err = openPath(beside); err != nil {
			return nil, fmt.Errorf("split unit %s: neither there nor at %s, nor in a .dwp file: %w", path, beside, err)
		}
	}
	f.opened = o
	f.data = f.r.openDWARF(o, ".dwo")
	f.data.NoInlines = f.skeleton.NoInlines
	return f.data, nil
}

// openPackage looks for the .dwp file beside the object or its debug file.
func (f *splitFinder) openPackage() {
	paths := []string{f.r.debug.path + ".dwp"}
	if f.r.object.Path != f.r.debug.path {
		paths = append(paths, f.r.object.Path+".dwp")
	}
	for _, d := range f.r.s.options.DebugDirs {
		paths = append(paths, filepath.Join(d, filepath.Base(f.r.object.Path)+".dwp"))
	}
	for _, p := range paths {
		o, err := openPath(p)
		if err != nil {
			continue
		}
		index := o.section(".debug_cu_index", f.r.warn)
		contributions, err := readUnitIndex(index)
		if err != nil {
			f.r.s.warn("read %s: %v", p, err)
			o.Close()
			continue
		}
		f.dwp, f.index = o, contributions
		f.packages = f.r.openDWARF(o, ".dwo")
		return
	}
}

// span is a part of a section.
type span struct{ off, size uint64 }

// contribution is a unit's parts of the sections of a package, by DW_SECT code.
type contribution map[uint32]span

// DW_SECT codes, version 5; 2 to 4 are what version 2 of the format has in the same places.
const (
	sectInfo       = 1
	sectAbbrev     = 3
	sectLine       = 4
	sectStrOffsets = 6
	sectRnglists   = 8
)

const maxUnitIndex = 64 << 20

var errUnitIndex = errors.New("damaged .debug_cu_index")

// readUnitIndex parses the hash table of a package.
func readUnitIndex(s *section.Section) (map[uint64]contribution, error) {
	if s.Size() < 16 || s.Size() > maxUnitIndex {
		return nil, errUnitIndex
	}
	b := make([]byte, s.Size())
	if err := s.Copy(b, 0); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	if v := le.Uint32(b); v != 2 && v != 5 && v != 2<<16|5 && le.Uint16(b) != 5 {
		return nil, fmt.Errorf("version %d: %w", v, errors.ErrUnsupported)
	}
	columns, units, slots := uint64(le.Uint32(b[4:])), uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:]))
	ids := uint64(16)
	rows := ids + 8*slots
	codes := rows + 4*slots
	offsets := codes + 4*columns
	sizes := offsets + 4*columns*units
	if columns > 32 || sizes+4*columns*units > uint64(len(b)) {
		return nil, errUnitIndex
	}
	index := map[uint64]contribution{}
	for i := range slots {
		row := uint64(le.Uint32(b[rows+4*i:]))
		if row == 0 || row > units {
			continue
		}
		c := contribution{}
		for k := range columns {
			at := 4 * ((row-1)*columns + k)
			c[le.Uint32(b[codes+4*k:])] = span{uint64(le.Uint32(b[offsets+at:])), uint64(le.Uint32(b[sizes+at:]))}
		}
		index[le.Uint64(b[ids+8*i:])] = c
	}
	return index, nil
}

func (f *splitFinder) fromPackage(c contribution) (*frames.Data, error) {
	p := f.packages
	d := &frames.Data{MaxUnit: p.MaxUnit, Warn: p.Warn, NoInlines: f.skeleton.NoInlines}
	d.Str, d.Addr = p.Str, p.Addr
	for _, part := range []struct {
		code uint32
		from *section.Section
		to   **section.Section
	}{
		{sectInfo, p.Info, &d.Info}, {sectAbbrev, p.Abbrev, &d.Abbrev}, {sectLine, p.Line, &d.Line},
		{sectStrOffsets, p.StrOffsets, &d.StrOffsets}, {sectRnglists, p.Rnglists, &d.Rnglists},
	} {
		place, ok := c[part.code]
		if !ok {
			continue
		}
		s, err := section.Slice(part.from, place.off, place.size)
		if err != nil {
			return nil, fmt.Errorf("unit in %s: %w", f.dwp.path, err)
		}
		*part.to = s
	}
	return d, nil
}
