package unwindtest

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/scenario"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// TestScenarioStacksEqualTheOracles walks the nginx, LuaJIT and library service under load. eu-stack knows nothing of
// compiled Lua: there, what it found before must be equal, and the rest must reach main.
func TestScenarioStacksEqualTheOracles(t *testing.T) {
	service, err := scenario.Start(t.Context(), scenario.Options{Workers: 1, TLS: true, Gzip: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { service.Close() })
	if _, err := service.Load(t.Context(), 2000, 4); err != nil { // by then the hot Lua is compiled
		t.Fatal(err)
	}
	pid := service.Workers()[0]
	w := newWalker(t, options{})
	s := w.publish(t, pid)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	wg.Go(func() { service.Run(ctx, scenario.Load{Duration: time.Minute, Concurrency: 4}) })
	w.settle(t, &s)
	w.attach(t, w.objs.OnUprobe, pid, libc(t, pid), "malloc")
	w.oracle(t, 60, 11, s)
	w.complete(t, s)
}

// settle waits until the mappings stay the same: LuaJIT turns its code unwritable, and with that executable, again and
// again while it compiles.
func (w *walker) settle(t *testing.T, s **unwind.Space) {
	t.Helper()
	for same := 0; same < 10; same++ {
		time.Sleep(20 * time.Millisecond)
		next, err := w.tables.Refresh(*s)
		if err != nil {
			t.Fatal(err)
		}
		if next != *s {
			w.show(t, next)
			w.tables.Release(*s)
			*s, same = next, 0
		}
	}
}

// untilMark is the part before the first frame that is no address.
func untilMark(e *ProbeEvent) ([]uint64, bool) {
	i := slices.IndexFunc(frames(e), func(f uint64) bool { return f&unwind.FrameMark != 0 })
	if i < 0 {
		return plain(e), false
	}
	return plain(e)[:i], true
}
