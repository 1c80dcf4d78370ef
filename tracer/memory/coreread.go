package memory

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Bounds on what a core file may ask for; a hostile one asks for everything.
const (
	maxSegments = 4 << 20   // PT_LOAD entries; the kernel's limit of ranges is 65,530 unless raised
	maxNotes    = 512 << 20 // bytes of notes
)

// Types of notes that debug/elf does not name.
const (
	noteAuxv      = 6
	noteFile      = 0x46494c45 // "FILE"
	noteOwner     = "allocsnoop"
	noteIndex     = 0x58444e49 // "INDX": of noteOwner, but bfd looks at the type alone, so it must be one of its own
	prstatusRegs  = 112        // offset of the registers in struct elf_prstatus on 64-bit machines
	prstatusPID   = 32
	prpsinfoPID   = 24
	prpsinfoComm  = 40
	prpsinfoCount = 136
)

var coreArch = map[elf.Machine]string{elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64"}

// core is an ELF core while it is read.
type core struct {
	r        io.ReaderAt
	size     uint64
	header   elf.Header64
	progs    []elf.Prog64
	info     Info
	files    []mappedFile // from NT_FILE
	index    []byte       // from allocsnoop's own note
	cutShort bool
}

type mappedFile struct {
	start, end, offset uint64
	path               string
}

func newCoreImage(r io.ReaderAt, size int64) (*FileImage, error) {
	c := &core{r: r, size: uint64(size)}
	if err := c.readHeader(); err != nil {
		return nil, err
	}
	if err := c.readPrograms(); err != nil {
		return nil, fmt.Errorf("read program headers: %w", err)
	}
	if err := c.readNotes(); err != nil {
		return nil, fmt.Errorf("read notes: %w", err)
	}
	if c.index != nil {
		return c.indexedImage()
	}
	return c.image()
}

func (c *core) readHeader() error {
	var raw [64]byte
	if c.size < 64 {
		return ErrNotImage
	}
	if _, err := c.r.ReadAt(raw[:], 0); err != nil {
		return fmt.Errorf("read ELF header: %w", err)
	}
	if string(raw[:4]) != elf.ELFMAG {
		return ErrNotImage
	}
	if raw[elf.EI_CLASS] != byte(elf.ELFCLASS64) || raw[elf.EI_DATA] != byte(elf.ELFDATA2LSB) {
		return fmt.Errorf("%w of a 64-bit little-endian machine", ErrNotImage)
	}
	if _, err := binary.Decode(raw[:], binary.LittleEndian, &c.header); err != nil {
		return err
	}
	if elf.Type(c.header.Type) != elf.ET_CORE {
		return fmt.Errorf("%w: an ELF file of type %v", ErrNotImage, elf.Type(c.header.Type))
	}
	arch, ok := coreArch[elf.Machine(c.header.Machine)]
	if !ok {
		return fmt.Errorf("a core of machine %v: only x86-64 and arm64 are known", elf.Machine(c.header.Machine))
	}
	c.info.Arch = arch
	return nil
}

func (c *core) readPrograms() error {
	count := uint64(c.header.Phnum)
	if count == 0xffff { // PN_XNUM: the true number stands in the first section header
		var section elf.Section64
		if err := c.decode(c.header.Shoff, &section); err != nil {
			return err
		}
		count = uint64(section.Info)
	}
	const entry = 56
	if c.header.Phentsize != entry {
		return fmt.Errorf("entries of %d bytes", c.header.Phentsize)
	}
	if count > maxSegments || c.header.Phoff > c.size || count*entry > c.size-c.header.Phoff {
		return fmt.Errorf("%d of them at %d do not fit a file of %d bytes", count, c.header.Phoff, c.size)
	}
	raw := make([]byte, count*entry)
	if _, err := c.r.ReadAt(raw, int64(c.header.Phoff)); err != nil {
		return err
	}
	c.progs = make([]elf.Prog64, count)
	_, err := binary.Decode(raw, binary.LittleEndian, c.progs)
	return err
}

func (c *core) decode(off uint64, v any) error {
	size := uint64(binary.Size(v))
	if off > c.size || size > c.size-off {
		return io.ErrUnexpectedEOF
	}
	raw := make([]byte, size)
	if _, err := c.r.ReadAt(raw, int64(off)); err != nil {
		return err
	}
	_, err := binary.Decode(raw, binary.LittleEndian, v)
	return err
}

func (c *core) readNotes() error {
	for _, p := range c.progs {
		if elf.ProgType(p.Type) != elf.PT_NOTE || p.Filesz == 0 {
			continue
		}
		if p.Off > c.size || p.Filesz > c.size-p.Off {
			c.cutShort = true
			continue
		}
		if p.Filesz > maxNotes {
			return fmt.Errorf("%d bytes of them", p.Filesz)
		}
		raw := make([]byte, p.Filesz)
		if _, err := c.r.ReadAt(raw, int64(p.Off)); err != nil {
			return err
		}
		if err := eachNote(raw, c.takeNote); err != nil {
			return err
		}
	}
	return nil
}

// eachNote walks over ELF notes with the alignment that cores have: 4.
func eachNote(raw []byte, f func(owner string, kind uint32, desc []byte) error) error {
	for len(raw) >= 12 {
		nameSize := uint64(binary.LittleEndian.Uint32(raw))
		descSize := uint64(binary.LittleEndian.Uint32(raw[4:]))
		kind := binary.LittleEndian.Uint32(raw[8:])
		descAt := 12 + align4(nameSize)
		if descAt+descSize > uint64(len(raw)) {
			return fmt.Errorf("a note of %d+%d bytes in %d", nameSize, descSize, len(raw))
		}
		owner := string(bytes.TrimRight(raw[12:12+nameSize], "\x00"))
		if err := f(owner, kind, raw[descAt:descAt+descSize]); err != nil {
			return err
		}
		raw = raw[min(descAt+align4(descSize), uint64(len(raw))):]
	}
	return nil
}

func align4(n uint64) uint64 { return (n + 3) &^ 3 }

func (c *core) takeNote(owner string, kind uint32, desc []byte) error {
	switch {
	case owner == noteOwner && kind == noteIndex:
		c.index = desc
	case owner != "CORE":
	case kind == uint32(elf.NT_PRSTATUS):
		return c.takeStatus(desc)
	case kind == uint32(elf.NT_PRPSINFO) && len(desc) >= prpsinfoCount:
		c.info.PID = int(int32(binary.LittleEndian.Uint32(desc[prpsinfoPID:])))
		comm, _, _ := bytes.Cut(desc[prpsinfoComm:prpsinfoComm+16], []byte{0})
		c.info.Comm = string(comm)
	case kind == noteAuxv:
		c.info.Auxv = desc
	case kind == noteFile:
		files, err := parseFileNote(desc)
		c.files = files
		return err
	}
	return nil
}

func (c *core) takeStatus(desc []byte) error {
	if len(desc) < prstatusRegs+8 {
		return fmt.Errorf("registers of %d bytes", len(desc))
	}
	thread := Thread{TID: int(int32(binary.LittleEndian.Uint32(desc[prstatusPID:])))}
	for at := prstatusRegs; at+16 <= len(desc); at += 8 { // pr_fpvalid and padding come after the last
		thread.Registers = append(thread.Registers, binary.LittleEndian.Uint64(desc[at:]))
	}
	c.info.Threads = append(c.info.Threads, thread)
	return nil
}

// parseFileNote reads NT_FILE: count, page size, (start, end, offset in pages) each, then the names.
func parseFileNote(desc []byte) ([]mappedFile, error) {
	if len(desc) < 16 {
		return nil, fmt.Errorf("a list of mapped files of %d bytes", len(desc))
	}
	count := binary.LittleEndian.Uint64(desc)
	page := binary.LittleEndian.Uint64(desc[8:])
	if count > uint64(len(desc)-16)/24 {
		return nil, fmt.Errorf("%d mapped files in %d bytes", count, len(desc))
	}
	names := desc[16+count*24:]
	files := make([]mappedFile, 0, count)
	for i := range count {
		entry := desc[16+i*24:]
		name, rest, _ := bytes.Cut(names, []byte{0})
		names = rest
		files = append(files, mappedFile{binary.LittleEndian.Uint64(entry), binary.LittleEndian.Uint64(entry[8:]),
			binary.LittleEndian.Uint64(entry[16:]) * page, string(name)})
	}
	slices.SortFunc(files, func(a, b mappedFile) int { return cmp.Compare(a.start, b.start) })
	return files, nil
}

// indexedImage is the image of a core that allocsnoop wrote.
func (c *core) indexedImage() (*FileImage, error) {
	parsed, err := parseIndex(c.index, c.size)
	if err != nil {
		return nil, err
	}
	parsed.info.Threads = c.info.Threads
	return &FileImage{file: c.r, info: parsed.info, ranges: parsed.ranges, extents: parsed.extents}, nil
}

// image is the image of a core that the kernel, gcore or another program wrote.
func (c *core) image() (*FileImage, error) {
	img := &FileImage{file: c.r}
	loads := slices.DeleteFunc(c.progs, func(p elf.Prog64) bool {
		return elf.ProgType(p.Type) != elf.PT_LOAD || p.Memsz == 0 && p.Filesz == 0
	})
	slices.SortStableFunc(loads, func(a, b elf.Prog64) int { return cmp.Compare(a.Vaddr, b.Vaddr) })
	for _, p := range loads {
		size := max(p.Memsz, p.Filesz)
		if size > -p.Vaddr-1 {
			return nil, fmt.Errorf("segment %#x of %d bytes passes the end of all addresses", p.Vaddr, size)
		}
		r := Range{Start: p.Vaddr, End: p.Vaddr + size, Perms: permsOfFlags(p.Flags)}
		c.nameRange(&r)
		img.ranges = append(img.ranges, r)
		if err := checkOrder(img.ranges); err != nil {
			return nil, err
		}
		c.addExtent(img, p)
	}
	if len(img.ranges) == 0 {
		return nil, errors.New("the core has no memory in it")
	}
	c.nameSpecial(img.ranges)
	classify(len(img.ranges), func(i int) *Range { return &img.ranges[i] })
	var pointers []uint64
	for i := range c.info.Threads {
		pointers = append(pointers, c.info.Threads[i].sp(c.info.Arch))
	}
	markThreadStacks(len(img.ranges), func(i int) *Range { return &img.ranges[i] }, pointers)
	if c.cutShort {
		c.info.Partial = "the file is shorter than its headers say: it was cut off"
	}
	if len(c.files) > 0 && c.info.Exe == "" {
		c.info.Exe = c.exe()
	}
	img.info = c.info
	return img, nil
}

// addExtent adds what the file has of a segment. What it has not was left out by whoever wrote the core.
func (c *core) addExtent(img *FileImage, p elf.Prog64) {
	have := p.Filesz
	if p.Off > c.size {
		have = 0
	} else {
		have = min(have, c.size-p.Off)
	}
	if have < p.Filesz {
		c.cutShort = true
	}
	if have > 0 {
		img.extents = append(img.extents, fileExtent{Extent{p.Vaddr, p.Vaddr + have, Data}, p.Off})
	}
}

func permsOfFlags(flags uint32) Perms {
	var p Perms
	for i, bit := range []elf.ProgFlag{elf.PF_R, elf.PF_W, elf.PF_X} {
		if elf.ProgFlag(flags)&bit != 0 {
			p |= 1 << i
		}
	}
	return p
}

// nameRange gives a range the file that NT_FILE has for its start.
func (c *core) nameRange(r *Range) {
	i, found := slices.BinarySearchFunc(c.files, r.Start, func(f mappedFile, addr uint64) int { return cmp.Compare(f.start, addr) })
	if !found {
		i--
	}
	if i < 0 || c.files[i].end <= r.Start {
		return
	}
	f := &c.files[i]
	r.Path, r.Deleted = strings.CutSuffix(f.path, " (deleted)")
	r.Offset = f.offset + r.Start - f.start
}

// maxBrkGap is how far beyond the program's data the kernel puts the heap at most.
const maxBrkGap = 1 << 30

// nameSpecial finds what /proc/PID/maps has names for and a core has not: the first thread's stack, by its stack pointer, the
// heap, as the first memory beyond the program's own, and the vdso by the auxiliary vector.
func (c *core) nameSpecial(ranges []Range) {
	if len(c.info.Threads) > 0 {
		main := &c.info.Threads[0]
		for i := range c.info.Threads {
			if c.info.Threads[i].TID == c.info.PID {
				main = &c.info.Threads[i]
			}
		}
		if r := FindRange(ranges, main.sp(c.info.Arch)); r != nil && r.Path == "" {
			r.Path = "[stack]"
		}
	}
	if r := FindRange(ranges, auxValue(c.info.Auxv, auxVDSO)); r != nil && r.Path == "" {
		r.Path = "[vdso]"
	}
	if r := FindRange(ranges, auxValue(c.info.Auxv, auxExecFn)); r != nil && r.Path == "" {
		r.Path = "[stack]" // the kernel puts the program's file name at its top
	}
	if exe := c.exe(); exe != "" {
		nameHeap(ranges, exe)
	}
}

func nameHeap(ranges []Range, exe string) {
	last := -1
	for i := range ranges {
		if ranges[i].Path == exe {
			last = i
		}
	}
	if last < 0 {
		return
	}
	end := ranges[last].End
	for i := last + 1; i < len(ranges) && ranges[i].Start-end <= maxBrkGap; i++ {
		r := &ranges[i]
		if r.Path != "" || r.Perms&Write == 0 {
			return
		}
		if r.Start > end { // a range without a gap is the program's .bss
			r.Path = "[heap]"
			return
		}
		end = r.End
	}
}

// Keys of the auxiliary vector.
const (
	auxEntry  = 9
	auxExecFn = 31
	auxVDSO   = 33
)

// auxValue is a value of an auxiliary vector; 0 when it is not there.
func auxValue(auxv []byte, key uint64) uint64 {
	for ; len(auxv) >= 16; auxv = auxv[16:] {
		if binary.LittleEndian.Uint64(auxv) == key {
			return binary.LittleEndian.Uint64(auxv[8:])
		}
	}
	return 0
}

// exe is the path of the file that holds the program's entry.
func (c *core) exe() string {
	entry := auxValue(c.info.Auxv, auxEntry)
	for _, f := range c.files {
		if entry >= f.start && entry < f.end {
			return f.path
		}
	}
	return ""
}

// sp is the stack pointer; 0 when it is unknown.
func (t *Thread) sp(arch string) uint64 {
	at := map[string]int{"amd64": 19, "arm64": 31}[arch]
	if at == 0 || at >= len(t.Registers) {
		return 0
	}
	return t.Registers[at]
}
