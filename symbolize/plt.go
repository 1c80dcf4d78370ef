package symbolize

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/allocsnoop/allocsnoop/symbolize/section"
)

// A PLT stub jumps through a slot of the global offset table; the relocation of that slot names the function. Stubs have no
// symbols, and without names a stub would look like part of the function before it.

const pltEntry = 16 // bytes of a stub; those of .plt.got without branch protection take 8

// pltSection returns the section of stubs around the address.
func (o *object) pltSection(addr uint64) *elf.Section {
	for _, s := range o.Sections {
		if strings.HasPrefix(s.Name, ".plt") && s.Flags&elf.SHF_EXECINSTR != 0 && addr >= s.Addr && addr-s.Addr < s.Size {
			return s
		}
	}
	return nil
}

// pltNames returns a name for each of the addresses that lie in stubs.
func (o *object) pltNames(addrs []uint64, warn func(error)) map[uint64]string {
	names := map[uint64]string{}
	var slots map[uint64]string
	for _, addr := range addrs {
		s := o.pltSection(addr)
		if s == nil {
			continue
		}
		if slots == nil {
			slots = o.gotSlots(warn)
		}
		if name := slots[o.pltSlot(s, addr)]; name != "" {
			names[addr] = name + "@plt"
		}
	}
	return names
}

// pltSlot decodes the stub around addr and returns the address of the slot it jumps through; 0 when it does not.
func (o *object) pltSlot(s *elf.Section, addr uint64) uint64 {
	if s.Type == elf.SHT_NOBITS {
		return 0
	}
	size := uint64(pltEntry)
	if s.Name == ".plt.got" && s.Entsize == 8 {
		size = 8
	}
	start := (addr - s.Addr) / size * size
	code := o.at(s.Offset+start, min(size, s.Size-start))
	switch o.Machine {
	case elf.EM_X86_64:
		return x86Slot(code, s.Addr+start)
	case elf.EM_AARCH64:
		return arm64Slot(code, s.Addr+start)
	}
	return 0
}

// x86Slot finds "jmp *disp(%rip)", perhaps behind endbr64 or a bnd prefix.
func x86Slot(code []byte, addr uint64) uint64 {
	i := 0
	if len(code) >= 4 && binary.LittleEndian.Uint32(code) == 0xfa1e0ff3 {
		i = 4
	}
	if i < len(code) && code[i] == 0xf2 {
		i++
	}
	if i+6 > len(code) || code[i] != 0xff || code[i+1] != 0x25 {
		return 0
	}
	disp := int32(binary.LittleEndian.Uint32(code[i+2:]))
	return addr + uint64(i) + 6 + uint64(int64(disp))
}

// arm64Slot finds "adrp x16, page; ldr x17, [x16, #offset]", perhaps behind bti.
func arm64Slot(code []byte, addr uint64) uint64 {
	for i := 0; i+8 <= len(code); i += 4 {
		adrp, ldr := binary.LittleEndian.Uint32(code[i:]), binary.LittleEndian.Uint32(code[i+4:])
		if adrp&0x9f00001f != 0x90000010 || ldr&0xffc003ff != 0xf9400211 {
			continue
		}
		imm := int64(adrp>>29&3|adrp>>5&0x7ffff<<2) << 43 >> 31 // 21 bits, signed, pages
		return (addr+uint64(i))&^(pageSize-1) + uint64(imm) + uint64(ldr>>10&0xfff)*8
	}
	return 0
}

const maxRelocations = 4 << 20

// gotSlots maps the slots of the global offset table to the functions that the dynamic linker puts there.
func (o *object) gotSlots(warn func(error)) map[uint64]string {
	slots := map[uint64]string{}
	if o.Class != elf.ELFCLASS64 {
		return slots
	}
	for _, s := range o.Sections {
		if s.Type != elf.SHT_RELA || s.Flags&elf.SHF_ALLOC == 0 || int(s.Link) >= len(o.Sections) {
			continue
		}
		if err := o.addSlots(s, slots); err != nil {
			warn(fmt.Errorf("read relocations of %s: %w", o.path, err))
		}
	}
	return slots
}

func (o *object) addSlots(rela *elf.Section, slots map[uint64]string) error {
	symbols := o.Sections[rela.Link]
	if symbols.Type != elf.SHT_DYNSYM || int(symbols.Link) >= len(o.Sections) {
		return nil
	}
	entries, err := section.OpenSection(o.File, rela, o.r, o.size)
	if err != nil {
		return err
	}
	syms, err := section.OpenSection(o.File, symbols, o.r, o.size)
	if err != nil {
		return err
	}
	names, err := section.OpenSection(o.File, o.Sections[symbols.Link], o.r, o.size)
	if err != nil {
		return err
	}
	const size = 24
	for i := range min(entries.Size()/size, maxRelocations) {
		b, err := entries.View(i*size, size, nil)
		if err != nil {
			return err
		}
		slot, info := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
		if !o.isSlotRelocation(uint32(info)) {
			continue
		}
		b, err = syms.View(info>>32*size, 4, nil)
		if err != nil {
			continue
		}
		if name, err := names.String(uint64(binary.LittleEndian.Uint32(b))); err == nil {
			slots[slot] = name
		}
	}
	return nil
}

func (o *object) isSlotRelocation(typ uint32) bool {
	switch o.Machine {
	case elf.EM_X86_64:
		return elf.R_X86_64(typ) == elf.R_X86_64_JMP_SLOT || elf.R_X86_64(typ) == elf.R_X86_64_GLOB_DAT
	case elf.EM_AARCH64:
		return elf.R_AARCH64(typ) == elf.R_AARCH64_JUMP_SLOT || elf.R_AARCH64(typ) == elf.R_AARCH64_GLOB_DAT
	}
	return false
}
