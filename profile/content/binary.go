package content

import (
	"bytes"
	"encoding/binary"
	"math"
	"unicode"
)

// luaLayouts are the heads of string objects. All have a type byte, a length and, behind the text, a zero.
var luaLayouts = []struct {
	name           string
	typeAt, lenAt  int
	textAt, length int // length: of the length field
	types          []byte
}{
	{"LuaJIT GC64", 9, 20, 24, 4, []byte{4}},
	{"LuaJIT GC64, before 2020", 9, 16, 20, 4, []byte{4}},
	{"PUC 5.1 and 5.2, long strings of 5.3 and later", 8, 16, 24, 8, []byte{4, 0x14, 0x44, 0x54}},
	{"PUC 5.3, short strings", 8, 11, 24, 1, []byte{4, 0x44}},
	{"LuaJIT, 32-bit pointers", 5, 16, 20, 4, []byte{4}},
	{"LuaJIT, 32-bit pointers, before 2020", 5, 12, 16, 4, []byte{4}},
}

// luaString recognizes Lua's string objects by their head; the zero behind the text must be where the length says.
func (c *Classifier) luaString(b []byte) (finding, bool) {
	for i := range luaLayouts {
		l := &luaLayouts[i]
		if len(b) < l.textAt+2 || bytes.IndexByte(l.types, b[l.typeAt]) < 0 {
			continue
		}
		var n uint64
		switch l.length {
		case 1:
			n = uint64(b[l.lenAt])
		case 4:
			n = uint64(binary.LittleEndian.Uint32(b[l.lenAt:]))
		default:
			n = binary.LittleEndian.Uint64(b[l.lenAt:])
		}
		if n == 0 || n > 1<<30 || !c.luaHead(b, l.typeAt) {
			continue
		}
		end := uint64(l.textAt) + n
		if end < uint64(len(b)) && b[end] != 0 || end >= uint64(len(b)) && len(b) < maxLook {
			continue
		}
		text := b[l.textAt:min(end, uint64(len(b)))]
		run := textRun(text)
		if run < len(text) && len(b)-int(end) > slack+8 {
			continue // neither text nor a block of just this size
		}
		f := finding{kind: LuaString, inner: Binary}
		if run == len(text) {
			f = c.text(text)
			f.inner, f.kind = f.kind, LuaString
		}
		f.header, f.length = l.textAt, len(text)
		return f, true
	}
	return finding{}, false
}

// luaHead: the object's link to the next one is a pointer or nothing, and the bytes behind the type are small.
func (c *Classifier) luaHead(b []byte, typeAt int) bool {
	if typeAt == 5 {
		return b[0]&7 == 0
	}
	next := binary.LittleEndian.Uint64(b)
	return next == 0 || next%8 == 0 && c.isPointer(next)
}

// wideText recognizes UTF-16 and UTF-32 of scripts with small code points, with a byte order mark of any script.
func wideText(b []byte) (finding, bool) {
	if len(b) < 8 {
		return finding{}, false
	}
	switch {
	case b[0] == 0xff && b[1] == 0xfe && b[2]|b[3] != 0:
		return finding{kind: UTF16, name: "LE", length: len(b)}, wideRun(b[2:], binary.LittleEndian.Uint16, true) >= 3
	case b[0] == 0xfe && b[1] == 0xff:
		return finding{kind: UTF16, name: "BE", length: len(b)}, wideRun(b[2:], binary.BigEndian.Uint16, true) >= 3
	}
	for i, order := range wideOrders {
		if high := b[1-i:]; !wideHigh(high[0]) || !wideHigh(high[2]) || !wideHigh(high[4]) || !wideHigh(high[6]) {
			continue // four units are the least
		}
		if n := wideRun(b, order.get, false); n >= 4 && (n*2+slack >= len(b) || n >= 12 || order.get(b[n*2:]) == 0 && n >= 6) {
			return finding{kind: UTF16, name: order.name, length: n * 2}, true
		}
	}
	if n := run32(b); n >= 4 {
		return finding{kind: UTF32, length: n * 4}, true
	}
	return finding{}, false
}

var wideOrders = [2]struct {
	name string
	get  func([]byte) uint16
}{{"LE", binary.LittleEndian.Uint16}, {"BE", binary.BigEndian.Uint16}}

// wideHigh is what wideRun lets pass of a unit's high byte.
func wideHigh(c byte) bool { return c < 0x7 || c == 0x20 }

// wideRun counts 16-bit letters, digits, spaces and marks from the start.
func wideRun(b []byte, get func([]byte) uint16, anyScript bool) (n int) {
	ascii := 0
	for ; n*2+2 <= len(b); n++ {
		r := rune(get(b[n*2:]))
		if r < ' ' && r != '\n' && r != '\t' && r != '\r' {
			break
		}
		if !anyScript && r >= 0x700 && (r < 0x2000 || r > 0x20ff) {
			break
		}
		if r >= 0x80 && !unicode.IsPrint(r) {
			break
		}
		if r < 0x80 {
			ascii++
		}
	}
	if !anyScript && ascii == 0 {
		return 0 // not even a space: small numbers rather than words
	}
	return n
}

func run32(b []byte) (n int) {
	for ; n*4+4 <= len(b); n++ {
		r := binary.LittleEndian.Uint32(b[n*4:])
		if r < ' ' && r != '\n' && r != '\t' || r > 0x2fff || !unicode.IsPrint(rune(r)) {
			break
		}
	}
	return n
}

