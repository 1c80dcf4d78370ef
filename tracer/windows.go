package tracer

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
)

// windows is the step between sampling and no probes at all: the probes are in for one tick of the budget or more, and then
// out until the targets have run for so long that another such window lies within the budget.
//
// The trap: a block that is in use when a window ends may be freed unseen. It leaves all figures before the next window
// begins and is kept in the book of its stack in unfollowed, of a kind of its own. Until then it counts: it was in use when
// the probes were last in.
type windows struct {
	on         bool
	count      int
	began      time.Time
	opened     time.Time       // the window that is open, or was last
	open       time.Duration   // all windows together
	spent      spent           // since the step
	last       spent           // a window's: what another one is thought to cost
	opening    bool            // under way beside the trace
	out        <-chan struct{} // closed when the probes of the last window are gone
	unfollowed map[bpf.RowKey]adjustment
	variances  map[bpf.RowKey]variance
}

type variance struct{ objects, bytes float64 }

const (
	// windowTick is the shortest window; it is accounted for before the next one.
	windowTick = 100 * time.Millisecond
	// longestGap is how long the probes may have to stay out after a window: where the budget asks for more, they stay out for
	// good.
	longestGap = time.Minute
)

// tickLength is how long one tick of the budget is. The caller holds mu.
func (t *Tracer) tickLength() time.Duration {
	if t.windows.on && !t.callsShut {
		return windowTick
	}
	return budgetTick
}

// windowShare is how much of the budget windows may use: that probes go in and out costs the targets something too, which is
// not measured.
const windowShare = 0.6

// gap is how long the targets have to run before another window lies within the budget, in their CPU time.
func (w *windows) gap(budget float64) time.Duration {
	next := w.spent.plus(w.last)
	return time.Duration(float64(next.cost)/(windowShare*budget)) - next.cpu
}

// startWindows is the step: the probes go out, and in again as the budget allows. A window is thought to cost what the tick
// did. The caller holds mu.
func (t *Tracer) startWindows(tick spent, elapsed time.Duration) error {
	w := &t.windows
	w.on, w.began, w.last = true, time.Now(), tick.times(float64(windowTick)/float64(elapsed))
	w.unfollowed, w.variances = map[bpf.RowKey]adjustment{}, map[bpf.RowKey]variance{}
	return t.shutCalls()
}

// window is the step's part of a tick, which took the given cost and CPU time. It returns whether a window is to be opened.
// The caller holds mu.
func (t *Tracer) window(tick spent, elapsed time.Duration) (open bool, err error) {
	w, budget := &t.windows, t.options.MaxOverhead
	w.spent = w.spent.plus(tick)
	if !t.callsShut {
		if float64(tick.cost) <= budget*float64(tick.cpu) {
			return false, nil // the targets do less by now: the window stays open
		}
		return false, t.endWindow(tick)
	}
	if w.opening || tick.cpu == 0 {
		return false, nil
	}
	gap := w.gap(budget)
	if inTime := time.Duration(float64(gap) * float64(elapsed) / float64(tick.cpu)); inTime > longestGap && w.spent.cpu > 0 {
		t.windows.on = false
		t.announce("the probes would have to stay out for %v after each %v: they stay out for good, and from now on only heap and mappings are followed",
			inTime.Round(time.Second), windowTick)
		return false, nil
	}
	w.opening = gap <= 0
	return w.opening, nil
}

// endWindow takes the probes out again. The caller holds mu.
func (t *Tracer) endWindow(tick spent) error {
	w := &t.windows
	w.last = tick
	w.open += time.Since(w.opened)
	t.logWindow("the probes go out again after %.1f s", time.Since(w.opened).Seconds())
	return t.shutCalls()
}

// maxWindowsLogged bounds the log of a trace of days; how many there were is in the notes all the same.
const maxWindowsLogged = 100

func (t *Tracer) logWindow(format string, args ...any) {
	if t.windows.count <= maxWindowsLogged {
		t.log("window %d: %s", t.windows.count, fmt.Sprintf(format, args...))
	}
}

// openWindow puts the probes in again. It holds what thin holds, as it empties the live map.
func (t *Tracer) openWindow() {
	t.mu.Lock()
	out := t.windows.out
	t.mu.Unlock()
	<-out // or a call would be seen twice
	t.thinning.Lock()
	defer t.thinning.Unlock()
	err := t.excludeLive()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.windows.opening = false
	if err == nil && t.stopped.IsZero() {
		err = t.openCalls()
	}
	if err != nil {
		t.windows.on = false
		t.announce("the probes stay out for good: %v", err)
	}
}

