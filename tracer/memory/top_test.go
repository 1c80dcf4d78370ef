package memory

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// statOf is a line of /proc/PID/stat.
func statOf(pid int, comm string, ticks int) string {
	return fmt.Sprintf("%d (%s) S 1 1 1 0 -1 0 0 0 0 0 1 2 0 0 20 0 3 0 %d 0 0\n", pid, comm, ticks)
}

func TestTop(t *testing.T) {
	fs := fakeProc(t, map[string]string{
		"7/stat": statOf(7, "quiet", 5), "7/statm": "1000 900 100 1 0 300 0\n",
		"11/stat": statOf(11, "leaks (a lot)", 5), "11/statm": "1000 300 100 1 0 300 0\n", "11/smaps": smapsFixture,
		"13/stat": statOf(13, "shrinks", 5), "13/statm": "1000 950 100 1 0 300 0\n",
		"17/stat": statOf(17, "kworker", 5), "17/statm": "0 0 0 0 0 0 0\n",
		"19/stat": statOf(19, "reused", 5), "19/statm": "1000 200 100 1 0 300 0\n",
		"self/stat": "", "uptime": "1 1\n", "23/statm": "garbage",
	})
	top := fs.NewTop()
	rows, err := top.Sample()
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 4 {
		t.Fatalf("%d processes, want 4: %+v", len(rows), rows)
	}
	for _, r := range rows {
		if r.GrowthPerMinute != nil {
			t.Errorf("pid %d grows by %v after one look", r.PID, *r.GrowthPerMinute)
		}
	}
	for name, text := range map[string]string{
		"11/statm": "1000 400 100 1 0 300 0\n", "13/statm": "1000 940 100 1 0 300 0\n",
		"19/statm": "1000 990 100 1 0 300 0\n", "19/stat": statOf(19, "another", 6), // the same pid, another process
	} {
		if err := os.WriteFile(filepath.Join(fs.Root, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	if rows, err = top.Sample(); err != nil {
		t.Fatal(err)
	}
	SortByGrowth(rows)
	var order []string
	for _, r := range rows {
		order = append(order, r.Comm)
	}
	if got := strings.Join(order, ","); got != "leaks (a lot),another,shrinks,quiet" {
		t.Errorf("order is %s", got)
	}
	page := uint64(os.Getpagesize())
	first := &rows[0]
	if first.RSS != 400*page || first.Anonymous != 300*page || first.GrowthPerMinute == nil {
		t.Fatalf("%+v", first)
	}
	// 100 pages in no longer than the test has run.
	if least := float64(100*page) / time.Since(began.Add(-time.Minute)).Minutes(); *first.GrowthPerMinute < least {
		t.Errorf("growth %.0f a minute, want %.0f or more", *first.GrowthPerMinute, least)
	}
	top.Detail(rows[:2], rows, 0)
	if d := first.TopDetail; d == nil || d.PSS != 8121*1024 || d.Heap != 8123*1024 || d.Swap != 23*1024 {
		t.Errorf("detail %+v", d)
	}
	if rows[1].TopDetail != nil || first.TopLimit != nil {
		t.Errorf("a process without smaps has detail %+v, one without cgroup limit %+v", rows[1].TopDetail, first.TopLimit)
	}
}

func TestTopOfRealLeak(t *testing.T) {
	tgt := startTarget(t)
	top := FS{}.NewTop()
	if _, err := top.Sample(); err != nil {
		t.Fatal(err)
	}
	rows, err := top.Sample()
	if err != nil {
		t.Fatal(err)
	}
	top.Detail(rows, rows, 0)
	for _, r := range rows {
		if r.PID == os.Getpid() {
			t.Error("the caller is in its own list")
		}
		if r.PID != tgt.pid {
			continue
		}
		usage, err := FS{}.Rollup(tgt.pid)
		if err != nil {
			t.Fatal(err)
		}
		if r.RSS == 0 || r.PSS == 0 || r.Heap < 2_000_000 || r.Heap > usage.RSS || r.Anonymous < r.Heap {
			t.Errorf("%+v %+v, smaps says %+v", r, r.TopDetail, usage)
		}
		return
	}
	t.Errorf("pid %d is not among %d processes", tgt.pid, len(rows))
}

// BenchmarkTop is a round over 1,000 sleeping processes, 20 of them shown.
func BenchmarkTop(b *testing.B) {
	var all []*exec.Cmd
	for range 1000 {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		all = append(all, cmd)
	}
	defer func() {
		for _, cmd := range all {
			cmd.Process.Kill()
		}
		for _, cmd := range all {
			cmd.Wait()
		}
	}()
	top := FS{}.NewTop()
	before := cpuTime(b)
	for b.Loop() {
		rows, err := top.Sample()
		if err != nil || len(rows) < 1000 {
			b.Fatalf("%d processes, %v", len(rows), err)
		}
		SortByGrowth(rows)
		top.Detail(rows[:20], rows, 150*time.Millisecond)
	}
	b.ReportMetric(float64(cpuTime(b)-before)/float64(time.Millisecond)/float64(b.N), "cpu-ms/op") // whoever else uses the machine
}

func cpuTime(b *testing.B) time.Duration {
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		b.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}
