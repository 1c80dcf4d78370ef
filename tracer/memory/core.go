package memory

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"runtime"
)

// A core made here has its program headers first, then the memory, then the notes: how many threads there are is known only
// once they have stopped, and the memory must have its place by then. Its last note is the index of a raw dump, so that
// nothing that allocsnoop knows is lost with this format.

const programEntry = 56

// coreHeaderSize is the room for ELF header, program headers and the one section header that counts them if they are many.
func (d *dumper) coreHeaderSize() uint64 {
	// A range that is not dumped has one header, a dumped piece up to one for each segment and one for the rest on each side.
	count := uint64(len(d.ranges)) + 3*uint64(len(d.pieces)) + 2
	for i := range d.pieces {
		count += d.pieces[i].size() / maxHole * 2
	}
	return alignPage(64 + 64 + count*programEntry)
}

// finishCore writes notes and headers of what was dumped.
func (d *dumper) finishCore(end position) error {
	machine, ok := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("write core: not known how on %s; a raw dump works", runtime.GOARCH)
	}
	extents := d.extents(end)
	notes := &crcWriter{w: io.NewOffsetWriter(d.out, int64(d.dataEnd()))}
	d.writeNotes(notes)
	if err := d.writeIndexNote(notes, extents); err != nil {
		return fmt.Errorf("write core's notes: %w", err)
	}
	programs := []elf.Prog64{
		{Type: uint32(elf.PT_NOTE), Off: d.dataEnd(), Filesz: notes.n, Align: 4},
	} // one, for gdb and elfutils disagree on which of several counts
	programs = d.appendLoads(programs, extents)
	var head bytes.Buffer
	header := elf.Header64{Type: uint16(elf.ET_CORE), Machine: uint16(machine), Version: 1, Phoff: 64 + 64, Ehsize: 64,
		Phentsize: programEntry, Phnum: uint16(min(len(programs), 0xffff))}
	copy(header.Ident[:], elf.ELFMAG+"\x02\x01\x01")
	if header.Phnum == 0xffff { // PN_XNUM
		header.Shoff, header.Shentsize, header.Shnum = 64, 64, 1
	}
	binary.Write(&head, binary.LittleEndian, &header)
	binary.Write(&head, binary.LittleEndian, &elf.Section64{Info: uint32(len(programs))})
	binary.Write(&head, binary.LittleEndian, programs)
	if uint64(head.Len()) > d.base {
		return fmt.Errorf("write core: %d bytes of headers in a room of %d", head.Len(), d.base)
	}
	if _, err := d.out.WriteAt(head.Bytes(), 0); err != nil {
		return fmt.Errorf("write core's headers: %w", err)
	}
	return nil
}

// appendLoads adds a PT_LOAD for each part of a range: with its bytes if they were dumped, without if not.
func (d *dumper) appendLoads(programs []elf.Prog64, extents []fileExtent) []elf.Prog64 {
	next := 0
	for i := range d.ranges {
		r := &d.ranges[i]
		if r.Start >= 1<<63 {
			continue // [vsyscall]: the kernel leaves it out too
		}
		at := r.Start
		for ; next < len(extents) && extents[next].Start < r.End; next++ {
			e := extents[next]
			if e.Kind == Zero {
				continue
			}
			// Lost pages stay inside their segment as zeros, so that a core has few segments.
			seg := d.segmentOf(e.Start)
			for next+1 < len(extents) && extents[next+1].Kind != Zero && extents[next+1].Start < seg.end {
				next++
			}
			if e.Start > at {
				programs = append(programs, loadHeader(r, at, e.Start, 0, 0))
			}
			// What follows in the range without content belongs to the same header, as the kernel has it: elfutils finds libraries
			// only by headers that start at the library's first page and span the range.
			at = r.End
			if next+1 < len(extents) && extents[next+1].Start < r.End {
				at = extents[next+1].Start
			}
			programs = append(programs, loadHeader(r, e.Start, at, seg.off+e.Start-seg.start, extents[next].End-e.Start))
		}
		if at < r.End {
			programs = append(programs, loadHeader(r, at, r.End, 0, 0))
		}
	}
	return programs
}

func loadHeader(r *RangeUsage, start, end, off, size uint64) elf.Prog64 {
	return elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: progFlags(r.Perms), Off: off, Vaddr: start, Filesz: size,
		Memsz: end - start, Align: PageSize}
}

func progFlags(p Perms) uint32 {
	var flags elf.ProgFlag
	for i, bit := range []elf.ProgFlag{elf.PF_R, elf.PF_W, elf.PF_X} {
		if p&(1<<i) != 0 {
			flags |= bit
		}
	}
	return uint32(flags)
}

