package allocator

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/arch/x86/x86asm"
)

// maxForwarder is how many instructions a function may have to be judged a mere forwarder.
const maxForwarder = 96

// harmless are functions that a forwarder may call besides the one it forwards to.
var harmless = map[string]bool{
	"_ZSt15get_new_handlerv": true, "__cxa_allocate_exception": true, "__cxa_throw": true, "__cxa_begin_catch": true,
	"__cxa_end_catch": true, "__cxa_rethrow": true, "__cxa_free_exception": true, "_Unwind_Resume": true,
	"__stack_chk_fail": true, "abort": true, "__errno_location": true, "_ZSt17__throw_bad_allocv": true,
	"_ZSt9terminatev": true, "__cxa_call_unexpected": true, "__cxa_call_terminate": true,
	"__popcountdi2": true,
}

// forwards reports why a function needs no probe: all it does is to call another function of the table, which is
// probed where it is. Every path is followed; one that writes memory, or calls anything not known, is no forwarder.
// Probing both would be a wasted trap, and for a free a second, unknown, free of the same block.
func (s *scanner) forwards(f *Found, here map[uint64]*Found) string {
	if s.elf.Machine != elf.EM_X86_64 || f.Family == FamilyDeclared {
		return ""
	}
	w := &walk{scanner: s, here: here, from: f, seen: map[uint64]bool{}}
	if !w.run() || w.target == "" {
		return ""
	}
	if w.wraps {
		f.Op = Wrap
		return ""
	}
	return "forwards every call to " + w.target
}

type walk struct {
	scanner *scanner
	here    map[uint64]*Found
	from    *Found
	seen    map[uint64]bool
	todo    []uint64
	target  string
	wraps   bool // it rounds the size up on its way to target
	// exception: the straight line has made an exception object, which it may fill in.
	exception bool
}

func (w *walk) run() bool {
	w.todo = []uint64{w.from.Address}
	for len(w.todo) > 0 {
		at := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		if !w.line(at) {
			return false
		}
	}
	return true
}

// line follows straight code until it ends.
func (w *walk) line(at uint64) bool {
	code, base := w.scanner.text(at, 0, 1024)
	w.exception = false
	for !w.seen[at] {
		if len(w.seen) >= maxForwarder || at-base >= uint64(len(code)) {
			return false
		}
		w.seen[at] = true
		in, ok := decode(code[at-base:])
		if !ok {
			return false
		}
		next := at + uint64(in.size)
		ends, ok := w.step(in, at, next)
		if !ok {
			return false
		}
		if ends {
			return true
		}
		at = next
	}
	return true
}

// step judges one instruction; ends is true where the line does.
func (w *walk) step(in instruction, at, next uint64) (ends, ok bool) {
	if in.nop {
		return false, true
	}
	switch in.inst.Op {
	case x86asm.RET, x86asm.UD2:
		return true, true
	case x86asm.PUSH, x86asm.POP, x86asm.CALL, x86asm.JMP, x86asm.LEAVE:
	default:
		if rel, isRel := in.inst.Args[0].(x86asm.Rel); isRel { // a conditional jump
			w.todo = append(w.todo, next+uint64(int64(rel)))
			return false, true
		}
		how, passes := passable[in.inst.Op]
		return false, passes && !w.writesMemory(in, how)
	}
	if in.inst.Op == x86asm.PUSH || in.inst.Op == x86asm.POP || in.inst.Op == x86asm.LEAVE {
		return false, true
	}
	call := in.inst.Op == x86asm.CALL
	switch arg := in.inst.Args[0].(type) {
	case x86asm.Rel:
		return !call, w.reach(next+uint64(int64(arg)), call)
	case x86asm.Mem:
		if arg.Base != x86asm.RIP {
			return false, false
		}
		return !call, w.reachName(w.scanner.imported(next+ripOffset(arg)), call)
	case x86asm.Reg:
		// The new-handler of operator new; an allocator behind a pointer elsewhere.
		return false, call && tableGroup(w.from.Name) == groupCxx
	}
	return false, false
}

// writesMemory: stores to the stack and to thread-local variables (errno) are no allocator's work.
func (w *walk) writesMemory(in instruction, how effect) bool {
	m, ok := in.inst.Args[0].(x86asm.Mem)
	if !ok || how == readsOnly {
		return false
	}
	return m.Base != x86asm.RSP && m.Segment != x86asm.FS && !w.exception
}

// reach follows a direct branch: to a function of the table, a stub, or more of this function.
func (w *walk) reach(target uint64, call bool) bool {
	if f := w.here[target]; f != nil && target != w.from.Address {
		return w.reachName(f.Name, call)
	}
	if name := w.scanner.stub(target); name != "" {
		return w.reachName(name, call)
	}
	if call {
		return false
	}
	w.todo = append(w.todo, target)
	return true
}

