package frames

import (
	"debug/dwarf"
	"fmt"
	"slices"
	"sort"
)

// DW_UT codes.
const (
	unitCompile      = 1
	unitType         = 2
	unitPartial      = 3
	unitSkeleton     = 4
	unitSplitCompile = 5
	unitSplitType    = 6
)

// Attributes that debug/dwarf does not name.
const (
	attrMIPSLinkageName = dwarf.Attr(0x2007)
	attrGNUDwoName      = dwarf.Attr(0x2130)
	attrGNUDwoID        = dwarf.Attr(0x2131)
	attrGNURangesBase   = dwarf.Attr(0x2132)
	attrGNUAddrBase     = dwarf.Attr(0x2133)
)

type unitHeader struct {
	off, end uint64 // in the section
	first    uint64 // of the first entry, relative to off
	abbrev   uint64
	kind     uint8
	id       uint64 // of a split unit, in version 5
	encoding
}

// unit is a compile unit whose bytes are in memory.
type unit struct {
	unitHeader
	d   *Data
	b   []byte // from off to end, or the beginning only when opened for its root entry
	abb *abbrevTable

	hasLow, hasLines, hasDwo bool
	low, lines               uint64
	high, ranges             value
	compDir, name            value
	dwoName                  value
	strOffsetsBase           uint64
	addrBase                 uint64
	rnglistsBase             uint64
	rangesBase               uint64 // GNU split DWARF 4: what DW_AT_ranges of the split unit is relative to
	rangeData                *Data  // whose .debug_ranges and .debug_addr count: for a split DWARF 4 unit, its skeleton's
}

const headerSize = 48 // no unit header is longer

// readHeader parses the header at off.
func (d *Data) readHeader(off uint64) (unitHeader, error) {
	h := unitHeader{off: off}
	b, err := d.Info.View(off, min(headerSize, d.Info.Size()-min(off, d.Info.Size())), nil)
	if err != nil {
		return h, err
	}
	c := cursor{b: b}
	length, is64 := c.unitLength()
	h.is64 = is64
	start := off + uint64(c.p)
	if c.bad || length > d.Info.Size()-start || length == 0 {
		return h, fmt.Errorf("unit of %d bytes: %w", length, errDamaged)
	}
	h.end = start + length
	h.version = int(c.u16())
	if h.version < 2 || h.version > 5 {
		return h, fmt.Errorf("DWARF version %d: %w", h.version, errDamaged)
	}
	h.kind = unitCompile
	if h.version >= 5 {
		h.kind = c.u8()
		h.addrSize = int(c.u8())
		h.abbrev = c.offset(is64)
		switch h.kind {
		case unitSkeleton, unitSplitCompile:
			h.id = c.u64()
		case unitType, unitSplitType:
			c.skip(8)
			c.offset(is64)
		}
	} else {
		h.abbrev = c.offset(is64)
		h.addrSize = int(c.u8())
	}
	if c.bad || h.addrSize != 4 && h.addrSize != 8 {
		return h, fmt.Errorf("unit header: %w", errDamaged)
	}
	h.first = uint64(c.p)
	if off+h.first > h.end {
		return h, fmt.Errorf("unit header: %w", errDamaged)
	}
	return h, nil
}

const rootView = 4096 // enough for almost any unit's root entry

// openUnit reads the unit at off into the scratch buffer (the previous unit's bytes are gone), or only its beginning.
func (d *Data) openUnit(off uint64, whole bool) (*unit, error) {
	h, err := d.readHeader(off)
	if err != nil {
		return nil, err
	}
	n := h.end - h.off
	if !whole {
		n = min(n, rootView)
	}
	if err := d.checkUnitSize(n); err != nil {
		return nil, err
	}
	if uint64(cap(d.scratch)) < n {
		d.scratch = make([]byte, n+n/4)
	}
	u := &unit{unitHeader: h, d: d, b: d.scratch[:n], rangeData: d}
	if err := d.Info.Copy(u.b, off); err != nil {
		return nil, err
	}
	if err := u.readRoot(); err != nil {
		if !whole && h.end-h.off > rootView {
			return d.openUnit(off, true)
		}
		return nil, err
	}
	return u, nil
}

func (d *Data) checkUnitSize(n uint64) error {
	limit := d.MaxUnit
	if limit == 0 {
		limit = defaultMaxUnit
	}
	if n > limit {
		return fmt.Errorf("unit of %d bytes: more than the limit of %d", n, limit)
	}
	return d.spend(n)
}

