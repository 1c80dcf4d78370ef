package tracer

import (
	"errors"
	"fmt"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// onEvent applies one event of the BPF side. Events come in the kernel's order.
func (t *Tracer) onEvent(raw []byte) {
	if len(raw) < int(unsafe.Sizeof(bpf.Event{})) {
		return
	}
	e := *(*bpf.Event)(unsafe.Pointer(unsafe.SliceData(raw)))
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	switch bpf.CurrentEventType(e.Type) {
	case bpf.CurrentEventTypeEVENT_FORK:
		t.onFork(&e)
	case bpf.CurrentEventTypeEVENT_EXEC:
		t.onExec(&e)
	case bpf.CurrentEventTypeEVENT_EXIT:
		t.onExit(&e)
	case bpf.CurrentEventTypeEVENT_UNKNOWN_PC:
		if m := t.members[e.Proc]; m != nil && !m.ended {
			t.tryRefresh(m)
		}
	case bpf.CurrentEventTypeEVENT_LIVE_FULL:
		t.closing.Go(t.thin)
	default:
		if m := t.members[e.Proc]; m != nil {
			t.onMapping(m, &e)
		}
	}
}

func (t *Tracer) tryRefresh(m *member) {
	if err := t.refresh(m); err != nil && !ended(m.pid, err) {
		t.options.Warn(err.Error())
	}
}

// ended tells whether an error of a process is that it ends. The kernel says so before its state does.
func ended(pid int, err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, memory.ErrGone) || gone(pid)
}

// gone tells whether a process has ended or is about to: then what could not be read of it is no news.
func gone(pid int) bool {
	state := memory.FS{}.State(pid)
	return state.Letter == 0 || state.Gone()
}

func (t *Tracer) onFork(e *bpf.Event) {
	parent, pid := t.current[int(e.Tgid)], int(e.Other)
	if parent == nil || t.members[e.Proc] != nil && e.Flags&uint32(bpf.CurrentEventFlagEVENT_SHARES_MM) == 0 {
		return
	}
	if e.Flags&uint32(bpf.CurrentEventFlagEVENT_SHARES_MM) != 0 {
		t.current[pid] = parent // until it execs
		parent.users++
		return
	}
	m := parent.child(e.Proc, pid)
	if parent.space != nil {
		m.space = t.tables.Share(parent.space, pid)
	}
	t.members[m.key] = m
	t.current[pid] = m
	if e.Flags&uint32(bpf.CurrentEventFlagEVENT_BY_LEADER) == 0 || e.Time <= parent.probed || t.useSessions {
		// Perhaps nothing was inherited: sessions never are, uprobes only from threads that were there when they were opened
		// and had them by then.
		t.tryRefresh(m)
		return
	}
	if hooks, err := keepEvents(pid); err == nil { // a process that has ended needs none
		m.calls = append(m.calls, hooks...)
	}
}

func (t *Tracer) onExec(e *bpf.Event) {
	pid := int(e.Tgid)
	if e.Proc == 0 {
		if t.options.Execed != nil {
			t.options.Execed(pid)
		}
		return
	}
	old := t.current[pid]
	m := newMember(e.Proc, pid)
	if old != nil && old.pid == pid {
		// Probes are of the process, not of its image: what both images map stays probed without a gap.
		m.calls, m.guards, m.opened = old.calls, old.guards, old.opened
		old.calls, old.guards, old.opened = nil, nil, map[*probe]bool{}
		old.execed = old.users == 1 // else its memory lives on
	}
	m.identify()
	if old != nil {
		m.clan = old.clan
		m.process.Container = old.process.Container
		t.leave(old)
	}
	t.members[m.key] = m
	t.current[pid] = m
	t.tryRefresh(m)
}

func (t *Tracer) onExit(e *bpf.Event) { t.exited(int(e.Tgid), exitText(e.Other), e.Other != 0) }

func (t *Tracer) exited(pid int, how string, failed bool) {
	m := t.current[pid]
	if m == nil {
		return
	}
	delete(t.current, pid)
	if m.pid == pid {
		m.process.Exited = true
		m.process.Exit = how
		t.logExit(m, failed)
	}
	t.leave(m)
	if len(t.current) == 0 && !t.options.Service {
		t.doneOnce.Do(func() { close(t.done) })
	}
}

const missedEvery = time.Second

// endMissed ends processes whose end was not told, as the event buffer was full: a trace would wait for them for good.
// Twice in a row they have to be gone, for the event may be on its way. The caller holds t.mu.
func (t *Tracer) endMissed() {
	if time.Since(t.missed.looked) < missedEvery || t.count(bpf.CurrentCounterCOUNT_MAP_GAP) == 0 {
		return
	}
	before := t.missed.gone
	t.missed.looked, t.missed.gone = time.Now(), map[int]bool{}
	for pid := range t.current {
		// The main thread alone may have ended.
		if state := (memory.FS{}).State(pid); !state.Gone() || state.Threads > 1 {
			continue
		}
		t.missed.gone[pid] = true
		if before[pid] {
			t.exited(pid, "ended, nobody saw how", false)
		}
	}
}

