// Package verdict runs labelled programs under the real tracer and checks what allocsnoop says of each.
package verdict

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// labels are the programs of testdata/programs.c, and the class that each of their functions must get.
var labels = []struct {
	program string
	want    map[string]profile.Class
}{
	{"leak", map[string]profile.Class{"leak_block": profile.Leaking}},
	{"slow_leak", map[string]profile.Class{"busy_request": profile.Churn, "busy_context": profile.Leaking}},
	{"lru", map[string]profile.Class{"lru_put": profile.SteadyCache}},
	{"filling", map[string]profile.Class{"filling_put": profile.SteadyCache}},
	{"warm_up", map[string]profile.Class{"warm_config": profile.SteadyCache, "warm_request": profile.Churn}},
	{"saw_tooth", map[string]profile.Class{"batch_row": profile.Churn}},
	{"pool", map[string]profile.Class{"pool_grow": profile.SteadyCache}},
	{"fragmentation", map[string]profile.Class{"chunk_make": profile.SteadyCache}},
	{"thread_growth", map[string]profile.Class{"thread_spawn": profile.Leaking}},
	{"mmap_leak", map[string]profile.Class{"map_more": profile.Leaking}},
	{"realloc_growth", map[string]profile.Class{"append_row": profile.Growing}},
	{"freed_at_exit", map[string]profile.Class{"table_entry": profile.Churn}},
}

// All programs at once, traced by one allocsnoop. VERDICT_RUNS=10 is the measurement of docs/benchmarks.md.
func TestLabelledProgramsGetTheirVerdict(t *testing.T) {
	runs, _ := strconv.Atoi(os.Getenv("VERDICT_RUNS"))
	program := live.CompileC(t, "testdata/programs.c")
	for i := range max(runs, 1) {
		t.Run(fmt.Sprintf("run %d", i+1), func(t *testing.T) { oneRun(t, program) })
	}
}

func oneRun(t *testing.T, program string) {
	var targets []*live.Process
	args := []string{"--mode", "exact", "--json"}
	for _, l := range labels {
		p := live.Start(t, program, l.program)
		p.Expect(t, "ready")
		targets = append(targets, p)
		args = append(args, "--pid", strconv.Itoa(p.PID))
	}
	tracer := live.TraceArgs(t, args...)
	for _, p := range targets {
		p.Send(t, "go")
	}
	// 20 s of the programs' own time: on a busy machine they are late.
	for i, p := range targets {
		p.Expect(t, "tick 800")
		if labels[i].program != "freed_at_exit" {
			p.Expect(t, "tick 2000")
		}
	}
	result := tracer.Stop(t)
	if result.ExitCode != 0 && result.ExitCode != 130 {
		t.Fatalf("exit code %d: %s", result.ExitCode, result.Stderr)
	}
	snapshot := live.ReadSnapshot(t, result.Path)
	t.Logf("traced for %s", snapshot.Duration())
	verdicts := profile.Judge(snapshot)
	for _, l := range labels {
		for function, want := range l.want {
			checkVerdict(t, verdicts, l.program, function, want)
		}
	}
	for _, v := range verdicts {
		if v.Class == profile.Leaking && !leaks(v.Owner.Function) {
			t.Errorf("%s is called a leak: %s", v.Owner, v.Evidence)
		}
	}
}

// checkVerdict wants the class for the function's largest verdict.
func checkVerdict(t *testing.T, verdicts []profile.Verdict, program, function string, want profile.Class) {
	t.Helper()
	var got *profile.Verdict
	for i := range verdicts {
		v := &verdicts[i]
		if v.Owner.Function == function && (got == nil || v.AllocBytes > got.AllocBytes) {
			got = v
		}
	}
	if got == nil {
		t.Errorf("%s: no verdict on %s", program, function)
		return
	}
	t.Logf("%-14s %-13s %-12s confidence %.2f, %s", program, function, got.Class, got.Confidence, got.Evidence)
	if got.Class != want {
		t.Errorf("%s: %s is %s, want %s (%s)", program, function, got.Class, want, got.Evidence)
	}
}

func leaks(function string) bool {
	for _, l := range labels {
		if l.want[function] == profile.Leaking {
			return true
		}
	}
	return false
}

// The books close against the resident memory within 5 % of its change. What they put down to the allocator itself is no
// rest that would close any books: glibc's own lists, walked while the program stands still, say the same.
func TestReconciliationCloses(t *testing.T) {
	program := live.CompileC(t, "testdata/programs.c")
	for _, name := range []string{"leak", "fragmentation", "mmap_leak", "thread_growth"} {
		t.Run(name, func(t *testing.T) {
			p := live.Start(t, program, name)
			p.Expect(t, "ready")
			before := chunks(t, p.PID)
			tracer := live.Trace(t, p.PID, "--mode", "exact")
			p.Send(t, "go")
			p.Expect(t, "tick 800")
			if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			result := tracer.Stop(t)
			after := chunks(t, p.PID)
			snapshot := live.ReadSnapshot(t, result.Path)
			r := profile.Reconcile(snapshot)
			if r == nil {
				t.Fatalf("no resident memory in the profile: %s", result.Stderr)
			}
			t.Log(r)
			// Pages that the allocator's first call touches are what a small change may be off by.
			limit := max(r.Change/20, 32<<10)
			if off := r.Unexplained; off > limit || off < -limit {
				t.Errorf("%d of %d bytes unexplained", off, r.Change)
			}
			var inUse int64
			for _, s := range snapshot.Stacks {
				if s.Kind == profile.KindMalloc {
					inUse += s.InUseBytes()
				}
			}
			said, walked := part(r, "allocator slack and free chunks"), after-before-inUse
			t.Logf("slack and free chunks: %d by the books, %d by glibc's own lists", said, walked)
			if off := said - walked; off > limit || off < -limit {
				t.Errorf("slack and free chunks are %d bytes, glibc's lists say %d", said, walked)
			}
			if !strings.Contains(result.Stdout, "RSS (resident memory) ") {
				t.Error("the summary has no RSS line")
			}
		})
	}
}

// chunks is what glibc has of the kernel for blocks, in use or free, without the never used end of each arena.
func chunks(t *testing.T, pid int) int64 {
	t.Helper()
	image, err := memory.OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer image.Close()
	h, err := heap.Walk(t.Context(), heap.NewSpace(image))
	if errors.Is(err, heap.ErrNoAllocator) {
		return 0 // it has not allocated yet
	}
	if err != nil {
		t.Fatal(err)
	}
	sum := h.Total()
	return int64(sum.InUse.Bytes + sum.Tcache.Bytes + sum.Fast.Bytes + sum.Free.Bytes + h.Mmapped.Bytes)
}

func part(r *profile.Reconciliation, name string) int64 {
	for _, p := range r.Parts {
		if p.Name == name {
			return p.Bytes
		}
	}
	return 0
}

// A program that ends while it is traced is judged by what it did until then.
func TestTraceThatEndsWithItsTarget(t *testing.T) {
	p := live.Start(t, live.CompileC(t, "testdata/programs.c"), "freed_at_exit")
	p.Expect(t, "ready")
	tracer := live.Trace(t, p.PID, "--mode", "exact")
	p.Send(t, "go")
	result := tracer.Wait(t)
	if _, err := os.Stat(filepath.Clean(result.Path)); err != nil {
		t.Fatal(err)
	}
	checkVerdict(t, profile.Judge(live.ReadSnapshot(t, result.Path)), "freed_at_exit", "table_entry", profile.Churn)
}
