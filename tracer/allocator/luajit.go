package allocator

import (
	"debug/elf"
	"slices"

	"golang.org/x/arch/x86/x86asm"
)

// LuaJIT takes the memory of its objects from mmap and hands it out with an allocator of its own, lj_alloc_f, which is
// static in the library. Its address is written in the code that makes a Lua state: newer versions turn the marker
// LJ_ALLOCF_INTERNAL into the address in lua_newstate, older ones pass it on in luaL_newstate. What is found there
// counts only if its code asks the two questions of a lua_Alloc in their order: is the new size 0, and else, is there
// an old block.

// findLuaJIT adds lj_alloc_f of a LuaJIT whose symbol tables do not name it, or notes why not.
func (s *scanner) findLuaJIT(byAddress map[uint64]*Found) {
	if !s.hints.luaJIT || s.defines("lj_alloc_f") {
		return
	}
	const seen = "LuaJIT's objects are seen only as a total, kind mmap: "
	if s.elf.Machine != elf.EM_X86_64 {
		s.note(seen + "its allocator has no symbol, and is recognized by its code on x86-64 only")
		return
	}
	var proved []uint64
	for _, maker := range s.hints.luaMakers {
		for _, address := range s.codeAddresses(maker.address, maker.size) {
			if s.isLuaAlloc(address) && !slices.Contains(proved, address) {
				proved = append(proved, address)
			}
		}
	}
	switch len(proved) {
	case 1:
		function, _ := Lookup("lj_alloc_f")
		s.add(byAddress, symbol{address: proved[0]}, function, FamilyLuaJIT)
	case 0:
		s.note(seen + "its allocator has no symbol, and none was recognized in the code that makes a state")
	default:
		s.note(seen+"its allocator has no symbol, and %d functions look like it", len(proved))
	}
}

// codeAddresses are the addresses of code that a function computes.
func (s *scanner) codeAddresses(address, size uint64) []uint64 {
	const most = 16 << 10
	var found []uint64
	code, base := s.text(address, 0, min(max(size, 16), most))
	for at := 0; at < len(code); {
		in, ok := decode(code[at:])
		if !ok {
			return found
		}
		at += in.size
		if target, ok := leaTarget(in, base+uint64(at)); ok && s.executable(target) != nil {
			found = append(found, target)
		}
	}
	return found
}

// isLuaAlloc checks the shape: on the straight line from the entry the new size (argument 4) is compared with 0 and
// branched on, and where it is not 0 the same is done with the old block (argument 2).
func (s *scanner) isLuaAlloc(address uint64) bool {
	const most = 64
	held := holdArguments([]int{2, 4})
	asked := 0   // questions answered so far
	pending := 0 // the argument whose test sets the flags now
	for range most {
		code, _ := s.text(address, 0, 16)
		in, ok := decode(code)
		if !ok {
			return false
		}
		address += uint64(in.size)
		switch {
		case in.nop:
			continue
		case in.inst.Op == x86asm.JE || in.inst.Op == x86asm.JNE:
			if want := []int{4, 2}[asked]; pending != want {
				return false
			}
			if asked++; asked == 2 {
				return true
			}
			if rel, ok := in.inst.Args[0].(x86asm.Rel); ok && in.inst.Op == x86asm.JNE {
				address += uint64(int64(rel)) // the line of "not 0"
			}
			pending = 0
			continue
		case in.inst.Op == x86asm.PUSH:
			continue
		case in.inst.Op == x86asm.TEST:
			pending = held.tested(in)
			continue
		case in.inst.Op == x86asm.SUB && in.writes(writesFirst) == regSP:
			pending = 0
			continue
		}
		if in.inst.Op != x86asm.MOV && in.inst.Op != x86asm.LEA {
			pending = 0 // may set flags
		}
		if in.blocks(held) != "" {
			return false
		}
	}
	return false
}

// tested returns the argument that a "test r,r" compares with 0, or 0.
func (h holders) tested(in instruction) int {
	a, isReg := in.inst.Args[0].(x86asm.Reg)
	b, isReg2 := in.inst.Args[1].(x86asm.Reg)
	if !isReg || !isReg2 || a != b || a < x86asm.RAX || a > x86asm.R15 {
		return 0
	}
	for argument, in := range h {
		if in&registerSet(a) != 0 {
			return argument
		}
	}
	return 0
}
