// Package tracer counts the allocations of live processes: it loads the BPF programs, places probes, feeds the unwind
// tables, follows processes as they fork, exec and exit, and reads the books into a profile.Snapshot.
//
// The trap is order. Tables are published before probes go live, or the first stacks are cut; the gate opens after the
// last probe is in and shuts before the first is out, or frees are seen without their allocations; and the books are read
// after the probes are out, or they change below the reader.
package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// Tracer traces a service: one process or many. Its methods may be called from any goroutine.
type Tracer struct {
	options    Options
	programs   *programs
	tracefs    *tracefs
	tables     *unwind.Tables
	files      *files
	scanner    *allocator.Scanner
	kinds      *kinds
	probes     *probes
	watches    []io.Closer // of system calls and process events
	readers    *readers
	guard      *guard
	exceptions *exceptions

	mu       sync.Mutex
	members  map[uint64]*member // by key, all that ever were
	current  map[int]*member    // by pid, those that live
	stacks   map[stackKey]*stack
	keys     map[*profile.Stack]bookKey    // of the last snapshot's stacks
	contents map[bookKey][]profile.Content // as last read
	notes    []string
	events   []profile.Event
	exits    int // processes that ended
	started  time.Time
	startNS  uint64 // CLOCK_MONOTONIC
	stopped  time.Time
	history  []moment
	noted    time.Duration // when the last moment was taken
	spacing  time.Duration // of moments
	rss      profile.RSSChange
	done     chan struct{}
	doneOnce sync.Once
	missed   struct { // see endMissed
		looked time.Time
		gone   map[int]bool
	}
	closed bool

	useSessions bool      // probes that skip returns are in
	callsShut   bool      // the books of calls are shut
	shutAt      time.Time // when they first were
	calibrating sync.WaitGroup
	closing     sync.WaitGroup
	budget      budget
	windows     windows
	adjustments map[bpf.RowKey]adjustment
	audit       audit
	thinning    sync.Mutex // held while the live map is thinned; taken before mu
}

// New loads the programs. Nothing is traced before Add and Start.
func New(o Options) (*Tracer, error) {
	o = o.withDefaults()
	t := &Tracer{
		options: o, kinds: newKinds(),
		files: newFiles(), exceptions: newExceptions(),
		scanner: &allocator.Scanner{
			Rules: allocator.Rules{LongNops: kernel.EmulatesLongNops(), RAX: true}, Definitions: o.Definitions,
		},
		members: map[uint64]*member{}, current: map[int]*member{}, stacks: map[stackKey]*stack{},
		contents:    map[bookKey][]profile.Content{},
		adjustments: map[bpf.RowKey]adjustment{},
		audit:       audit{wrong: map[bpf.RowKey]bool{}},
		done:        make(chan struct{}),
	}
	if err := t.prepare(); err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *Tracer) prepare() (err error) {
	raiseFileLimit()
	if t.programs, err = loadPrograms(t.options); err != nil {
		return err
	}
	if t.programs.RealFile != nil {
		t.files.real = t.programs.realFile
	}
	if t.tracefs, err = openTracefs(); err != nil {
		return err
	}
	if err := t.tracefs.removeStale(); err != nil {
		t.options.Warn(err.Error())
	}
	t.tables, err = unwind.New(unwind.Maps{
		Rows: t.programs.UnwindRows, Rules: t.programs.UnwindRules, Slots: t.programs.UnwindSlots, BinUse: t.programs.UnwindBinUse,
	}, nil)
	if err != nil {
		return fmt.Errorf("prepare unwind tables: %w", err)
	}
	t.probes = newProbes(t.programs, t.tracefs, t.kinds, t.options.Children)
	if len(t.options.Guard) > 0 {
		if t.guard, err = startGuard(t.options.Guard, t.probes.group); err != nil {
			return err
		}
	}
	if err := t.setSampling(t.options); err != nil {
		return err
	}
	if err := t.fillReserves(); err != nil {
		return err
	}
	if t.readers, err = startReaders(t); err != nil {
		return err
	}
	if t.options.Mode != Growth {
		t.calibrating.Go(t.calibrate)
	}
	return t.watch()
}

