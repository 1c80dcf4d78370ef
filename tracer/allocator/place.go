package allocator

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"strings"

	"golang.org/x/arch/arm64/arm64asm"
	"golang.org/x/arch/x86/x86asm"
)

// maxStretch is how far behind the entry a probe may go, in bytes.
const maxStretch = 64

// shortReach is how far a two-byte jump reaches, in bytes.
const shortReach = 130

// Rules say what the running kernel does with a probed instruction beyond what every kernel since 5.10 does.
type Rules struct {
	// LongNops: nops of several bytes are emulated too (6.18 and later); one-byte and prefixed nops always are.
	LongNops bool
	// RAX: the tracer can read an argument from rax too (ArgRAX).
	RAX bool
}

// Code is the machine code of one function and its surroundings. Addresses are those of the ELF file.
type Code struct {
	Machine elf.Machine
	// Text holds the bytes around the function, Base is the address of the first one.
	Text []byte
	Base uint64
	// Entry is the function's address. Size may be 0 when the symbol has none.
	Entry, Size uint64
	// JumpInto reports whether any direct jump or call outside Text leads to an address in [lo, hi]; nil: none does.
	JumpInto func(lo, hi uint64) bool
}

// Placement is where the probe of a function goes.
type Placement struct {
	Offset      uint64 `json:"offset"` // of the probed instruction from the entry
	Instruction string `json:"instruction"`
	Emulated    bool   `json:"emulated"` // rather than single-stepped
	Why         string `json:"why"`
	// Moved says where arguments are at the probe that have left their own registers: argument position to the
	// position whose register holds the value there (ArgRAX for rax). Most often it is empty.
	Moved map[int]int `json:"moved,omitempty"`
	// Bare: the registers that belong to the caller are as at the entry too, so that the function's own frame can be
	// left without its unwind table (musl's allocator has none).
	Bare bool `json:"-"`
}

// ArgRAX stands for register rax where a position of an argument is asked for; only with Rules.RAX.
const ArgRAX = 7

// Place chooses the first instruction of a function that the kernel emulates and that every call passes with the stack
// pointer as at the entry and every argument of args in some argument register. Where this cannot be proved the probe
// stays at the entry. Jumps through tables and pointers are out of reach; compilers do not aim them at a prologue.
func Place(c Code, args []int, rules Rules) Placement {
	if c.Machine == elf.EM_AARCH64 {
		return placeArm64(c)
	}
	if c.Machine != elf.EM_X86_64 {
		return Placement{Bare: true, Why: "no placement for this architecture: the entry"}
	}
	body := c.body()
	first, ok := decode(body)
	if !ok {
		return Placement{Instruction: "(unknown)", Bare: true, Why: "the entry cannot be decoded: probed there, at the cost of a single step"}
	}
	stay := func(format string, a ...any) Placement {
		return Placement{
			Instruction: first.text,
			Bare:        true,
			Why:         "single-stepped at the entry, about 15 times the cost of an emulated probe: " + fmt.Sprintf(format, a...),
		}
	}
	held, bare := holdArguments(args), true
	limit := maxStretch
	if c.Size != 0 {
		limit = min(limit, int(min(c.Size, maxStretch)))
	}
	for offset := 0; offset < limit; {
		in, ok := decode(body[offset:])
		if !ok {
			return stay("the instruction at +%d cannot be decoded", offset)
		}
		if c.Size != 0 && uint64(offset+in.size) > c.Size {
			return stay("the instruction at +%d reaches beyond the function", offset)
		}
		if in.emulated(rules) {
			p := Placement{Offset: uint64(offset), Instruction: in.text, Emulated: true, Bare: bare, Why: "the entry is emulated"}
			if offset == 0 {
				return p
			}
			if from, jumped := c.jumpInto(offset, in.size); jumped {
				return stay("%s leads between the entry and the %s at +%d", from, in.text, offset)
			}
			if p.Moved, ok = held.moved(rules); !ok {
				return stay("at +%d an argument is in a register that is not read", offset)
			}
			p.Why = fmt.Sprintf("every call passes it with its arguments; the entry (%s) would be single-stepped", first.text)
			return p
		}
		if why := in.blocks(held); why != "" {
			return stay("%s at +%d %s", in.text, offset, why)
		}
		bare = bare && !in.writesCallers()
		offset += in.size
	}
	return stay("nothing emulated in its first %d bytes", limit)
}

