package target

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// ChangeKind says what happened to the set of traced processes.
type ChangeKind int

// What a Watcher reports.
const (
	Joined ChangeKind = iota + 1
	Execed            // a member runs another program now; its identity stays
	Left              // a member ended
)

// String is the kind as a word.
func (k ChangeKind) String() string {
	switch k {
	case Joined:
		return "joined"
	case Execed:
		return "execed"
	case Left:
		return "left"
	}
	return fmt.Sprintf("change %d", int(k))
}

// Change is one report. For one process they come in order: Joined, any number of Execed, Left.
type Change struct {
	Kind    ChangeKind
	Process Process
	// Why says what made a process join: "--name nginx", "child of 942 (nginx)".
	Why string
}

// Options of a Watcher; the zero value is usable.
type Options struct {
	// NoChildren leaves out children of members that the selector does not select themselves.
	NoChildren bool
	// Interval is the pause between scans of /proc, which find what kernel events did not tell; 0 is 50 ms, so that a
	// process is found within 100 ms. A scan that takes longer than a twentieth of the pause makes the next pause longer.
	Interval time.Duration
}

// Stats are the watcher's own figures.
type Stats struct {
	Joined, Left uint64
	// Unread counts members that ended before anything could be read of them; they are named after their parents.
	Unread uint64
	// Late counts members that a scan found although kernel events should have told of them.
	Late     uint64
	Scans    uint64
	ScanTime time.Duration
	// Errors counts scans that failed.
	Errors uint64
}

// Watcher keeps the set of traced processes. Kernel events come in through Fork, Exec and Exit; Run adds what only a look
// at /proc tells. The report function is called for each change, one at a time, by whoever found it, and must not call the
// watcher.
type Watcher struct {
	finder *Finder
	opts   Options
	report func(Change)

	mu      sync.Mutex
	members map[int]Process
	stats   Stats

	// Of the scanning goroutine alone.
	seen  map[int]uint64 // inode of /proc/PID by pid: a reused pid has another one
	queue []int          // pids to look at again, for what changes without a sign: names, groups, libraries
	again time.Time      // when the container runtimes may be asked again
}

// NewWatcher starts with an empty set: nothing is found before Scan or Run is called or an event comes in.
func NewWatcher(f *Finder, opts Options, report func(Change)) *Watcher {
	if opts.Interval <= 0 {
		opts.Interval = 50 * time.Millisecond
	}
	return &Watcher{finder: f, opts: opts, report: report, members: map[int]Process{}, seen: map[int]uint64{}}
}

// Members are the processes of the set in the order of their pids.
func (w *Watcher) Members() []Process {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := slices.Collect(maps.Values(w.members))
	slices.SortFunc(list, func(a, b Process) int { return a.PID - b.PID })
	return list
}

// Stats are the figures so far.
func (w *Watcher) Stats() Stats {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stats
}

// Ended says that no member is left and none can come.
func (w *Watcher) Ended() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.members) == 0 && w.stats.Joined > 0 && w.finder.selector.Finite()
}

// Add makes a process a member whatever the selector says: a command that was started to be traced.
func (w *Watcher) Add(p Process, why string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.join(p, why)
}

