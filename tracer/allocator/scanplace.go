package allocator

import (
	"cmp"
	"debug/elf"
	"io"
	"slices"
)

// place chooses the spot of every found function. Jumps from anywhere in the file are looked for in one pass.
func (s *scanner) place() {
	s.chooseSpots()
	for i := range s.file.Found {
		f := &s.file.Found[i]
		const longest = 15
		f.code, _ = s.text(f.Address, 0, f.Place.Offset+longest)
	}
}

func (s *scanner) chooseSpots() {
	found := s.file.Found
	if s.elf.Machine != elf.EM_X86_64 {
		for i := range found {
			found[i].Place = Place(s.codeOf(&found[i]), found[i].Args(), s.options.Rules)
		}
		return
	}
	var stretches []stretch
	for i := range found {
		f := &found[i]
		f.Place = Place(s.codeOf(f), f.Args(), s.options.Rules)
		if f.Place.Offset > 0 {
			stretches = append(stretches, stretch{lo: f.Address + 1, hi: f.Address + f.Place.Offset + 15, index: i})
		}
	}
	if len(stretches) == 0 {
		return
	}
	hit := s.farJumps(stretches)
	for i := range found {
		f := &found[i]
		if targets := hit[i]; len(targets) > 0 {
			code := s.codeOf(f)
			code.JumpInto = func(lo, hi uint64) bool {
				return slices.ContainsFunc(targets, func(t uint64) bool { return t >= lo && t <= hi })
			}
			f.Place = Place(code, f.Args(), s.options.Rules)
		}
	}
}

func (s *scanner) codeOf(f *Found) Code {
	text, base := s.text(f.Address, 512, f.Length+512)
	return Code{Machine: s.elf.Machine, Text: text, Base: base, Entry: f.Address, Size: f.Length}
}

// stretch is the code between an entry and its probe.
type stretch struct {
	lo, hi uint64
	index  int
}

// farJumps finds every byte sequence in the executable segments that can be a near jump or call into a stretch, other
// than from nearby code, which Place has judged by disassembly. In random bytes one is found once in 400 million.
func (s *scanner) farJumps(stretches []stretch) map[int][]uint64 {
	slices.SortFunc(stretches, func(a, b stretch) int { return cmp.Compare(a.lo, b.lo) })
	lo, hi := stretches[0].lo, uint64(0)
	for _, st := range stretches {
		hi = max(hi, st.hi)
	}
	hit := map[int][]uint64{}
	check := func(at, target uint64) {
		if target < lo || target > hi {
			return
		}
		i, _ := slices.BinarySearchFunc(stretches, target, func(st stretch, t uint64) int { return cmp.Compare(st.hi, t) })
		for ; i < len(stretches) && stretches[i].lo <= target; i++ {
			st := stretches[i]
			f := &s.file.Found[st.index]
			near := at+512 >= f.Address && at < f.Address+f.Length+512
			if target <= st.hi && !near {
				hit[st.index] = append(hit[st.index], target)
			}
		}
	}
	left := int64(maxText)
	for _, p := range s.segments {
		n := min(left, int64(p.Filesz))
		scanNearJumps(io.NewSectionReader(p, 0, n), p.Vaddr, check)
		if left -= n; left == 0 {
			break
		}
	}
	if left == 0 { // not all was seen: nothing is proved
		for _, st := range stretches {
			hit[st.index] = append(hit[st.index], st.lo)
		}
	}
	return hit
}

// scanNearJumps calls f for every e8, e9 and 0f 8x with its target, in a stream of code. Within one buffer the last
// bytes are kept for the next round.
func scanNearJumps(r io.Reader, base uint64, f func(at, target uint64)) {
	const keep = 6
	buffer := make([]byte, 256<<10)
	have := 0
	for {
		n, err := io.ReadFull(r, buffer[have:])
		code := buffer[:have+n]
		for i := 0; i+keep <= len(code); i++ {
			switch b := code[i]; {
			case b&0xfe == 0xe8:
				at := base + uint64(i)
				f(at, at+5+rel32(code[i+1:]))
			case b == 0x0f && code[i+1]&0xf0 == 0x80:
				at := base + uint64(i)
				f(at, at+6+rel32(code[i+2:]))
			}
		}
		if err != nil {
			return
		}
		kept := min(keep-1, len(code))
		copy(buffer, code[len(code)-kept:])
		base += uint64(len(code) - kept)
		have = kept
	}
}
