package frames

import (
	"fmt"
	"path"
	"sort"
)

// lineTable is the line number program of one unit.
type lineTable struct {
	u *unit
	encoding
	program               []byte
	minInst               uint64
	lineBase              int64
	lineRange, opcodeBase uint64
	operands              []byte // of the standard opcodes
	dirs                  []value
	files                 []fileEntry
	header                []byte // where inline strings of dirs and files lie
	paths                 map[uint64]string
	firstFile             uint64
}

type fileEntry struct {
	name value
	dir  uint64
}

const (
	maxLineTable = 64 << 20
	maxFiles     = 1 << 20
)

// DW_LNCT codes.
const (
	lnctPath = 1
	lnctDir  = 2
)

// openLines parses the header of the unit's line table; nil without error when there is none.
func (u *unit) openLines() (*lineTable, error) {
	if !u.hasLines {
		return nil, nil
	}
	sec := u.d.Line
	b, err := sec.View(u.lines, min(32, sec.Size()-min(sec.Size(), u.lines)), nil)
	if err != nil {
		return nil, err
	}
	c := cursor{b: b}
	length, is64 := c.unitLength()
	n := uint64(c.p) + length
	if c.bad || length > sec.Size() || n > sec.Size()-u.lines || n > maxLineTable {
		return nil, fmt.Errorf("line table of %d bytes: %w", length, errDamaged)
	}
	if err := u.d.spend(n); err != nil {
		return nil, err
	}
	if uint64(cap(u.d.lineBuf)) < n {
		u.d.lineBuf = make([]byte, n+n/4)
	}
	b = u.d.lineBuf[:n]
	if err := sec.Copy(b, u.lines); err != nil {
		return nil, err
	}
	c = cursor{b: b, p: c.p}
	t := &lineTable{u: u, encoding: encoding{addrSize: u.addrSize, is64: is64}, header: b, paths: map[uint64]string{}}
	return t, t.readHeader(&c)
}

func (t *lineTable) readHeader(c *cursor) error {
	t.version = int(c.u16())
	if t.version < 2 || t.version > 5 {
		return fmt.Errorf("line table version %d: %w", t.version, errDamaged)
	}
	if t.version >= 5 {
		t.addrSize = int(c.u8())
		c.u8() // segment selector size
	}
	headerLength := c.offset(t.is64)
	if c.bad || headerLength > uint64(len(c.b)-c.p) {
		return errDamaged
	}
	t.program = c.b[c.p+int(headerLength):]
	t.minInst = uint64(c.u8())
	if t.version >= 4 {
		c.u8() // operations per VLIW instruction
	}
	c.u8() // default is_stmt
	t.lineBase = int64(int8(c.u8()))
	t.lineRange = uint64(c.u8())
	t.opcodeBase = uint64(c.u8())
	if c.bad || t.lineRange == 0 || t.opcodeBase == 0 {
		return errDamaged
	}
	t.operands = c.take(int(t.opcodeBase) - 1)
	if t.version >= 5 {
		return t.readTablesV5(c)
	}
	return t.readTablesV2(c)
}

func (t *lineTable) readTablesV2(c *cursor) error {
	t.firstFile = 1
	t.dirs = append(t.dirs, value{}) // directory 0 is the unit's
	for {
		at := c.p
		c.skipString()
		if c.bad {
			return errDamaged
		}
		if c.p == at+1 {
			break
		}
		t.dirs = append(t.dirs, value{kindString, uint64(at)})
		if len(t.dirs) > maxFiles {
			return errDamaged
		}
	}
	for {
		at := c.p
		c.skipString()
		if c.bad {
			return errDamaged
		}
		if c.p == at+1 {
			return nil
		}
		t.files = append(t.files, fileEntry{value{kindString, uint64(at)}, c.uleb()})
		c.uleb()
		c.uleb()
		if len(t.files) > maxFiles {
			return errDamaged
		}
	}
}

func (t *lineTable) readTablesV5(c *cursor) error {
	dirs, err := t.readEntries(c)
	if err != nil {
		return err
	}
	for _, d := range dirs {
		t.dirs = append(t.dirs, d.name)
	}
	t.files, err = t.readEntries(c)
	return err
}

func (t *lineTable) readEntries(c *cursor) ([]fileEntry, error) {
	type format struct{ content, form uint64 }
	formats := make([]format, c.u8())
	for i := range formats {
		formats[i] = format{c.uleb(), c.uleb()}
	}
	n := c.uleb()
	if c.bad || n > maxFiles || n > uint64(len(c.b)) {
		return nil, errDamaged
	}
	// Values are parsed with the unit's encoding but for the offset size, which is the table's.
	u := *t.u
	u.is64 = t.is64
	var entries []fileEntry
	for range n {
		var e fileEntry
		at := c.p
		for _, f := range formats {
			v := u.read(c, attrSpec{form: uint32(f.form)})
			switch f.content {
			case lnctPath:
				e.name = v
			case lnctDir:
				e.dir = v.u
			}
		}
		if c.bad || c.p == at {
			return nil, errDamaged
		}
		entries = append(entries, e)
	}
	return entries, nil
}

