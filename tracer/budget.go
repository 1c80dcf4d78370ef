package tracer

import (
	"fmt"
	"io"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// budget keeps account of what the trace costs its targets, and holds it below Options.MaxOverhead.
type budget struct {
	traps   trapCosts
	tick    account // as it stood at the last tick
	wait    bool    // the last tick changed the precision: its effect is yet to show
	ticks   int
	program time.Duration                 // of one run of a BPF program, on average
	stats   io.Closer                     // open while the kernel keeps run times
	since   runStats                      // as they stood when it began to
	waits   struct{ ran, waited float64 } // of the targets so far, in ns
	spent   spent                         // over all ticks
}

// account is what had been used up at one moment.
type account struct {
	at                         time.Time
	emulated, stepped, returns uint64 // hits
	cpu                        map[int]time.Duration
}

const (
	budgetTick = 400 * time.Millisecond
	// least is the targets' CPU time in a tick below which a share of it says nothing.
	leastCPU = 20 * time.Millisecond
)

// runStats are the kernel's own figures of how long programs ran. They are only kept while somebody asks for them.
type runStats struct {
	runs uint64
	took time.Duration
}

// Control is to be called often while the trace runs: when a tick is due it accounts for the cost of the trace, and steps
// down where the budget asks for it. It also looks after processes whose end was missed.
func (t *Tracer) Control() error {
	open, err := t.control()
	if open {
		t.closing.Go(t.openWindow)
	}
	return err
}

func (t *Tracer) control() (open bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endMissed()
	if t.probes.sessionsForThrowing {
		if err := t.updateGranted(); err != nil {
			return false, err
		}
	}
	b := &t.budget
	elapsed := time.Since(b.tick.at)
	if t.options.Mode == Growth || elapsed < t.tickLength() || !t.stopped.IsZero() {
		return false, nil
	}
	tick := t.settle()
	t.measurePrograms()
	if t.options.MaxOverhead == 0 {
		return false, nil
	}
	if t.windows.on {
		return t.window(tick, elapsed)
	}
	if t.callsShut || tick.cpu < leastCPU && tick.cost < leastCPU {
		return false, nil
	}
	if b.wait {
		b.wait = false
		return false, nil
	}
	if tick.share() <= t.options.MaxOverhead {
		return false, nil
	}
	b.wait = true
	return false, t.stepDown(tick, elapsed)
}

// settle accounts for the time since the last tick. The caller holds t.mu.
func (t *Tracer) settle() spent {
	b := &t.budget
	now := t.account()
	tick := b.between(b.tick, now)
	b.spent = b.spent.plus(tick)
	b.tick = now
	return tick
}

// spent is a cost of the trace, and the CPU time of the targets meanwhile, which the traps are a part of.
type spent struct{ cost, cpu time.Duration }

func (s spent) plus(o spent) spent { return spent{s.cost + o.cost, s.cpu + o.cpu} }

func (s spent) times(f float64) spent {
	return spent{time.Duration(f * float64(s.cost)), time.Duration(f * float64(s.cpu))}
}

// share is at most 1: what is measured above it is noise, and a budget of 100 % is no limit.
func (s spent) share() float64 { return min(float64(s.cost)/float64(max(s.cpu, 1)), 1) }

// between is what the probes cost between two moments, and the CPU time of the targets.
func (b *budget) between(from, to account) spent {
	run := b.program
	cost := time.Duration(to.emulated-from.emulated)*(b.traps.emulated+run) +
		time.Duration(to.stepped-from.stepped)*(b.traps.stepped+run) +
		time.Duration(to.returns-from.returns)*(b.traps.returned+run)
	var cpu time.Duration
	for pid, n := range to.cpu {
		cpu += n - from.cpu[pid]
	}
	return spent{cost, cpu}
}

// account reads hits and CPU times. The caller holds t.mu.
func (t *Tracer) account() account {
	a := account{at: time.Now(), cpu: map[int]time.Duration{}, returns: t.count(bpf.CurrentCounterCOUNT_RETURNS)}
	for _, p := range t.probes.all() {
		n := t.hitsOf(p)
		if p.allocator.Place.Emulated {
			a.emulated += n
		} else {
			a.stepped += n
		}
	}
	for pid := range t.current {
		a.cpu[pid] = cpuTime(pid)
	}
	return a
}

// statsEvery is how many ticks lie between two measurements of the programs' run time: keeping it costs each run a little.
const statsEvery = 8

// measurePrograms turns the average run time of the programs into the cost of one run.
func (t *Tracer) measurePrograms() {
	b := &t.budget
	if b.stats != nil {
		now := t.runStats()
		if n := now.runs - b.since.runs; n > 100 {
			b.program = t.onCPU((now.took - b.since.took) / time.Duration(n))
		}
		_ = b.stats.Close()
		b.stats = nil
	} else if b.ticks%statsEvery == 0 {
		// Where the kernel does not let us, the traps alone are counted.
		if stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME); err == nil {
			b.stats, b.since = stats, t.runStats()
			t.onCPU(0)
		}
	}
	b.ticks++
}

