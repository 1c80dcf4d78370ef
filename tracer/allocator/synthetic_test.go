package allocator

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// syntheticSymbol is a function of a made-up file; its address is an offset into the code.
type syntheticSymbol struct {
	name   string
	offset int
	size   int
	ifunc  bool
}

const syntheticBase = 0x401000

// syntheticELF makes a shared library of some code and a dynamic symbol table: a file small enough for a fuzzer.
func syntheticELF(code []byte, symbols []syntheticSymbol) []byte {
	const headers = 0x1000 // the code begins here in the file
	var strtab, symtab bytes.Buffer
	strtab.WriteByte(0)
	symtab.Write(make([]byte, symbolSize))
	for _, s := range symbols {
		kind := elf.STT_FUNC
		if s.ifunc {
			kind = elf.STT_GNU_IFUNC
		}
		_ = binary.Write(&symtab, binary.LittleEndian, elf.Sym64{
			Name: uint32(strtab.Len()), Info: elf.ST_INFO(elf.STB_GLOBAL, kind), Shndx: 1,
			Value: syntheticBase + uint64(s.offset), Size: uint64(s.size),
		})
		strtab.WriteString(s.name + "\x00")
	}
	names := "\x00.text\x00.dynsym\x00.dynstr\x00.shstrtab\x00"
	at := uint64(headers + len(code))
	section := func(name string, kind elf.SectionType, size int, link uint32) elf.Section64 {
		s := elf.Section64{Name: uint32(strings.Index(names, name)), Type: uint32(kind), Off: at, Size: uint64(size), Link: link}
		at += uint64(size)
		return s
	}
	sections := []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Flags: uint64(elf.SHF_ALLOC | elf.SHF_EXECINSTR), Addr: syntheticBase, Off: headers, Size: uint64(len(code))},
		section(".dynsym", elf.SHT_DYNSYM, symtab.Len(), 3),
		section(".dynstr", elf.SHT_STRTAB, strtab.Len(), 0),
		section(".shstrtab", elf.SHT_STRTAB, len(names), 0),
	}
	sections[2].Entsize = symbolSize
	var out bytes.Buffer
	header := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Shoff: at, Ehsize: 64,
		Phentsize: 56, Phnum: 1, Shentsize: 64, Shnum: uint16(len(sections)), Shstrndx: 4,
	}
	copy(header.Ident[:], "\x7fELF\x02\x01\x01")
	segment := elf.Prog64{
		Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Off: headers, Vaddr: syntheticBase,
		Filesz: uint64(len(code)), Memsz: uint64(len(code)), Align: 0x1000,
	}
	_ = binary.Write(&out, binary.LittleEndian, header)
	_ = binary.Write(&out, binary.LittleEndian, segment)
	out.Write(make([]byte, headers-out.Len()))
	out.Write(code)
	out.Write(symtab.Bytes())
	out.Write(strtab.Bytes())
	out.WriteString(names)
	_ = binary.Write(&out, binary.LittleEndian, sections)
	return out.Bytes()
}

