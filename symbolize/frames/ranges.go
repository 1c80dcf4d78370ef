package frames

import (
	"context"
	"debug/dwarf"
	"sort"
)

const noUnit = ^uint64(0)

// unitsOf returns the offset of each address's compile unit, or noUnit.
func (d *Data) unitsOf(ctx context.Context, addrs []uint64) ([]uint64, error) {
	units := make([]uint64, len(addrs))
	for i := range units {
		units[i] = noUnit
	}
	left := len(addrs)
	claim := func(low, high, unit uint64) {
		if dead(low) {
			return
		}
		for i := sort.Search(len(addrs), func(i int) bool { return addrs[i] >= low }); i < len(addrs) && addrs[i] < high; i++ {
			if units[i] == noUnit {
				units[i] = unit
				left--
			}
		}
	}
	listed := d.readAranges(claim)
	if left == 0 {
		return units, nil
	}
	// clang writes no .debug_aranges, and a program may link objects of both kinds.
	for off := uint64(0); off < d.Info.Size(); {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := d.spend(headerSize); err != nil {
			return nil, err
		}
		h, err := d.readHeader(off)
		if err != nil {
			if len(listed) > 0 || off > 0 {
				d.warn(err)
				return units, nil
			}
			return nil, err
		}
		if !listed[off] && (h.kind == unitCompile || h.kind == unitSkeleton) {
			if err := d.claimUnit(off, claim); err != nil {
				d.warn(err)
			}
		}
		off = h.end
	}
	return units, nil
}

// dead tells ranges of functions that the linker dropped: it resolves their addresses to 0 or 1.
func dead(low uint64) bool { return low <= 1 }

func (d *Data) claimUnit(off uint64, claim func(low, high, unit uint64)) error {
	u, err := d.openUnit(off, false)
	if err != nil {
		return err
	}
	return u.eachRange(value{kindAddr, u.low}, u.hasLow, u.high, u.ranges, func(low, high uint64) {
		claim(low, high, off)
	})
}

// readAranges claims what .debug_aranges says and returns the units that are listed there. Damage only ends it.
func (d *Data) readAranges(claim func(low, high, unit uint64)) map[uint64]bool {
	listed := map[uint64]bool{}
	var buf []byte
	for off := uint64(0); off < d.Aranges.Size(); {
		b, err := d.Aranges.View(off, min(32, d.Aranges.Size()-off), nil)
		if err != nil {
			return listed
		}
		c := cursor{b: b}
		length, is64 := c.unitLength()
		start := uint64(c.p)
		c.u16()
		unit := c.offset(is64)
		addrSize, segment := int(c.u8()), c.u8()
		if c.bad || segment != 0 || addrSize != 4 && addrSize != 8 || length > d.Aranges.Size()-off-start || length > 1<<28 {
			return listed
		}
		first := uint64(c.p)
		// Pairs are aligned to their own size, counted from the set's start.
		pair := uint64(2 * addrSize)
		first += (pair - first%pair) % pair
		end := off + start + length
		if off+first > end {
			return listed
		}
		if b, err = d.Aranges.View(off+first, end-off-first, buf); err != nil {
			return listed
		}
		if uint64(cap(buf)) < uint64(len(b)) {
			buf = make([]byte, len(b))
		}
		for c = (cursor{b: b}); c.p+int(pair) <= len(b); {
			low, n := c.uint(addrSize), c.uint(addrSize)
			if low == 0 && n == 0 {
				break
			}
			listed[unit] = true
			if low+n > low {
				claim(low, low+n, unit)
			}
		}
		off = end
	}
	return listed
}

// eachRange calls f with the address ranges of an entry.
func (u *unit) eachRange(low value, hasLow bool, high, ranges value, f func(low, high uint64)) error {
	if ranges.kind != kindNone {
		return u.rangeList(ranges, f)
	}
	if !hasLow || high.kind == kindNone {
		return nil
	}
	start, err := u.address(low)
	if err != nil {
		return err
	}
	end := high.u
	if high.kind == kindConst {
		end += start
	} else if end, err = u.address(high); err != nil {
		return err
	}
	if end > start && !dead(start) {
		f(start, end)
	}
	return nil
}

