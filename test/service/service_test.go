// Package service tests traces of services: workers that are killed, respawned and reloaded, commands that allocsnoop
// starts, control groups whose members the OOM killer takes.
//
// The trap: a killed worker's books must be compared with a ledger that outlives it, so the library keeps its counts in
// a file.
package service

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/test/scenario"
)

func start(t *testing.T, o scenario.Options) *scenario.Service {
	t.Helper()
	s, err := scenario.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// generations drives a service through loads, kills and a reload, and returns all workers that ever were.
func generations(t *testing.T, s *scenario.Service) []int {
	t.Helper()
	var all []int
	load := func() {
		all = append(all, s.Workers()...)
		if _, err := s.Load(t.Context(), 307, 4); err != nil {
			t.Fatal(err)
		}
		all = append(all, s.Workers()...)
	}
	load()
	for range 3 {
		victim := s.Workers()[0]
		if err := syscall.Kill(victim, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		await(t, "a new worker", func() bool { w := s.Workers(); return len(w) == 2 && !slices.Contains(w, victim) })
		load()
	}
	if err := s.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	load()
	slices.Sort(all)
	return slices.Compact(all)
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20s for %s", what)
		}
	}
}

func TestEveryGenerationOfWorkersIsInTheProfileToTheByte(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, scenario.Options{})
	args := []string{"--pid", strconv.Itoa(s.Master), "--mode", "exact"}
	for _, pid := range s.Workers() {
		args = append(args, "--pid", strconv.Itoa(pid))
	}
	tr := live.TraceArgs(t, args...)
	workers := generations(t, s)
	result := tr.Stop(t)
	if result.ExitCode != 130 {
		t.Errorf("exit code %d, want 130 (interrupted)\n%s%s", result.ExitCode, result.Stdout, result.Stderr)
	}
	if len(workers) < 7 {
		t.Errorf("%d workers lived, want 2 and 3 respawned and 2 reloaded", len(workers))
	}
	var want live.Book
	for _, pid := range workers {
		stats, err := s.Stats(pid)
		if err != nil {
			t.Fatal(err)
		}
		want.InUseObjects += stats.Blocks
		want.InUseBytes += stats.Bytes
	}
	got := live.Sum(result.Profile, "malloc", "malloc", "session_new")
	if got.InUseObjects != want.InUseObjects || got.InUseBytes != want.InUseBytes {
		t.Errorf("the profile has %d blocks of %d bytes, the library counted %d of %d",
			got.InUseObjects, got.InUseBytes, want.InUseObjects, want.InUseBytes)
	}
	pids := map[string]bool{}
	for _, sample := range result.Profile.Sample {
		pids[sample.Label["pid"][0]] = true
	}
	for _, pid := range workers {
		if !pids[strconv.Itoa(pid)] {
			t.Errorf("worker %d has no sample with its pid", pid)
		}
	}
}

func TestProcessesThatJoinByNameAreTraced(t *testing.T) {
	live.RequireBPF(t)
	name := fmt.Sprintf("snoop%d", os.Getpid())
	program := copyOf(t, live.CompileC(t, "testdata/maker.c"), name)
	early := live.Start(t, program, "11", "1009")
	early.Expect(t, "ready")
	tr := live.TraceArgs(t, "--name", "^"+name+"$", "--mode", "exact")
	late := live.Start(t, program, "13", "2003")
	late.Expect(t, "ready")
	time.Sleep(500 * time.Millisecond) // joining takes up to 100 ms, and nothing can signal it from outside
	for _, p := range []*live.Process{early, late} {
		p.Send(t, "go")
		p.Expect(t, "done")
	}
	result := tr.Stop(t)
	got := live.Sum(result.Profile, "malloc", "malloc", "make_blocks")
	if want := (live.Book{AllocObjects: 24, AllocBytes: 11*1009 + 13*2003, InUseObjects: 24, InUseBytes: 11*1009 + 13*2003}); got != want {
		t.Errorf("got %+v, want %+v\n%s%s", got, want, result.Stdout, result.Stderr)
	}
}

