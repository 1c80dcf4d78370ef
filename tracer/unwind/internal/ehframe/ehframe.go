// Package ehframe turns the .eh_frame of an ELF file into rows of unwind rules. It is the only place that knows the
// library behind it (elfunwindinfo of the OpenTelemetry profiler), whose API changes and which has panicked on damaged
// files: every call goes through recover. The trap: the library guesses where it does not understand; check.go finds
// these places, since a stack may be cut but never wrong.
package ehframe

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"slices"

	"go.opentelemetry.io/ebpf-profiler/libpf/pfelf"
	"go.opentelemetry.io/ebpf-profiler/nativeunwind/elfunwindinfo"
	sdtypes "go.opentelemetry.io/ebpf-profiler/nativeunwind/stackdeltatypes"
	"go.opentelemetry.io/ebpf-profiler/support"
)

// Errors that Extract wraps.
var (
	ErrNoTable = errors.New("no unwind table")
	ErrTooHigh = errors.New("code above 4 GiB in the file's address space")
	ErrMachine = errors.New("built for another machine")
	ErrBroken  = errors.New("damaged unwind table")
)

// maxRows bounds what one file may ask for; clang's library of 130 MB has 810 thousand.
const maxRows = 8 << 20

// Row holds from VAddr to the next row's: Rule is an index into Table.Rules.
type Row struct {
	VAddr uint32
	Rule  uint16
	_     uint16
}

// Rule says how to find the caller's registers. Its layout is struct unwind_rule of bpf/unwind.h.
type Rule struct {
	Flags, Base, Aux, _ uint8
	Param, AuxParam     int32
}

// Segment is an executable PT_LOAD.
type Segment struct {
	Off, VAddr, FileSize uint64
}

// Table is the unwind table of a file.
type Table struct {
	Rows     []Row
	Rules    []Rule
	Segments []Segment
	// Flat is the longest stretch of code under one rule that keeps the frame pointer at CFA-16, in bytes, and FlatRule
	// that rule: an interpreter's assembler looks like this.
	Flat     uint64
	FlatRule Rule
}

// The rules that this package makes itself, and the numbers of the library's that the walker knows.
const (
	FlagCommand = support.UnwindFlagCommand
	RegCFA      = support.UnwindRegCfa
	RegSP       = support.UnwindRegSp
	cmdInvalid  = support.UnwindCommandInvalid
	cmdStop     = support.UnwindCommandStop
	cmdPLT      = support.UnwindCommandPLT
	cmdSignal   = support.UnwindCommandSignal
)

// Invalid is the rule of code whose own is not usable; None that of code that the table leaves out.
var (
	Invalid = Rule{Flags: FlagCommand, Param: cmdInvalid}
	None    = Rule{Flags: FlagCommand, Param: cmdInvalid, AuxParam: 1}
)

// reader hides that it may be an *os.File, which the library would map into memory: a file that shrinks under a
// mapping kills the process with SIGBUS.
type reader struct{ io.ReaderAt }

type noOpener struct{}

func (noOpener) OpenELF(string) (*pfelf.File, error) { return nil, os.ErrNotExist }

// Extract reads the table of an ELF file. The segments are filled even when the error is ErrNoTable, ErrTooHigh or
// ErrBroken, since the file's mappings need their bias all the same.
func Extract(r io.ReaderAt, machine elf.Machine) (t *Table, err error) {
	t = &Table{}
	f, err := elf.NewFile(r)
	if err != nil {
		return t, fmt.Errorf("read ELF header: %w", err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && p.Flags&elf.PF_X != 0 {
			t.Segments = append(t.Segments, Segment{p.Off, p.Vaddr, p.Filesz})
		}
	}
	if f.Machine != machine || f.Class != elf.ELFCLASS64 {
		return t, fmt.Errorf("%w: %s", ErrMachine, f.Machine)
	}
	intervals, err := extract(r)
	if err != nil {
		return t, fmt.Errorf("%w: %w", ErrBroken, err)
	}
	if len(intervals.Blocks) == 0 {
		return t, ErrNoTable
	}
	if intervals.NumDeltas > maxRows {
		return t, fmt.Errorf("%w: %d rows", ErrBroken, intervals.NumDeltas)
	}
	return t, t.flatten(intervals, code{f, misunderstood(f)})
}

// extract calls the library, whose panics become errors. A fault in memory is one too: the library may map sections.
func extract(r io.ReaderAt) (i *sdtypes.IntervalData, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			i, err = nil, fmt.Errorf("panic in extractor: %v", p)
		}
	}()
	ref := pfelf.NewReferenceWithOpenFunc("", noOpener{}, func() (*pfelf.File, error) {
		return pfelf.NewFile(reader{r}, 0, false)
	})
	defer ref.Close()
	return elfunwindinfo.ExtractELF(ref)
}

// code reads a file's bytes by virtual address.
type code struct {
	f     *elf.File
	wrong []span // functions that the library misunderstands
}

func (c code) read(vaddr uint64, p []byte) bool {
	for _, s := range c.f.Progs {
		if s.Type != elf.PT_LOAD || vaddr < s.Vaddr || vaddr-s.Vaddr >= s.Filesz {
			continue
		}
		_, err := s.ReadAt(p, int64(vaddr-s.Vaddr))
		return err == nil
	}
	return false
}

