package service

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/test/scenario"
)

// memoryGroup makes a control group with a memory limit, of version 1 or 2, whichever has the controller here.
func memoryGroup(t *testing.T, limit int) string {
	t.Helper()
	dir, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
		dir, file = "/sys/fs/cgroup", "memory.max"
	}
	group := filepath.Join(dir, fmt.Sprintf("allocsnoop-test-%d", os.Getpid()))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		await(t, "the control group to be empty", func() bool { return os.Remove(group) == nil })
	})
	if err := os.WriteFile(filepath.Join(group, file), []byte(strconv.Itoa(limit)), 0o644); err != nil {
		t.Fatal(err)
	}
	return group
}

// enter moves processes into a group.
func enter(t *testing.T, group string, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// number is how often something is done: an environment variable, or little in a run of all tests.
func number(t *testing.T, variable string, usual int64) int64 {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return usual
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q is no number above 0", variable, text)
	}
	return n
}

// The story of the whole tool: workers grow until the OOM killer takes one, and somebody wants to know why.
func TestTheRecorderNamesTheLeakOfTheOOMKillersVictim(t *testing.T) {
	live.RequireBPF(t)
	for run := range number(t, "ALLOCSNOOP_OOM_RUNS", 1) {
		t.Run(fmt.Sprint("run ", run+1), func(t *testing.T) { recordVictim(t) })
	}
}

func recordVictim(t *testing.T) {
	const limit = 40 << 20
	group := memoryGroup(t, limit) // before the service, so that it is empty when it is removed
	s := start(t, scenario.Options{})
	enter(t, group, append(s.Workers(), s.Master)...)
	before := map[int]scenario.Stats{}
	tr := live.TraceArgs(t, "--cgroup", group, "--until-oom", "--mode", "exact", "--content")
	for _, pid := range s.Workers() {
		stats, err := s.Stats(pid)
		if err != nil {
			t.Fatal(err)
		}
		before[pid] = stats
	}
	// Requests of a worker that is killed fail, which is no failure here.
	for uid := 0; tr.Running(); uid += 1000 {
		s.Run(t.Context(), scenario.Load{Requests: 1000, Concurrency: 4, FirstUID: uid})
	}
	result := tr.Wait(t)
	if result.ExitCode != 0 {
		t.Fatalf("exit code %d, want 0\n%s%s", result.ExitCode, result.Stdout, result.Stderr)
	}
	victims := killedWorkers.FindAllStringSubmatch(result.Stdout, -1)
	if len(victims) == 0 {
		t.Error("no worker was killed")
	}
	for _, v := range victims {
		pid, err := strconv.Atoi(v[1])
		if err != nil {
			t.Fatal(err)
		}
		after, err := s.Stats(pid)
		if err != nil {
			t.Fatal(err)
		}
		checkVictim(t, result, pid, after.Sub(before[pid]).Bytes)
	}
	for _, want := range []string{"the OOM killer took 1 process", "session_new", "passed 70 %"} {
		if !strings.Contains(result.Stdout, want) {
			t.Errorf("the summary lacks %q", want)
		}
	}
	if t.Failed() {
		t.Log(result.Stdout, result.Stderr)
	}
}

// More than one may be killed before the trace has ended.
var killedWorkers = regexp.MustCompile(`nginx \(pid (\d+)\) ended: was killed by signal 9`)

// checkVictim compares what the profile has of a killed worker with what its library had counted, and asks what was in it.
func checkVictim(t *testing.T, result *live.Result, pid int, counted int64) {
	t.Helper()
	var got int64
	shapes := ""
	for _, sample := range result.Profile.Sample {
		if sample.Label["pid"][0] == strconv.Itoa(pid) && live.SampleHas(sample, "session_new") {
			got += sample.Value[3]
			shapes += strings.Join(sample.Label["content"], ",")
		}
	}
	t.Logf("the library of worker %d counted %d bytes, the profile has %d (%.3f %%)", pid, counted, got, 100*float64(got)/float64(counted))
	if got < counted*99/100 || got > counted*101/100 {
		t.Errorf("%d bytes through session_new, want %d", got, counted)
	}
	if !strings.Contains(shapes, "JSON") {
		t.Errorf("the blocks of worker %d are said to hold %q, want JSON", pid, shapes)
	}
}

func TestProfilesAreWrittenOnTheWayToTheLimitWithoutAKill(t *testing.T) {
	live.RequireBPF(t)
	const limit = 64 << 20
	group := memoryGroup(t, limit)
	program := live.CompileC(t, "testdata/grower.c")
	p := live.StartCmd(t, exec.Command("sh", "-c", "echo $$ >"+group+"/cgroup.procs && exec "+program+" 5003"))
	p.Expect(t, "ready")
	tr := live.TraceArgs(t, "--cgroup", group, "--mode", "exact", "--at", "30%,60%")
	p.Send(t, "go")
	p.Expect(t, "done")
	names := func() []string {
		list, err := filepath.Glob(strings.TrimSuffix(tr.Output(), ".pb.gz") + ".0*.pb.gz")
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	await(t, "two profiles", func() bool { return len(names()) == 2 })
	result := tr.Stop(t)
	var last int64
	for i, name := range names() {
		got := live.Sum(live.ReadProfile(t, name), "malloc", "malloc", "grow").InUseBytes
		if got <= last || got < limit*int64(i+1)*25/100 {
			t.Errorf("profile %d has %d bytes in use, the one before %d", i+1, got, last)
		}
		last = got
	}
	if got := live.Sum(result.Profile, "malloc", "malloc", "grow"); got.InUseObjects != 5003 || got.InUseBytes != 5003*10007 {
		t.Errorf("the last profile has %+v", got)
	}
	for _, want := range []string{"passed 30 %", "passed 60 %"} {
		if !strings.Contains(result.Stdout, want) {
			t.Errorf("the summary lacks %q\n%s", want, result.Stdout)
		}
	}
}
