package tracer

import (
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/allocator"
)

// Mode says how precise a trace is.
type Mode int

// The modes, from the dearest to the cheapest.
const (
	Exact  Mode = iota // every block
	Sample             // blocks by chance, by size; figures are estimates with error bars
	Growth             // no probe at all: only the growth of the heap and the mappings
)

// String is the mode's name on the command line.
func (m Mode) String() string { return [...]string{"exact", "sample", "growth"}[m] }

// Options of a trace. The zero value of a field means its default.
type Options struct {
	Mode Mode
	// SampleBytes is the mean interval of Sample, in bytes; 512 KiB.
	SampleBytes uint64
	// MaxOverhead is the share of the targets' CPU time that the trace may cost; 0 is no limit. Above it the trace steps
	// down: from Exact to Sample, from there to windows of it, and at last to following only heap and mappings.
	MaxOverhead float64
	// OlderThan: only blocks of at least this age count as in use.
	OlderThan time.Duration
	// Children: what a traced process forks is traced too.
	Children bool
	// Service: the trace goes on when no process is left, as others may join.
	Service bool
	// Execed is called when a process that is not traced runs another program; it must not wait. nil: nobody asks.
	Execed func(pid int)

	MaxLive     uint32 // blocks in use at one time; 1,000,000
	MaxStacks   uint32 // distinct call stacks, per process and kind; 65,536
	MaxFrames   uint32 // of one stack; 128
	MaxProcs    uint32 // processes at one time; 1,024
	MaxTableMiB uint64 // memory of the unwind tables; 64

	// CheckEvery is how often the books are checked against the blocks in use; 10 s, or more where that would cost much.
	CheckEvery time.Duration

	// Definitions are functions of the user's own.
	Definitions []allocator.Definition

	// Guard is a command that calls Sweep with its last argument; it cleans up should the tracer be killed. Without one,
	// the next tracer does.
	Guard []string

	// Warn is told what a person should know while the trace runs; nil drops it.
	Warn func(text string)
}

func (o Options) withDefaults() Options {
	def := func(v *uint32, d uint32) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.MaxLive, 1_000_000)
	def(&o.MaxStacks, 65_536)
	def(&o.MaxFrames, 128)
	def(&o.MaxProcs, 1024)
	if o.MaxTableMiB == 0 {
		o.MaxTableMiB = 64
	}
	if o.CheckEvery == 0 {
		o.CheckEvery = 10 * time.Second
	}
	if o.SampleBytes == 0 {
		o.SampleBytes = 512 << 10
	}
	if o.Warn == nil {
		o.Warn = func(string) {}
	}
	return o
}

// mayStepDown tells whether figures may come to be sampled.
func (o Options) mayStepDown() bool { return o.Mode == Sample || o.Mode == Exact && o.MaxOverhead > 0 }
