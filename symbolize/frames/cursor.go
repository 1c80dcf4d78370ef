package frames

import "encoding/binary"

// cursor reads little-endian DWARF data. Reading beyond the end sets bad and yields zeros, so that callers check once.
type cursor struct {
	b   []byte
	p   int
	bad bool
}

func (c *cursor) fail() {
	c.bad = true
	c.p = len(c.b)
}

func (c *cursor) skip(n uint64) {
	if n > uint64(len(c.b)-c.p) {
		c.fail()
		return
	}
	c.p += int(n)
}

func (c *cursor) take(n int) []byte {
	if n < 0 || n > len(c.b)-c.p {
		c.fail()
		return nil
	}
	c.p += n
	return c.b[c.p-n : c.p]
}

func (c *cursor) u8() uint8 {
	if c.p >= len(c.b) {
		c.fail()
		return 0
	}
	c.p++
	return c.b[c.p-1]
}

func (c *cursor) u16() uint16 {
	if b := c.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (c *cursor) u32() uint32 {
	if b := c.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (c *cursor) u64() uint64 {
	if b := c.take(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// uint reads n bytes; n is 1, 2, 3, 4 or 8.
func (c *cursor) uint(n int) uint64 {
	switch n {
	case 1:
		return uint64(c.u8())
	case 2:
		return uint64(c.u16())
	case 3:
		lo := uint64(c.u16())
		return lo | uint64(c.u8())<<16
	case 4:
		return uint64(c.u32())
	case 8:
		return c.u64()
	}
	c.fail()
	return 0
}

// offset reads a section offset or a length of the unit's format.
func (c *cursor) offset(is64 bool) uint64 {
	if is64 {
		return c.u64()
	}
	return uint64(c.u32())
}

// unitLength reads an initial length and says which format it announces.
func (c *cursor) unitLength() (length uint64, is64 bool) {
	length = uint64(c.u32())
	if length == 0xffffffff {
		return c.u64(), true
	}
	if length >= 0xfffffff0 {
		c.fail()
	}
	return length, false
}

func (c *cursor) uleb() uint64 {
	if c.p < len(c.b) && c.b[c.p] < 0x80 {
		c.p++
		return uint64(c.b[c.p-1])
	}
	var v uint64
	for shift := uint(0); ; shift += 7 {
		if c.p >= len(c.b) {
			c.fail()
			return 0
		}
		x := c.b[c.p]
		c.p++
		if shift < 64 {
			v |= uint64(x&0x7f) << shift
		}
		if x < 0x80 {
			return v
		}
	}
}

func (c *cursor) sleb() int64 {
	var v int64
	shift := uint(0)
	for {
		if c.p >= len(c.b) {
			c.fail()
			return 0
		}
		x := c.b[c.p]
		c.p++
		if shift < 64 {
			v |= int64(x&0x7f) << shift
		}
		shift += 7
		if x < 0x80 {
			if shift < 64 && x&0x40 != 0 {
				v |= -1 << shift
			}
			return v
		}
	}
}

// skipString passes a zero-terminated string.
func (c *cursor) skipString() {
	for c.p < len(c.b) {
		c.p++
		if c.b[c.p-1] == 0 {
			return
		}
	}
	c.fail()
}

func (c *cursor) str() string {
	start := c.p
	c.skipString()
	if c.bad {
		return ""
	}
	return string(c.b[start : c.p-1])
}
