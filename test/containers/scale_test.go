package containers

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// crowd is a container's control group with a process that has many children.
type crowd struct {
	*pipes
	ledger string
}

func startCrowd(t *testing.T, program, group string, workers int) *crowd {
	t.Helper()
	dir := t.TempDir()
	c := &crowd{newPipes(t, dir), filepath.Join(dir, "ledger")}
	if err := os.WriteFile(c.ledger, make([]byte, 4096), 0o666); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$@"`, group, program, dir, c.ledger, strconv.Itoa(workers))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p := live.StartCmd(t, cmd)
	t.Cleanup(func() { _ = syscall.Kill(-p.PID, syscall.SIGKILL) })
	return c
}

// counts are how many workers and children have done their work.
func (c *crowd) counts(t *testing.T) (workers, children int64) {
	t.Helper()
	text, err := os.ReadFile(c.ledger)
	if err != nil {
		t.Fatal(err)
	}
	return int64(binary.NativeEndian.Uint32(text)), int64(binary.NativeEndian.Uint32(text[4:]))
}

// scale is how many of each. ALLOCSNOOP_SCALE gives other numbers of containers than 10; with 50 these are the figures of
// docs/benchmarks.md: 500 processes, 200 forks a second.
type scale struct {
	containers, workers int // workers for each container, and the process that forks
	forks               int // of each container
	distance            time.Duration
}

func scaleOf(t *testing.T) scale {
	s := scale{10, 9, 20, 50 * time.Millisecond}
	if text := os.Getenv("ALLOCSNOOP_SCALE"); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 {
			t.Fatalf("ALLOCSNOOP_SCALE=%s: it is a number of containers", text)
		}
		s = scale{n, 9, 40, 250 * time.Millisecond}
	}
	return s
}

func TestManyProcessesOfManyContainersAreCountedToTheBlock(t *testing.T) {
	live.RequireBPF(t)
	s := scaleOf(t)
	program := live.CompileC(t, "testdata/crowd.c")
	var crowds []*crowd
	parent := ""
	for i := range s.containers {
		group := newGroup(t, filepath.Join("docker", containerID(t, strconv.Itoa(i))))
		parent = filepath.Dir(group)
		crowds = append(crowds, startCrowd(t, program, group, s.workers))
	}
	for _, c := range crowds {
		c.expect(t, "ready")
	}
	began := time.Now()
	tr := live.TraceArgs(t, "--cgroup", parent, "--mode", "exact", "--json")
	attached := time.Since(began)
	t.Logf("attached in %v", attached)
	cpuBefore, rssBefore := usage(t, tr.PID())
	began = time.Now()
	for _, c := range crowds {
		c.send(t, "work")
		c.send(t, fmt.Sprintf("fork %d %d", s.forks, s.distance.Microseconds()))
	}
	for _, c := range crowds {
		c.expect(t, "done")
		c.expect(t, "done")
	}
	ran := time.Since(began)
	cpu, rss := usage(t, tr.PID())
	var workers, children int64
	await(t, "the work of all workers and children", func() bool {
		workers, children = 0, 0
		for _, c := range crowds {
			w, n := c.counts(t)
			workers, children = workers+w, children+n
		}
		return workers == int64(s.containers*s.workers) && children == int64(s.containers*s.forks)
	})
	began = time.Now()
	result := tr.Stop(t)
	if result.ExitCode != 130 {
		t.Fatalf("exit code %d, want 130\n%s", result.ExitCode, result.Stderr)
	}
	t.Logf("%d processes in %d containers: attached in %v; %d births in %v (%.0f/s) cost %v of CPU time; resident memory %d KiB before, %d KiB after; "+
		"the profile took %v", s.containers*(s.workers+1), s.containers, attached, children, ran, float64(children)/ran.Seconds(), cpu-cpuBefore, rssBefore, rss, time.Since(began))
	want := live.Book{AllocObjects: 7 * workers, AllocBytes: 7 * 2003 * workers, InUseObjects: 7 * workers, InUseBytes: 7 * 2003 * workers}
	if got := live.Sum(result.Profile, "malloc", "malloc", "worker_blocks"); got != want {
		t.Errorf("blocks of workers: got %+v, want %+v", got, want)
	}
	want = live.Book{AllocObjects: 3 * children, AllocBytes: 3 * 1009 * children, InUseObjects: 2 * children, InUseBytes: 2 * 1009 * children}
	if got := live.Sum(result.Profile, "malloc", "malloc", "child_blocks"); got != want {
		t.Errorf("blocks of children: got %+v, want %+v", got, want)
	}
	var summary struct {
		Losses []struct {
			Name  string
			Count uint64
		} `json:"losses"`
	}
	if err := json.Unmarshal([]byte(result.Stdout), &summary); err != nil {
		t.Fatal(err)
	}
	if len(summary.Losses) > 0 {
		t.Errorf("losses: %+v", summary.Losses)
	}
}

// usage is a process's CPU time and resident memory in KiB.
func usage(t *testing.T, pid int) (cpu time.Duration, rss int) {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	for _, field := range fields[11:13] { // user and system time, in ticks of 10 ms
		ticks, _ := strconv.Atoi(field)
		cpu += time.Duration(ticks) * 10 * time.Millisecond
	}
	pages, _ := strconv.Atoi(fields[21])
	return cpu, pages * os.Getpagesize() / 1024
}