func scanSynthetic(t interface{ Fatal(...any) }, code []byte, symbols ...syntheticSymbol) *File {
	file, err := Scan(bytes.NewReader(syntheticELF(code, symbols)), nil)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// piece is an instruction whose effect is stated here by hand, so that the property below does not believe the code
// that it tests.
type piece struct {
	code     string
	emulated bool
	ends     bool // no probe may go behind it
	writes   string
	copies   [2]string // from, to: the whole register
}

var pieces = []piece{
	{code: "\x48\x85\xff"},                                  // test %rdi,%rdi
	{code: "\x48\x81\xff\x00\x10\x00\x00"},                  // cmp $0x1000,%rdi
	{code: "\x80\x3d\x10\x00\x00\x00\x00"},                  // cmpb $0,16(%rip)
	{code: "\xf3\x0f\x1e\xfa"},                              // endbr64
	{code: "\x0f\x1f\x44\x00\x00"},                          // nopl
	{code: "\x31\xc0", writes: "rax"},                       // xor %eax,%eax
	{code: "\x31\xf6", writes: "rsi"},                       // xor %esi,%esi
	{code: "\x40\xb7\x01", writes: "rdi"},                   // mov $1,%dil
	{code: "\x48\x8d\x46\xff", writes: "rax"},               // lea -1(%rsi),%rax
	{code: "\x48\xf7\xe6", writes: "rax rdx"},               // mul %rsi
	{code: "\x48\x99", writes: "rdx"},                       // cqto
	{code: "\x64\x48\x8b\x38", writes: "rdi"},               // mov %fs:(%rax),%rdi
	{code: "\x48\x0f\x44\xfe", writes: "rdi"},               // cmove %rsi,%rdi
	{code: "\x48\x89\xfe", copies: [2]string{"rdi", "rsi"}}, // mov %rdi,%rsi
	{code: "\x48\x89\xf7", copies: [2]string{"rsi", "rdi"}}, // mov %rsi,%rdi
	{code: "\x49\x89\xf8", copies: [2]string{"rdi", "r8"}},  // mov %rdi,%r8
	{code: "\x48\x89\xf8", copies: [2]string{"rdi", "rax"}}, // mov %rdi,%rax
	{code: "\x48\x89\xfb", copies: [2]string{"rdi", "rbx"}}, // mov %rdi,%rbx, which is the caller's
	{code: "\x45\x31\xe4", writes: "r12"},                   // xor %r12d,%r12d: the caller's too
	{code: "\x48\x83\xec\x08", ends: true},                  // sub $8,%rsp
	{code: "\x48\x89\x3c\x24", ends: true},                  // mov %rdi,(%rsp): over the return address
	{code: "\x48\x87\xfe", ends: true},                      // xchg %rdi,%rsi
	{code: "\xff\xe0", ends: true},                          // jmp *%rax
	{code: "\x0f\x05", ends: true},                          // syscall
	{code: "\xc3", ends: true},                              // ret
	{code: "\x53", emulated: true},                          // push %rbx
	{code: "\x41\x57", emulated: true},                      // push %r15
	{code: "\x74\x10", emulated: true},                      // je +16
	{code: "\x0f\x87\x10\x00\x00\x00", emulated: true},      // ja +16, long
	{code: "\xe9\x10\x00\x00\x00", emulated: true},          // jmp +16
	{code: "\xe8\x10\x00\x00\x00", emulated: true},          // call +16
	{code: "\x90", emulated: true},                          // nop
	{code: "\x6a\x07", ends: true},                          // push $7: moves the stack, not emulated
	{code: "\x66\x74\x10", ends: true},                      // je with the prefix that the kernel refuses
	{code: "\xff\x74\x24\x08", ends: true},                  // push 8(%rsp)
	{code: "\xf0\x48\xff\x00", ends: true},                  // lock incq (%rax)
}

// TestPlacementProperty draws functions from the pieces and checks the placement against what the pieces say.
func TestPlacementProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		chosen := rapid.SliceOfN(rapid.SampledFrom(pieces), 1, 12).Draw(t, "pieces")
		args := rapid.SampledFrom([][]int{{1}, {2}, {1, 2}, nil}).Draw(t, "args")
		var code []byte
		for _, p := range chosen {
			code = append(code, p.code...)
		}
		size := len(code)
		code = append(code, bytes.Repeat([]byte{0xcc}, 64)...)
		got := Place(Code{
			Machine: elf.EM_X86_64, Text: code, Base: 0x1000, Entry: 0x1000, Size: uint64(size),
		}, args, Rules{})
		wantOffset, wantEmulated, where := expected(chosen, args)
		if int(got.Offset) != wantOffset || got.Emulated != wantEmulated {
			t.Fatalf("%x: %+v, want +%d, emulated %v", code[:size], got, wantOffset, wantEmulated)
		}
		for _, a := range args {
			at := a
			if moved, ok := got.Moved[a]; ok {
				at = moved
			}
			if !slices.Contains(where[a], map[int]string{1: "rdi", 2: "rsi", 3: "rdx", 4: "rcx", 5: "r8", 6: "r9"}[at]) {
				t.Fatalf("%x: argument %d is said to be at %d, it is in %v", code[:size], a, at, where[a])
			}
		}
		if want := bare(chosen, int(got.Offset)); got.Bare != want {
			t.Fatalf("%x at +%d: bare %v, want %v", code[:size], got.Offset, got.Bare, want)
		}
		if got.Instruction == "" || got.Why == "" {
			t.Fatal("not explained")
		}
	})
}

// bare tells whether no piece before the offset writes a register of the caller's.
func bare(chosen []piece, offset int) bool {
	for _, p := range chosen {
		if offset <= 0 {
			break
		}
		if p.writes == "r12" || p.copies[1] == "rbx" {
			return false
		}
		offset -= len(p.code)
	}
	return true
}

// expected walks the pieces with named registers. Code that jumps back into the stretch cannot come out of the pieces:
// all their jumps go forward.
func expected(chosen []piece, args []int) (offset int, emulated bool, where map[int][]string) {
	home := map[int][]string{1: {"rdi"}, 2: {"rsi"}}
	where = map[int][]string{1: {"rdi"}, 2: {"rsi"}}
	at := 0
	for _, p := range chosen {
		if p.emulated {
			for _, a := range args {
				if !slices.ContainsFunc(where[a], func(r string) bool { return r != "rax" && r != "rbx" }) {
					return 0, false, home
				}
			}
			if at >= maxStretch {
				return 0, false, home
			}
			return at, true, where
		}
		if p.ends {
			return 0, false, home
		}
		next := map[int][]string{}
		for _, a := range []int{1, 2} {
			for _, r := range where[a] {
				if !strings.Contains(" "+p.writes+" ", " "+r+" ") && r != p.copies[1] {
					next[a] = append(next[a], r)
				}
			}
			if p.copies[0] != "" && slices.Contains(where[a], p.copies[0]) {
				next[a] = append(next[a], p.copies[1])
			}
			if len(next[a]) == 0 && slices.Contains(args, a) {
				return 0, false, home
			}
		}
		where = next
		at += len(p.code)
	}
	return 0, false, home
}