func (d *Data) abbrevTable(off uint64, enc encoding) (*abbrevTable, error) {
	key := abbrevKey{off, enc}
	if t := d.abbrevs[key]; t != nil {
		return t, nil
	}
	t, buf, err := parseAbbrevs(d.Abbrev, off, enc, d.abbrevBuf)
	d.abbrevBuf = buf
	if err != nil {
		return nil, fmt.Errorf("abbreviations at %#x: %w", off, err)
	}
	if err := d.spend(t.size); err != nil {
		return nil, err
	}
	if d.abbrevs == nil || d.abbrevSize+t.size > maxAbbrevCache {
		d.abbrevs, d.abbrevSize = map[abbrevKey]*abbrevTable{}, 0
	}
	d.abbrevs[key] = t
	d.abbrevSize += t.size
	return t, nil
}

// readRoot parses the unit's first entry.
func (u *unit) readRoot() error {
	var err error
	if u.abb, err = u.d.abbrevTable(u.abbrev, u.encoding); err != nil {
		return err
	}
	if u.version >= 5 { // where a split unit, which has no base attributes, finds its tables
		u.strOffsetsBase = uint64(2 * u.offsetSize())
		u.rnglistsBase = 12
		if u.is64 {
			u.rnglistsBase = 20
		}
	}
	c := cursor{b: u.b, p: int(u.first)}
	a := u.abb.get(c.uleb())
	if a == nil || c.bad {
		return fmt.Errorf("root entry: %w", errDamaged)
	}
	var low value
	for _, spec := range a.attrs {
		v := u.read(&c, spec)
		switch spec.attr {
		case dwarf.AttrLowpc:
			low = v
		case dwarf.AttrHighpc:
			u.high = v
		case dwarf.AttrRanges:
			u.ranges = v
		case dwarf.AttrStmtList:
			u.hasLines, u.lines = v.kind != kindNone, v.u
		case dwarf.AttrCompDir:
			u.compDir = v
		case dwarf.AttrName:
			u.name = v
		case dwarf.AttrStrOffsetsBase:
			u.strOffsetsBase = v.u
		case dwarf.AttrAddrBase, attrGNUAddrBase:
			u.addrBase = v.u
		case dwarf.AttrRnglistsBase:
			u.rnglistsBase = v.u
		case attrGNURangesBase:
			u.rangesBase = v.u
		case dwarf.AttrDwoName, attrGNUDwoName:
			u.dwoName, u.hasDwo = v, true
		case attrGNUDwoID:
			u.id = v.u
		}
	}
	if c.bad {
		return fmt.Errorf("root entry: %w", errDamaged)
	}
	if low.kind != kindNone {
		u.low, err = u.address(low)
		u.hasLow = err == nil
	}
	return nil
}

// isSkeleton tells whether the unit's entries are in another file.
func (u *unit) isSkeleton() bool {
	return u.kind == unitSkeleton || u.version < 5 && u.hasDwo && u.id != 0
}

// openSplit opens the unit that the skeleton u stands for.
func (u *unit) openSplit() (*unit, error) {
	name, err := u.text(u.dwoName)
	if err != nil {
		return nil, fmt.Errorf("name of the split unit: %w", err)
	}
	dir, err := u.text(u.compDir)
	if err != nil {
		dir = ""
	}
	if u.d.Split == nil {
		return nil, fmt.Errorf("split unit %s: nowhere to look for it", name)
	}
	d, err := u.d.Split(dir, name, u.id)
	if err != nil {
		return nil, err
	}
	d.work, d.maxWork, d.MaxUnit, d.Warn = 0, u.d.maxWork, u.d.MaxUnit, u.d.Warn
	for off := uint64(0); off < d.Info.Size(); {
		h, err := d.readHeader(off)
		if err != nil {
			return nil, fmt.Errorf("split unit %s: %w", name, err)
		}
		if h.kind == unitType || h.kind == unitSplitType {
			off = h.end
			continue
		}
		s, err := d.openUnit(off, true)
		if err != nil {
			return nil, fmt.Errorf("split unit %s: %w", name, err)
		}
		if s.id != u.id {
			off = h.end
			continue
		}
		s.addrBase, s.low, s.hasLow = u.addrBase, u.low, u.hasLow
		if s.version < 5 {
			s.strOffsetsBase = 0
		}
		s.rangesBase = u.rangesBase
		s.rangeData = u.d
		return s, nil
	}
	return nil, fmt.Errorf("split unit %s: no unit with id %016x: it is of another build", name, u.id)
}