// body is the code from the entry on.
func (c Code) body() []byte {
	if c.Entry < c.Base || c.Entry-c.Base >= uint64(len(c.Text)) {
		return nil
	}
	return c.Text[c.Entry-c.Base:]
}

// jumpInto looks for a direct jump to behind the entry and up to the probed instruction's last byte. Every byte
// sequence that could be such a jump counts unless the disassembly shows that no instruction starts there.
func (c Code) jumpInto(offset, size int) (from string, found bool) {
	lo, hi := c.Entry+1, c.Entry+uint64(offset+size)-1
	starts := c.instructionStarts()
	for i := range c.Text {
		target, ok := branchTarget(c.Text[i:], c.Base+uint64(i))
		if !ok || target < lo || target > hi {
			continue
		}
		at := c.Base + uint64(i)
		if start, known := starts.at(at); known && !start {
			continue
		}
		return fmt.Sprintf("a jump at %#x", at), true
	}
	if c.JumpInto != nil && c.JumpInto(lo, hi) {
		return "a jump from elsewhere in the file", true
	}
	return "", false
}

// startSet knows the instruction starts of a part of the text.
type startSet struct {
	lo, hi uint64 // [lo, hi) is known
	starts map[uint64]bool
}

func (s startSet) at(address uint64) (start, known bool) {
	if address < s.lo || address >= s.hi {
		return false, false
	}
	return s.starts[address], true
}

// instructionStarts disassembles the function and what lies around it. What precedes the entry is believed only when
// the disassembly runs without an error into the entry exactly; variable-length code falls into step within a few
// instructions, so that part is used only from some way behind where it began.
func (c Code) instructionStarts() startSet {
	s := startSet{lo: c.Entry, hi: c.Entry, starts: map[uint64]bool{}}
	body := c.body()
	end := min(len(body), int(min(c.Size, 1<<20))+2*shortReach)
	for offset := 0; offset < end; {
		in, ok := decode(body[offset:])
		if !ok {
			break
		}
		s.starts[c.Entry+uint64(offset)] = true
		offset += in.size
		s.hi = c.Entry + uint64(offset)
	}
	const settle = 64
	begin := c.Entry - min(c.Entry-c.Base, 2*settle+2*shortReach)
	var ahead []uint64
	at := begin
	for at < c.Entry {
		in, ok := decode(c.Text[at-c.Base:])
		if !ok { // out of step, or data: begin again behind it
			at++
			begin, ahead = at, nil
			continue
		}
		ahead = append(ahead, at)
		at += uint64(in.size)
	}
	if at != c.Entry || c.Entry-begin <= settle {
		return s
	}
	for _, a := range ahead {
		s.starts[a] = true
	}
	s.lo = begin + settle
	return s
}

// branchTarget reads the direct branch that starts at code[0], if the bytes can be one. Prefixes are not skipped: the
// scan comes by the opcode itself.
func branchTarget(code []byte, at uint64) (target uint64, ok bool) {
	if len(code) < 2 {
		return 0, false
	}
	switch op := code[0]; {
	case op == 0xeb, op >= 0x70 && op <= 0x7f, op >= 0xe0 && op <= 0xe3:
		return at + 2 + uint64(int64(int8(code[1]))), true
	case op == 0xe8, op == 0xe9:
		if len(code) < 5 {
			return 0, false
		}
		return at + 5 + rel32(code[1:]), true
	case op == 0x0f && code[1]&0xf0 == 0x80:
		if len(code) < 6 {
			return 0, false
		}
		return at + 6 + rel32(code[2:]), true
	}
	return 0, false
}

func rel32(b []byte) uint64 { return uint64(int64(int32(binary.LittleEndian.Uint32(b)))) }

// instruction is one decoded x86-64 instruction.
type instruction struct {
	inst  x86asm.Inst
	bytes []byte
	size  int
	text  string
	nop   bool // endbr64 and nops: no effect at all
}

var endbr64 = []byte{0xf3, 0x0f, 0x1e, 0xfa}

func decode(code []byte) (instruction, bool) {
	if len(code) >= 4 && string(code[:4]) == string(endbr64) {
		return instruction{bytes: code[:4], size: 4, text: "endbr64", nop: true}, true
	}
	if n := longNop(code); n > 0 {
		return instruction{bytes: code[:n], size: n, text: "nop", nop: true}, true
	}
	inst, err := x86asm.Decode(code[:min(len(code), 15)], 64)
	if err != nil || inst.Len <= 0 || inst.Len > len(code) || inst.Op == 0 {
		return instruction{}, false
	}
	return instruction{
		inst: inst, bytes: code[:inst.Len], size: inst.Len,
		text: strings.ToLower(x86asm.GNUSyntax(inst, 0, nil)),
		nop:  inst.Op == x86asm.NOP,
	}, true
}