// calibrate measures the traps while targets are looked into.
func (t *Tracer) calibrate() {
	traps, err := t.probes.calibrate(func(p []io.Closer) { t.closeLater(p) })
	if err != nil {
		t.options.Warn(fmt.Sprintf("%v: the cost of the trace is not known", err))
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.budget.traps = traps
}

// watch attaches what is not the business of one process: system calls, forks, execs, exits.
func (t *Tracer) watch() error {
	for name, enter := range t.programs.syscalls() {
		for half, prog := range map[string]*ebpf.Program{"enter": enter, "exit": t.programs.SyscallExit} {
			id, err := t.tracefs.id("syscalls/sys_" + half + "_" + name)
			if err != nil {
				return err
			}
			h, err := attachTracepoint(prog, id, t.programs.haveCookie)
			if err != nil {
				return fmt.Errorf("watch system call %s: %w", name, err)
			}
			t.watches = append(t.watches, h)
		}
	}
	for name, prog := range map[string]*ebpf.Program{
		"sched_process_fork": t.programs.ProcessForked,
		"sched_process_exec": t.programs.ProcessExeced,
		"sched_process_exit": t.programs.ProcessExited,
	} {
		l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: name, Program: prog})
		if err != nil {
			return fmt.Errorf("watch %s: %w", name, err)
		}
		t.watches = append(t.watches, l)
	}
	return nil
}

// Add takes a process in: tables first, then probes. It may be called before Start and while tracing. The error is
// memory.ErrGone, among others, when the process has ended.
func (t *Tracer) Add(pid int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current[pid] != nil || !t.stopped.IsZero() {
		return nil // whoever joins after the end is not missed
	}
	m := newMember((monotonic()>>10)<<32|uint64(uint32(pid)), pid)
	m.identify()
	err := t.admit(m)
	if err != nil && ended(pid, err) && !errors.Is(err, memory.ErrGone) {
		return fmt.Errorf("%w: %w", memory.ErrGone, err)
	}
	return err
}

// wasBorn tells whether the BPF side follows a process already: a child whose fork has yet to arrive here. Another key would
// tear its books apart.
func (t *Tracer) wasBorn(pid int) bool {
	var p bpf.Proc
	return t.programs.Procs.Lookup(uint32(pid), &p) == nil
}

// Remap takes notice of what a process has mapped since it was added. Maps change by themselves only while the process
// runs; this is for one that stands still.
func (t *Tracer) Remap(pid int) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	m := t.current[pid]
	if m == nil {
		return fmt.Errorf("read mappings of process %d: it is not traced", pid)
	}
	return t.refresh(m)
}

// admit makes a member known to the BPF side and to the books. Forked members are known to the BPF side already.
func (t *Tracer) admit(m *member) error {
	p := bpf.Proc{Key: m.key, Slot: noSlot}
	if t.options.Children {
		p.Flags |= uint32(bpf.CurrentProcFlagPROC_FOLLOW)
	}
	if err := t.programs.Procs.Put(uint32(m.pid), p); err != nil {
		return fmt.Errorf("take in process %d: %w", m.pid, err)
	}
	if err := t.refresh(m); err != nil {
		return errors.Join(err, t.programs.Procs.Delete(uint32(m.pid)), closeAll(m.takeProbes()))
	}
	t.members[m.key] = m
	t.current[m.pid] = m
	return nil
}

const noSlot = ^uint32(0)

// Start opens the gate: from now on everything counts.
func (t *Tracer) Start() error {
	t.calibrating.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rss.Before = t.residentByKind()
	t.started = time.Now()
	t.startNS = monotonic()
	t.budget.tick = t.account()
	if err := t.programs.Gate.Set(uint32(1)); err != nil {
		return fmt.Errorf("open the gate: %w", err)
	}
	return nil
}

// Done is closed when no traced process is left.
func (t *Tracer) Done() <-chan struct{} { return t.done }

// Stop shuts the gate and takes all probes out. The books then stand still. It may be called twice.
func (t *Tracer) Stop() error {
	t.mu.Lock()
	if !t.stopped.IsZero() {
		t.mu.Unlock()
		return nil
	}
	err := t.programs.Gate.Set(uint32(0))
	t.settle()
	t.stopped = time.Now()
	if len(t.current) > 0 {
		t.rss.After = t.residentByKind()
	}
	t.mu.Unlock()
	return errors.Join(err, t.detach())
}

