package exact

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// busy takes every CPU twice and puts the tracer behind, so that its readers hardly get one, until the function that it
// returns is called.
func busy(t *testing.T, tr *live.Tracer) (quiet func()) {
	t.Helper()
	path := live.CompileC(t, "testdata/spin.c")
	prioritize(t, tr, 19)
	var spinners []*live.Process
	for range 2 * runtime.NumCPU() {
		spinners = append(spinners, live.Start(t, path))
	}
	return func() {
		for _, p := range spinners {
			p.Kill()
		}
		prioritize(t, tr, 0)
	}
}

// prioritize sets the nice value of all threads of allocsnoop.
func prioritize(t *testing.T, tr *live.Tracer, nice int) {
	t.Helper()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", tr.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		tid, _ := strconv.Atoi(thread.Name())
		if err := syscall.Setpriority(syscall.PRIO_PROCESS, tid, nice); err != nil {
			t.Fatal(err)
		}
	}
}

// endOf lets the target end by itself, which ends the trace.
func endOf(t *testing.T, p *live.Process, tr *live.Tracer) *live.Result {
	t.Helper()
	if err := p.Wait(t); err != nil {
		t.Fatalf("target: %v", err)
	}
	result := tr.Wait(t)
	if result.Profile == nil {
		t.Fatalf("exit code %d and no profile\nstderr: %s", result.ExitCode, result.Stderr)
	}
	return result
}

// lost sums up what allocsnoop says is missing, by the names of its counters.
func lost(t *testing.T, result *live.Result) map[string]int64 {
	t.Helper()
	lost := map[string]int64{}
	for _, l := range summary(t, result).Losses {
		if l.Name != "pending_stale" {
			lost[l.Name] = int64(l.Count)
		}
	}
	want := 0
	if len(lost) > 0 {
		want = 3
	}
	if result.ExitCode != want {
		t.Errorf("exit code %d, want %d: %v\nstderr: %s", result.ExitCode, want, lost, result.Stderr)
	}
	return lost
}

// Both CPUs taken twice, and the tracer gets what is left. Counting happens in the kernel, so that nothing may be missing
// but what is said to be.
func TestBooksWithNoCPULeft(t *testing.T) {
	for _, a := range allocators {
		if a.name != "glibc" && a.name != "jemalloc" && !everything() {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			p := a.start(t, a.compileRandom(t), "3", "8")
			p.Send(t, "run 20000")
			p.Expect(t, "did")
			tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
			quiet := busy(t, tr)
			p.Send(t, "attached")
			p.Expect(t, "did")
			books := run(t, p, operations()/5)
			quiet()
			result := endOf(t, p, tr)
			if lost := lost(t, result); len(lost) > 0 {
				t.Logf("allocsnoop says it lost: %v", lost)
				return
			}
			a.compareBooks(t, result.Profile, books)
		})
	}
}

// More blocks than the map holds, more stacks than there are rows: what is not in the books is counted, to the block.
func TestWhatDoesNotFitIsCounted(t *testing.T) {
	for _, tt := range []struct {
		name  string
		args  []string
		count string
	}{
		{"too many blocks", []string{"--max-live", "1000"}, "live_full"},
		{"too many stacks", []string{"--max-stacks", "150"}, "stacks_full"},
		{"too many of both", []string{"--max-live", "1000", "--max-stacks", "150"}, "live_full"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, a := range allocators {
				if a.name != "glibc" && !a.tableless() {
					continue
				}
				t.Run(a.name, func(t *testing.T) {
					p := a.start(t, a.compileRandom(t), "5", "8")
					tr := live.Trace(t, p.PID, append(tt.args, "--mode", "exact", "--json")...)
					quiet := busy(t, tr)
					for _, line := range []string{"alone", "attached", "run 20000"} {
						p.Send(t, line)
						p.Expect(t, "did")
					}
					p.Send(t, "ledger")
					rows := ledger(t, p)
					quiet()
					result := endOf(t, p, tr)
					counted := lost(t, result)
					if counted[tt.count] == 0 {
						t.Errorf("%s is not counted: %v", tt.count, counted)
					}
					a.compareMissing(t, result, rows, counted["live_full"]+counted["stacks_full"])
				})
			}
		})
	}
}

