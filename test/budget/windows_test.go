package budget

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// Targets that do nothing but allocate, far above the budget even under sampling: the probes go out and come back. Every
// block is taken (an interval of one byte), so that the figures are exact for what was seen.
func TestProbesAreInForWindowsAndWhatTheyCannotFollowIsSetApart(t *testing.T) {
	live.RequireBPF(t)
	target := live.Start(t, live.CompileC(t, "testdata/windows.c"))
	target.Expect(t, "ready")
	tr := live.Trace(t, target.PID, "--json", "--max-overhead", "30%", "--sample-bytes", "1", "--check-every", "300ms")
	target.Send(t, "go")
	var child int
	for range 2 {
		var who string
		var pid int
		if _, err := fmt.Sscan(target.Line(t), &who, &pid); err != nil {
			t.Fatal(err)
		}
		if who == "child" {
			child = pid
		}
	}
	for range 2 {
		until(t, "the probes are out", func() bool { return !live.Probed(t, target.PID) })
		until(t, "the probes are in", func() bool { return live.Probed(t, target.PID) && live.Probed(t, child) })
	}
	target.Send(t, "stop")
	var parents, childs int64
	if _, err := fmt.Sscanf(target.Line(t), "leaked %d %d", &parents, &childs); err != nil {
		t.Fatal(err)
	}
	r := tr.Stop(t)
	s := readSummary(t, r)
	if len(s.Losses) != 0 {
		t.Errorf("losses: %+v", s.Losses)
	}
	for _, want := range []string{"sampling from now on", "probes out", "window 1: the probes are in", "window 1: the probes go out again", "window 2: the probes are in"} {
		if !strings.Contains(text(s), want) {
			t.Errorf("the log does not say %q:\n%s", want, text(s))
		}
	}
	for _, tt := range []struct {
		pid    int
		leaked int64
	}{{target.PID, parents}, {child, childs}} {
		own := live.OfProcess(r.Profile, tt.pid)
		followed, left := live.Sum(own, "malloc", "leak"), live.Sum(own, "unfollowed", "leak")
		if followed.AllocObjects != followed.InUseObjects || left.AllocObjects != left.InUseObjects {
			t.Errorf("process %d frees what it leaks: %+v, %+v", tt.pid, followed, left)
		}
		if left.InUseObjects == 0 || followed.InUseObjects+left.InUseObjects > tt.leaked {
			t.Errorf("process %d: %d blocks in use and %d unfollowed, of %d leaked", tt.pid, followed.InUseObjects, left.InUseObjects, tt.leaked)
		}
		if left.InUseBytes != 1009*left.InUseObjects {
			t.Errorf("process %d: unfollowed are %d bytes in %d blocks of 1009", tt.pid, left.InUseBytes, left.InUseObjects)
		}
		// At most the block of the moment is in use when a window ends.
		churned, left := live.Sum(own, "malloc", "churn"), live.Sum(own, "unfollowed", "churn")
		if churned.AllocObjects == 0 || churned.InUseObjects > 1 || left.InUseObjects > 20 {
			t.Errorf("process %d: churn is %+v, unfollowed of it %+v", tt.pid, churned, left)
		}
	}
	target.Send(t, "end")
	if err := target.Wait(t); err != nil {
		t.Error(err)
	}
	if strings.Contains(r.Stdout, `"class": "leaking"`) {
		t.Error("there is a verdict on calls that were seen for part of the time")
	}
}

// until waits for a state that comes by itself; only the test's own deadline ends it.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}
