// Package profile owns Snapshot, what allocsnoop knows about a service's memory at one moment, and turns it into pprof
// files, text, comparisons and verdicts. It never touches the operating system: tracer and symbolize fill its types.
//
// The trap: blocks of different kinds may be the same bytes seen twice (a pool's block lives inside a malloc block),
// so figures of two kinds are never added up.
package profile

import "time"

// Kind says who handed out a block. Figures of different kinds are never added together.
type Kind string

// The kinds that every build knows; a declared pair of functions (--alloc, --free) has a kind of its own name.
const (
	KindMalloc Kind = "malloc" // an allocator function: malloc, operator new, mallocx, ...
	KindMmap   Kind = "mmap"   // anonymous mappings that no allocator call made
	KindBrk    Kind = "brk"    // program heap moved by the program itself
	KindLuaJIT Kind = "luajit" // LuaJIT's garbage-collected objects
	// KindUnfollowed are blocks of allocator functions that were in use when the probes went out: their ends were not seen.
	KindUnfollowed Kind = "unfollowed"
)

// Snapshot is the state of one trace at one moment. Sizes are bytes. Pointers inside are shared: a Mapping or Location
// stands once however many stacks refer to it.
type Snapshot struct {
	Command   string    // the tool's own command line, for the profile's comments
	Started   time.Time // probes live
	Taken     time.Time // the moment the figures hold for
	Processes []*Process
	Stacks    []*Stack

	// Mode is how precise the trace was at its end: "exact", "sample" or "growth" (only mappings and program heap).
	Mode string
	// SampleBytes is the mean sampling interval R in bytes at the end of the trace; 0 means every block was counted.
	SampleBytes uint64
	// Losses are the named ways in which something was lost, cut or missed; zero counts are left out.
	Losses []Counter
	// LossStated is true when losses exceed the stated limit (exit code 3).
	LossStated bool
	// Notes say what cannot be seen of the targets, for a person.
	Notes []string
	// PreAttach counts what happened to blocks allocated before the probes were live.
	PreAttach PreAttach
	// Unwind is the histogram of stack end reasons over all events with a stack, by reason name; "complete" is the good one.
	Unwind []Counter
	// Probes says which functions of which file were probed.
	Probes []Probe
	// Events is the log of what the tracer did: steps of precision, members that joined, files replaced.
	Events []Event
	// Overhead is the measured cost to the target; nil when nothing was measured.
	Overhead *Overhead
	// Windows is set when the probes were in for a part of the time only.
	Windows *Windows
	// RSS is the resident memory by kind of range at the start and the end; nil when it was not read.
	RSS *RSSChange
	// HasBlocks says that the stacks carry the addresses of their blocks in use.
	HasBlocks bool
}

// Duration is the length of the trace.
func (s *Snapshot) Duration() time.Duration { return s.Taken.Sub(s.Started) }

// PartlyFollowed is whether the probes were in for a part of the time only: figures of allocator calls then hold for that
// part, and say nothing of growth.
func (s *Snapshot) PartlyFollowed() bool { return s.Windows != nil }

// Process is one member of the traced service.
type Process struct {
	PID       int // as the tracer's pid namespace sees it
	Comm      string
	Exe       string // path as the target sees it
	Container string // container or pod id; empty outside one
	Started   time.Time
	Exited    bool
	Exit      string // how it ended in words ("killed by signal 9"); empty while it runs
	Mappings  []*Mapping
}

// Mapping is a range of a process's address space that is backed by a file (or [vdso]); Start and Limit are addresses,
// Offset is the file offset of Start.
type Mapping struct {
	Start, Limit, Offset uint64
	File                 string // path as the target sees it, without " (deleted)"
	BuildID              string // lower-case hex; empty when the file has none
	Replaced             bool   // the file on disk is deleted or has another build-id than the one in memory
	Size                 int64  // of the file; 0 when unknown
	ModTime              time.Time
	Version              string // version strings found in the file, if any
}

// Location is one frame of a call stack.
type Location struct {
	Address uint64   // program counter; for callers the return address minus one, so that it lies inside the call
	Mapping *Mapping // nil when no file backs the address
	Lines   []Line   // innermost inlined function first; empty when nothing is known
	// Mark replaces names for frames that are no function: "[LuaJIT]", "[truncated: no unwind table for libfoo.so]".
	Mark string
}

// Line is one function at a location. Line numbers are 0 when unknown.
type Line struct {
	Function   string // demangled
	SystemName string // as the symbol table has it
	File       string
	Line       int
	StartLine  int
}