// detach takes everything out of the targets and the kernel. Each piece waits for grace periods, so they go together.
func (t *Tracer) detach() error {
	t.calibrating.Wait()
	t.mu.Lock()
	all := t.watches
	t.watches = nil
	if t.probes != nil {
		all = append(all, t.probes.takeShared()...)
	}
	var guards []io.Closer
	for _, m := range t.members {
		guards = append(guards, m.guards...)
		m.guards = nil
		all = append(all, m.takeProbes()...)
	}
	t.mu.Unlock()
	errs := []error{closeAll(all)}
	t.closing.Wait()
	// Calls that are under way return through the trampoline for a moment longer, by an exception too.
	errs = append(errs, closeAll(guards))
	if t.probes != nil {
		errs = append(errs, t.probes.Close())
	}
	return errors.Join(errs...)
}

// takeProbes hands over the probes of a member to somebody who closes them.
func (m *member) takeProbes() []io.Closer {
	all := slices.Concat(m.calls, m.guards)
	m.calls, m.guards = nil, nil
	return all
}

// closeLater closes probes beside the trace: each waits for grace periods of the kernel. The channel is closed when that is
// done.
func (t *Tracer) closeLater(probes []io.Closer) <-chan struct{} {
	done := make(chan struct{})
	if len(probes) == 0 {
		close(done)
		return done
	}
	t.closing.Go(func() {
		defer close(done)
		if err := closeAll(probes); err != nil {
			t.options.Warn(fmt.Sprintf("take probes out: %v", err))
		}
	})
	return done
}

// Close stops and frees everything. Snapshots that were taken stay good; their files are closed. It may be called twice.
func (t *Tracer) Close() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	t.mu.Unlock()
	errs := []error{t.detach(), t.guard.Close()}
	if t.readers != nil {
		errs = append(errs, t.readers.Close())
	}
	if t.tables != nil {
		errs = append(errs, t.tables.Close())
	}
	if t.tracefs != nil {
		errs = append(errs, t.tracefs.Close())
	}
	if t.programs != nil {
		errs = append(errs, t.programs.Close())
	}
	errs = append(errs, t.exceptions.Close())
	return errors.Join(append(errs, t.files.Close())...)
}

// Log puts something into the trace's log, which the profile carries.
func (t *Tracer) Log(text string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.log("%s", text)
}

func (t *Tracer) log(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	at := time.Duration(0)
	if !t.started.IsZero() {
		at = time.Since(t.started)
	}
	t.events = append(t.events, profile.Event{At: at, Text: text})
}

func monotonic() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts); err != nil {
		return 0
	}
	return uint64(ts.Nano())
}

// raiseFileLimit makes room for the events of many processes. Where it may not, fewer processes fit.
func raiseFileLimit() {
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) != nil {
		return
	}
	want := unix.Rlimit{Cur: max(limit.Cur, 1<<20), Max: max(limit.Max, 1<<20)}
	if unix.Setrlimit(unix.RLIMIT_NOFILE, &want) != nil {
		limit.Cur = limit.Max
		_ = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
}

func pageSize() uint64 { return uint64(os.Getpagesize()) }

// ErrNothingToProbe is wrapped by the error of Probing.
var ErrNothingToProbe = errors.New("nothing to probe")

// Probing reports whether there is anything to see at all: at least one probe, or the mode that needs none.
func (t *Tracer) Probing() error {
	if t.options.Mode == Growth || len(t.probes.all()) > 0 {
		return nil
	}
	return fmt.Errorf("%w: no file of the target defines an allocator that is known (a Go program without cgo has none: "+
		"use its own pprof endpoint; a static program that was stripped has no names left); --mode growth works without, and --alloc and --free name functions of your own", ErrNothingToProbe)
}

// Announcement says what the trace costs in memory and what it has probed, in one line.
func (t *Tracer) Announcement() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	force, processes := "", "1 process"
	for _, m := range t.current {
		force = m.inForce
	}
	if len(t.current) != 1 {
		processes = fmt.Sprintf("%d processes", len(t.current))
	}
	return fmt.Sprintf("tracing %s, allocator %s, %d functions probed; %s of kernel memory for up to %d blocks; Ctrl-C ends",
		processes, force, len(t.probes.all()), profile.FormatBytes(t.programs.bytes), t.options.MaxLive)
}
