package ehframe

import (
	"debug/elf"
	"encoding/binary"
	"math"
	"slices"
)

// The library keeps the rule before, or says "root of the stack", where it meets an expression that it does not know,
// and takes a frame pointer that is in another register for unchanged. Any of these makes silently wrong stacks, so that
// misunderstood finds the functions whose frame description holds such a thing; they get no rule at all. It reads
// .eh_frame on its own, and no further than it needs to.
func misunderstood(f *elf.File) []span {
	if f.Machine != elf.EM_X86_64 {
		return nil
	}
	s := f.Section(".eh_frame")
	if s == nil || s.Type == elf.SHT_NOBITS || s.Size > maxFrameSection {
		return nil
	}
	b, err := s.Data()
	if err != nil {
		return nil
	}
	var spans []span
	cies := map[int]cie{}
	for at := 0; at+8 <= len(b); {
		size := int(binary.LittleEndian.Uint32(b[at:]))
		if size == 0 || size >= 0xfffffff0 || size < 4 || at+4+size > len(b) {
			break // the end, or the 64-bit form, which no compiler writes
		}
		body := b[at+4 : at+4+size]
		if id := int(binary.LittleEndian.Uint32(body)); id != 0 {
			start := at + 4 - id
			c, ok := cies[start]
			if !ok {
				c = parseCIE(b, start)
				cies[start] = c
			}
			if sp, ok := c.fde(body[4:], s.Addr+uint64(at)+8); ok {
				spans = append(spans, sp)
			}
		}
		at += 4 + size
	}
	slices.SortFunc(spans, func(a, b span) int {
		switch {
		case a.start < b.start:
			return -1
		case a.start > b.start:
			return 1
		}
		return 0
	})
	return spans
}

// maxFrameSection is far above the real ones: that of a browser has 30 MB.
const maxFrameSection = 512 << 20

type span struct{ start, end uint64 }

// within tells whether a span holds the address; they are sorted and functions do not overlap.
func within(spans []span, vaddr uint64) bool {
	i, found := slices.BinarySearchFunc(spans, vaddr, func(s span, v uint64) int {
		switch {
		case s.end <= v:
			return -1
		case s.start > v:
			return 1
		}
		return 0
	})
	return found && spans[i].start <= vaddr
}

// cie is what the description of a function needs to know of its common part.
type cie struct {
	ok         bool
	augmented  bool
	pcRelative bool // 32-bit offsets from where they stand: what compilers write; others are left alone
	signal     bool
	program    codes
}

// codes is what a list of call frame instructions holds: something misunderstood, or an instruction not known here.
type codes struct{ wrong, unknown bool }

func parseCIE(b []byte, at int) (c cie) {
	if at < 0 || at+8 > len(b) {
		return c
	}
	size := int(binary.LittleEndian.Uint32(b[at:]))
	if size < 6 || at+4+size > len(b) || binary.LittleEndian.Uint32(b[at+4:]) != 0 {
		return c
	}
	r := bytesReader{b: b[at+8 : at+4+size]}
	version := r.byte()
	text := r.text()
	r.uleb() // code alignment
	r.uleb() // data alignment, signed: as long
	if version == 1 {
		r.byte() // the return address's register
	} else {
		r.uleb()
	}
	if len(text) > 0 && text[0] == 'z' {
		c.augmented = true
		rest := bytesReader{b: r.take(r.uleb())}
		for _, ch := range text[1:] {
			switch ch {
			case 'R':
				c.pcRelative = rest.byte() == 0x1b
			case 'L':
				rest.byte()
			case 'P':
				rest.take(pointerSize(rest.byte()))
			case 'S':
				c.signal = true
			}
		}
		r.bad = r.bad || rest.bad
	}
	c.program = scan(&r)
	c.ok = !r.bad && !c.program.unknown
	return c
}

// pointerSize is that of an encoded pointer; variable-length ones do not occur for personalities.
func pointerSize(encoding byte) uint64 {
	switch encoding & 0x07 {
	case 2:
		return 2
	case 3:
		return 4
	}
	return 8
}

// fde is the function's range when its description would be misunderstood. where is the address of body.
func (c cie) fde(body []byte, where uint64) (span, bool) {
	if !c.ok || c.signal || !c.pcRelative || len(body) < 8 {
		return span{}, false
	}
	start := where + uint64(int64(int32(binary.LittleEndian.Uint32(body))))
	end := start + uint64(binary.LittleEndian.Uint32(body[4:]))
	r := bytesReader{b: body[8:]}
	if c.augmented {
		r.take(r.uleb())
	}
	p := scan(&r)
	return span{start, end}, (p.wrong || c.program.wrong) && end > start
}

