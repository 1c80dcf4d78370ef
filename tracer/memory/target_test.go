package memory

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// target is a running testdata/target.c.
type target struct {
	pid   int
	addr  map[string]uint64
	cmd   *exec.Cmd
	stdin io.Closer
}

// buildC compiles one file of testdata, once for a run.
func buildC(tb testing.TB, name string) string {
	tb.Helper()
	built, _ := builds.LoadOrStore(name, sync.OnceValues(func() (string, error) {
		dir, err := os.MkdirTemp("", "allocsnoop-memory-")
		if err != nil {
			return "", err
		}
		buildDirs = append(buildDirs, dir)
		exe := filepath.Join(dir, strings.TrimSuffix(name, ".c"))
		out, err := exec.Command("gcc", "-g", "-O1", "-pthread", "-Wl,--build-id,-z,now", "-o", exe,
			filepath.Join(sourceDir, name)).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("gcc %s: %w: %s", name, err, out)
		}
		return exe, nil
	}))
	exe, err := built.(func() (string, error))()
	if err != nil {
		tb.Fatal(err)
	}
	return exe
}

var (
	sourceDir, _ = filepath.Abs("testdata")
	builds       sync.Map
	buildDirs    []string
)

func TestMain(m *testing.M) {
	code := m.Run()
	for _, dir := range buildDirs {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// startTarget runs target.c and waits until all its memory is in place.
func startTarget(tb testing.TB, args ...string) *target {
	tb.Helper()
	t := &target{addr: map[string]uint64{}, cmd: exec.Command(buildC(tb, "target.c"), args...)}
	stdin, err := t.cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	stdout, err := t.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := t.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	t.pid, t.stdin = t.cmd.Process.Pid, stdin
	tb.Cleanup(t.stop)
	for in := bufio.NewScanner(stdout); in.Scan(); {
		name, value, _ := strings.Cut(in.Text(), " ")
		if name == "ready" {
			t.awaitSleep(tb)
			return t
		}
		t.addr[name], _ = strconv.ParseUint(value, 16, 64)
	}
	tb.Fatal("the target ended before it was ready")
	return nil
}

// awaitSleep waits until the threads are where they stay, so that the target itself touches no more pages.
func (t *target) awaitSleep(tb testing.TB) {
	tb.Helper()
	for range 5000 {
		tids, err := FS{}.threads(t.pid)
		if err != nil {
			tb.Fatal(err)
		}
		asleep := 0
		for _, tid := range tids {
			if (FS{Root: fmt.Sprintf("/proc/%d/task", t.pid)}).State(tid).Letter == 'S' {
				asleep++
			}
		}
		if asleep == len(tids) {
			return
		}
		time.Sleep(time.Millisecond)
	}
	tb.Fatal("the target does not come to rest")
}

func (t *target) stop() {
	t.stdin.Close()
	t.cmd.Wait()
}

// pageOf is what fill() in target.c puts into page i of a region.
func pageOf(seed, i uint64) []byte {
	page := make([]byte, 0, PageSize)
	for w := range uint64(PageSize / 8) {
		page = binary.NativeEndian.AppendUint64(page, (seed+i)*2654435761*(w+1))
	}
	return page
}

func zeros(n int) []byte { return make([]byte, n) }
