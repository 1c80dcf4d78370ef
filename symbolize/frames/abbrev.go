package frames

import (
	"debug/dwarf"

	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

// DW_FORM codes.
const (
	formAddr          = 0x01
	formBlock2        = 0x03
	formBlock4        = 0x04
	formData2         = 0x05
	formData4         = 0x06
	formData8         = 0x07
	formString        = 0x08
	formBlock         = 0x09
	formBlock1        = 0x0a
	formData1         = 0x0b
	formFlag          = 0x0c
	formSdata         = 0x0d
	formStrp          = 0x0e
	formUdata         = 0x0f
	formRefAddr       = 0x10
	formRef1          = 0x11
	formRef2          = 0x12
	formRef4          = 0x13
	formRef8          = 0x14
	formRefUdata      = 0x15
	formIndirect      = 0x16
	formSecOffset     = 0x17
	formExprloc       = 0x18
	formFlagPresent   = 0x19
	formStrx          = 0x1a
	formAddrx         = 0x1b
	formRefSup4       = 0x1c
	formStrpSup       = 0x1d
	formData16        = 0x1e
	formLineStrp      = 0x1f
	formRefSig8       = 0x20
	formImplicitConst = 0x21
	formLoclistx      = 0x22
	formRnglistx      = 0x23
	formRefSup8       = 0x24
	formStrx1         = 0x25
	formStrx2         = 0x26
	formStrx3         = 0x27
	formStrx4         = 0x28
	formAddrx1        = 0x29
	formAddrx2        = 0x2a
	formAddrx3        = 0x2b
	formAddrx4        = 0x2c
	formGNUAddrIndex  = 0x1f01
	formGNUStrIndex   = 0x1f02
	formGNURefAlt     = 0x1f20
	formGNUStrpAlt    = 0x1f21
)

type attrSpec struct {
	attr     dwarf.Attr
	form     uint32
	implicit int64
}

type abbrev struct {
	tag      dwarf.Tag
	children bool
	attrs    []attrSpec
	skips    []skipOp
}

// skipOp passes fixed bytes, then one attribute of the variable form.
type skipOp struct {
	fixed uint32
	form  uint32 // 0 for none
}

// encoding is what the size of a form depends on.
type encoding struct {
	version  int
	addrSize int
	is64     bool
}

func (e encoding) offsetSize() int {
	if e.is64 {
		return 8
	}
	return 4
}

// fixedSize returns the size of a form that always has the same, or -1.
func (e encoding) fixedSize(form uint32) int {
	switch form {
	case formFlagPresent, formImplicitConst:
		return 0
	case formData1, formFlag, formRef1, formStrx1, formAddrx1:
		return 1
	case formData2, formRef2, formStrx2, formAddrx2:
		return 2
	case formStrx3, formAddrx3:
		return 3
	case formData4, formRef4, formRefSup4, formStrx4, formAddrx4:
		return 4
	case formData8, formRef8, formRefSig8, formRefSup8:
		return 8
	case formData16:
		return 16
	case formAddr:
		return e.addrSize
	case formRefAddr:
		if e.version <= 2 {
			return e.addrSize
		}
		return e.offsetSize()
	case formStrp, formSecOffset, formLineStrp, formStrpSup, formGNURefAlt, formGNUStrpAlt:
		return e.offsetSize()
	}
	return -1
}

// skipForm passes one attribute value of a variable-sized form.
func (e encoding) skipForm(c *cursor, form uint32) {
	for range 4 { // indirect forms may nest, but nobody's do
		if n := e.fixedSize(form); n >= 0 {
			c.skip(uint64(n))
			return
		}
		switch form {
		case formString:
			c.skipString()
		case formBlock, formExprloc:
			c.skip(c.uleb())
		case formBlock1:
			c.skip(uint64(c.u8()))
		case formBlock2:
			c.skip(uint64(c.u16()))
		case formBlock4:
			c.skip(uint64(c.u32()))
		case formSdata, formUdata, formRefUdata, formStrx, formAddrx, formLoclistx, formRnglistx, formGNUAddrIndex, formGNUStrIndex:
			c.uleb()
		case formIndirect:
			form = uint32(c.uleb())
			continue
		default:
			c.fail()
		}
		return
	}
	c.fail()
}

// abbrevTable maps the codes of one table; compilers number them densely from 1.
type abbrevTable struct {
	dense  []abbrev
	sparse map[uint64]*abbrev
	size   uint64
}

func (t *abbrevTable) get(code uint64) *abbrev {
	if code-1 < uint64(len(t.dense)) {
		return &t.dense[code-1]
	}
	return t.sparse[code]
}

const (
	abbrevChunk = 64 << 10 // the first guess at a table's size
	maxAbbrev   = 2 << 20  // a larger table is nonsense
)

func parseAbbrevs(s *section.Section, off uint64, enc encoding, buf []byte) (*abbrevTable, []byte, error) {
	if off >= s.Size() {
		return nil, buf, errDamaged
	}
	for n := uint64(abbrevChunk); ; n *= 8 {
		n = min(n, s.Size()-off)
		b, err := s.View(off, n, buf)
		if err != nil {
			return nil, buf, err
		}
		t, ok := parseAbbrevTable(b, enc)
		if ok {
			return t, buf, nil
		}
		if n == s.Size()-off || n >= maxAbbrev {
			return nil, buf, errDamaged
		}
	}
}

// parseAbbrevTable reports false when the table does not end within b.
func parseAbbrevTable(b []byte, enc encoding) (*abbrevTable, bool) {
	c := cursor{b: b}
	t := &abbrevTable{}
	var specs []attrSpec
	var ops []skipOp
	for {
		code := c.uleb()
		if c.bad {
			return nil, false
		}
		if code == 0 {
			t.size = uint64(c.p)
			return t, true
		}
		a := abbrev{tag: dwarf.Tag(c.uleb()), children: c.u8() != 0}
		firstSpec, firstOp := len(specs), len(ops)
		fixed := 0
		for {
			spec := attrSpec{attr: dwarf.Attr(c.uleb()), form: uint32(c.uleb())}
			if spec.form == formImplicitConst {
				spec.implicit = c.sleb()
			}
			if c.bad {
				return nil, false
			}
			if spec.attr == 0 && spec.form == 0 {
				break
			}
			specs = append(specs, spec)
			if n := enc.fixedSize(spec.form); n >= 0 {
				fixed += n
				continue
			}
			ops = append(ops, skipOp{uint32(fixed), spec.form})
			fixed = 0
		}
		if fixed > 0 {
			ops = append(ops, skipOp{uint32(fixed), 0})
		}
		a.attrs, a.skips = specs[firstSpec:len(specs):len(specs)], ops[firstOp:len(ops):len(ops)]
		t.add(code, a)
	}
}

func (t *abbrevTable) add(code uint64, a abbrev) {
	if code == uint64(len(t.dense))+1 && t.sparse[code] == nil {
		t.dense = append(t.dense, a)
		return
	}
	if t.sparse == nil {
		t.sparse = map[uint64]*abbrev{}
	}
	if t.get(code) == nil { // the first declaration of a code counts
		t.sparse[code] = &a
	}
}

func (e encoding) skipAttrs(c *cursor, a *abbrev) {
	for _, op := range a.skips {
		c.skip(uint64(op.fixed))
		if op.form != 0 {
			e.skipForm(c, op.form)
		}
	}
}
