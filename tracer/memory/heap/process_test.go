package heap

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// built holds the fixtures that were compiled in this run.
var built struct {
	sync.Mutex
	dir   string
	paths map[string]string
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "heap")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built.dir, built.paths = dir, map[string]string{}
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// build compiles a fixture once per test run.
func build(t testing.TB, source string, flags ...string) string {
	t.Helper()
	built.Lock()
	defer built.Unlock()
	key := fmt.Sprint(source, flags)
	if path, ok := built.paths[key]; ok {
		return path
	}
	bin := filepath.Join(built.dir, fmt.Sprint(len(built.paths)))
	args := append([]string{"-O0", "-g", "-w", "-pthread", "-o", bin, source}, flags...)
	cc := "gcc"
	if filepath.Ext(source) == ".cc" {
		cc = "g++"
	}
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", cc, args, err, out)
	}
	built.paths[key] = bin
	return bin
}

// start runs a fixture until it says "ready" and returns its pid and the lines that it printed before.
func start(t testing.TB, env []string, bin string, args ...string) (pid int, lines []string) {
	t.Helper()
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for scan := bufio.NewScanner(out); scan.Scan(); {
		if scan.Text() == "ready" {
			return cmd.Process.Pid, lines
		}
		lines = append(lines, scan.Text())
	}
	t.Fatalf("%s %v ended before it was ready: %q", bin, args, lines)
	return 0, nil
}

func openSpace(t testing.TB, pid int) *Space {
	t.Helper()
	p, err := memory.OpenProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	s := NewSpace(p)
	s.Threads = LiveThreads(pid)
	return s
}

func walkProcess(t testing.TB, pid int) *Heap {
	t.Helper()
	h, err := Walk(context.Background(), openSpace(t, pid))
	if err != nil {
		t.Fatal(err)
	}
	return h
}
