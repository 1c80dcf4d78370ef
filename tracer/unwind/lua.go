package unwind

import (
	"bytes"
	"debug/elf"
	"io"

	"golang.org/x/arch/x86/x86asm"

	"github.com/allocsnoop/allocsnoop/tracer/unwind/internal/ehframe"
)

// luaLayout is what the walker must know of a build of LuaJIT to cross its compiled code. Offsets differ between
// builds, so that they are read out of the library's own code; when that fails, such stacks stay cut.
type luaLayout struct {
	cur    uint32 // of the running lua_State in global_State
	cframe uint32 // of the innermost C frame in lua_State
	size   uint32 // of the interpreter's C frame
}

// minInterpreter is the least size of the interpreter's assembler under one rule; it has some 20 KB.
const minInterpreter = 8192

// findLua recognizes LuaJIT (2.1, 64-bit collector) by its symbols; nil for anything else.
func findLua(r io.ReaderAt, table *ehframe.Table) *luaLayout {
	f, err := elf.NewFile(r)
	if err != nil || f.Machine != elf.EM_X86_64 || table.Flat < minInterpreter {
		return nil
	}
	symbols := luaSymbols(f)
	if symbols["lua_close"] == 0 || symbols["luaJIT_setmode"] == 0 {
		return nil
	}
	code := make([]byte, 384)
	n := readCode(f, symbols["lua_close"], code)
	l := deriveLua(code[:n])
	if l == nil || table.FlatRule.Param < 32 || table.FlatRule.Param > 512 {
		return nil
	}
	l.size = uint32(table.FlatRule.Param)
	return l
}

// luaSymbols looks at string tables first: reading all symbols of a large library takes long.
func luaSymbols(f *elf.File) map[string]uint64 {
	found := map[string]uint64{}
	for _, t := range []struct {
		strings string
		symbols func() ([]elf.Symbol, error)
	}{{".dynstr", f.DynamicSymbols}, {".strtab", f.Symbols}} {
		s := f.Section(t.strings)
		if s == nil || s.Size > 64<<20 {
			continue
		}
		b, err := s.Data()
		if err != nil || !bytes.Contains(b, []byte("luaJIT_setmode")) {
			continue
		}
		symbols, err := t.symbols()
		if err != nil {
			continue
		}
		for _, s := range symbols {
			if elf.ST_TYPE(s.Info) == elf.STT_FUNC && s.Section != elf.SHN_UNDEF {
				found[s.Name] = s.Value
			}
		}
	}
	return found
}

func readCode(f *elf.File, vaddr uint64, p []byte) int {
	for _, s := range f.Progs {
		if s.Type == elf.PT_LOAD && vaddr >= s.Vaddr && vaddr-s.Vaddr < s.Filesz {
			n, _ := s.ReadAt(p, int64(vaddr-s.Vaddr))
			return n
		}
	}
	return 0
}

// deriveLua reads lua_close: it loads global_State from the lua_State (rdi+16), clears the running state in it, loads
// the main thread out of it, and clears that one's C frame. Both show as stores of 0.
func deriveLua(code []byte) *luaLayout {
	const stateToGlobal = 16
	l := &luaLayout{}
	var global, main x86asm.Reg
	zero := map[x86asm.Reg]bool{}
	for len(code) > 0 {
		inst, err := x86asm.Decode(code, 64)
		if err != nil || inst.Op == x86asm.RET {
			return nil
		}
		code = code[inst.Len:]
		switch inst.Op {
		case x86asm.XOR:
			if a, ok := inst.Args[0].(x86asm.Reg); ok && inst.Args[0] == inst.Args[1] {
				zero[wide(a)] = true
			}
			continue
		case x86asm.CALL:
			for _, r := range []x86asm.Reg{x86asm.RAX, x86asm.RCX, x86asm.RDX, x86asm.RSI, x86asm.RDI, x86asm.R8, x86asm.R9,
				x86asm.R10, x86asm.R11} {
				delete(zero, r)
			}
			continue
		case x86asm.MOV:
		default:
			continue
		}
		if to, ok := inst.Args[0].(x86asm.Reg); ok {
			from, ok := inst.Args[1].(x86asm.Mem)
			delete(zero, wide(to))
			switch {
			case ok && global == 0 && from.Base == x86asm.RDI && from.Disp == stateToGlobal && from.Index == 0 && inst.MemBytes == 8:
				global = to
			case ok && global != 0 && main == 0 && from.Base == global && from.Index == 0 && inst.MemBytes == 8:
				main = to
			}
			continue
		}
		to, ok := inst.Args[0].(x86asm.Mem)
		if !ok || inst.MemBytes != 8 || to.Index != 0 || !storesZero(inst, zero) {
			continue
		}
		switch {
		case global != 0 && to.Base == global && l.cur == 0:
			l.cur = uint32(to.Disp)
		case main != 0 && to.Base == main && l.cframe == 0:
			l.cframe = uint32(to.Disp)
		}
		if l.cur != 0 && l.cframe != 0 {
			if l.cur > 4096 || l.cframe > 256 || l.cur&7 != 0 || l.cframe&7 != 0 {
				return nil
			}
			return l
		}
	}
	return nil
}

func storesZero(inst x86asm.Inst, zero map[x86asm.Reg]bool) bool {
	switch from := inst.Args[1].(type) {
	case x86asm.Imm:
		return from == 0
	case x86asm.Reg:
		return zero[wide(from)]
	}
	return false
}

// wide is the 64-bit register that a 32-bit name writes.
func wide(r x86asm.Reg) x86asm.Reg {
	if r >= x86asm.EAX && r <= x86asm.R15L {
		return r - x86asm.EAX + x86asm.RAX
	}
	return r
}