// flatten writes blocks out as rows, with a row of no rule where code that has none lies between two of them.
func (t *Table) flatten(intervals *sdtypes.IntervalData, c code) error {
	numbers := map[Rule]uint16{}
	// a direct-mapped cache before the map: nearly all rules are one of a few
	var recent [256]struct {
		rule Rule
		n    uint16
		ok   bool
	}
	number := func(r Rule) (uint16, error) {
		c := &recent[uint8(r.Param>>3)^r.Base<<6^uint8(r.AuxParam)<<2]
		if c.ok && c.rule == r {
			return c.n, nil
		}
		n, ok := numbers[r]
		if ok {
			c.rule, c.n, c.ok = r, n, true
			return n, nil
		}
		if len(t.Rules) >= math.MaxUint16 {
			return 0, fmt.Errorf("%w: too many rules", ErrBroken)
		}
		n = uint16(len(t.Rules))
		numbers[r] = n
		t.Rules = append(t.Rules, r)
		return n, nil
	}
	add := func(vaddr uint64, r Rule) error {
		if vaddr > math.MaxUint32 {
			return ErrTooHigh
		}
		n, err := number(r)
		if err != nil {
			return err
		}
		t.add(uint32(vaddr), n)
		return nil
	}
	t.Rows = make([]Row, 0, intervals.NumDeltas+uint32(len(intervals.Blocks)/8))
	for i, b := range intervals.Blocks {
		if err := t.addBlock(b, c, add); err != nil {
			t.Rows, t.Rules = nil, nil
			return err
		}
		last := i == len(intervals.Blocks)-1
		if last || intervals.Blocks[i+1].Start > b.End+sdtypes.MinimumGap {
			if err := add(b.End, None); err != nil {
				t.Rows, t.Rules = nil, nil
				return err
			}
		}
	}
	t.Rows = slices.Clip(t.Rows)
	return nil
}

func (t *Table) addBlock(b *sdtypes.BasicBlock, c code, add func(uint64, Rule) error) error {
	wrong := within(c.wrong, b.Start)
	for j, d := range b.Deltas {
		start := b.Start + uint64(d.Offset)
		end := b.End
		if j+1 < len(b.Deltas) {
			end = b.Start + uint64(b.Deltas[j+1].Offset)
		}
		r := Rule{Flags: d.Info.Flags, Base: d.Info.BaseReg, Aux: d.Info.AuxBaseReg,
			Param: d.Info.Param, AuxParam: d.Info.AuxParam}
		switch {
		case r.Flags&FlagCommand != 0 && r.Param == cmdPLT:
			r = pltRule(b.Start, c)
		case wrong:
			r = Invalid
		case r.Flags&FlagCommand != 0 && r.Param == cmdSignal && start > 0:
			start-- // looked up by return address - 1, though no call stands before the trampoline
		}
		if r.Base == RegSP && r.Flags == 0 && r.Aux == RegCFA && r.AuxParam == -16 && end > start && end-start > t.Flat {
			t.Flat, t.FlatRule = end-start, r
		}
		if err := add(start, r); err != nil {
			return err
		}
	}
	return nil
}

// add appends a row. Blocks come sorted, but they may overlap: the table stays sorted, and the later block wins.
func (t *Table) add(vaddr uint32, rule uint16) {
	for n := len(t.Rows); n > 0 && t.Rows[n-1].VAddr >= vaddr; n-- {
		t.Rows = t.Rows[:n-1]
	}
	if n := len(t.Rows); n > 0 && t.Rows[n-1].Rule == rule {
		return
	}
	t.Rows = append(t.Rows, Row{VAddr: vaddr, Rule: rule})
}

// pltRule finds out where in an entry of the procedure linkage table the index is pushed: the library reads the
// expression's shape and not its numbers, and with -fcf-protection they differ.
func pltRule(start uint64, c code) Rule {
	r := Rule{Flags: FlagCommand, Param: cmdPLT}
	var b [8]byte
	if !c.read(start+16, b[:]) {
		return Invalid
	}
	switch {
	case b[0] == 0xff && b[1] == 0x25: // jmp *slot; push
		r.AuxParam = 11
	case b[0] == 0xf3 && b[1] == 0x0f && b[2] == 0x1e && b[3] == 0xfa && b[4] == 0x68: // endbr64; push; jmp
		r.AuxParam = 9
	case b[0] == 0x68: // push; bnd jmp
		r.AuxParam = 5
	default:
		return Invalid
	}
	return r
}

// Lookup is the rule that holds at vaddr; the walker does the same in the kernel.
func (t *Table) Lookup(vaddr uint32) (Rule, bool) {
	i, found := slices.BinarySearchFunc(t.Rows, vaddr, func(r Row, v uint32) int {
		switch {
		case r.VAddr < v:
			return -1
		case r.VAddr > v:
			return 1
		}
		return 0
	})
	if !found {
		i--
	}
	if i < 0 {
		return Rule{}, false
	}
	return t.Rules[t.Rows[i].Rule], true
}