// excludeLive takes all blocks out of the live map and out of the books: their ends will not be seen. Nothing else changes
// the map meanwhile, as the books of calls are shut.
func (t *Tracer) excludeLive() error {
	var keys []bpf.LiveKey
	t.mu.Lock()
	err := eachEntry(t.programs.Live, func(k *bpf.LiveKey, b *bpf.Block) {
		keys = append(keys, *k)
		if k.Proc != 0 {
			t.exclude(rowOf(k, b), b)
		}
	})
	t.mu.Unlock()
	if err != nil {
		return fmt.Errorf("walk the blocks in use: %w", err)
	}
	if err := deleteAll(t.programs.Live, keys); err != nil {
		return fmt.Errorf("empty the live map: %w", err)
	}
	return t.fillLiveReserve()
}

func deleteAll[K any](m *ebpf.Map, keys []K) error {
	if len(keys) == 0 {
		return nil
	}
	if _, err := m.BatchDelete(keys, nil); err == nil {
		return nil
	}
	for i := range keys { // the kernel has no batches, or one of them is gone already
		if err := m.Delete(&keys[i]); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			return err
		}
	}
	return nil
}

// exclude moves a block from the books of its row to those of what could not be followed. The caller holds mu.
func (t *Tracer) exclude(row bpf.RowKey, b *bpf.Block) {
	objects, bytes := int64(weight(b.Prob)), int64(weightedBytes(b.Size, b.Prob))
	a := t.adjustments[row]
	t.adjustments[row] = adjustment{a.objects - objects, a.bytes - bytes}
	u := t.windows.unfollowed[row]
	t.windows.unfollowed[row] = adjustment{u.objects + objects, u.bytes + bytes}
	v := t.windows.variances[row]
	o, s := varianceOf(b)
	t.windows.variances[row] = variance{v.objects + o, v.bytes + s}
}

// openCalls puts the probes of allocator calls into all members, and opens the books of calls once all are in. The caller
// holds mu.
func (t *Tracer) openCalls() error {
	w := &t.windows
	t.callsShut = false
	w.count++
	for pid, m := range t.current {
		if m.pid != pid {
			continue // a vfork child in its parent's memory
		}
		if err := t.openProbes(m, t.probes.all()); err != nil && !ended(pid, err) {
			return errors.Join(err, t.shutCalls())
		}
		m.probed = monotonic()
	}
	if err := t.programs.Window.Set(uint32(w.count)); err != nil {
		return fmt.Errorf("begin a window: %w", err)
	}
	if err := t.programs.CallsShut.Set(uint32(0)); err != nil {
		return fmt.Errorf("open the books of calls: %w", err)
	}
	w.opened = time.Now()
	t.logWindow("the probes are in")
	t.settle() // a tick of its own begins
	return nil
}

// addUnfollowed gives the blocks that left the books their own. The caller holds mu.
func (t *Tracer) addUnfollowed(books map[bookKey]*book) {
	for row, a := range t.windows.unfollowed {
		label := t.kinds.name(row.Kind)
		if label == profile.KindMalloc {
			label = ""
		}
		v := t.windows.variances[row]
		books[bookKey{stackKey{row.Proc, row.Stack}, profile.KindUnfollowed, string(label)}] = &book{
			allocObjects: objects(uint64(a.objects)), allocBytes: a.bytes, objectsVar: v.objects, bytesVar: v.bytes,
		}
	}
}

// tell puts into a snapshot what the windows mean for its figures. The caller holds mu.
func (w *windows) tell(s *profile.Snapshot, shut bool) {
	if w.began.IsZero() {
		return
	}
	told := &profile.Windows{Count: w.count, In: w.open, Of: s.Taken.Sub(w.began)}
	if !shut {
		told.In += s.Taken.Sub(w.opened)
	}
	s.Windows = told
	if w.count == 0 {
		s.Notes = append(s.Notes, "the budget took the probes out: figures of allocator calls hold for the time before")
		return
	}
	s.Notes = append(s.Notes, fmt.Sprintf("the probes were in for %.1f of the last %.1f s, in %d windows: calls in between were not seen, and "+
		"what was in use when a window ended is of the kind %q, as whether it was freed since is not known",
		told.In.Seconds(), told.Of.Seconds(), told.Count, profile.KindUnfollowed))
}