// operands of a call frame instruction, in order: u is a variable-length number, digits are bytes, b is a block, p an
// address in the encoding of the CIE (four bytes here).
// An array, since scan reads some ten instructions of each function of a large library.
var operands = func() (o [64]string) {
	for i := range o {
		o[i] = "?"
	}
	for op, args := range map[byte]string{0x00: "", 0x01: "p", 0x02: "1", 0x03: "2", 0x04: "4", 0x05: "uu", 0x06: "u", 0x07: "u",
		0x08: "u", 0x09: "uu", 0x0a: "", 0x0b: "", 0x0c: "uu", 0x0d: "u", 0x0e: "u", 0x0f: "b", 0x10: "ub", 0x11: "uu", 0x12: "uu",
		0x13: "u", 0x14: "uu", 0x15: "uu", 0x16: "ub", 0x2d: "", 0x2e: "u", 0x2f: "uu"} {
		o[op] = args
	}
	return o
}()

func scan(r *bytesReader) (c codes) {
	const defCFAExpression, register, expression, valOffset, valOffsetSf, valExpression = 0x0f, 0x09, 0x10, 0x14, 0x15, 0x16
	const rbp = 6
	for len(r.b) > 0 && !r.bad {
		op := r.byte()
		switch op & 0xc0 {
		case 0x40, 0xc0: // advance, restore: the operand is in the opcode
			continue
		case 0x80: // offset
			r.uleb()
			continue
		}
		args := operands[op]
		var first uint64
		for i := range len(args) {
			a := args[i]
			switch a {
			case 'u':
				n := r.uleb()
				if i == 0 {
					first = n
				}
			case 'b':
				block := r.take(r.uleb())
				switch shape := shapeOf(block); op {
				case defCFAExpression:
					c.wrong = c.wrong || !slices.Contains(cfaShapes, shape)
				case expression:
					c.wrong = c.wrong || first == rbp && shape != "r"
				}
			case 'p', '4':
				r.take(4)
			case '?':
				c.unknown = true
				return c
			default:
				r.take(uint64(a - '0'))
			}
		}
		switch op {
		case register, valOffset, valOffsetSf, valExpression:
			c.wrong = c.wrong || first == rbp
		}
	}
	return c
}

// cfaShapes are the expressions that the library tells apart: linkage tables, and a saved stack pointer.
var cfaShapes = []string{"rrn&ngn<+", "rd", "rdc", "rrn*+dc", "r"}

// shapeOf is one letter for each operation of an expression, "?" when one is not known or has an operand that the
// library cuts off.
func shapeOf(block []byte) string {
	names := map[byte]byte{0x06: 'd', 0x1a: '&', 0x1e: '*', 0x22: '+', 0x24: '<', 0x2a: 'g'}
	var shape []byte
	r := bytesReader{b: block}
	for len(r.b) > 0 {
		op := r.byte()
		name, ok := names[op]
		switch {
		case ok:
		case op >= 0x30 && op < 0x50:
			name = 'n'
		case op >= 0x70 && op < 0x90:
			name = 'r'
			if n := r.sleb(); n < math.MinInt16 || n > math.MaxInt16 {
				return "?"
			}
		case op == 0x23:
			name = 'c'
			if r.uleb() > math.MaxInt16 {
				return "?"
			}
		default:
			return "?"
		}
		shape = append(shape, name)
	}
	if r.bad {
		return "?"
	}
	return string(shape)
}

// bytesReader reads until something does not fit, and then nothing any more.
type bytesReader struct {
	b   []byte
	bad bool
}

func (r *bytesReader) take(n uint64) []byte {
	if n > uint64(len(r.b)) {
		r.b, r.bad = nil, true
		return nil
	}
	head := r.b[:n]
	r.b = r.b[n:]
	return head
}

func (r *bytesReader) byte() byte {
	if b := r.take(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *bytesReader) uleb() (n uint64) {
	for shift := 0; ; shift += 7 {
		b := r.byte()
		if shift < 64 {
			n |= uint64(b&0x7f) << shift
		}
		if b < 0x80 {
			return n
		}
	}
}

func (r *bytesReader) sleb() (n int64) {
	for shift := 0; ; shift += 7 {
		b := r.byte()
		if shift < 64 {
			n |= int64(b&0x7f) << shift
		}
		if b < 0x80 {
			if b&0x40 != 0 && shift < 57 {
				n |= -1 << (shift + 7)
			}
			return n
		}
	}
}

func (r *bytesReader) text() string {
	i := slices.Index(r.b, 0)
	if i < 0 {
		r.take(uint64(len(r.b)) + 1)
		return ""
	}
	s := string(r.b[:i])
	r.b = r.b[i+1:]
	return s
}
