package exact

import (
	"slices"
	"strconv"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

// An exception must not meet a return probe: the unwinder of C++ does not know the kernel's trampoline, and the program
// would end in std::terminate. Where the kernel lets the tracer help the unwinder, every block is counted; elsewhere the
// calls that may throw are not followed, and those that could have made a block are counted.
func TestOperatorNewMayThrow(t *testing.T) {
	for _, a := range allocators {
		if a.compiler != "" || !a.throws() { // no C++ library, or nothing to see
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			p := a.start(t, a.compile(t, "throw.cc"))
			tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
			p.Send(t, "go")
			failed, err := strconv.ParseInt(p.Line(t), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			rows := ledger(t, p)
			result := tr.Stop(t)
			if !p.Alive() {
				t.Error("the target ended during the trace")
			}
			live.CheckText(t, p.PID)
			var unseen int64
			for _, loss := range summary(t, result).Losses {
				if loss.Name != "not_followed" {
					t.Errorf("allocsnoop says it lost: %s %d (%s)", loss.Name, loss.Count, loss.Meaning)
				}
				unseen = int64(loss.Count)
			}
			thrown := takeOut(result.Profile, "__cxa_allocate_exception")
			if thrown.AllocObjects != 13+failed || thrown.InUseObjects != 0 {
				t.Errorf("of exceptions the profile has %+v, want %d blocks, all freed", thrown, 13+failed)
			}
			for _, r := range rows {
				if r.Site == "site_limited" && unseen > 0 {
					got := live.Sum(result.Profile, "malloc", r.Site).AllocObjects
					if want := r.AllocObjects + failed - unseen; got != want {
						t.Errorf("%d blocks and %d failures, %d of them not followed; the profile has %d, want %d", r.AllocObjects, failed, unseen, got, want)
					}
					continue
				}
				compareRow(t, result.Profile, r)
			}
		})
	}
}

// The children inherit the probes, and with them the danger.
func TestOperatorNewMayThrowInChildren(t *testing.T) {
	for _, a := range allocators {
		if a.compiler != "" || !a.throws() {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			rows, result := traceGo(t, a.start(t, a.compile(t, "throw_child.cc")))
			requireLossless(t, result)
			takeOut(result.Profile, "__cxa_allocate_exception")
			a.compare(t, result.Profile, rows)
		})
	}
}

// takeOut takes the samples through a function out of a profile and adds them up.
func takeOut(p *profile.Profile, function string) live.Book {
	sum := live.Sum(p, "malloc", function)
	p.Sample = slices.DeleteFunc(p.Sample, func(s *profile.Sample) bool { return live.SampleHas(s, function) })
	return sum
}
