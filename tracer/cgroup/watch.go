package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// EventKind says what happened to a watched group.
type EventKind int

// What a Watcher reports.
const (
	// Crossed: the working set passed a threshold from below. It is reported again only after it was clearly below.
	Crossed EventKind = iota + 1
	// Killed: the OOM killer took processes of the group or of one below it.
	Killed
	// Removed: the group does not exist any more. It is the last event.
	Removed
)

// String is the kind as a word.
func (k EventKind) String() string {
	switch k {
	case Crossed:
		return "crossed"
	case Killed:
		return "killed"
	case Removed:
		return "removed"
	}
	return "event " + strconv.Itoa(int(k))
}

// Event is one report.
type Event struct {
	Kind      EventKind
	Time      time.Time
	Threshold float64 // Crossed: the share that was passed; the highest when several were at once
	Kills     uint64  // Killed: how many since the last report
	// Limited is the group nearest to its limit, the watched one or an ancestor, and Usage its figures at that moment (of
	// Killed, without statistics). When a kill is seen its victim's memory may be gone already: Peak is the highest usage
	// seen since the last kill.
	Limited Group
	Usage   Usage
	Peak    uint64
}

// WatchOptions say what to report.
type WatchOptions struct {
	// At are the shares of the limit, within (0, 1], at which Crossed is reported. None are needed to see kills.
	At []float64
	// Poll is the pause between readings far from any threshold; 0 is 100 ms. Near one it is a fifth of that.
	Poll time.Duration
}

// rearmGap is how far below a threshold the working set must fall until the threshold counts again.
const rearmGap = 0.02

// ParseShares reads a list like "80%,90%" or "0.8" in ascending order.
func ParseShares(text string) ([]float64, error) {
	var shares []float64
	for field := range strings.SplitSeq(text, ",") {
		share, err := parseShare(strings.TrimSpace(field))
		if err != nil {
			return nil, err
		}
		shares = append(shares, share)
	}
	slices.Sort(shares)
	return slices.Compact(shares), nil
}

func parseShare(field string) (float64, error) {
	number, percent := strings.CutSuffix(field, "%")
	v, err := strconv.ParseFloat(number, 64)
	if percent {
		v /= 100
	}
	// Written so that NaN fails too.
	if err != nil || !(v > 0 && v <= 1) {
		return 0, fmt.Errorf("%q is no share of a limit: write a percentage above 0%% up to 100%%, such as 90%%", field)
	}
	return v, nil
}

// Watch reports what happens to a group until the context ends or the group is gone; then the channel is closed. Kills
// from before the call are not reported.
func (g Group) Watch(ctx context.Context, opts WatchOptions) (<-chan Event, error) {
	w := &watcher{group: g, opts: opts, events: make(chan Event, 16), wake: make(chan struct{}, 1)}
	if w.opts.Poll <= 0 {
		w.opts.Poll = 100 * time.Millisecond
	}
	w.fired = make([]bool, len(opts.At))
	if !slices.IsSorted(opts.At) {
		return nil, errors.New("watch: thresholds must ascend")
	}
	var err error
	if w.kills, _, err = g.Kills(); err != nil {
		return nil, err
	}
	if _, _, err := g.Tightest(); err != nil {
		return nil, err
	}
	w.listen()
	go w.run(ctx)
	return w.events, nil
}

type watcher struct {
	group  Group
	opts   WatchOptions
	events chan Event
	wake   chan struct{}
	files  []*os.File

	fired     []bool // by threshold
	kills     uint64
	nextKills time.Time // when counting kills may be paid for again
	peak      uint64
}

func (w *watcher) run(ctx context.Context) {
	defer close(w.events)
	defer w.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		woken := false
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-w.wake:
			woken = true
		}
		pause, err := w.look(ctx, woken)
		if err != nil {
			w.send(ctx, Event{Kind: Removed, Limited: w.group, Peak: w.peak})
			return
		}
		timer.Reset(pause)
	}
}