func TestACommandIsTracedFromItsFirstInstruction(t *testing.T) {
	live.RequireBPF(t)
	program := live.CompileC(t, "testdata/early.c")
	out := filepath.Join(t.TempDir(), "early.pb.gz")
	cmd := exec.Command(live.Allocsnoop(t), "--mode", "exact", "-o", out, "--", program)
	text, err := cmd.CombinedOutput()
	if code := cmd.ProcessState.ExitCode(); code != 7 {
		t.Fatalf("exit code %d, want the command's 7: %v\n%s", code, err, text)
	}
	p := live.ReadProfile(t, out)
	if got, want := live.Sum(p, "malloc", "malloc", "in_constructor"), (live.Book{AllocObjects: 17, AllocBytes: 17 * 1511, InUseObjects: 17, InUseBytes: 17 * 1511}); got != want {
		t.Errorf("blocks of the constructor: got %+v, want %+v\n%s", got, want, text)
	}
	if got, want := live.Sum(p, "malloc", "malloc", "main"), (live.Book{AllocObjects: 1, AllocBytes: 4001, InUseObjects: 1, InUseBytes: 4001}); got != want {
		t.Errorf("blocks of main: got %+v, want %+v", got, want)
	}
}

func TestOneProfileForEachProcessOnDemand(t *testing.T) {
	live.RequireBPF(t)
	program := live.CompileC(t, "testdata/maker.c")
	a, b := live.Start(t, program, "11", "1009"), live.Start(t, program, "13", "2003")
	a.Expect(t, "ready")
	b.Expect(t, "ready")
	tr := live.TraceArgs(t, "--pid", strconv.Itoa(a.PID), "--pid", strconv.Itoa(b.PID), "--per-process", "--mode", "exact")
	for _, p := range []*live.Process{a, b} {
		p.Send(t, "go")
		p.Expect(t, "done")
	}
	result := tr.Stop(t)
	for pid, want := range map[int]int64{a.PID: 11 * 1009, b.PID: 13 * 2003} {
		p := live.ReadProfile(t, strings.TrimSuffix(result.Path, ".pb.gz")+fmt.Sprintf(".%d.pb.gz", pid))
		if got := live.Sum(p, "malloc", "malloc", "make_blocks").InUseBytes; got != want {
			t.Errorf("process %d: %d bytes in use, want %d", pid, got, want)
		}
	}
}

func copyOf(t *testing.T, program, name string) string {
	t.Helper()
	data, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestContentNamesTheShapeBehindAStackAndHidesTheRest(t *testing.T) {
	live.RequireBPF(t)
	p := live.Start(t, live.CompileC(t, "testdata/json.c"))
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--content", "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Stop(t)
	if want := "101 blocks, 20.8 KiB, JSON {user, secret, roles, note}"; !strings.Contains(result.Stdout, want) {
		t.Errorf("the summary lacks %q\n%s", want, result.Stdout)
	}
	if strings.Contains(result.Stdout, "tango") {
		t.Errorf("the summary shows content\n%s", result.Stdout)
	}
	for _, sample := range result.Profile.Sample {
		if label := sample.Label["content"]; slices.Contains(live.Functions(sample), "keep_document") && (len(label) != 1 || !strings.HasPrefix(label[0], "JSON")) {
			t.Errorf("the leaking sample's content label is %q", label)
		}
	}
}

func TestASeriesOfProfilesIsKeptToTheNewest(t *testing.T) {
	live.RequireBPF(t)
	p := live.Start(t, live.CompileC(t, "testdata/json.c"))
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--interval", "300ms", "--keep", "2", "--duration", "3s", "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Wait(t)
	if result.ExitCode != 0 {
		t.Fatalf("exit code %d\n%s", result.ExitCode, result.Stderr)
	}
	series, err := filepath.Glob(strings.TrimSuffix(result.Path, ".pb.gz") + ".0*.pb.gz")
	if err != nil || len(series) != 2 {
		t.Fatalf("%d profiles of the series are there, want the newest 2: %v %v", len(series), series, err)
	}
	if got := live.Sum(live.ReadProfile(t, series[1]), "malloc", "malloc", "keep_document"); got.InUseObjects != 101 || got.InUseBytes != 101*211 {
		t.Errorf("the last of the series has %+v, want 101 blocks of 211 bytes", got)
	}
}

func TestOnlyBlocksOfTheGivenAgeCountAsInUse(t *testing.T) {
	live.RequireBPF(t)
	p := live.Start(t, live.CompileC(t, "testdata/json.c"))
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--older-than", "2s", "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	time.Sleep(2500 * time.Millisecond) // the first blocks come of age
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Stop(t)
	got := live.Sum(result.Profile, "malloc", "malloc", "keep_document")
	if want := (live.Book{AllocObjects: 154, AllocBytes: 154 * 211, InUseObjects: 101, InUseBytes: 101 * 211}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