// onCPU takes the time out in which the targets waited for a CPU: programs are preempted, and the kernel's clock runs on.
func (t *Tracer) onCPU(d time.Duration) time.Duration {
	var ran, waited float64
	for pid := range t.current {
		p, err := procfs.NewProc(pid)
		if err != nil {
			continue
		}
		if stat, err := p.Schedstat(); err == nil {
			ran += float64(stat.RunningNanoseconds)
			waited += float64(stat.WaitingNanoseconds)
		}
	}
	waits := &t.budget.waits
	r, w := ran-waits.ran, waited-waits.waited
	waits.ran, waits.waited = ran, waited
	if r <= 0 || w < 0 {
		return d
	}
	return time.Duration(float64(d) * r / (r + w))
}

func (t *Tracer) runStats() (sum runStats) {
	for _, p := range []*ebpf.Program{t.programs.CallEntered, t.programs.CallReturned, t.programs.session.now()} {
		if p == nil {
			continue
		}
		if s, err := p.Stats(); err == nil {
			sum.runs += s.RunCount
			sum.took += s.Runtime
		}
	}
	return sum
}

// stepDown lowers the precision by one step. The caller holds t.mu.
func (t *Tracer) stepDown(tick spent, elapsed time.Duration) error {
	share := tick.share()
	limit := fmt.Sprintf("%.1f %% of the target's CPU, above the budget of %.1f %%", 100*share, 100*t.options.MaxOverhead)
	if t.options.Mode == Exact {
		t.options.Mode = Sample
		t.announce("%s: sampling from now on, one block in %s of allocations", limit, profile.FormatBytes(t.options.SampleBytes))
		return t.startSampling()
	}
	t.announce("%s: probes out after %v, and in again for a moment at a time, as the budget allows; heap and mappings are followed all the while",
		limit, time.Since(t.started).Round(100*time.Millisecond))
	return t.startWindows(tick, elapsed)
}

// announce logs an event for the profile and tells the person at once.
func (t *Tracer) announce(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	t.log("%s", text)
	t.options.Warn(text)
}

// startSampling makes the BPF side sample and, where the kernel can, exchanges the probes for ones that skip the return of
// calls that were not taken. Both sorts are in for a moment: the sessions variable says which of them enters calls.
func (t *Tracer) startSampling() error {
	if err := t.setSampling(t.options); err != nil {
		return err
	}
	if !t.programs.haveSession || t.useSessions {
		return nil
	}
	if _, err := t.programs.session.get(); err != nil {
		t.options.Warn(fmt.Sprintf("load session program: %v: returns of calls that are not taken cannot be skipped", err))
		return nil
	}
	return t.changeToSessions()
}

func (t *Tracer) changeToSessions() error {
	t.useSessions = true
	var old []io.Closer
	for pid, m := range t.current {
		if m.pid != pid {
			continue // a vfork child in its parent's memory
		}
		links, err := t.probes.sessions(t.probes.pairs(), pid)
		if err != nil {
			if gone(pid) {
				continue
			}
			return err
		}
		old = append(old, m.calls...)
		m.calls = links
		for _, p := range t.probes.pairs() {
			m.opened[p] = true
		}
	}
	if err := t.programs.Sessions.Set(uint32(1)); err != nil {
		return fmt.Errorf("switch to session probes: %w", err)
	}
	t.closeLater(old)
	return nil
}

// shutCalls ends the books of allocator calls: frees are no longer seen, so that nothing may be added either.
func (t *Tracer) shutCalls() error {
	if err := t.programs.CallsShut.Set(uint32(1)); err != nil {
		return fmt.Errorf("shut the books of calls: %w", err)
	}
	t.callsShut = true
	if t.shutAt.IsZero() {
		t.shutAt = time.Now()
	}
	calls := t.probes.takeShared()
	for _, m := range t.members {
		calls = append(calls, m.calls...)
		m.calls = nil
	}
	t.windows.out = t.closeLater(calls)
	return nil
}

// overhead is the account of the whole trace. The caller holds t.mu.
func (t *Tracer) overhead() *profile.Overhead {
	if t.options.Mode == Growth {
		return nil
	}
	b := &t.budget
	hits := b.tick.emulated + b.tick.stepped + b.tick.returns
	if hits == 0 || b.spent.cpu == 0 {
		return nil
	}
	o := &profile.Overhead{
		Hits: hits, CostPerHit: b.spent.cost / time.Duration(hits), CPUFraction: float64(b.spent.cost) / float64(b.spent.cpu),
		Budget: t.options.MaxOverhead, TargetCPU: b.spent.cpu, MapBytes: t.programs.bytes,
	}
	var usage unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &usage) == nil {
		o.TracerCPU = time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	if u, err := (memory.FS{}).Rollup(os.Getpid()); err == nil {
		// The unwind tables are mapped into allocsnoop: they are in its RSS, and in MapBytes already.
		o.TracerRSS = max(u.RSS-min(u.RSS, t.tables.Stats().Bytes), u.Anonymous)
	}
	return o
}

// cpuTime is the CPU time that all threads of a process have used.
func cpuTime(pid int) time.Duration {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return 0
	}
	stat, err := p.Stat()
	if err != nil {
		return 0
	}
	return time.Duration(stat.CPUTime() * float64(time.Second))
}