// compareMissing checks that no site has more than it made, and that what is missing is what was counted. A block that is
// not in the books is unknown to realloc, which then counts it as one from before the attach.
func (a allocator) compareMissing(t *testing.T, result *live.Result, rows []row, counted int64) {
	t.Helper()
	counted += int64(summary(t, result).PreAttach.Reallocs)
	missing := int64(0)
	for _, r := range rows {
		if r.Kind != "malloc" {
			continue
		}
		got := live.Sum(result.Profile, r.Kind, r.Site)
		if got.AllocObjects > r.AllocObjects || got.AllocBytes > r.AllocBytes || got.InUseObjects < 0 || got.InUseBytes < 0 {
			t.Errorf("%s: the profile has %+v, the program did %+v", r.Site, got, r.book())
		}
		missing += r.AllocObjects - got.AllocObjects
	}
	if missing > counted {
		t.Errorf("%d blocks are missing, %d are said to be", missing, counted)
	}
	// Nothing else allocates in a static program; elsewhere threads have blocks of their own. What a realloc that failed
	// could not put back, as its room was taken meanwhile, is counted too.
	if a.tableless() && counted > missing+missing/100 {
		t.Errorf("%d blocks are missing, %d are said to be", missing, counted)
	}
}

// The tracer is stopped while the target makes more stacks than the ring buffer holds. The books are in the kernel and
// stay whole; stacks that are not seen again have no frames, and are counted.
func TestReaderThatStandsStill(t *testing.T) {
	a := allocators[0]
	p := a.start(t, a.compile(t, "stacks.c"), "32768", "15")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
	signal(t, tr, syscall.SIGSTOP)
	p.Send(t, "go")
	rows := ledger(t, p)
	signal(t, tr, syscall.SIGCONT)
	result := endOf(t, p, tr)
	counted := lost(t, result)
	if counted["stack_lost"] == 0 {
		t.Errorf("no stack was lost, the test proves nothing: %v", counted)
	}
	seen := int64(countStacks(result.Profile, "site_stacks"))
	if seen+counted["stack_lost"] != 32768 {
		t.Errorf("%d stacks have frames, %d are said to have none, want 32768 in all", seen, counted["stack_lost"])
	}
	all := live.Sum(result.Profile, "malloc")
	if want := rows[0].book(); all.AllocObjects < want.AllocObjects || all.AllocBytes < want.AllocBytes || all.InUseBytes < want.InUseBytes {
		t.Errorf("all stacks have %+v, want %+v at least", all, want)
	}
}

// More mappings than the ring buffer holds.
func TestMappingsWhileTheReaderStandsStill(t *testing.T) {
	a := allocators[0]
	p := a.start(t, a.compile(t, "situations.c", a.cxx()...), "mapstorm")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
	signal(t, tr, syscall.SIGSTOP)
	p.Send(t, "go")
	rows := ledger(t, p)
	signal(t, tr, syscall.SIGCONT)
	result := endOf(t, p, tr)
	counted := lost(t, result)
	if counted["map_gap"] == 0 {
		t.Errorf("no mapping was lost, the test proves nothing: %v", counted)
	}
	for _, r := range rows {
		if r.Kind == "malloc" {
			compareRow(t, result.Profile, r)
		}
	}
}

func signal(t *testing.T, tr *live.Tracer, s syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(tr.PID(), s); err != nil {
		t.Fatal(err)
	}
}

// The probes go out one by one, in any order: a call whose return is no longer seen was not left by longjmp.
func TestCallsUnderWayAtTheEndAreNoLoss(t *testing.T) {
	p := live.Start(t, live.CompileC(t, "testdata/calls.c"))
	for range 3 {
		tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
		requireLossless(t, tr.Stop(t))
	}
}