// longNop returns the length of a nop of several bytes, with any number of prefixes: compilers pad with up to 15 bytes
// of them, more than x86asm takes for one instruction.
func longNop(code []byte) int {
	i := 0
	for i < len(code) && (code[i] == 0x66 || code[i] == 0x2e) {
		i++
	}
	if i+3 > len(code) || code[i] != 0x0f || code[i+1] != 0x1f {
		return 0
	}
	modrm := code[i+2]
	mod, rm := modrm>>6, modrm&7
	n := i + 3
	if mod != 3 && rm == 4 {
		n++ // SIB
	}
	switch {
	case mod == 1:
		n++
	case mod == 2, mod == 0 && rm == 5:
		n += 4
	}
	if n > len(code) || n > 15 {
		return 0
	}
	return n
}

// emulated follows arch/x86/kernel/uprobes.c: relative jumps and calls, pushes of a register, nops. Everything else is
// executed out of line, one trap more.
func (in instruction) emulated(rules Rules) bool {
	prefixes, opcode := in.split()
	if len(opcode) == 0 {
		return false
	}
	operandSize := strings.IndexByte(string(prefixes), 0x66) >= 0
	switch op := opcode[0]; {
	case op == 0x90:
		return len(prefixes) == 0 || !isREX(prefixes[len(prefixes)-1]) // 41 90 is xchg
	case op == 0x0f && len(opcode) > 1 && opcode[1] == 0x1f:
		return rules.LongNops && in.size <= 8
	case op >= 0x50 && op <= 0x57: // push: alone or with the one prefix 0x41
		return len(prefixes) == 0 || len(prefixes) == 1 && prefixes[0] == 0x41
	case op == 0xeb, op == 0xe9, op == 0xe8, op >= 0x70 && op <= 0x7f:
		return !operandSize
	case op == 0x0f && len(opcode) > 1 && opcode[1]&0xf0 == 0x80:
		return !operandSize
	}
	return false
}

func isREX(b byte) bool { return b&0xf0 == 0x40 }

func (in instruction) split() (prefixes, opcode []byte) {
	for i, b := range in.bytes {
		switch {
		case b == 0x66, b == 0x67, b == 0xf0, b == 0xf2, b == 0xf3, b == 0x2e, b == 0x36, b == 0x3e, b == 0x26, b == 0x64, b == 0x65:
		case isREX(b):
		default:
			return in.bytes[:i], in.bytes[i:]
		}
	}
	return in.bytes, nil
}

// registers is a set of general registers, bit n for register n in the encoding's order (0 rax, 4 rsp).
type registers uint16

const (
	regAX registers = 1 << 0
	regCX registers = 1 << 1
	regDX registers = 1 << 2
	regSP registers = 1 << 4

	calleeSaved registers = 1<<3 | 1<<5 | 0xf<<12
)

// argumentRegisters are those of the System V calling convention; later arguments are on the stack, which is at its
// place as long as rsp is untouched.
var argumentRegisters = [...]registers{1 << 7, 1 << 6, regDX, regCX, 1 << 8, 1 << 9}

// holders knows which registers hold each needed argument while the code goes on from the entry.
type holders map[int]registers

func holdArguments(args []int) holders {
	h := holders{}
	for _, a := range args {
		if a >= 1 && a <= len(argumentRegisters) {
			h[a] = argumentRegisters[a-1]
		}
	}
	return h
}

// write forgets what a register held; false when it was the last copy of an argument.
func (h holders) write(r registers) bool {
	for a := range h {
		h[a] &^= r
		if h[a] == 0 {
			return false
		}
	}
	return true
}

// copy notes a move of a whole register.
func (h holders) copy(to, from registers) bool {
	copied := map[int]bool{}
	for a := range h {
		copied[a] = h[a]&from != 0
	}
	ok := true
	for a := range h {
		if copied[a] {
			h[a] |= to
			continue
		}
		h[a] &^= to
		ok = ok && h[a] != 0
	}
	return ok
}