// look reads the group once, reports, and says when to look again. An error means that the group is gone.
func (w *watcher) look(ctx context.Context, woken bool) (time.Duration, error) {
	limited, usage, err := w.usage()
	if err != nil {
		return 0, err
	}
	w.peak = max(w.peak, usage.Current)
	if e, ok := w.crossed(usage.Share()); ok {
		e.Limited, e.Usage, e.Peak = limited, usage, w.peak
		w.send(ctx, e)
	}
	now := time.Now()
	if woken || !now.Before(w.nextKills) {
		kills, _, err := w.group.Kills()
		if err != nil {
			return 0, err
		}
		// On v1 this walks every group below: never spend more than a fiftieth of the time on it.
		w.nextKills = now.Add(50 * time.Since(now))
		w.reportKills(ctx, kills, Event{Limited: limited, Usage: usage})
	}
	return w.pause(usage.Share()), nil
}

// usage is Tightest, but does not read statistics, the dear part, while even with page cache usage is below every
// threshold.
func (w *watcher) usage() (Group, Usage, error) {
	var best Group
	var bestUsage Usage
	for _, a := range w.group.Ancestors() {
		u, err := a.brief()
		if errors.Is(err, os.ErrNotExist) && a.Dir != w.group.Dir {
			continue
		}
		if err != nil {
			return best, u, err
		}
		if best.Dir == "" || u.Share() > bestUsage.Share() {
			best, bestUsage = a, u
		}
	}
	if len(w.opts.At) > 0 && bestUsage.Share() >= w.opts.At[0] {
		return w.group.Tightest()
	}
	return best, bestUsage, nil
}

func (w *watcher) reportKills(ctx context.Context, kills uint64, e Event) {
	before := w.kills
	w.kills = kills
	// Fewer than before: on v1 a group below, with its count, was removed.
	if kills <= before {
		return
	}
	e.Kind, e.Kills, e.Peak = Killed, kills-before, w.peak
	w.peak = 0
	w.send(ctx, e)
}

// crossed is the report for the highest threshold that share has newly passed.
func (w *watcher) crossed(share float64) (Event, bool) {
	var e Event
	for i, at := range w.opts.At {
		switch {
		case share >= at && !w.fired[i]:
			w.fired[i] = true
			e = Event{Kind: Crossed, Threshold: at}
		case share < at-rearmGap:
			w.fired[i] = false
		}
	}
	return e, e.Kind != 0
}

// pause is short while the next threshold is near.
func (w *watcher) pause(share float64) time.Duration {
	const near = 0.15
	for _, at := range w.opts.At {
		if share < at && share > at-near {
			return w.opts.Poll / 5
		}
	}
	return w.opts.Poll
}

func (w *watcher) send(ctx context.Context, e Event) {
	e.Time = time.Now()
	select {
	case w.events <- e:
	case <-ctx.Done():
	}
}

// listen asks the kernel to say when to look, which is faster than the next poll. Where it cannot be had (v1 events on a
// real-time kernel, an inotify limit), polling alone remains.
func (w *watcher) listen() {
	if w.group.V2 {
		w.listenV2()
		return
	}
	w.listenV1(w.group, "memory.oom_control", "")
	for _, g := range w.group.Ancestors() {
		limit, err := g.Limit()
		if err != nil || limit == NoLimit {
			continue
		}
		for _, at := range w.opts.At {
			w.listenV1(g, "memory.usage_in_bytes", strconv.FormatUint(uint64(at*float64(limit)), 10))
		}
	}
}

// listenV2 watches memory.events, which the kernel touches at each count, of groups below too.
func (w *watcher) listenV2() {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, filepath.Join(w.group.Dir, "memory.events"), unix.IN_MODIFY); err != nil {
		f.Close()
		return
	}
	w.wait(f, 4096)
}

// listenV1 connects an eventfd with a file of the group through cgroup.event_control.
func (w *watcher) listenV1(g Group, file, arg string) {
	source, err := os.Open(filepath.Join(g.Dir, file))
	if err != nil {
		return
	}
	defer source.Close() // needed for the registration only
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "eventfd")
	line := fmt.Sprintf("%d %d %s", fd, source.Fd(), arg)
	if err := os.WriteFile(filepath.Join(g.Dir, "cgroup.event_control"), []byte(line), 0); err != nil {
		f.Close()
		return
	}
	w.wait(f, 8)
}

// wait wakes the watcher at each message of f, until f is closed.
func (w *watcher) wait(f *os.File, size int) {
	w.files = append(w.files, f)
	go func() {
		buf := make([]byte, size)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			select {
			case w.wake <- struct{}{}:
			default: // it is going to look anyway
			}
		}
	}()
}

func (w *watcher) close() {
	for _, f := range w.files {
		f.Close()
	}
}
