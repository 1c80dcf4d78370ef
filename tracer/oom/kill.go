// Package oom reads what the kernel's log says about processes that the out-of-memory killer took: which, by whose limit,
// at what usage, and who asked for the page that was one too many.
//
// The traps: the text changed from kernel to kernel, its lines may be cut off at the front by the log's end, and the names
// in it are chosen by the processes themselves, so that "Killed process 7 (x) total-vm:" may be a name.
package oom

import (
	"cmp"
	"slices"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/target"
)

// Scope says what ran out.
type Scope string

// The scopes; empty when the log does not tell.
const (
	Cgroup Scope = "cgroup" // a control group's limit
	System Scope = "system" // the machine's memory
	Nodes  Scope = "nodes"  // the NUMA nodes that a cpuset or a memory policy allows
)

// Kill is one process that the OOM killer took. Sizes are bytes; nil means that the log does not tell. Names are as the
// processes chose them.
type Kill struct {
	Time   time.Time     // zero when the log has none
	Uptime time.Duration // after boot; 0 when the log has none
	Scope  Scope

	PID        int
	Comm       string
	UID        *int
	TotalVM    *uint64 // of the victim, as what follows
	Anon       *uint64
	File       *uint64
	Shmem      *uint64
	PageTables *uint64
	Score      *int // badness in thousandths of the memory at hand; kernels before 5.1
	ScoreAdj   *int
	Group      bool // killed with its whole group (memory.oom.group)
	Asker      bool // killed for it was the one that asked (vm.oom_kill_allocating_task)
	Manual     bool // a person asked for it (SysRq f)

	Invoker     Invoker
	LimitCgroup string // whose limit was met
	TaskCgroup  string // the victim's own group
	Container   target.Container
	Usage       *uint64 // of the limiting group, as what follows
	Limit       *uint64
	SwapUsage   *uint64
	SwapLimit   *uint64
	SwapWithRAM bool    // the swap figures are memory and swap together (v1)
	Failures    *uint64 // times that the limit was hit

	Candidates int // processes that the kernel could choose from
	Largest    []Candidate
	Kernel     string // release
}

// Invoker is the process whose request for memory could not be met.
type Invoker struct {
	PID  int // of the process where the log tells, else of the thread; 0 when it tells neither
	Comm string
	GFP  string // flags of the request
	// Order is the power of two of the pages it asked for.
	Order int
}

// Candidate is a row of the table of processes.
type Candidate struct {
	PID      int
	Comm     string
	RSS      uint64
	ScoreAdj int
}

// maxLargest is how many candidates a kill keeps.
const maxLargest = 5

// largest are the biggest candidates, biggest first.
func largest(list []Candidate) []Candidate {
	sorted := slices.Clone(list)
	slices.SortStableFunc(sorted, func(a, b Candidate) int { return cmp.Compare(b.RSS, a.RSS) })
	return sorted[:min(len(sorted), maxLargest)]
}
