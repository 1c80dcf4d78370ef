package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer"
	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/target"
)

// service follows the processes that a selector means while they come and go. Forks, execs and exits of members are the
// tracer's own business; this finds those that join from outside.
type service struct {
	watcher *target.Watcher
	execs   chan int
}

func newService() *service { return &service{execs: make(chan int, 4096)} }

// execed takes the tracer's word that a process that is no member runs another program. It never waits: what does not fit
// is found by the next look at /proc.
func (s *service) execed(pid int) {
	select {
	case s.execs <- pid:
	default:
	}
}

// follow adds processes to the tracer as they join, until the context ends.
func (s *service) follow(ctx context.Context, finder *target.Finder, t *tracer.Tracer, noChildren bool, warn func(string)) {
	s.watcher = target.NewWatcher(finder, target.Options{NoChildren: noChildren}, func(c target.Change) {
		if c.Kind != target.Joined || target.Check(memory.FS{}, c.Process.PID) != nil {
			return
		}
		if err := t.Add(c.Process.PID); err != nil && !errors.Is(err, memory.ErrGone) {
			warn(fmt.Sprintf("process %s joined (%s) and is not traced: %v", c.Process.String(), c.Why, err))
		}
	})
	go s.watcher.Run(ctx)
	for {
		select {
		case <-ctx.Done():
			return
		case pid := <-s.execs:
			s.watcher.Exec(pid)
		}
	}
}

// watchGroups reports what happens to the memory of the selector's control groups.
func watchGroups(ctx context.Context, groups []cgroup.Group, at []float64) (<-chan cgroup.Event, error) {
	events := make(chan cgroup.Event)
	for _, g := range groups {
		from, err := g.Watch(ctx, cgroup.WatchOptions{At: at})
		if err != nil {
			return nil, fmt.Errorf("watch control group %s: %w", g.Path, err)
		}
		go func() {
			for e := range from {
				select {
				case events <- e:
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	return events, nil
}

// unlimited names a group that no limit can stop, neither its own nor one above; empty when all have one.
func unlimited(groups []cgroup.Group) string {
	for _, g := range groups {
		if _, usage, err := g.Tightest(); err == nil && usage.Limit == cgroup.NoLimit {
			return profile.Sanitize(g.Path)
		}
	}
	return ""
}

// describe is a line for the profile's log.
func describe(e cgroup.Event) string {
	limit := "no limit"
	if e.Usage.Limit != cgroup.NoLimit {
		limit = "limit " + profile.FormatBytes(e.Usage.Limit)
	}
	group := profile.Sanitize(e.Limited.Path)
	switch e.Kind {
	case cgroup.Crossed:
		return fmt.Sprintf("control group %s passed %.0f %% of its %s: usage %s", group, 100*e.Threshold, limit, profile.FormatBytes(e.Usage.Current))
	case cgroup.Killed:
		processes := "1 process"
		if e.Kills != 1 {
			processes = fmt.Sprintf("%d processes", e.Kills)
		}
		return fmt.Sprintf("the OOM killer took %s of control group %s: highest usage seen %s, %s", processes, group,
			profile.FormatBytes(max(e.Peak, e.Usage.Current)), limit)
	}
	return fmt.Sprintf("control group %s was removed", group)
}
