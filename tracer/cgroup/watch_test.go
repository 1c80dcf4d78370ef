package cgroup

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hogVariable makes the test program a process that holds as many bytes as its standard input asks for.
const hogVariable = "ALLOCSNOOP_TEST_HOG"

func TestMain(m *testing.M) {
	if os.Getenv(hogVariable) != "" {
		hog()
	}
	os.Exit(m.Run())
}

// hog reads "BYTES" lines, touches that much more memory and answers "ok".
func hog() {
	for {
		var bytes int
		if _, err := fmt.Scanln(&bytes); err != nil {
			os.Exit(0)
		}
		mem, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			fmt.Println(err)
			continue
		}
		for i := 0; i < len(mem); i += 4096 {
			mem[i] = 1
		}
		fmt.Println("ok")
	}
}

type hogProcess struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.Writer
	out   io.Reader
}

// startHog starts a hog inside a group.
func startHog(t *testing.T, g Group) *hogProcess {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec "$1"`, g.Dir, "/proc/"+strconv.Itoa(os.Getpid())+"/exe")
	cmd.Env = append(os.Environ(), hogVariable+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return &hogProcess{t, cmd, stdin, out}
}

// take makes the hog hold more; false when it did not live to say so.
func (h *hogProcess) take(bytes int) bool {
	h.t.Helper()
	fmt.Fprintln(h.stdin, bytes)
	var answer string
	fmt.Fscanln(h.out, &answer)
	return answer == "ok"
}

// newGroup makes a group with a memory limit in the real hierarchy, and removes it after the test.
func newGroup(t *testing.T, limit int) Group {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("makes control groups: needs root")
	}
	mounts, err := Mounts()
	if err != nil {
		t.Fatal(err)
	}
	mounts = byUse(mounts)
	if len(mounts) == 0 || !mounts[0].memory() {
		t.Skip("needs a mounted memory controller")
	}
	dir := filepath.Join(mounts[0].Dir, fmt.Sprintf("allocsnoop-test-%d-%d", os.Getpid(), time.Now().UnixNano()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("needs a writable memory controller: %v", err)
	}
	t.Cleanup(func() { removeGroup(t, dir) })
	g, err := FindIn(mounts, dir)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(dir, g.file("memory.max", "memory.limit_in_bytes")), strconv.Itoa(limit))
	return g
}

// removeGroup waits for the group's last process, which cleanups that ran before killed, to be gone.
func removeGroup(t *testing.T, dir string) {
	for range 500 {
		if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("group %s cannot be removed", dir)
}

// next is the next event, or a failure after a time that only a bug reaches.
func next(t *testing.T, events <-chan Event) Event {
	t.Helper()
	select {
	case e, ok := <-events:
		if !ok {
			t.Fatal("the watcher ended")
		}
		return e
	case <-time.After(30 * time.Second):
		t.Fatal("no event")
	}
	return Event{}
}

const mib = 1 << 20

func TestThresholdsAreReportedOnceOnTheWayUpAndTheKillAfterThem(t *testing.T) {
	g := newGroup(t, 64*mib)
	h := startHog(t, g)
	if !h.take(mib) {
		t.Fatal("the hog does not start")
	}
	events, err := g.Watch(t.Context(), WatchOptions{At: []float64{0.5, 0.8}})
	if err != nil {
		t.Fatal(err)
	}
	h.take(35 * mib)
	if e := next(t, events); e.Kind != Crossed || e.Threshold != 0.5 || e.Limited.Path != g.Path || e.Usage.Limit != 64*mib {
		t.Fatalf("got %+v, want 50 %% crossed", e)
	}
	h.take(17 * mib)
	if e := next(t, events); e.Kind != Crossed || e.Threshold != 0.8 || e.Usage.WorkingSet() < 51*mib {
		t.Fatalf("got %+v, want 80 %% crossed", e)
	}
	if h.take(64 * mib) {
		t.Fatal("the hog lives above its limit")
	}
	e := next(t, events)
	if e.Kind != Killed || e.Kills != 1 || e.Peak < 51*mib {
		t.Errorf("got %+v, want one kill", e)
	}
	if state, _ := h.cmd.Process.Wait(); state.ExitCode() != -1 || !strings.Contains(state.String(), "killed") {
		t.Errorf("the hog ended with %v", state)
	}
	removeGroup(t, g.Dir)
	if e := next(t, events); e.Kind != Removed {
		t.Errorf("got %+v, want the group's removal", e)
	}
	if _, open := <-events; open {
		t.Error("the channel is open after the removal")
	}
}

func TestAKillInAGroupBelowUnderTheLimitAboveIsReported(t *testing.T) {
	g := newGroup(t, 48*mib)
	if g.V2 {
		writeFile(t, filepath.Join(g.Dir, "cgroup.subtree_control"), "+memory")
	}
	if g.flat() {
		writeFile(t, filepath.Join(g.Dir, "memory.use_hierarchy"), "1")
	}
	dir := filepath.Join(g.Dir, "worker")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeGroup(t, dir) })
	below, err := Find(dir)
	if err != nil {
		t.Fatal(err)
	}
	for name, watched := range map[string]Group{"above": g, "below": below} {
		t.Run("watched "+name, func(t *testing.T) {
			events, err := watched.Watch(t.Context(), WatchOptions{At: []float64{0.75}})
			if err != nil {
				t.Fatal(err)
			}
			h := startHog(t, below)
			h.take(40 * mib)
			if e := next(t, events); e.Kind != Crossed || e.Limited.Path != g.Path {
				t.Fatalf("got %+v, want the upper group's limit near", e)
			}
			h.take(64 * mib)
			if e := next(t, events); e.Kind != Killed || e.Kills != 1 {
				t.Errorf("got %+v, want one kill", e)
			}
			h.cmd.Wait()
		})
	}
}

func TestPageCacheAloneCrossesNothing(t *testing.T) {
	var st unix.Statfs_t
	if err := unix.Statfs("/var/tmp", &st); err != nil || st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		t.Skip("needs a disk below /var/tmp: pages of a memory file system are no cache")
	}
	g := newGroup(t, 64*mib)
	h := startHog(t, g)
	h.take(mib)
	events, err := g.Watch(t.Context(), WatchOptions{At: []float64{0.5}})
	if err != nil {
		t.Fatal(err)
	}
	// The shell is in the group when it writes, so that the file's pages are charged to the group.
	name := filepath.Join("/var/tmp", filepath.Base(g.Dir))
	t.Cleanup(func() { os.Remove(name) })
	out, err := exec.Command("/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && head -c 100000000 /dev/zero >"$1" && sync`, g.Dir, name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if u.Current < 32*mib || u.InactiveFile < 16*mib {
		t.Skipf("needs a file system whose pages count as cache: %+v", u)
	}
	h.take(40 * mib)
	// Had the cache crossed the threshold, that report would come first, with little anonymous memory.
	if e := next(t, events); e.Kind != Crossed || e.Usage.Anon < 30*mib {
		t.Errorf("got %+v, want the crossing by the process's memory", e)
	}
}

func TestTheEndOfTheContextClosesTheChannel(t *testing.T) {
	g := newGroup(t, 64*mib)
	ctx, cancel := context.WithCancel(t.Context())
	events, err := g.Watch(ctx, WatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if e, open := <-events; open {
		t.Errorf("got %+v", e)
	}
}