// behindHeader looks for text behind the head of a counted or sized string: a reference count, a length, a capacity.
func (c *Classifier) behindHeader(b []byte) (finding, bool) {
	const maxHeader = 64
	for at := 1; at < len(b) && at <= maxHeader; at++ {
		if !textBytes[b[at]] || textBytes[b[at-1]] {
			continue
		}
		n := textRun(b[at:])
		if n < 8 {
			at += n
			continue
		}
		f := c.text(b[at : at+n])
		marked := f.kind != Text && f.kind != Base64 && f.kind != Hex
		if marked && (n >= 12 || at+n >= len(b)-slack) || n*2 >= len(b) && (at+n >= len(b)-slack || b[at+n] == 0) {
			f.header += at
			f.length = n
			return f, true
		}
		at += n
	}
	return finding{}, false
}

// isPointer says whether a word is an address.
func (c *Classifier) isPointer(word uint64) bool {
	if word < 1<<16 || word>>48 != 0 {
		return false
	}
	if c.Pointer != nil {
		return c.Pointer(word)
	}
	return looksLikePointer(word)
}

// looksLikePointer knows where Linux puts programs, heaps, libraries and stacks on x86-64 and arm64.
func looksLikePointer(word uint64) bool {
	switch top := word >> 40; {
	case word>>48 != 0:
		return false
	case top == 0x55, top == 0x56, top == 0x7e, top == 0x7f, top == 0xaa, top == 0xff:
		return true
	}
	return false
}

// statsLook is how much of a block is counted for statistics; patterns repeat.
const statsLook = 4096

// words counts what the words of a block are.
type words struct{ total, zero, pointer, small, float, other int }

func (c *Classifier) countWords(b []byte) (w words) {
	for ; len(b) >= 8; b = b[8:] {
		word := binary.LittleEndian.Uint64(b)
		w.total++
		switch {
		case word == 0:
			w.zero++
		case c.isPointer(word):
			w.pointer++
		case isSmall(word):
			w.small++
		case isFloat(word):
			w.float++
		default:
			w.other++
		}
	}
	return w
}

// isSmall: one number of 32 bits with its sign, or two of 16 to 24 bits.
func isSmall(word uint64) bool {
	if int64(word) == int64(int32(word)) {
		return true
	}
	low, high := int32(word), int32(word>>32)
	return low > -1<<20 && low < 1<<24 && high > -1<<20 && high < 1<<24
}

// isFloat: a double between 1e-9 and 1e12, or two floats like that.
func isFloat(word uint64) bool {
	abs := math.Abs(math.Float64frombits(word))
	if abs > 1e-9 && abs < 1e12 {
		return true
	}
	low := math.Abs(float64(math.Float32frombits(uint32(word))))
	high := math.Abs(float64(math.Float32frombits(uint32(word >> 32))))
	return low > 1e-6 && low < 1e9 && high > 1e-6 && high < 1e9
}

// statistics judges blocks without a mark by what their words and bytes are.
func (c *Classifier) statistics(b []byte) finding {
	look := b[:min(len(b), statsLook)]
	w := c.countWords(look)
	filled := w.total - w.zero
	f := finding{kind: Binary, length: len(b)}
	switch {
	case filled == 0:
	case w.pointer*4 >= filled*3:
		f.kind = Pointers
	case w.pointer > 0 && (w.pointer*8 >= filled || len(b) <= 256):
		f.kind = Structure
	case isRandom(look):
		f.kind = Entropy
	case w.small*8 >= filled*7:
		f.kind = Integers
	case w.float*8 >= filled*7 && filled >= 2:
		f.kind = Floats
	}
	if f.kind == Structure || f.kind == Pointers || f.kind == Binary {
		c.embedded(look, &f)
	}
	return f
}

// minPool is the smallest block that is searched for JSON inside, as pools and pages hold it.
const minPool = 256

// embedded looks for the first JSON object in the middle of a block.
func (c *Classifier) embedded(b []byte, f *finding) {
	if len(b) < minPool {
		return
	}
	for at := 0; ; at++ {
		i := bytes.Index(b[at:], []byte(`{"`))
		if i < 0 {
			return
		}
		at += i
		if in, ok := c.parseJSON(b[at:]); ok && len(in.keys) > 0 {
			f.inner, f.keys, f.list, f.hash = JSON, in.keys, in.list, in.hash
			return
		}
	}
}

// isRandom compares how often bytes repeat with what chance makes: in n random bytes the sum of squared counts is about
// n + n*n/256. Compressed and encrypted data reach that; code, text and numbers are far above.
func isRandom(b []byte) bool {
	if len(b) < 32 {
		return false
	}
	// Slack may hang behind the data.
	if n := len(bytes.TrimRight(b, "\x00")); n >= 32 && len(b)-n <= slack {
		b = b[:n]
	}
	var counts [256]uint16
	sum := 0
	for _, x := range b {
		sum += 2*int(counts[x]) + 1 // (n+1)*(n+1) - n*n
		counts[x]++
	}
	n := len(b)
	expect := float64(n) + float64(n)*float64(n)/256
	limit := 1.15 + 4/math.Sqrt(float64(n)) // small samples vary more
	return float64(sum) < expect*limit
}