func (w *walk) reachName(name string, call bool) bool {
	if name == "" {
		return false
	}
	if harmless[name] {
		w.exception = w.exception || name == "__cxa_allocate_exception"
		return true
	}
	target, ok := w.tableFunction(name)
	if !ok || w.from.Op != target.Op && target.Op != Wrap {
		return false
	}
	// An aligned operator new may do so on its way to aligned_alloc.
	w.wraps = w.wraps || call && alignedNew(w.from.Name) && !alignedNew(name)
	if w.target != "" && w.target != name {
		return false
	}
	w.target = name
	return true
}

// tableFunction finds a function by the name it has here or, for an import, in the table.
func (w *walk) tableFunction(name string) (Function, bool) {
	for _, f := range w.here {
		if f.Name == name {
			return f.Function, true
		}
	}
	return Lookup(name)
}

func alignedNew(name string) bool {
	return strings.HasPrefix(name, "_Zn") && strings.Contains(name, "St11align_val_t")
}

func tableGroup(name string) group {
	if i, ok := byName[name]; ok {
		return rows[i].group
	}
	return groupC
}

// stub returns the symbol that a PLT stub jumps to, empty when the code at the address is none.
func (s *scanner) stub(address uint64) string {
	code, _ := s.text(address, 0, 16)
	if len(code) >= 4 && string(code[:4]) == string(endbr64) {
		code, address = code[4:], address+4
	}
	if len(code) > 0 && code[0] == 0xf2 { // bnd
		code, address = code[1:], address+1
	}
	if len(code) < 6 || code[0] != 0xff || code[1] != 0x25 {
		return ""
	}
	return s.imported(address + 6 + rel32(code[2:]))
}

// imported returns the symbol whose address the dynamic linker puts into a GOT slot.
func (s *scanner) imported(slot uint64) string {
	if s.imports == nil {
		s.imports = s.readImports()
	}
	return s.imports[slot]
}

func (s *scanner) readImports() map[uint64]string {
	imports := map[uint64]string{}
	names := s.dynamicNames()
	left := uint64(maxRelocations)
	for _, section := range s.elf.Sections {
		if section.Type != elf.SHT_RELA || section.Flags&elf.SHF_ALLOC == 0 || section.FileSize/24 > left {
			continue
		}
		left -= section.FileSize / 24
		raw, err := readAt(section, section.FileSize)
		if err != nil {
			continue
		}
		for ; len(raw) >= 24; raw = raw[24:] {
			info := binary.LittleEndian.Uint64(raw[8:])
			switch elf.R_X86_64(info & 0xffffffff) {
			case elf.R_X86_64_JMP_SLOT, elf.R_X86_64_GLOB_DAT:
			default:
				continue
			}
			if i := info >> 32; i < uint64(len(names)) && names[i] != "" {
				imports[binary.LittleEndian.Uint64(raw)] = names[i]
			}
		}
	}
	return imports
}

// dynamicNames are the names of the dynamic symbols by their index in relocations.
func (s *scanner) dynamicNames() []string {
	section := s.elf.SectionByType(elf.SHT_DYNSYM)
	if section == nil || section.FileSize/symbolSize > maxSymbols {
		return nil
	}
	symbols, err := s.elf.DynamicSymbols() // leaves out the null symbol at index 0
	if err != nil {
		return nil
	}
	names := make([]string, len(symbols)+1)
	for i, sym := range symbols {
		names[i+1] = sym.Name
	}
	return names
}

// resolveIFunc books every function that an indirect function's resolver may choose. Which one it chose depends on the
// machine; they are alternatives of one meaning, so that all of them are probed.
func (s *scanner) resolveIFunc(byAddress map[uint64]*Found, sym symbol, function Function, family Family) {
	candidates := s.resolverCandidates(sym.address)
	for _, address := range candidates {
		if byAddress[address] != nil {
			continue
		}
		s.add(byAddress, symbol{address: address, version: sym.version}, function, family)
		if f := byAddress[address]; f != nil {
			f.IFunc = true
		}
	}
	if len(candidates) == 0 {
		s.note("%s is chosen at run time (ifunc) and its candidates were not recognized: calls to it are not seen", sym.name)
	}
}

func (s *scanner) resolverCandidates(resolver uint64) []uint64 {
	var candidates []uint64
	code, base := s.text(resolver, 0, 512)
	for at := uint64(0); at < uint64(len(code)); {
		in, ok := decode(code[at:])
		if !ok {
			break
		}
		at += uint64(in.size)
		if in.inst.Op == x86asm.RET {
			break
		}
		if address, ok := leaTarget(in, base+at); ok && s.executable(address) != nil {
			candidates = append(candidates, address)
		}
	}
	return candidates
}

// leaTarget is the address that a lea relative to rip computes; next is the address behind the instruction.
func leaTarget(in instruction, next uint64) (uint64, bool) {
	if in.inst.Op != x86asm.LEA {
		return 0, false
	}
	m, ok := in.inst.Args[1].(x86asm.Mem)
	if !ok || m.Base != x86asm.RIP {
		return 0, false
	}
	return next + ripOffset(m), true
}

// ripOffset is the displacement of an operand relative to rip, which x86asm does not sign-extend.
func ripOffset(m x86asm.Mem) uint64 { return uint64(int64(int32(m.Disp))) }

func (f Found) String() string { return fmt.Sprintf("%s at %#x", f.Name, f.Address) }
