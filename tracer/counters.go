package tracer

import (
	"fmt"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// counter describes one counter of the BPF side.
type counter struct {
	number  bpf.CurrentCounter
	name    string
	meaning string
	lost    bool // an event is missing from the books
}

var counters = []counter{
	{bpf.CurrentCounterCOUNT_LIVE_FULL, "live_full", "blocks not counted: more in use than --max-live", true},
	{bpf.CurrentCounterCOUNT_ROWS_FULL, "stacks_full", "blocks without their own call stack: more than --max-stacks", true},
	{bpf.CurrentCounterCOUNT_ROWS_LOST, "stacks_lost", "blocks not counted: no room for their call stack", true},
	{bpf.CurrentCounterCOUNT_THREAD_LOST, "thread_lost", "calls not counted: no kernel memory for the thread's state", true},
	{bpf.CurrentCounterCOUNT_PENDING_OVERFLOW, "pending_overflow", "calls nested too deeply to follow", true},
	{bpf.CurrentCounterCOUNT_PENDING_STALE, "pending_stale", "calls that were left by longjmp, an exception or a thread's end", false},
	{bpf.CurrentCounterCOUNT_RETURN_WITHOUT_ENTRY, "return_without_entry", "returns of calls whose entry was not seen", true},
	{bpf.CurrentCounterCOUNT_OVERWRITTEN, "overwritten", "blocks whose free was missed: their address was handed out again", true},
	{bpf.CurrentCounterCOUNT_DIED_IN_REALLOC, "died_in_realloc", "threads that ended inside realloc; their blocks were put back", false},
	{bpf.CurrentCounterCOUNT_MAP_GAP, "map_gap", "mappings or processes not seen: the event buffer was full", true},
	{bpf.CurrentCounterCOUNT_READ_FAULT, "read_fault", "blocks not counted: their address could not be read from the target", true},
	{bpf.CurrentCounterCOUNT_NO_PROC_ROOM, "no_process_room", "processes not traced: too many at one time", true},
	{bpf.CurrentCounterCOUNT_NOT_FOLLOWED, "not_followed", "calls of operator new near the target's memory limit: no return probe may meet an exception", true},
	{bpf.CurrentCounterCOUNT_POOL_FULL, "pool_full", "pool blocks not counted: no room", true},
}

// stacksFull is sent again at the stack's next hit, so that only stacks without frames in the end are a loss.
const stacksLost = "stack_lost"

func (t *Tracer) count(number bpf.CurrentCounter) uint64 {
	var perCPU []uint64
	_ = t.programs.Counters.Lookup(uint32(number), &perCPU)
	return sum(perCPU)
}

// addCounters fills in what was lost, how stacks ended and what happened to blocks from before the trace.
func (t *Tracer) addCounters(s *profile.Snapshot, lostStacks int) {
	for _, c := range counters {
		n := t.count(c.number)
		if n == 0 {
			continue
		}
		s.Losses = append(s.Losses, profile.Counter{Name: c.name, Count: n, Meaning: c.meaning})
		s.LossStated = s.LossStated || c.lost
	}
	if lostStacks > 0 {
		s.Losses = append(s.Losses, profile.Counter{
			Name: stacksLost, Count: uint64(lostStacks), Meaning: "call stacks without frames: the stack buffer was full",
		})
		s.LossStated = true
	}
	if n := len(t.audit.wrong); n > 0 {
		s.Losses = append(s.Losses, profile.Counter{
			Name: booksWrong, Count: uint64(n), Meaning: "call stacks whose books are not the sum of their blocks: a fault of allocsnoop, please report it",
		})
		s.LossStated = true
	}
	for _, e := range t.tables.Stats().Evicted {
		s.Events = append(s.Events, profile.Event{At: s.Duration(), Text: fmt.Sprintf("unwind table of %s gave way to others (--max-table-mb)", e)})
	}
	s.PreAttach = profile.PreAttach{
		Frees:        t.count(bpf.CurrentCounterCOUNT_FREE_PREATTACH),
		Reallocs:     t.count(bpf.CurrentCounterCOUNT_REALLOC_PREATTACH),
		ReallocBytes: t.count(bpf.CurrentCounterCOUNT_REALLOC_PREATTACH_BYTES),
		Inherited:    t.count(bpf.CurrentCounterCOUNT_FREE_INHERITED),
	}
	for end := range uint32(bpf.CurrentUnwindEndEND_COUNT) {
		var perCPU []uint64
		_ = t.programs.Ends.Lookup(end, &perCPU)
		if n := sum(perCPU); n > 0 {
			s.Unwind = append(s.Unwind, profile.Counter{Name: unwind.End(end).String(), Count: n})
		}
	}
}
