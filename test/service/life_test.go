package service

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// stages are what each call of a stage of testdata/life.c makes; one block of them is freed again.
var stages = map[string]struct{ blocks, size int64 }{
	"in_parent": {7, 1009}, "in_child": {5, 211}, "in_grandchild": {11, 307}, "in_thread": {13, 401},
	"before_exec": {3, 503}, "after_exec": {17, 601},
}

// calls says how often a stage ran, and in how many of the runs its blocks are in use at the end.
type calls struct{ made, kept int64 }

func books(ran map[string]calls) map[string]live.Book {
	books := map[string]live.Book{}
	for name, c := range ran {
		s := stages[name]
		books[name] = live.Book{
			AllocObjects: c.made * s.blocks, AllocBytes: c.made * s.blocks * s.size,
			InUseObjects: c.kept * (s.blocks - 1), InUseBytes: c.kept * (s.blocks - 1) * s.size,
		}
	}
	return books
}

func stagesOf(r *live.Result) map[string]live.Book {
	got := map[string]live.Book{}
	for name := range stages {
		if book := live.Sum(r.Profile, "malloc", "malloc", name); book != (live.Book{}) {
			got[name] = book
		}
	}
	return got
}

// sum adds up all books, for images that end before anybody can look at what they have mapped: their blocks are counted, but
// not all are named.
func sum(books map[string]live.Book) map[string]live.Book {
	var all live.Book
	for _, b := range books {
		all.AllocObjects += b.AllocObjects
		all.AllocBytes += b.AllocBytes
		all.InUseObjects += b.InUseObjects
		all.InUseBytes += b.InUseBytes
	}
	return map[string]live.Book{"all": all}
}

func TestBooksAreExactHoweverProcessesLive(t *testing.T) {
	live.RequireBPF(t)
	program := live.CompileC(t, "testdata/life.c")
	bombs := number(t, "ALLOCSNOOP_BOMB", 211) // each of two processes
	for _, tt := range []struct {
		name, scenario string
		n              int
		want           map[string]calls
		execs          bool // into images that live for a moment only
	}{
		{"a bounded fork bomb", "bomb", int(bombs), map[string]calls{"in_parent": {1, 1}, "in_child": {bombs, bombs}, "in_grandchild": {bombs, bombs}}, false},
		{"a chain of execs", "chain", 23, map[string]calls{"before_exec": {23, 0}, "after_exec": {23, 1}}, true},
		{"a daemon that forked twice, with threads", "daemon", 19, map[string]calls{"in_child": {1, 1}, "in_grandchild": {1, 1}, "in_thread": {19, 19}}, false},
		{"vfork and exec", "vfork", 29, map[string]calls{"in_child": {29, 29}, "after_exec": {29, 29}}, true},
		{"posix_spawn", "spawn", 31, map[string]calls{"in_parent": {31, 31}, "after_exec": {31, 31}}, true},
		{"children that change their user", "drop", 37, map[string]calls{"in_child": {37, 37}}, false},
		{"forks of another thread than the main one", "thread-forks", 41, map[string]calls{"in_child": {41, 41}, "in_thread": {1, 1}}, false},
		{"one pid again and again", "reuse", 43, map[string]calls{"in_child": {43, 43}}, false},
		{"one pid of a small pid namespace again and again", "namespace", 47, map[string]calls{"in_child": {47, 47}}, false},
		{"processes that share memory", "shared", 53, map[string]calls{"in_child": {53, 53}, "in_parent": {1, 1}}, false},
		{"a process that shares memory and outlives its parent", "orphaned", 59, map[string]calls{"in_child": {59, 59}, "in_parent": {1, 1}}, false},
		{"a process whose main thread has ended", "headless", 61, map[string]calls{"in_thread": {61, 61}, "in_child": {1, 1}}, false},
		{"forks of a thread from before the trace", "early-thread-forks", 41, map[string]calls{"in_child": {41, 41}, "in_thread": {1, 1}}, false},
		{"a main thread that ends before threads from before the trace", "early-headless", 61, map[string]calls{"in_thread": {61, 61}, "in_child": {1, 1}}, false},
		{"exec by a thread from before the trace", "early-thread-execs", 1, map[string]calls{"before_exec": {1, 0}, "after_exec": {1, 1}}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of the time is the kernel's grace periods
			p := live.Start(t, program, tt.scenario, strconv.Itoa(tt.n), program)
			p.Expect(t, "ready")
			tr := live.Trace(t, p.PID, "--mode", "exact", "--max-live", "50000")
			p.Send(t, "go")
			result := tr.Wait(t)
			if result.ExitCode != 0 {
				t.Errorf("exit code %d, want 0", result.ExitCode)
			}
			want, got := books(tt.want), stagesOf(result)
			if tt.execs {
				want, got = sum(want), map[string]live.Book{"all": live.Sum(result.Profile, "malloc")}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("books (-want +got):\n%s", diff)
			}
			if t.Failed() {
				t.Logf("%s%s", result.Stdout, result.Stderr)
			}
		})
	}
}

// The kernel takes perf events, which the probes are, from a process that gains rights by exec.
func TestASetuidHelperIsTracedAfterItsExec(t *testing.T) {
	live.RequireBPF(t)
	program := copyOf(t, live.CompileC(t, "testdata/life.c"), "helper")
	// Another user must reach it, which the directories of tests do not allow.
	dir, err := os.MkdirTemp("/tmp", "allocsnoop-setuid-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	public := filepath.Join(dir, "life")
	for _, err := range []error{os.Chmod(dir, 0o755), exec.Command("cp", program, public).Run(), os.Chmod(public, 0o4755|os.ModeSetuid)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := live.Start(t, public, "setuid", "1", public)
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "helper")
	p.Send(t, "go")
	result := tr.Wait(t)
	// The image may live too short a time for its stacks to be named.
	want := sum(books(map[string]calls{"in_parent": {1, 0}, "after_exec": {1, 1}}))["all"]
	if got := live.Sum(result.Profile, "malloc"); got != want {
		t.Errorf("the profile has %+v, want %+v\n%s%s", got, want, result.Stdout, result.Stderr)
	}
}
