package section

import (
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
)

// errDeflate is returned for a stream that is no valid deflate data.
var errDeflate = errors.New("damaged deflate data")

const (
	window   = 32 << 10 // how far back a match may reach
	overrun  = 258 + 8  // the most that one match writes beyond the limit, and the slack of its copy loop
	inputBuf = 32 << 10
	litBits  = 11 // width of the first-level tables; longer codes go through a second level
	distBits = 8
)

// A table entry is value<<16 | extra<<8 | kind<<5 | length; for kindSub, value is the index of the second level and extra its width.
// Entry 0 is an unused code.
const (
	kindLit = iota
	kindEnd
	kindMatch
	kindSub
)

func entry(value, extra, kind, length uint32) uint32 {
	return value<<16 | extra<<8 | kind<<5 | length
}

// inflater decodes a deflate stream in pieces and can resume at any piece's start. compress/flate can do neither at the
// speed wanted: .debug_info of a large library inflates to 257 MB, and 300 addresses in it must cost less than 2 s.
type inflater struct {
	in    io.ReaderAt
	inEnd int64 // size of the compressed data

	buf     [inputBuf + 16]byte // input; zero padded at the end of the stream
	bufBase int64               // offset of buf[0] in the input
	bufLen  int                 // valid bytes, without the padding
	pos     int                 // next byte of buf to go into bb
	bb      uint64              // bit buffer
	nb      uint                // valid bits of bb; bits above them may be set (they repeat what pos will deliver)

	block  int64 // bit position of the current block's header
	inside bool  // within a compressed block whose tables are built
	stored int   // bytes left of a stored block
	final  bool  // the current block is the last one
	done   bool

	lit, dist [4 << litBits]uint32
	litWidth  uint
	distWidth uint
}

// checkpoint is a place in the stream where decoding can resume.
type checkpoint struct {
	bit, block     int64
	inside         bool
	stored         int
	final, done    bool
	history        []byte // what came before: up to window bytes, then the bytes already written beyond the piece
	beyond, before int    // their numbers
}

func (z *inflater) bitPos() int64 { return (z.bufBase+int64(z.pos))*8 - int64(z.nb) }

// seekBit continues reading at an absolute bit position of the input.
func (z *inflater) seekBit(bit int64) error {
	z.bufBase, z.pos, z.bufLen, z.bb, z.nb = bit>>3, 0, 0, 0, 0
	if err := z.fill(); err != nil {
		return err
	}
	z.refill()
	z.bb >>= uint(bit & 7)
	z.nb -= uint(bit & 7)
	return nil
}