// A value's kind says how to read it.
const (
	kindNone = iota
	kindConst
	kindAddr
	kindAddrx
	kindString  // u is an offset in the unit's bytes
	kindStrp    // .debug_str
	kindLineStr // .debug_line_str
	kindStrAlt  // .debug_str of the alternate file
	kindStrx
	kindRef // offset in .debug_info
	kindRefAlt
	kindOffset
	kindRnglistx
	kindOther
)

type value struct {
	kind uint8
	u    uint64
}

// read parses one attribute value.
func (u *unit) read(c *cursor, spec attrSpec) value {
	form := spec.form
	if form == formIndirect {
		form = uint32(c.uleb())
		if form == formIndirect || form == formImplicitConst {
			c.fail()
			return value{}
		}
	}
	switch form {
	case formAddr:
		return value{kindAddr, c.uint(u.addrSize)}
	case formData1, formFlag:
		return value{kindConst, uint64(c.u8())}
	case formData2:
		return value{kindConst, uint64(c.u16())}
	case formData4:
		return value{kindConst, uint64(c.u32())}
	case formData8:
		return value{kindConst, c.u64()}
	case formUdata:
		return value{kindConst, c.uleb()}
	case formSdata:
		return value{kindConst, uint64(c.sleb())}
	case formImplicitConst:
		return value{kindConst, uint64(spec.implicit)}
	case formFlagPresent:
		return value{kindConst, 1}
	case formString:
		at := uint64(c.p)
		c.skipString()
		return value{kindString, at}
	case formStrp:
		return value{kindStrp, c.offset(u.is64)}
	case formLineStrp:
		return value{kindLineStr, c.offset(u.is64)}
	case formGNUStrpAlt, formStrpSup:
		return value{kindStrAlt, c.offset(u.is64)}
	case formStrx, formGNUStrIndex:
		return value{kindStrx, c.uleb()}
	case formStrx1, formStrx2, formStrx3, formStrx4:
		return value{kindStrx, c.uint(int(form-formStrx1) + 1)}
	case formAddrx, formGNUAddrIndex:
		return value{kindAddrx, c.uleb()}
	case formAddrx1, formAddrx2, formAddrx3, formAddrx4:
		return value{kindAddrx, c.uint(int(form-formAddrx1) + 1)}
	case formRef1, formRef2, formRef4, formRef8:
		return value{kindRef, u.off + c.uint(1<<(form-formRef1))}
	case formRefUdata:
		return value{kindRef, u.off + c.uleb()}
	case formRefAddr:
		return value{kindRef, c.uint(u.fixedSize(form))}
	case formGNURefAlt:
		return value{kindRefAlt, c.offset(u.is64)}
	case formRefSup4:
		return value{kindRefAlt, uint64(c.u32())}
	case formRefSup8:
		return value{kindRefAlt, c.u64()}
	case formSecOffset:
		return value{kindOffset, c.offset(u.is64)}
	case formRnglistx:
		return value{kindRnglistx, c.uleb()}
	}
	u.skipForm(c, form)
	return value{kindOther, 0}
}

// address returns an address attribute's value.
func (u *unit) address(v value) (uint64, error) {
	switch v.kind {
	case kindAddr:
		return v.u, nil
	case kindAddrx:
		return u.indexedAddress(v.u)
	}
	return 0, errDamaged
}

func (u *unit) indexedAddress(index uint64) (uint64, error) {
	if index > 1<<40 {
		return 0, errDamaged
	}
	b, err := u.rangeData.Addr.View(u.addrBase+index*uint64(u.addrSize), uint64(u.addrSize), nil)
	if err != nil {
		return 0, fmt.Errorf("address %d of .debug_addr: %w", index, err)
	}
	c := cursor{b: b}
	return c.uint(u.addrSize), nil
}

// ref returns where a string attribute's text lies.
func (u *unit) ref(v value) stringRef {
	switch v.kind {
	case kindString:
		c := cursor{b: u.b, p: int(v.u)}
		return stringRef{s: c.str()}
	case kindStrp:
		return stringRef{sec: u.d.Str, off: v.u}
	case kindLineStr:
		return stringRef{sec: u.d.LineStr, off: v.u}
	case kindStrAlt:
		if u.d.Alt != nil {
			return stringRef{sec: u.d.Alt.Str, off: v.u}
		}
	case kindStrx:
		n := uint64(u.offsetSize())
		if v.u > 1<<40 {
			return stringRef{}
		}
		b, err := u.d.StrOffsets.View(u.strOffsetsBase+v.u*n, n, nil)
		if err != nil {
			return stringRef{}
		}
		c := cursor{b: b}
		return stringRef{sec: u.d.Str, off: c.offset(u.is64)}
	}
	return stringRef{}
}

