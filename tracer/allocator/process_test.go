package allocator

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// start runs a program that prints a line when it is ready and ends with its standard input.
func start(t *testing.T, program string, env ...string) int {
	t.Helper()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), env...)
	in, err := cmd.StdinPipe()
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
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("target: %v", err)
		}
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatalf("target is not ready: %v", err)
	}
	return cmd.Process.Pid
}

func planOf(t *testing.T, s *Scanner, pid int) Plan {
	t.Helper()
	plan, err := s.Plan(pid)
	if err != nil {
		t.Fatal(err)
	}
	return plan
}

func probeIn(plan Plan, path, name string) *Probe {
	for i, p := range plan.Probes {
		if strings.Contains(p.Path, path) && slices.Contains(p.Names(), name) {
			return &plan.Probes[i]
		}
	}
	return nil
}

func TestPlanOfAProcessWithAPreloadedAllocator(t *testing.T) {
	program := compile(t, "gcc", "target.c")
	pid := start(t, program, "LD_PRELOAD="+libs+"libjemalloc.so.2")
	plan := planOf(t, &Scanner{}, pid)
	if !strings.HasPrefix(plan.InForce, "jemalloc (") {
		t.Errorf("in force: %q", plan.InForce)
	}
	for _, file := range []string{"libc.so.6", "libjemalloc.so.2"} {
		p := probeIn(plan, file, "malloc")
		if p == nil {
			t.Fatalf("malloc of %s is not probed", file)
		}
		if p.BuildID == "" || p.OpenPath == "" {
			t.Errorf("%s: build-id %q, path %q", file, p.BuildID, p.OpenPath)
		}
	}
	if len(plan.Notes) != 0 {
		t.Errorf("notes: %q", plan.Notes)
	}
}

func TestPlanOfAProcessWhoseFileIsDeleted(t *testing.T) {
	program := compile(t, "musl-gcc", "target.c", "-static")
	pid := start(t, program)
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	plan := planOf(t, &Scanner{}, pid)
	if p := probeIn(plan, filepath.Base(program), "__libc_malloc_impl"); p == nil || !strings.HasPrefix(plan.InForce, "musl (") {
		t.Errorf("probes %v, in force %q, skipped %v, notes %v", plan.Probes, plan.InForce, plan.Skipped, plan.Notes)
	}
}

func TestPatchedFunctionsAreLeftAlone(t *testing.T) {
	pid := start(t, compile(t, "gcc", "target.c", "-DPATCH"))
	plan := planOf(t, &Scanner{}, pid)
	if probeIn(plan, "libc.so.6", "pvalloc") != nil {
		t.Error("pvalloc is patched in memory and would be probed")
	}
	if probeIn(plan, "libc.so.6", "malloc") == nil {
		t.Error("malloc is not patched and should be probed")
	}
	if !strings.Contains(strings.Join(plan.Notes, "\n"), "pvalloc is patched in memory") {
		t.Errorf("notes: %q", plan.Notes)
	}
}

func TestFilesAreScannedOnceForManyProcesses(t *testing.T) {
	program := compile(t, "gcc", "target.c")
	s := &Scanner{}
	first, second := planOf(t, s, start(t, program)), planOf(t, s, start(t, program))
	if len(first.Probes) == 0 || len(first.Probes) != len(second.Probes) {
		t.Fatalf("%d and %d probes", len(first.Probes), len(second.Probes))
	}
	n := len(s.cache)
	planOf(t, s, os.Getpid())
	if len(s.cache) < n {
		t.Errorf("the cache shrank from %d to %d files", n, len(s.cache))
	}
}

func TestBuildIDNotes(t *testing.T) {
	note := "\x04\x00\x00\x00\x03\x00\x00\x00\x03\x00\x00\x00GNU\x00\xab\xcd\xef\x00"
	other := "\x04\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00\x00GNU\x00\x01\x02\x03\x04"
	for _, tt := range []struct {
		name, notes, want string
	}{
		{"one note", note, "abcdef"},
		{"behind another", other + note, "abcdef"},
		{"none", other, ""},
		{"cut short", note[:17], ""},
		{"a size beyond the end", "\x04\x00\x00\x00\xff\xff\xff\xff" + note[8:], ""},
		{"a name beyond the end", "\xff\xff\xff\xff" + note[4:], ""},
		{"empty", "", ""},
	} {
		if got := buildIDNote([]byte(tt.notes), 4); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