// moved says where the arguments are that are not at home; false when one is in no register that the tracer reads.
func (h holders) moved(rules Rules) (map[int]int, bool) {
	var moved map[int]int
	for a, in := range h {
		if in&argumentRegisters[a-1] != 0 {
			continue
		}
		at := 0
		for i, r := range argumentRegisters {
			if in&r != 0 {
				at = i + 1
				break
			}
		}
		if at == 0 && rules.RAX && in&regAX != 0 {
			at = ArgRAX
		}
		if at == 0 {
			return nil, false
		}
		if moved == nil {
			moved = map[int]int{}
		}
		moved[a] = at
	}
	return moved, true
}

func registerSet(r x86asm.Reg) registers {
	switch {
	case r >= x86asm.AL && r <= x86asm.BL:
		return 1 << (r - x86asm.AL)
	case r >= x86asm.AH && r <= x86asm.BH:
		return 1 << (r - x86asm.AH)
	case r >= x86asm.SPB && r <= x86asm.R15B:
		return 1 << (r - x86asm.SPB + 4)
	case r >= x86asm.AX && r <= x86asm.R15W:
		return 1 << (r - x86asm.AX)
	case r >= x86asm.EAX && r <= x86asm.R15L:
		return 1 << (r - x86asm.EAX)
	case r >= x86asm.RAX && r <= x86asm.R15:
		return 1 << (r - x86asm.RAX)
	}
	return 0
}

// effect is what an instruction that a probe may move past does to registers.
type effect uint8

const (
	readsOnly effect = iota + 1
	writesFirst
	writesAX
	writesDX
	writesAXDX
	unaryOrFirst // imul: with one operand it writes rdx:rax
)

// passable are the instructions that a probe may be moved past: they go on to the next one, always, and write nothing
// but their first operand or what is noted. Anything else ends the search.
var passable = map[x86asm.Op]effect{
	x86asm.TEST: readsOnly, x86asm.CMP: readsOnly, x86asm.BT: readsOnly, x86asm.NOP: readsOnly,
	x86asm.PREFETCHT0: readsOnly, x86asm.PREFETCHT1: readsOnly, x86asm.PREFETCHT2: readsOnly, x86asm.PREFETCHNTA: readsOnly,
	x86asm.MOV: writesFirst, x86asm.MOVZX: writesFirst, x86asm.MOVSX: writesFirst, x86asm.MOVSXD: writesFirst,
	x86asm.LEA: writesFirst, x86asm.ADD: writesFirst, x86asm.SUB: writesFirst, x86asm.AND: writesFirst,
	x86asm.OR: writesFirst, x86asm.XOR: writesFirst, x86asm.ADC: writesFirst, x86asm.SBB: writesFirst,
	x86asm.SHL: writesFirst, x86asm.SHR: writesFirst, x86asm.SAR: writesFirst, x86asm.ROL: writesFirst, x86asm.ROR: writesFirst,
	x86asm.NEG: writesFirst, x86asm.NOT: writesFirst, x86asm.INC: writesFirst, x86asm.DEC: writesFirst,
	x86asm.BSF: writesFirst, x86asm.BSR: writesFirst, x86asm.LZCNT: writesFirst, x86asm.TZCNT: writesFirst, x86asm.BSWAP: writesFirst,
	x86asm.MOVD: writesFirst, x86asm.MOVQ: writesFirst, x86asm.MOVAPS: writesFirst, x86asm.MOVUPS: writesFirst,
	x86asm.MOVDQA: writesFirst, x86asm.MOVDQU: writesFirst, x86asm.PXOR: writesFirst, x86asm.XORPS: writesFirst,
	x86asm.PUNPCKLQDQ: writesFirst,
	x86asm.SETA:       writesFirst, x86asm.SETAE: writesFirst, x86asm.SETB: writesFirst, x86asm.SETBE: writesFirst, x86asm.SETE: writesFirst,
	x86asm.SETNE: writesFirst, x86asm.SETG: writesFirst, x86asm.SETGE: writesFirst, x86asm.SETL: writesFirst, x86asm.SETLE: writesFirst,
	x86asm.SETO: writesFirst, x86asm.SETNO: writesFirst, x86asm.SETS: writesFirst, x86asm.SETNS: writesFirst,
	x86asm.CMOVA: writesFirst, x86asm.CMOVAE: writesFirst, x86asm.CMOVB: writesFirst, x86asm.CMOVBE: writesFirst,
	x86asm.CMOVE: writesFirst, x86asm.CMOVNE: writesFirst, x86asm.CMOVG: writesFirst, x86asm.CMOVGE: writesFirst,
	x86asm.CMOVL: writesFirst, x86asm.CMOVLE: writesFirst, x86asm.CMOVO: writesFirst, x86asm.CMOVNO: writesFirst,
	x86asm.CMOVS: writesFirst, x86asm.CMOVNS: writesFirst,
	x86asm.CDQE: writesAX, x86asm.CWDE: writesAX, x86asm.CDQ: writesDX, x86asm.CQO: writesDX,
	x86asm.MUL: writesAXDX, x86asm.IMUL: unaryOrFirst,
}

