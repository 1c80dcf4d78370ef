package scenario

import (
	"encoding/json"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// The heap grows by calls from compiled Lua: those stacks are whole too, without any probe in the target.
func TestGrowthSeesWholeStacksWithoutAProbe(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	load(t, s, Load{Requests: 500, Concurrency: 8}) // LuaJIT compiles
	worker := s.Workers()[0]
	tr := live.Trace(t, worker, "--mode", "growth", "--json")
	load(t, s, Load{Requests: 4001, Concurrency: 8})
	if n := live.Breakpoints(t, worker); n != 0 {
		t.Errorf("%d probes are in", n)
	}
	r := tr.Stop(t)
	var doc struct {
		Complete *float64 `json:"stacks_complete"`
	}
	if err := json.Unmarshal([]byte(r.Stdout), &doc); err != nil {
		t.Fatal(err)
	}
	if doc.Complete == nil || *doc.Complete != 1 {
		t.Errorf("complete stacks: %v, want all\n%s", doc.Complete, r.Stdout)
	}
	if got := live.Sum(r.Profile, "brk", "session_new").InUseBytes + live.Sum(r.Profile, "mmap", "session_new").InUseBytes; got == 0 {
		t.Error("nothing grew through session_new")
	}
}