func (u *unit) text(v value) (string, error) {
	r := u.ref(v)
	if r.sec == nil {
		return r.s, nil
	}
	return r.sec.String(r.off)
}

// other returns the unit that contains the entry at off, which a reference from elsewhere names.
func (d *Data) other(off uint64) (*unit, error) {
	for _, u := range slices.Backward(d.others) {
		if off >= u.off && off < u.end {
			return u, nil
		}
	}
	h, err := d.headerOf(off)
	if err != nil {
		return nil, err
	}
	n := h.end - h.off
	if err := d.checkUnitSize(n); err != nil {
		return nil, err
	}
	u := &unit{unitHeader: h, d: d, b: make([]byte, n), rangeData: d}
	if err := d.Info.Copy(u.b, h.off); err != nil {
		return nil, err
	}
	if err := u.readRoot(); err != nil {
		return nil, err
	}
	total := n
	for i := len(d.others) - 1; i >= 0; i-- {
		total += uint64(len(d.others[i].b))
		if total > defaultMaxUnit/4 || len(d.others)-i >= maxOthers {
			d.others = slices.Clone(d.others[i+1:])
			break
		}
	}
	d.others = append(d.others, u)
	return u, nil
}

// headerOf finds the unit around off by walking the headers, once for all.
func (d *Data) headerOf(off uint64) (unitHeader, error) {
	if off >= d.Info.Size() {
		return unitHeader{}, fmt.Errorf("reference to %#x: %w", off, errDamaged)
	}
	for d.headersEnd <= off {
		h, err := d.readHeader(d.headersEnd)
		if err != nil {
			return unitHeader{}, err
		}
		if err := d.spend(headerSize); err != nil {
			return unitHeader{}, err
		}
		d.headers = append(d.headers, h)
		d.headersEnd = h.end
	}
	i := sort.Search(len(d.headers), func(i int) bool { return d.headers[i].end > off })
	return d.headers[i], nil
}

const maxReferences = 16 // in a chain from a concrete function to its name

// function returns the name of the entry at off, which v (of unit u) may refer to through others.
func (u *unit) function(off uint64) *function {
	if f := u.d.functions[off]; f != nil {
		return f
	}
	f := &function{}
	if u.d.functions == nil {
		u.d.functions = map[uint64]*function{}
	}
	u.d.functions[off] = f
	at := u
	for range maxReferences {
		next, nextUnit, err := at.readFunction(off, f)
		if err != nil {
			u.d.warn(fmt.Errorf("function entry at %#x: %w", off, err))
			return f
		}
		if nextUnit == nil || !f.linkage.empty() && f.startLine != 0 {
			return f
		}
		at, off = nextUnit, next
	}
	return f
}

// readFunction adds what the entry at off says and returns the entry it refers to.
func (u *unit) readFunction(off uint64, f *function) (uint64, *unit, error) {
	if off < u.off+u.first || off >= u.off+uint64(len(u.b)) {
		return 0, nil, errDamaged
	}
	c := cursor{b: u.b, p: int(off - u.off)}
	a := u.abb.get(c.uleb())
	if a == nil {
		return 0, nil, errDamaged
	}
	var to value
	for _, spec := range a.attrs {
		v := u.read(&c, spec)
		switch spec.attr {
		case dwarf.AttrLinkageName, attrMIPSLinkageName:
			if f.linkage.empty() {
				f.linkage = u.ref(v)
			}
		case dwarf.AttrName:
			if f.name.empty() {
				f.name = u.ref(v)
			}
		case dwarf.AttrDeclLine:
			if f.startLine == 0 {
				f.startLine = clampLine(v.u)
			}
		case dwarf.AttrAbstractOrigin, dwarf.AttrSpecification:
			to = v
		}
	}
	if c.bad {
		return 0, nil, errDamaged
	}
	if err := u.d.spend(uint64(c.p) - (off - u.off)); err != nil {
		return 0, nil, err
	}
	switch to.kind {
	case kindRef:
		if to.u >= u.off && to.u < u.end {
			return to.u, u, nil
		}
		next, err := u.d.other(to.u)
		return to.u, next, err
	case kindRefAlt:
		if u.d.Alt == nil {
			return 0, nil, nil
		}
		next, err := u.d.Alt.other(to.u)
		return to.u, next, err
	}
	return 0, nil, nil
}

func clampLine(v uint64) int {
	if v > 1<<31-1 {
		return 0
	}
	return int(v)
}