// Stack is the book of one call stack in one process and kind. Objects and bytes are estimates of the true figures when
// the trace sampled; then the variances tell how good they are. In use = allocated - freed.
type Stack struct {
	Kind     Kind
	PID      int
	Label    string      // what a mapping is beyond its kind: "thread stack", "reserved"; empty otherwise
	Frames   []*Location // innermost first; a cut stack ends in a marked location
	Complete bool

	AllocObjects, AllocBytes int64
	FreeObjects, FreeBytes   int64

	InUseObjectsVar, InUseBytesVar float64 // estimated variances of the in-use figures; 0 when exact

	Ages    *Ages
	History []Point // figures at earlier moments of the trace, oldest first; may be empty
	// Content says what is in the blocks in use, most bytes first; only when it was asked for.
	Content []Content
	// Blocks are the blocks in use in order of address; only when they were asked for (Snapshot.HasBlocks).
	Blocks []Block
}

// Block is a block in use: where it is, and the size that was asked for.
type Block struct {
	Addr, Size uint64
	// Weight is how many blocks of the target's this one stands for: 1 unless the trace sampled.
	Weight float64
}

// Content is a set of blocks of one shape.
type Content struct {
	Shape   string   `json:"shape"` // "JSON {uid, token, payload}"
	Blocks  int64    `json:"blocks"`
	Bytes   int64    `json:"bytes"`
	Samples []string `json:"samples,omitempty"` // redacted unless the person said otherwise
}

// InUseObjects is the number of blocks allocated since attach and not freed.
func (s *Stack) InUseObjects() int64 { return s.AllocObjects - s.FreeObjects }

// InUseBytes is the number of bytes allocated since attach and not freed.
func (s *Stack) InUseBytes() int64 { return s.AllocBytes - s.FreeBytes }

// Ages describes how long the blocks in use have lived at the moment of the snapshot.
type Ages struct {
	Min, Median, Max time.Duration
	// Old counts the blocks in use that were made in the first half of the trace.
	Old int64
}

// Point is a stack's book at one moment of the trace, At after its start.
type Point struct {
	At                       time.Duration
	AllocObjects, AllocBytes int64
	FreeObjects, FreeBytes   int64
}

// Counter is a named count: a loss, or a reason why stacks end.
type Counter struct {
	Name  string `json:"name"`
	Count uint64 `json:"count"`
	// Meaning says in words what was lost and what the reader can do; empty for plain counts.
	Meaning string `json:"meaning,omitempty"`
}

// String is "23 live_map_full, blocks not followed".
func (c Counter) String() string {
	return count(int64(c.Count)) + " " + Sanitize(c.Name) + prefixed(", ", Sanitize(c.Meaning))
}

// PreAttach counts calls on blocks that were allocated before the trace; they are never guessed into the books.
type PreAttach struct {
	Frees, Reallocs uint64
	ReallocBytes    uint64 // new sizes of those reallocs
	Inherited       uint64 // frees in a child of blocks its parent made
}

// Probe is one probed function.
type Probe struct {
	Function string // all names of the address, "free, cfree"
	File     string
	BuildID  string
	Offset   uint64 // of the probed instruction from the function's entry
	Hits     uint64
	Emulated bool // the kernel emulates the probed instruction (cheap) rather than single-steps it
}

// Event is one entry of the tracer's log.
type Event struct {
	At   time.Duration // after Started
	Text string
}

// Overhead is the cost of the trace to the target.
type Overhead struct {
	Hits        uint64        // probe hits
	CostPerHit  time.Duration // calibrated
	CPUFraction float64       // of the target's CPU time; 0.046 is 4.6 %
	Budget      float64       // 0 when there is none
	TargetCPU   time.Duration // CPU time of the target during the trace
	TracerCPU   time.Duration // CPU time of allocsnoop itself
	TracerRSS   uint64        // bytes
	MapBytes    uint64        // kernel memory of the BPF maps
}

// Windows is what the budget left of a trace once sampling was above it: the probes were in for In of the last Of, Count times.
type Windows struct {
	Count  int
	In, Of time.Duration
}

// RSSChange is the target's resident memory by kind of range ("heap", "arena", "anonymous", "thread stack", "file").
type RSSChange struct {
	Before, After map[string]uint64 // bytes
	// AllocatorFree is the change of free memory that the allocator keeps; nil when it could not be read.
	AllocatorFree *int64
}