func (u *unit) rangeList(v value, f func(low, high uint64)) error {
	if u.version < 5 {
		return u.rangesV4(v.u+u.splitRangesBase(), f)
	}
	off := v.u
	if v.kind == kindRnglistx {
		n := uint64(u.offsetSize())
		if off > 1<<40 {
			return errDamaged
		}
		b, err := u.d.Rnglists.View(u.rnglistsBase+off*n, n, nil)
		if err != nil {
			return err
		}
		c := cursor{b: b}
		off = u.rnglistsBase + c.offset(u.is64)
	}
	return u.rangesV5(off, f)
}

// splitRangesBase is not 0 only in a split DWARF 4 unit, which has the ranges in its skeleton's file.
func (u *unit) splitRangesBase() uint64 {
	if u.rangeData != u.d {
		return u.rangesBase
	}
	return 0
}

const rangeChunk = 128 // bytes of a range list read at once

func (u *unit) rangesV4(off uint64, f func(low, high uint64)) error {
	base, sec := u.low, u.rangeData.Ranges
	top := ^uint64(0)
	if u.addrSize == 4 {
		top = 1<<32 - 1
	}
	pair := uint64(2 * u.addrSize)
	for {
		if off >= sec.Size() {
			return errDamaged
		}
		n := min(rangeChunk, sec.Size()-off) / pair * pair
		b, err := sec.View(off, n, nil)
		if err != nil || n == 0 {
			return errDamaged
		}
		if err := u.d.spend(n); err != nil {
			return err
		}
		for c := (cursor{b: b}); c.p < len(b); {
			low, high := c.uint(u.addrSize), c.uint(u.addrSize)
			switch {
			case low == 0 && high == 0:
				return nil
			case low == top:
				base = high
			case high > low && !dead(base+low):
				f(base+low, base+high)
			}
		}
		off += n
	}
}

// DW_RLE codes.
const (
	rleEnd = iota
	rleBaseAddressx
	rleStartxEndx
	rleStartxLength
	rleOffsetPair
	rleBaseAddress
	rleStartEnd
	rleStartLength
)

func (u *unit) rangesV5(off uint64, f func(low, high uint64)) error {
	sec := u.d.Rnglists
	base := u.low
	for {
		if off >= sec.Size() {
			return errDamaged
		}
		n := min(rangeChunk, sec.Size()-off)
		b, err := sec.View(off, n, nil)
		if err != nil {
			return err
		}
		c := cursor{b: b}
		for {
			at := c.p
			end, err := u.rangeEntry(&c, &base, f)
			if err := u.d.spend(uint64(c.p - at)); err != nil {
				return err
			}
			if c.bad && at == 0 {
				return errDamaged // a single entry never fills a chunk
			}
			if c.bad { // cut off by the chunk's end
				off += uint64(at)
				break
			}
			if err != nil || end {
				return err
			}
		}
	}
}

func (u *unit) rangeEntry(c *cursor, base *uint64, f func(low, high uint64)) (end bool, err error) {
	var low, high uint64
	switch c.u8() {
	case rleEnd:
		return !c.bad, nil
	case rleBaseAddressx:
		index := c.uleb()
		if !c.bad {
			*base, err = u.indexedAddress(index)
		}
		return false, err
	case rleStartxEndx:
		a, b := c.uleb(), c.uleb()
		if c.bad {
			return false, nil
		}
		if low, err = u.indexedAddress(a); err == nil {
			high, err = u.indexedAddress(b)
		}
	case rleStartxLength:
		index, n := c.uleb(), c.uleb()
		if c.bad {
			return false, nil
		}
		low, err = u.indexedAddress(index)
		high = low + n
	case rleOffsetPair:
		low, high = c.uleb(), c.uleb()
		if dead(*base) && u.hasLow && *base != u.low {
			return false, nil
		}
		low, high = low+*base, high+*base
	case rleBaseAddress:
		v := c.uint(u.addrSize)
		if !c.bad {
			*base = v
		}
		return false, nil
	case rleStartEnd:
		low, high = c.uint(u.addrSize), c.uint(u.addrSize)
	case rleStartLength:
		low = c.uint(u.addrSize)
		high = low + c.uleb()
	default:
		return false, errDamaged
	}
	if err != nil || c.bad {
		return false, err
	}
	if high > low && !dead(low) {
		f(low, high)
	}
	return false, nil
}

// span is an entry's address attributes while it is parsed.
type span struct {
	low, high, ranges value
}

func (s *span) set(attr dwarf.Attr, v value) {
	switch attr {
	case dwarf.AttrLowpc:
		s.low = v
	case dwarf.AttrHighpc:
		s.high = v
	case dwarf.AttrRanges:
		s.ranges = v
	}
}
