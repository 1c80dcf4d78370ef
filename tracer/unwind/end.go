package unwind

import (
	"fmt"
	"path/filepath"
)

// End says why a stack ends. The values are enum unwind_end of bpf/unwind.h.
type End uint32

// The reasons; Whole tells which are good.
const (
	None       End = iota
	Complete       // a root: _start, a thread's start, a coroutine's start
	Depth          // more frames than asked for
	NoMapping      // the address lies in no mapping that is known
	NoTable        // the mapping's file has no unwind table
	NoRow          // the file's table leaves this code out
	Invalid        // the table has no usable rule for the address
	BadRead        // the stack could not be read
	Leaf           // a rule that holds in leaf functions only, met in a caller
	Trampoline     // a uretprobe's trampoline whose return address is not known
	Zero           // return address 0: a root by convention, as makecontext and clone leave it
	Backwards      // the caller's frame would lie below its callee's
	JIT            // machine code in anonymous memory that could not be crossed
	Disturbed      // tables or scratch changed under the walk
	NoUser         // no user registers, or 32-bit code
	endCount
)

var endNames = [endCount]string{"none", "complete", "depth", "no mapping", "no table", "no row", "invalid rule", "bad read",
	"leaf rule", "trampoline", "zero address", "backwards", "JIT code", "disturbed", "no user registers"}

// String is the name of the counter.
func (e End) String() string {
	if e >= endCount {
		return fmt.Sprintf("end %d", uint32(e))
	}
	return endNames[e]
}

// Whole is true when the stack reaches its root.
func (e End) Whole() bool { return e == Complete || e == Zero }

// Frames carry two flags above the address.
const (
	// FrameExact is set when the frame is the pc itself; without it the frame is a return address, and the call lies
	// one byte before.
	FrameExact = 1 << 63
	// FrameMark is set when the frame is no address at all but one of the marks below.
	FrameMark = 1 << 62
	frameBits = FrameExact | FrameMark
)

// MarkLuaJIT stands for the code compiled by LuaJIT between two frames.
const MarkLuaJIT = 1

// Frame takes a frame of the BPF side apart: the address to look up a symbol with, or the text of a mark.
func Frame(raw uint64) (addr uint64, mark string) {
	switch {
	case raw&FrameMark != 0:
		if raw&^uint64(frameBits) == MarkLuaJIT {
			return 0, "[LuaJIT]"
		}
		return 0, fmt.Sprintf("[mark %d]", raw&^uint64(frameBits))
	case raw&FrameExact != 0:
		return raw &^ FrameExact, ""
	}
	return raw - 1, ""
}

// Describe is the text of the frame that ends a cut stack, "" for a complete one. last is the outermost frame as the
// BPF side has it.
func (s *Space) Describe(end End, n int, last uint64) string {
	why := ""
	switch end {
	case Complete, Zero:
		return ""
	case Depth:
		why = fmt.Sprintf("more than %d frames", n)
	case NoMapping:
		why = "address in no known mapping"
	case NoTable:
		why = s.describeNoTable(last)
	case NoRow:
		why = "no unwind table for " + s.fileAt(last)
	case Invalid:
		why = "no usable unwind rule in " + s.fileAt(last)
	case BadRead:
		why = "the stack cannot be read beyond " + s.fileAt(last)
	case Leaf:
		why = "hand-written code in " + s.fileAt(last)
	case Trampoline:
		why = "another tool's return probe"
	case Backwards:
		why = "stack out of order in " + s.fileAt(last)
	case JIT:
		why = "just-in-time compiled code"
	case Disturbed:
		why = "unwind tables changed meanwhile"
	case NoUser:
		why = "no user registers"
	default:
		why = end.String()
	}
	return "[truncated: " + why + "]"
}

func (s *Space) describeNoTable(frame uint64) string {
	addr, _ := Frame(frame)
	m, ok := s.Find(addr)
	if !ok {
		return "no unwind table"
	}
	name := filepath.Base(m.Path)
	switch m.NoTable() {
	case reasonPending:
		return "unwind table of " + name + " was not read yet"
	case reasonEvicted, reasonFull:
		return "no room for the unwind table of " + name + ", raise --max-table-mb"
	}
	return "no unwind table for " + name
}

func (s *Space) fileAt(frame uint64) string {
	addr, _ := Frame(frame)
	m, ok := s.Find(addr)
	if !ok {
		return "unknown memory"
	}
	return filepath.Base(m.Path)
}
