package tracer

import (
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/test/live"
)

// traceKeeper traces a program that keeps 98 blocks of 53 bytes, until the test ends.
func traceKeeper(t *testing.T) *Tracer {
	t.Helper()
	live.RequireBPF(t)
	p := live.Start(t, live.CompileC(t, "testdata/keeps.c"))
	p.Expect(t, "ready")
	tr, err := New(Options{Mode: Exact, CheckEvery: time.Nanosecond, MaxLive: 10_007})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := tr.Add(p.PID); err != nil {
		t.Fatal(err)
	}
	if err := tr.Start(); err != nil {
		t.Fatal(err)
	}
	p.Send(t, "go")
	p.Expect(t, "did")
	return tr
}

// blockOf53 is the key of one of the kept blocks.
func blockOf53(t *testing.T, tr *Tracer) (key bpf.LiveKey, block bpf.Block) {
	t.Helper()
	n := 0
	err := eachEntry(tr.programs.Live, func(k *bpf.LiveKey, b *bpf.Block) {
		if b.Size == 53 {
			key, block = *k, *b
			n++
		}
	})
	if err != nil || n != 98 {
		t.Fatalf("%d blocks of 53 bytes are live, want 98: %v", n, err)
	}
	return key, block
}

func mismatches(t *testing.T, tr *Tracer) uint64 {
	t.Helper()
	s, err := tr.Snapshot()
	if err != nil {
		t.Fatal(err)
	}
	return mismatchesOf(s)
}

func mismatchesOf(s *profile.Snapshot) uint64 {
	for _, l := range s.Losses {
		if l.Name == booksWrong {
			return l.Count
		}
	}
	return 0
}

func TestBooksThatAddUpAreNoLoss(t *testing.T) {
	tr := traceKeeper(t)
	for range 3 {
		if err := tr.Check(); err != nil {
			t.Fatal(err)
		}
	}
	if err := tr.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := mismatches(t, tr); n != 0 {
		t.Errorf("%d rows are wrong: %+v", n, tr.audit.suspects)
	}
}

func TestAWrongBookIsFoundWhileItIsKeptAndAtTheEnd(t *testing.T) {
	breaks := map[string]func(t *testing.T, tr *Tracer, k bpf.LiveKey, b bpf.Block) error{
		"a block that is lost": func(t *testing.T, tr *Tracer, k bpf.LiveKey, b bpf.Block) error { return tr.programs.Live.Delete(k) },
		"a block of another size": func(t *testing.T, tr *Tracer, k bpf.LiveKey, b bpf.Block) error {
			b.Size++
			return tr.programs.Live.Update(k, b, ebpf.UpdateExist)
		},
		"a block that is in twice": func(t *testing.T, tr *Tracer, k bpf.LiveKey, b bpf.Block) error {
			k.Addr++
			return tr.programs.Live.Update(k, b, ebpf.UpdateNoExist)
		},
	}
	for name, damage := range breaks {
		t.Run(name, func(t *testing.T) {
			tr := traceKeeper(t)
			key, block := blockOf53(t, tr)
			if err := damage(t, tr, key, block); err != nil {
				t.Fatal(err)
			}
			for range 2 { // the first call only sets the pace
				if err := tr.Check(); err != nil {
					t.Fatal(err)
				}
			}
			if len(tr.audit.suspects) != 1 || len(tr.audit.wrong) != 0 {
				t.Fatalf("after one look: %d suspects, %d wrong, want 1 and none", len(tr.audit.suspects), len(tr.audit.wrong))
			}
			for k, s := range tr.audit.suspects {
				s.since = s.since.Add(-confirmAfter)
				tr.audit.suspects[k] = s
			}
			tr.audit.next = time.Now()
			if err := tr.Check(); err != nil {
				t.Fatal(err)
			}
			if n := mismatches(t, tr); n != 1 {
				t.Errorf("after two looks %d rows are wrong, want 1", n)
			}
			clear(tr.audit.wrong)
			if err := tr.Stop(); err != nil {
				t.Fatal(err)
			}
			if n := mismatches(t, tr); n != 1 {
				t.Errorf("at the end %d rows are wrong, want 1", n)
			}
		})
	}
}

// A block that a realloc under way holds is in no live map: that is no fault, however long it takes.
func TestARowWithAReallocUnderWayIsNotJudged(t *testing.T) {
	tr := traceKeeper(t)
	key, block := blockOf53(t, tr)
	row := rowOf(&key, &block)
	var r bpf.Row
	if err := tr.programs.RowsOfStacks.Lookup(row, &r); err != nil {
		t.Fatal(err)
	}
	r.Taken = 1
	if err := tr.programs.RowsOfStacks.Update(row, r, ebpf.UpdateExist); err != nil {
		t.Fatal(err)
	}
	if err := tr.programs.Live.Delete(key); err != nil {
		t.Fatal(err)
	}
	if err := tr.Stop(); err != nil {
		t.Fatal(err)
	}
	if n := mismatches(t, tr); n != 0 {
		t.Errorf("%d rows are wrong, want none", n)
	}
}