// blocks says why a probe must not be moved past the instruction; empty when it may. It keeps the holders up to date.
func (in instruction) blocks(held holders) string {
	if in.nop {
		return ""
	}
	how, ok := passable[in.inst.Op]
	if !ok {
		return "ends the straight line"
	}
	for _, p := range in.inst.Prefix {
		switch p & 0xff {
		case 0xf0:
			return "ends the straight line"
		}
	}
	written := in.writes(how)
	if written&regSP != 0 {
		return "moves the stack pointer"
	}
	if to, from, ok := in.copies(); ok {
		if !held.copy(to, from) {
			return "overwrites an argument"
		}
	} else if !held.write(written) {
		return "overwrites an argument"
	}
	if m, isMem := in.inst.Args[0].(x86asm.Mem); isMem && how != readsOnly && m.Base == x86asm.RSP && m.Disp > -8 {
		return "may overwrite the return address"
	}
	return ""
}

// copies recognizes a move of one whole register to another.
func (in instruction) copies() (to, from registers, ok bool) {
	if in.inst.Op != x86asm.MOV {
		return 0, 0, false
	}
	dst, isReg := in.inst.Args[0].(x86asm.Reg)
	src, isReg2 := in.inst.Args[1].(x86asm.Reg)
	if !isReg || !isReg2 || dst < x86asm.RAX || dst > x86asm.R15 || src < x86asm.RAX || src > x86asm.R15 {
		return 0, 0, false
	}
	return registerSet(dst), registerSet(src), true
}

func (in instruction) writes(how effect) registers {
	switch how {
	case writesAX:
		return regAX
	case writesDX:
		return regDX
	case writesAXDX:
		return regAX | regDX
	case unaryOrFirst:
		if in.inst.Args[1] == nil {
			return regAX | regDX
		}
	case readsOnly:
		return 0
	}
	if r, ok := in.inst.Args[0].(x86asm.Reg); ok {
		return registerSet(r)
	}
	return 0
}

// writesCallers tells whether a passable instruction writes a register that the caller gets back: rbx, rbp, r12 to r15.
func (in instruction) writesCallers() bool {
	return !in.nop && in.writes(passable[in.inst.Op])&calleeSaved != 0
}

// placeArm64 keeps the probe at the entry: every instruction has the same size and most prologues are single-stepped
// wherever the probe goes.
func placeArm64(c Code) Placement {
	body := c.body()
	if len(body) < 4 {
		return Placement{Instruction: "(unknown)", Bare: true, Why: "the entry cannot be decoded"}
	}
	word := binary.LittleEndian.Uint32(body)
	p := Placement{Instruction: fmt.Sprintf(".word %#x", word), Bare: true, Why: "the entry: no other place is known to be cheaper on arm64"}
	if inst, err := arm64asm.Decode(body[:4]); err == nil {
		p.Instruction = strings.ToLower(arm64asm.GNUSyntax(inst))
	}
	p.Emulated = simulatedArm64(word)
	return p
}

// simulatedArm64 follows arch/arm64/kernel/probes/decode-insn.c: branches, adr, adrp and literal loads.
func simulatedArm64(word uint32) bool {
	switch {
	case word&0x7c000000 == 0x14000000, // b, bl
		word&0xff000010 == 0x54000000, // b.cond
		word&0x7e000000 == 0x34000000, // cbz, cbnz
		word&0x7e000000 == 0x36000000, // tbz, tbnz
		word&0x1f000000 == 0x10000000, // adr, adrp
		word&0xbf000000 == 0x18000000, // ldr literal
		word&0xff000000 == 0x98000000, // ldrsw literal
		word&0xfffffc1f == 0xd61f0000, // br
		word&0xfffffc1f == 0xd63f0000, // blr
		word&0xfffffc1f == 0xd65f0000: // ret
		return true
	}
	return false
}