// maxExits bounds the log: a service may fork for days. How each process ended is in the profile all the same.
const maxExits = 200

func (t *Tracer) logExit(m *member, failed bool) {
	most := maxExits
	if failed {
		most *= 2 // those are what a person looks for
	}
	if t.exits++; t.exits <= most {
		t.log("process %d (%s) %s", m.pid, m.process.Comm, m.process.Exit)
	}
}

// leave takes notice that a process no longer lives in a member's memory. The last one ends the member.
func (t *Tracer) leave(m *member) {
	if m.users--; m.users <= 0 {
		t.end(m)
	}
}

// end gives back what a member holds. Its books stay.
func (t *Tracer) end(m *member) {
	if m.ended {
		return
	}
	m.ended = true
	if m.space != nil {
		t.tables.Release(m.space)
	}
	if heir := t.heir(m); heir != nil {
		heir.guards, m.guards = append(heir.guards, m.guards...), nil
		if !t.useSessions { // those are not inherited
			heir.calls, m.calls = append(heir.calls, m.calls...), nil
		}
	}
	t.closeLater(m.takeProbes())
}

// heir is a living member that has inherited the same probes; nil when there is none.
func (t *Tracer) heir(m *member) *member {
	if len(m.calls)+len(m.guards) == 0 {
		return nil
	}
	for _, c := range t.current {
		if c != m && c.clan == m.clan && !c.ended {
			return c
		}
	}
	return nil
}

func exitText(status uint32) string {
	if sig := syscall.Signal(status & 0x7f); sig != 0 {
		return fmt.Sprintf("was killed by signal %d (%s)", sig, sig)
	}
	return fmt.Sprintf("exited with status %d", status>>8&0xff)
}

const (
	mapStack         = 0x20000
	mapNoReserve     = 0x4000
	mremapDontUnmap  = 4
	labelThreadStack = "thread stack"
	labelReserved    = "reserved"
)

// onMapping applies one successful system call to a member's address space.
func (t *Tracer) onMapping(m *member, e *bpf.Event) {
	of := region{time: e.Time, internal: e.Flags&uint32(bpf.CurrentEventFlagEVENT_INTERNAL) != 0, key: regionKey{stack: e.Stack}}
	switch bpf.CurrentEventType(e.Type) {
	case bpf.CurrentEventTypeEVENT_MMAP:
		t.onMmap(m, e, of)
	case bpf.CurrentEventTypeEVENT_MUNMAP:
		m.regions.cut(e.Args[0], e.Args[0]+wholePages(e.Args[1]))
	case bpf.CurrentEventTypeEVENT_MREMAP:
		onMremap(m.regions, e, of)
	case bpf.CurrentEventTypeEVENT_BRK:
		of.key.brk = true
		onBrk(m, e, of)
	}
}

func (t *Tracer) onMmap(m *member, e *bpf.Event, of region) {
	end := e.Result + wholePages(e.Args[1])
	prot, flags := e.Args[2], e.Args[3]
	if flags&unix.MAP_ANONYMOUS == 0 {
		m.regions.cut(e.Result, end)
		if prot&unix.PROT_EXEC != 0 && !m.ended {
			t.tryRefresh(m)
		}
		return
	}
	switch {
	case flags&mapStack != 0:
		of.key.label = labelThreadStack
	case prot == unix.PROT_NONE || flags&mapNoReserve != 0:
		of.key.label = labelReserved
	}
	m.regions.add(e.Result, end, of)
}

func onMremap(r *regions, e *bpf.Event, of region) {
	from, to := e.Args[0], e.Result
	oldSize, newSize := wholePages(e.Args[1]), wholePages(e.Args[2])
	source := r.at(from)
	if oldSize == 0 || e.Args[3]&mremapDontUnmap != 0 {
		// The old range stays: the new one is memory of its own, through the same stack.
		if source != nil {
			of.key, of.internal = source.key, source.internal
		}
		r.add(to, to+newSize, of)
		return
	}
	r.cut(from+newSize, from+oldSize)
	if from != to {
		r.move(from, min(oldSize, newSize), to)
	}
	if newSize <= oldSize {
		return
	}
	if last := r.at(to + oldSize - 1); last != nil {
		r.extend(last, to+oldSize, to+newSize)
		return
	}
	r.add(to+oldSize, to+newSize, of) // a mapping from before the trace grew
}

func onBrk(m *member, e *bpf.Event, of region) {
	old, now := m.brk, e.Result
	m.brk = now
	if old == 0 || e.Args[0] != now {
		return // a query, a failure, or the first that is heard of the heap
	}
	if now > old {
		m.regions.add(old, now, of)
	} else {
		m.regions.cut(now, old)
	}
}

func wholePages(n uint64) uint64 { return (n + pageSize() - 1) &^ (pageSize() - 1) }