// writeNotes writes what debuggers look for, in the kernel's order: the first thread, the process, then the other threads.
func (d *dumper) writeNotes(w io.Writer) {
	threads := d.stops
	if len(threads) == 0 { // a core needs a thread: this one has no registers to show
		threads = []threadRegs{{tid: d.p.pid, general: make([]byte, generalSize)}}
	}
	numbers := d.p.fs.statNumbers(d.p.pid)
	for i := range threads {
		t := &threads[i]
		writeNote(w, "CORE", uint32(elf.NT_PRSTATUS), encodeStatus(t, numbers))
		if i == 0 {
			writeNote(w, "CORE", uint32(elf.NT_PRPSINFO), d.encodeInfo(numbers))
			writeNote(w, "CORE", noteAuxv, d.p.info.Auxv)
			writeNote(w, "CORE", noteFile, d.encodeFiles())
		}
		if len(t.float) > 0 {
			writeNote(w, "CORE", uint32(elf.NT_FPREGSET), t.float)
		}
		if len(t.extra) > 0 {
			writeNote(w, "LINUX", t.extraTy, t.extra)
		}
	}
}

func writeNote(w io.Writer, owner string, kind uint32, desc []byte) {
	writeNoteHead(w, owner, kind, uint64(len(desc)))
	w.Write(desc)
	w.Write(zeroPage[:align4(uint64(len(desc)))-uint64(len(desc))])
}

func writeNoteHead(w io.Writer, owner string, kind uint32, size uint64) {
	var head []byte
	head = binary.LittleEndian.AppendUint32(head, uint32(len(owner)+1))
	head = binary.LittleEndian.AppendUint32(head, uint32(size))
	head = binary.LittleEndian.AppendUint32(head, kind)
	head = append(head, owner...)
	head = append(head, zeroPage[:align4(uint64(len(owner)+1))-uint64(len(owner))]...)
	w.Write(head)
}

// writeIndexNote writes the index twice: to learn its length, and into the file.
func (d *dumper) writeIndexNote(w io.Writer, extents []fileExtent) error {
	count := &crcWriter{w: io.Discard}
	head := d.index()
	if err := writeIndex(count, head, d.ranges, extents); err != nil {
		return err
	}
	writeNoteHead(w, noteOwner, noteIndex, count.n)
	if err := writeIndex(w, head, d.ranges, extents); err != nil {
		return err
	}
	_, err := w.Write(zeroPage[:align4(count.n)-count.n])
	return err
}

// Fields of /proc/PID/stat, counted from the fourth.
const (
	statPPID, statPGRP, statSession = 0, 1, 2
)

func at(numbers []int64, i int) uint32 {
	if i >= len(numbers) {
		return 0
	}
	return uint32(numbers[i])
}

// encodeStatus is struct elf_prstatus: signal (none), ids, times (left out), registers, and whether there are FP registers.
func encodeStatus(t *threadRegs, numbers []int64) []byte {
	b := make([]byte, prstatusRegs, prstatusRegs+len(t.general)+8)
	binary.LittleEndian.PutUint32(b[prstatusPID:], uint32(t.tid))
	binary.LittleEndian.PutUint32(b[prstatusPID+4:], at(numbers, statPPID))
	binary.LittleEndian.PutUint32(b[prstatusPID+8:], at(numbers, statPGRP))
	binary.LittleEndian.PutUint32(b[prstatusPID+12:], at(numbers, statSession))
	b = append(b, t.general...)
	valid := uint64(0)
	if len(t.float) > 0 {
		valid = 1
	}
	return binary.LittleEndian.AppendUint64(b, valid)
}

// encodeInfo is struct elf_prpsinfo.
func (d *dumper) encodeInfo(numbers []int64) []byte {
	b := make([]byte, prpsinfoCount)
	state := d.p.fs.State(d.p.pid)
	b[1] = state.Letter
	if uid, ok := d.p.fs.owner(d.p.pid); ok {
		binary.LittleEndian.PutUint32(b[16:], uid)
	}
	binary.LittleEndian.PutUint32(b[prpsinfoPID:], uint32(d.p.pid))
	binary.LittleEndian.PutUint32(b[prpsinfoPID+4:], at(numbers, statPPID))
	binary.LittleEndian.PutUint32(b[prpsinfoPID+8:], at(numbers, statPGRP))
	binary.LittleEndian.PutUint32(b[prpsinfoPID+12:], at(numbers, statSession))
	copy(b[prpsinfoComm:prpsinfoComm+15], d.p.info.Comm)
	command, _ := os.ReadFile(d.p.fs.Path(d.p.pid, "cmdline"))
	command = bytes.ReplaceAll(bytes.TrimRight(command, "\x00"), []byte{0}, []byte(" "))
	copy(b[prpsinfoComm+16:prpsinfoCount-1], command)
	return b
}

// encodeFiles is NT_FILE, by which debuggers find the files of code that the core leaves out.
func (d *dumper) encodeFiles() []byte {
	var entries, names []byte
	count := uint64(0)
	for i := range d.ranges {
		r := &d.ranges[i]
		if !r.IsFile() {
			continue
		}
		count++
		for _, v := range []uint64{r.Start, r.End, r.Offset / PageSize} {
			entries = binary.LittleEndian.AppendUint64(entries, v)
		}
		names = append(names, r.Path...)
		if r.Deleted {
			names = append(names, " (deleted)"...)
		}
		names = append(names, 0)
	}
	head := binary.LittleEndian.AppendUint64(nil, count)
	head = binary.LittleEndian.AppendUint64(head, PageSize)
	return append(append(head, entries...), names...)
}
