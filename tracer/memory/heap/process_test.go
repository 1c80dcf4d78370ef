package heap

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// build compiles a fixture once per test run.
func build(t testing.TB, source string, flags ...string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), strings.TrimSuffix(filepath.Base(source), filepath.Ext(source)))
	args := append([]string{"-O0", "-g", "-w", "-pthread", "-o", bin, source}, flags...)
	cc := "gcc"
	if filepath.Ext(source) == ".cc" {
		cc = "g++"
	}
	if out, err := exec.Command(cc, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", cc, args, err, out)
	}
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