// fill makes at least 16 bytes available at pos, with zeros after the end of the input.
func (z *inflater) fill() error {
	if z.bufLen-z.pos >= 16 {
		return nil
	}
	z.bufBase += int64(z.pos)
	z.bufLen = copy(z.buf[:], z.buf[z.pos:max(z.bufLen, z.pos)])
	z.pos = 0
	left := z.inEnd - z.bufBase - int64(z.bufLen)
	if left > 0 {
		n := int(min(int64(inputBuf-z.bufLen), left))
		if got, err := z.in.ReadAt(z.buf[z.bufLen:z.bufLen+n], z.bufBase+int64(z.bufLen)); got < n {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		z.bufLen += n
	}
	clear(z.buf[z.bufLen : z.bufLen+16])
	if z.bitPos() > z.inEnd*8 {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// refill tops the bit buffer up to at least 56 bits; fill must have left 8 bytes.
func (z *inflater) refill() {
	z.bb |= binary.LittleEndian.Uint64(z.buf[z.pos:]) << z.nb
	z.pos += int((63 - z.nb) >> 3)
	z.nb |= 56
}

func (z *inflater) take(n uint) uint32 {
	v := uint32(z.bb) & (1<<n - 1)
	z.bb >>= n
	z.nb -= n
	return v
}

// decode writes to out from op on until limit is reached (by up to overrun bytes more) or the stream ends, and returns the
// new op. out[:op] is the history that matches may refer to.
func (z *inflater) decode(out []byte, op, limit int) (int, error) {
	for op < limit && !z.done {
		var err error
		switch {
		case z.stored > 0:
			op, err = z.copyStored(out, op, limit)
		case z.inside:
			op, err = z.decodeBlock(out, op, limit)
		case z.final:
			z.done = true
		default:
			err = z.header()
		}
		if err != nil {
			return op, err
		}
	}
	return op, nil
}

func (z *inflater) header() error {
	if err := z.fill(); err != nil {
		return err
	}
	z.block = z.bitPos()
	z.refill()
	z.final = z.take(1) == 1
	switch z.take(2) {
	case 0:
		z.take(z.nb & 7)
		if z.nb < 32 {
			return errDeflate
		}
		n := z.take(16)
		if n^0xffff != z.take(16) {
			return errDeflate
		}
		z.stored = int(n)
		z.giveBack()
		return nil
	case 1:
		return z.fixedTables()
	case 2:
		return z.dynamicTables()
	}
	return errDeflate
}

// giveBack empties the bit buffer, which holds whole bytes, because a stored block is read by bytes.
func (z *inflater) giveBack() {
	z.pos -= int(z.nb >> 3)
	z.bb, z.nb = 0, 0
	if z.pos < 0 { // these bytes have left buf already
		z.bufBase, z.pos, z.bufLen = z.bufBase+int64(z.pos), 0, 0
	}
}

func (z *inflater) copyStored(out []byte, op, limit int) (int, error) {
	if z.pos >= z.bufLen {
		if err := z.fill(); err != nil {
			return op, err
		}
		if z.bufLen == z.pos {
			return op, io.ErrUnexpectedEOF
		}
	}
	n := min(z.stored, limit-op, z.bufLen-z.pos)
	copy(out[op:op+n], z.buf[z.pos:z.pos+n])
	z.pos += n
	z.stored -= n
	return op + n, nil
}

// decodeBlock is the hot loop: state lives in locals, one refill (56 bits) feeds up to three literals of
// the first level (33 bits) and a length (20 bits); before a distance (28 bits) it may take another.
func (z *inflater) decodeBlock(out []byte, op, limit int) (int, error) {
	bb, nb, pos := z.bb, z.nb, z.pos
	litMask, distMask := uint64(1)<<z.litWidth-1, uint64(1)<<z.distWidth-1
	lit, dist := &z.lit, &z.dist
	var err error
loop:
	for op < limit {
		if z.bufLen-pos < 16 {
			z.bb, z.nb, z.pos = bb, nb, pos
			if err = z.fill(); err != nil {
				return op, err
			}
			bb, nb, pos = z.bb, z.nb, z.pos
		}
		bb |= binary.LittleEndian.Uint64(z.buf[pos:]) << (nb & 63)
		pos += int((63 - nb) >> 3)
		nb |= 56
		e := lit[bb&litMask&(4<<litBits-1)]
		if e&(7<<5) == kindLit<<5 && e != 0 {
			bb >>= e & 31
			nb -= uint(e & 31)
			out[op] = byte(e >> 16)
			op++
			e = lit[bb&litMask&(4<<litBits-1)]
			if e&(7<<5) == kindLit<<5 && e != 0 {
				bb >>= e & 31
				nb -= uint(e & 31)
				out[op] = byte(e >> 16)
				op++
				e = lit[bb&litMask&(4<<litBits-1)]
				if e&(7<<5) == kindLit<<5 && e != 0 {
					bb >>= e & 31
					nb -= uint(e & 31)
					out[op] = byte(e >> 16)
					op++
					continue
				}
			}
		}
		if e>>5&7 == kindSub {
			e = lit[(e>>16+uint32(bb>>z.litWidth)&(1<<(e>>8&31)-1))&(4<<litBits-1)]
		}
		if e == 0 {
			err = errDeflate
			break
		}
		bb >>= e & 31
		nb -= uint(e & 31)
		switch e >> 5 & 7 {
		case kindLit:
			out[op] = byte(e >> 16)
			op++
			continue
		case kindEnd:
			z.inside = false
			break loop
		}
		length := int(e>>16) + int(bb&(1<<(e>>8&31)-1))
		bb >>= e >> 8 & 31
		nb -= uint(e >> 8 & 31)
		if nb < 32 {
			bb |= binary.LittleEndian.Uint64(z.buf[pos:]) << (nb & 63)
			pos += int((63 - nb) >> 3)
			nb |= 56
		}
		e = dist[bb&distMask&(4<<litBits-1)]
		if e>>5&7 == kindSub {
			e = dist[(e>>16+uint32(bb>>z.distWidth)&(1<<(e>>8&31)-1))&(4<<litBits-1)]
		}
		if e == 0 {
			err = errDeflate
			break
		}
		bb >>= e & 31
		nb -= uint(e & 31)
		d := int(e>>16) + int(bb&(1<<(e>>8&31)-1))
		bb >>= e >> 8 & 31
		nb -= uint(e >> 8 & 31)
		if d > op {
			err = errDeflate
			break
		}
		if d >= 8 { // by words, beyond the end: what follows overwrites that
			from, to := out[op-d:], out[op:]
			for i := 0; i < length; i += 8 {
				binary.LittleEndian.PutUint64(to[i:], binary.LittleEndian.Uint64(from[i:]))
			}
		} else {
			for i := op; i < op+length; i++ {
				out[i] = out[i-d]
			}
		}
		op += length
	}
	z.bb, z.nb, z.pos = bb, nb, pos
	if err == nil && z.bitPos() > z.inEnd*8 {
		err = io.ErrUnexpectedEOF
	}
	return op, err
}

var lengthBase, lengthExtra, distBase, distExtra = matchTables()

func matchTables() (lb, le [29]uint32, db, de [30]uint32) {
	base := uint32(3)
	for i := range lb {
		if i >= 8 {
			le[i] = uint32(i/4 - 1)
		}
		lb[i] = base
		base += 1 << le[i]
	}
	lb[28], le[28] = 258, 0
	base = 1
	for i := range db {
		if i >= 4 {
			de[i] = uint32(i/2 - 1)
		}
		db[i] = base
		base += 1 << de[i]
	}
	return lb, le, db, de
}

func litEntry(sym int, length uint32) uint32 {
	switch {
	case sym < 256:
		return entry(uint32(sym), 0, kindLit, length)
	case sym == 256:
		return entry(0, 0, kindEnd, length)
	case sym-257 < len(lengthBase):
		return entry(lengthBase[sym-257], lengthExtra[sym-257], kindMatch, length)
	}
	return 0
}

func distEntry(sym int, length uint32) uint32 {
	if sym >= len(distBase) {
		return 0
	}
	return entry(distBase[sym], distExtra[sym], kindMatch, length)
}

func plainEntry(sym int, length uint32) uint32 { return entry(uint32(sym), 0, kindLit, length) }

func (z *inflater) fixedTables() error {
	var lens [288]uint8
	for i := range lens {
		switch {
		case i < 144:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		case i < 280:
			lens[i] = 7
		default:
			lens[i] = 8
		}
	}
	var dlens [30]uint8
	for i := range dlens {
		dlens[i] = 5
	}
	return z.build(lens[:], dlens[:])
}

func (z *inflater) build(lit, dist []uint8) error {
	var err error
	if z.litWidth, err = buildTable(z.lit[:], litBits, lit, litEntry); err != nil {
		return err
	}
	if z.distWidth, err = buildTable(z.dist[:], distBits, dist, distEntry); err != nil {
		return err
	}
	z.inside = true
	return nil
}

var codeOrder = [19]int{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

func (z *inflater) dynamicTables() error {
	nlit, ndist, ncode := int(z.take(5))+257, int(z.take(5))+1, int(z.take(4))+4
	if nlit > 286 || ndist > 30 {
		return errDeflate
	}
	var clens [19]uint8
	for i := range ncode {
		if err := z.fill(); err != nil {
			return err
		}
		z.refill()
		clens[codeOrder[i]] = uint8(z.take(3))
	}
	codes := z.lit[:]
	width, err := buildTable(codes, 7, clens[:], plainEntry)
	if err != nil {
		return err
	}
	var lens [286 + 30]uint8
	total := nlit + ndist
	for i := 0; i < total; {
		if err := z.fill(); err != nil {
			return err
		}
		z.refill()
		e := codes[z.bb&(1<<width-1)]
		if e == 0 {
			return errDeflate
		}
		z.take(uint(e & 31))
		sym := int(e >> 16)
		if sym < 16 {
			lens[i] = uint8(sym)
			i++
			continue
		}
		var val uint8
		n := 0
		switch sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			val, n = lens[i-1], 3+int(z.take(2))
		case 17:
			n = 3 + int(z.take(3))
		default:
			n = 11 + int(z.take(7))
		}
		if i+n > total {
			return errDeflate
		}
		for ; n > 0; n-- {
			lens[i] = val
			i++
		}
	}
	if lens[256] == 0 {
		return errDeflate
	}
	return z.build(lens[:nlit], lens[nlit:total])
}

// buildTable makes a two-level decoding table; each second level is as wide as the longest code. A code set that is over-subscribed is an error; an incomplete one is let
// through (a lone distance code is legal), its unused codes decode to entry 0.
func buildTable(table []uint32, maxBits uint, lens []uint8, mk func(sym int, length uint32) uint32) (uint, error) {
	var count [16]int
	longest := uint(0)
	for _, l := range lens {
		count[l]++
		longest = max(longest, uint(l))
	}
	count[0] = 0
	code, next := 0, [16]int{}
	for l := 1; l < 16; l++ {
		code = (code + count[l-1]) << 1
		next[l] = code
		if code+count[l] > 1<<l {
			return 0, errDeflate
		}
	}
	width := max(1, min(maxBits, longest))
	clear(table[:1<<width])
	end := 1 << width // of the used part of the table
	subWidth := longest - width
	for length := uint(1); length <= longest; length++ {
		for sym, l := range lens {
			if uint(l) != length {
				continue
			}
			rev := int(bits.Reverse16(uint16(next[length])) >> (16 - length))
			next[length]++
			if length <= width {
				e := mk(sym, uint32(length))
				for i := rev; i < 1<<width; i += 1 << length {
					table[i] = e
				}
				continue
			}
			first := rev & (1<<width - 1)
			if table[first] == 0 {
				if end+1<<subWidth > len(table) {
					return 0, errDeflate
				}
				table[first] = entry(uint32(end), uint32(subWidth), kindSub, 0)
				clear(table[end : end+1<<subWidth])
				end += 1 << subWidth
			}
			sub := table[table[first]>>16:]
			e := mk(sym, uint32(length))
			for i := rev >> width; i < 1<<subWidth; i += 1 << (length - width) {
				sub[i] = e
			}
		}
	}
	return width, nil
}

// save describes the present place; out[:limit] is what the piece and its history hold, out[limit:op] goes beyond.
func (z *inflater) save(out []byte, op, limit int) checkpoint {
	before := min(limit, window)
	return checkpoint{
		bit: z.bitPos(), block: z.block, inside: z.inside, stored: z.stored, final: z.final, done: z.done,
		history: append([]byte(nil), out[limit-before:op]...), before: before, beyond: op - limit,
	}
}

// restore continues at c; the caller copies c.history to the output.
func (z *inflater) restore(c *checkpoint) error {
	z.inside, z.stored, z.final, z.done = false, 0, false, false
	if c.inside {
		if err := z.seekBit(c.block); err != nil {
			return err
		}
		if err := z.header(); err != nil {
			return err
		}
	}
	if err := z.seekBit(c.bit); err != nil {
		return err
	}
	if c.stored > 0 {
		z.giveBack()
	}
	z.block, z.inside, z.stored, z.final, z.done = c.block, c.inside, c.stored, c.final, c.done
	return nil
}
