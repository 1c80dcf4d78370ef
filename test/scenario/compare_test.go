package scenario

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// printed is what allocsnoop says to a person.
func printed(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(live.Allocsnoop(t), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("allocsnoop %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// The story of the README: the pod runs an old build. Every step that finds it, on profiles taken from one service before
// and after the upgrade of its library.
func TestOldBuildAgainstNewBuild(t *testing.T) {
	live.RequireBPF(t)
	const requests = 1009
	s := start(t, Options{Build: Old, Workers: 1})
	counted, old := traceLoad(t, s, Load{Requests: requests, Concurrency: 8, FirstUID: 1000})
	if err := s.Install(New); err != nil {
		t.Fatal(err)
	}
	if err := s.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, new := traceLoad(t, s, Load{Requests: requests, Concurrency: 8, FirstUID: 1000})

	t.Run("libs diff names the one library with both builds", func(t *testing.T) {
		var doc struct {
			Libraries []struct {
				Name     string
				Old, New *struct {
					BuildID string `json:"build_id"`
					Version string
				}
			}
		}
		allocsnoop(t, &doc, "libs", "diff", old.Path, new.Path, "--json")
		if len(doc.Libraries) != 1 || doc.Libraries[0].Old == nil || doc.Libraries[0].New == nil {
			t.Fatalf("libraries are %+v", doc.Libraries)
		}
		l := doc.Libraries[0]
		if l.Name != "libencrypt.so" || len(l.Old.BuildID) != 40 || len(l.New.BuildID) != 40 || l.Old.BuildID == l.New.BuildID {
			t.Errorf("%s has the builds %+v and %+v", l.Name, l.Old, l.New)
		}
		text := printed(t, "libs", "diff", old.Path, new.Path)
		for _, want := range []string{"libencrypt.so", l.Old.BuildID, l.New.BuildID, "1.4.2", "1.4.3"} {
			if !strings.Contains(text, want) {
				t.Errorf("no %q in\n%s", want, text)
			}
		}
	})
	t.Run("diff has the leaking function first, with its bytes for each request", func(t *testing.T) {
		var doc struct {
			Differences []struct {
				Owner   struct{ Function, File string }
				Bytes   float64 `json:"difference_bytes"`
				PerUnit float64 `json:"difference_bytes_per_unit"`
				Rebuilt bool    `json:"library_changed_build"`
			}
		}
		allocsnoop(t, &doc, "diff", old.Path, new.Path, "--per", strconv.Itoa(requests), "--json")
		if len(doc.Differences) == 0 {
			t.Fatal("no difference")
		}
		got, want := doc.Differences[0], -float64(counted.Bytes)/requests
		if got.Owner.Function != "session_new" || !got.Rebuilt || math.Abs(got.PerUnit-want) > 0.001*-want {
			t.Errorf("first is %+v, want session_new with %.1f bytes a request", got, want)
		}
		text := printed(t, "diff", old.Path, new.Path)
		if at := strings.Index(text, "session_new"); at < 0 || strings.Index(text, "libencrypt.so") > at {
			t.Errorf("the library is not named before the function:\n%s", text)
		}
	})
	t.Run("go tool pprof -diff_base has the same sign and size", func(t *testing.T) {
		cmd := exec.Command("go", "tool", "pprof", "-top", "-cum", "-unit=B", "-diff_base", old.Path, new.Path)
		cmd.Env = append(os.Environ(), "PPROF_TMPDIR="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			if fields := strings.Fields(line); len(fields) > 5 && fields[len(fields)-1] == "session_new" {
				if want := fmt.Sprintf("-%dB", counted.Bytes); fields[3] != want {
					t.Errorf("pprof says %s, want %s", fields[3], want)
				}
				return
			}
		}
		t.Errorf("no session_new in\n%s", out)
	})
}

// The build that frees everything, against itself: at the same load, at half of it, for half the time, and against
// another process. COMPARE_RUNS=20 is the measurement of docs/benchmarks.md, in runs of the length that a person traces.
func TestNewBuildAgainstItselfShowsNoDifference(t *testing.T) {
	live.RequireBPF(t)
	runs, length := 1, 4*time.Second
	if n, _ := strconv.Atoi(os.Getenv("COMPARE_RUNS")); n > 0 {
		runs, length = n, 10*time.Second
	}
	const rate = 200
	var earlier *profile.Snapshot
	for i := range runs {
		t.Run(fmt.Sprintf("run %d", i+1), func(t *testing.T) {
			s := start(t, Options{Build: New, Workers: 1})
			load(t, s, Load{Requests: 500, Concurrency: 8})
			base := traceFor(t, s, length, rate)
			for _, tt := range []struct {
				name   string
				length time.Duration
				rate   int
			}{{"the same load", length, rate}, {"half the load", length, rate / 2}, {"half the time", length / 2, rate}} {
				other := traceFor(t, s, tt.length, tt.rate)
				wantSame(t, tt.name, base, other)
				wantSame(t, tt.name+", the other way", other, base)
			}
			if earlier != nil {
				wantSame(t, "another process", earlier, base)
			}
			earlier = base
		})
	}
}

// traceFor traces the worker under a steady load.
func traceFor(t *testing.T, s *Service, length time.Duration, rate int) *profile.Snapshot {
	t.Helper()
	pid := s.Workers()[0]
	tr := live.Trace(t, pid, "--mode", "exact")
	load(t, s, Load{Duration: length, Rate: rate, Concurrency: 8})
	return live.ReadSnapshot(t, tr.Stop(t).Path)
}

func wantSame(t *testing.T, name string, old, new *profile.Snapshot) {
	t.Helper()
	d := profile.Compare(old, new, profile.Per{})
	for _, r := range d.Rows {
		t.Errorf("%s: %s %+.0f beyond ± %.0f (scale %.3f, old %d in %d blocks, new %d in %d, expected %.0f)",
			name, r.Owner, r.Difference, r.Noise, d.Scale, r.Old, r.OldBlocks, r.New, r.NewBlocks, r.Expected)
	}
}

// The worker's resident memory is explained by the books within 5 % of its change, and what they leave to the allocator is
// what glibc's own lists hold.
func TestReconciliationOfNginxCloses(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	load(t, s, Load{Requests: 500, Concurrency: 8})
	pid := s.Workers()[0]
	tr := live.Trace(t, pid, "--mode", "exact")
	before := chunks(t, pid)
	load(t, s, Load{Requests: 5003, Concurrency: 8, FirstUID: 1000})
	after := chunks(t, pid)
	result := tr.Stop(t)
	snapshot := live.ReadSnapshot(t, result.Path)
	r := profile.Reconcile(snapshot)
	if r == nil {
		t.Fatalf("no resident memory in the profile: %s", result.Stderr)
	}
	t.Log(r)
	limit := r.Change / 20
	if r.Change < 3<<20 || r.Unexplained > limit || r.Unexplained < -limit {
		t.Errorf("%d of %d bytes unexplained", r.Unexplained, r.Change)
	}
	var inUse, said int64
	for _, st := range snapshot.Stacks {
		if st.Kind == profile.KindMalloc {
			inUse += st.InUseBytes()
		}
	}
	for _, p := range r.Parts {
		if p.Name == "allocator slack and free chunks" {
			said = p.Bytes
		}
	}
	t.Logf("slack and free chunks: %d by the books, %d by glibc's own lists", said, after-before-inUse)
	if off := said - (after - before - inUse); off > limit || off < -limit {
		t.Errorf("slack and free chunks are %d bytes, glibc's lists say %d", said, after-before-inUse)
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
	if err != nil {
		t.Fatal(err)
	}
	sum := h.Total()
	return int64(sum.InUse.Bytes + sum.Tcache.Bytes + sum.Fast.Bytes + sum.Free.Bytes + h.Mmapped.Bytes)
}