// A probe stays at the entry when anything in the file jumps behind it.
func TestJumpsIntoTheStretchKeepTheProbeAtTheEntry(t *testing.T) {
	// free: test %rdi,%rdi; je +16; ret. The jump is at +3.
	function := "\x48\x85\xff\x74\x10\xc3"
	for _, tt := range []struct {
		name    string
		ahead   string // code before the function
		inside  string // code behind its first bytes
		behind  string // code far behind
		moved   bool
		because string
	}{
		{"nothing jumps", "", "", "", true, ""},
		{"a loop back to the entry", "", "\xeb\xf8", "", true, ""},
		{"a loop back to the spot", "", "\xeb\xfb", "", false, "a jump at"},
		{"a short jump ahead of the function", "\xeb\x06\x90\x90\x90", "", "", false, "a jump at"},
		{"the same bytes as part of an instruction", strings.Repeat("\x90", 200) + "\xb8\xeb\x05\x90\x90\x90\x90\x90", "", "", true, ""},
		{"a call from far behind", "", "", "\xe8TO\x03", false, "elsewhere"},
		{"a long conditional jump from far behind", "", "", "\x0f\x84TO\x03", false, "elsewhere"},
		{"a call of the entry from far behind", "", "", "\xe8TO\x00", true, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			code := []byte(tt.ahead + function + tt.inside)
			entry := len(tt.ahead)
			size := len(code) - entry
			code = append(code, bytes.Repeat([]byte{0x90}, 4000)...)
			if opcode, target, ok := strings.Cut(tt.behind, "TO"); ok {
				code = append(code, opcode...)
				to := entry + int(target[0])
				code = binary.LittleEndian.AppendUint32(code, uint32(int32(to-len(code)-4)))
			}
			code = append(code, bytes.Repeat([]byte{0xc3}, 64)...)
			f := scanSynthetic(t, code, syntheticSymbol{name: "free", offset: entry, size: size}, syntheticSymbol{name: "malloc", offset: len(code) - 8, size: 1})
			got := find(t, f, "free").Place
			if (got.Offset == 3) != tt.moved || !strings.Contains(got.Why, tt.because) {
				t.Errorf("%+v, want moved %v", got, tt.moved)
			}
		})
	}
}

func TestIndirectFunctionsAreProbedAtTheirCandidates(t *testing.T) {
	code := bytes.Repeat([]byte{0xc3}, 256)
	copy(code, "\x48\x8d\x05\x39\x00\x00\x00\xc3")    // 0: lea 0x40(%rip relative): the candidate at 0x40
	copy(code[0x40:], "\x53\x48\x89\x07\x5b\xc3")     // a free: push; mov; pop; ret
	copy(code[0x80:], "\x53\x48\x89\x07\x5b\xc3")     // malloc
	copy(code[0xc0:], "\xb8\x01\x00\x00\x00\xc3\x90") // a resolver that cannot be read
	f := scanSynthetic(t, code,
		syntheticSymbol{name: "free", offset: 0, size: 8, ifunc: true},
		syntheticSymbol{name: "malloc", offset: 0x80, size: 6},
		syntheticSymbol{name: "calloc", offset: 0xc0, size: 6, ifunc: true})
	got := find(t, f, "free")
	if got.Address != syntheticBase+0x40 || !got.IFunc {
		t.Errorf("free at %#x, ifunc %v", got.Address, got.IFunc)
	}
	if !strings.Contains(fmt.Sprint(f.Notes), "calloc is chosen at run time") {
		t.Errorf("notes: %q", f.Notes)
	}
}

func FuzzPlace(f *testing.F) {
	f.Add([]byte("\x48\x85\xff\x74\x10\xc3"), uint16(0), uint16(6))
	f.Add([]byte("\xf3\x0f\x1e\xfa\x48\x89\xfe\x53\xeb\xf8"), uint16(4), uint16(0))
	f.Add([]byte("\x66\x66\x2e\x0f\x1f\x84"), uint16(0), uint16(60000))
	f.Fuzz(func(t *testing.T, code []byte, entry, size uint16) {
		c := Code{Machine: elf.EM_X86_64, Text: code, Base: 0x1000, Entry: 0x1000 + uint64(entry), Size: uint64(size)}
		p := Place(c, []int{1, 2, 3}, Rules{RAX: true, LongNops: true})
		if p.Offset > 0 && (!p.Emulated || p.Offset >= maxStretch || uint64(entry)+p.Offset >= uint64(len(code))) {
			t.Fatalf("%+v", p)
		}
	})
}