// Fork takes the kernel's word that a process has a new child process (not a thread). The child of a member joins at once,
// even if it is gone before it can be read.
func (w *Watcher) Fork(parent, child int) {
	if parent == child {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	of, known := w.members[parent]
	if !known {
		return // it is as little a member as its parent, until it does something else
	}
	p, err := Read(w.finder.fs, child)
	if err != nil {
		// Too short a life: the parent's facts were the child's.
		p = of
		p.ID, p.Parent, p.NSPIDs = ID{PID: child}, parent, nil
	}
	if w.opts.NoChildren {
		if why, ok := w.finder.Match(&p); ok {
			w.joinRead(p, why, err)
		}
		return
	}
	w.joinRead(p, "child of "+of.String(), err)
}

func (w *Watcher) joinRead(p Process, why string, readErr error) {
	if w.join(p, why) && readErr != nil {
		w.stats.Unread++
	}
}

// Exec takes the kernel's word that a process runs another program.
func (w *Watcher) Exec(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look(pid, true)
}

// Exit takes the kernel's word that a process ended, with all of its threads.
func (w *Watcher) Exit(pid int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p, ok := w.members[pid]; ok {
		w.leave(p)
	}
}

// join adds a process; false when it is a member already. A namesake with another start time is its late predecessor.
func (w *Watcher) join(p Process, why string) bool {
	if old, ok := w.members[p.PID]; ok {
		if old.Start == p.Start || old.Start == 0 || p.Start == 0 {
			return false
		}
		w.leave(old)
	}
	w.members[p.PID] = p
	w.stats.Joined++
	w.report(Change{Joined, p, why})
	return true
}

func (w *Watcher) leave(p Process) {
	delete(w.members, p.PID)
	w.stats.Left++
	w.report(Change{Left, p, ""})
}

// look reads a process and draws the consequences. execed says that a member's program certainly changed.
func (w *Watcher) look(pid int, execed bool) {
	member, known := w.members[pid]
	p, err := Read(w.finder.fs, pid)
	if known && (skippable(err) || err == nil && member.Start != 0 && p.Start != member.Start) {
		w.leave(member)
		known = false
	}
	if err != nil {
		return
	}
	if known {
		w.update(member, p, execed)
		return
	}
	if why, ok := w.finder.Match(&p); ok {
		w.join(p, why)
	}
}

// update notes what changed about a member. Members stay whatever they become, until they end.
func (w *Watcher) update(old, p Process, execed bool) {
	w.members[p.PID] = p
	if execed || p.Exe != old.Exe && p.Exe != "" && old.Exe != "" {
		w.report(Change{Execed, p, ""})
	}
}

// Run scans until the context ends.
func (w *Watcher) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		start := time.Now()
		w.Scan(ctx)
		timer.Reset(max(w.opts.Interval-time.Since(start), 20*time.Since(start)))
	}
}

// recheckBudget is the part of the interval that looking again at known processes may take.
const recheckBudget = 50

// Scan looks at /proc once. It is not for concurrent use with itself or Run.
func (w *Watcher) Scan(ctx context.Context) {
	start := time.Now()
	entries, err := readProcDir(w.finder.fs)
	if err == nil {
		w.findGone(entries)
		w.findNew(entries)
		w.refresh(ctx, start)
		w.recheck(start.Add(w.opts.Interval / recheckBudget))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stats.Scans++
	w.stats.ScanTime += time.Since(start)
	if err != nil {
		w.stats.Errors++
	}
}

// findGone lets members leave that are in /proc no more.
func (w *Watcher) findGone(entries map[int]uint64) {
	maps.DeleteFunc(w.seen, func(pid int, _ uint64) bool { _, ok := entries[pid]; return !ok })
	w.mu.Lock()
	defer w.mu.Unlock()
	for pid, p := range w.members {
		if _, ok := entries[pid]; ok {
			continue
		}
		// It may have joined after the directory was read.
		if state := w.finder.fs.State(pid); state.Gone() || p.Start != 0 && state.StartTicks != p.Start {
			w.leave(p)
		}
	}
}

// findNew looks at processes that were not there at the last scan.
func (w *Watcher) findNew(entries map[int]uint64) {
	for pid, inode := range entries {
		if w.seen[pid] == inode {
			continue
		}
		w.seen[pid] = inode
		w.mu.Lock()
		before := w.stats.Joined
		w.look(pid, false)
		w.adopt(pid)
		if w.stats.Scans > 0 {
			w.stats.Late += w.stats.Joined - before
		}
		w.mu.Unlock()
	}
}

// adopt lets a process join whose parent is a member: the child of one that forked when nobody listened.
func (w *Watcher) adopt(pid int) {
	if _, known := w.members[pid]; known || w.opts.NoChildren {
		return
	}
	state := w.finder.fs.State(pid)
	parent, ok := w.members[state.PPID]
	if !ok || state.Gone() {
		return
	}
	if p, err := Read(w.finder.fs, pid); err == nil {
		w.join(p, "child of "+parent.String())
	}
}

// refresh asks the container runtimes every second whether a name belongs to a new container.
func (w *Watcher) refresh(ctx context.Context, now time.Time) {
	if now.Before(w.again) {
		return
	}
	began := time.Now()
	_ = w.finder.Refresh(ctx) // that nobody has the name now is no error: the container is being replaced
	w.again = now.Add(max(time.Second, 50*time.Since(began)))
}

// recheck looks at known processes again, in turn and until the deadline, but at one at least.
func (w *Watcher) recheck(deadline time.Time) {
	if len(w.queue) == 0 {
		w.queue = slices.Collect(maps.Keys(w.seen))
	}
	for first := true; len(w.queue) > 0 && (first || time.Now().Before(deadline)); first = false {
		pid := w.queue[0]
		w.queue = w.queue[1:]
		w.mu.Lock()
		w.look(pid, false)
		w.mu.Unlock()
	}
}