func (t *lineTable) text(v value) string {
	if v.kind == kindString {
		c := cursor{b: t.header, p: int(v.u)}
		return c.str()
	}
	s, err := t.u.text(v)
	if err != nil {
		t.u.d.warn(fmt.Errorf("read file name: %w", err))
	}
	return s
}

// path returns the absolute path of a file of the table; empty when there is no such file.
func (t *lineTable) path(index uint64) string {
	if p, ok := t.paths[index]; ok {
		return p
	}
	var p string
	if i := index - t.firstFile; i < uint64(len(t.files)) {
		f := t.files[i]
		p = t.text(f.name)
		if !path.IsAbs(p) {
			p = path.Join(t.dir(f.dir), p)
		} else {
			p = path.Clean(p)
		}
	}
	if t.u.d.spend(uint64(len(p))) != nil {
		p = ""
	}
	t.paths[index] = p
	return p
}

func (t *lineTable) dir(index uint64) string {
	var dir string
	if index < uint64(len(t.dirs)) && t.dirs[index].kind != kindNone {
		dir = t.text(t.dirs[index])
	}
	if path.IsAbs(dir) {
		return dir
	}
	compDir, err := t.u.text(t.u.compDir)
	if err != nil {
		t.u.d.warn(fmt.Errorf("read compilation directory: %w", err))
	}
	return path.Join(compDir, dir)
}

// row is a line of the table; it holds from its address up to the next row's.
type row struct {
	addr, file uint64
	line       int64
}

// matcher assigns rows to the sorted addresses as they come.
type matcher struct {
	addrs []uint64
	rows  []row
	found []bool
	next  int // first address that the sequence has not passed
	prev  row
	open  bool // within a sequence
	dead  bool // of a function that the linker dropped
}

func (m *matcher) emit(r row, end bool) {
	if !m.open {
		m.open, m.dead = true, dead(r.addr)
		m.seek(r.addr)
	} else if !m.dead {
		if r.addr < m.prev.addr {
			m.seek(r.addr)
		}
		for m.next < len(m.addrs) && m.addrs[m.next] < r.addr {
			if !m.found[m.next] && m.addrs[m.next] >= m.prev.addr {
				m.found[m.next], m.rows[m.next] = true, m.prev
			}
			m.next++
		}
	}
	m.prev = r
	if end {
		m.open = false
	}
}

func (m *matcher) seek(addr uint64) {
	m.next = sort.Search(len(m.addrs), func(i int) bool { return m.addrs[i] >= addr })
}

// run executes the program and fills the places of the addresses.
func (t *lineTable) run(addrs []uint64, out []*located) error {
	m := matcher{addrs: addrs, rows: make([]row, len(addrs)), found: make([]bool, len(addrs))}
	err := t.execute(&m)
	for i, l := range out {
		if m.found[i] {
			l.hasLine, l.file, l.line = true, t.path(m.rows[i].file), clampLine(uint64(m.rows[i].line))
		}
	}
	return err
}

// Opcodes of the line number program.
const (
	lnsCopy           = 1
	lnsAdvancePC      = 2
	lnsAdvanceLine    = 3
	lnsSetFile        = 4
	lnsConstAddPC     = 8
	lnsFixedAdvancePC = 9
	lneEndSequence    = 1
	lneSetAddress     = 2
	lneDefineFile     = 3
)

func (t *lineTable) execute(m *matcher) error {
	c := cursor{b: t.program}
	start := row{file: 1, line: 1}
	r := start
	for c.p < len(c.b) {
		op := uint64(c.u8())
		if op >= t.opcodeBase {
			op -= t.opcodeBase
			r.addr += op / t.lineRange * t.minInst
			r.line += t.lineBase + int64(op%t.lineRange)
			m.emit(r, false)
			continue
		}
		switch op {
		case 0:
			if t.extended(&c, &r, m) {
				r = start
			}
		case lnsCopy:
			m.emit(r, false)
		case lnsAdvancePC:
			r.addr += c.uleb() * t.minInst
		case lnsAdvanceLine:
			r.line += c.sleb()
		case lnsSetFile:
			r.file = c.uleb()
		case lnsConstAddPC:
			r.addr += (255 - t.opcodeBase) / t.lineRange * t.minInst
		case lnsFixedAdvancePC:
			r.addr += uint64(c.u16())
		default:
			for range t.operands[op-1] {
				c.uleb()
			}
		}
		if c.bad {
			return errDamaged
		}
	}
	return nil
}

// extended executes an extended opcode and reports the end of a sequence.
func (t *lineTable) extended(c *cursor, r *row, m *matcher) bool {
	n := c.uleb()
	if n == 0 || n > uint64(len(c.b)-c.p) {
		if n != 0 {
			c.fail()
		}
		return false
	}
	sub := cursor{b: c.take(int(n))}
	switch sub.u8() {
	case lneEndSequence:
		m.emit(*r, true)
		return true
	case lneSetAddress:
		r.addr = sub.uint(len(sub.b) - 1)
	case lneDefineFile:
		// The name's place in the header's buffer: the program is its tail.
		at := len(t.header) - len(t.program) + c.p - int(n) + sub.p
		sub.skipString()
		if len(t.files) > maxFiles {
			c.fail()
			return false
		}
		t.files = append(t.files, fileEntry{value{kindString, uint64(at)}, sub.uleb()})
	}
	return false
}
