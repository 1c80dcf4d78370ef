package scenario

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// LuaJIT's entries are probed until the worker's VM is known: a trap for each request would be dear. Stacks through compiled
// code are whole all the same, before and after.
func TestTheProbesOnLuaJITGoOutOnceItsVMIsKnown(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	load(t, s, Load{Requests: 500, Concurrency: 8}) // LuaJIT compiles
	worker := s.Workers()[0]
	tr := live.Trace(t, worker, "--mode", "exact", "--json")
	all := live.Breakpoints(t, worker)
	load(t, s, Load{Requests: 211, Concurrency: 8})
	for end := time.Now().Add(time.Minute); live.Breakpoints(t, worker) >= all; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("all %d probes are still in", all)
		}
	}
	load(t, s, Load{Requests: 1009, Concurrency: 8})
	r := tr.Stop(t)
	var doc struct {
		Complete *float64 `json:"stacks_complete"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Complete == nil || *doc.Complete != 1 {
		t.Errorf("complete stacks: %v, want all", doc.Complete)
	}
	if got := live.Sum(r.Profile, "malloc", "session_new").InUseObjects; got == 0 {
		t.Error("no session is in the profile")
	}
}

func TestGrowthPutsNoProbeIntoTheTarget(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	worker := s.Workers()[0]
	tr := live.Trace(t, worker, "--mode", "growth")
	load(t, s, Load{Requests: 2003, Concurrency: 8})
	if n := live.Breakpoints(t, worker); n != 0 {
		t.Errorf("%d probes are in", n)
	}
	tr.Stop(t)
}
