package kernels

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// walkerPrograms are the targets of the stack walker's tests that need nothing but themselves, and how each is built.
var walkerPrograms = [][]string{
	{"backtrace.c", "-static"},
	{"threads.c", "-static", "-pthread"},
}

// TestStackWalker runs the tests of test/unwind that make do with static programs. The kernels that can be are booted
// fully preemptible: a walk that is preempted must not find another thread's frames in its scratch.
func TestStackWalker(t *testing.T) {
	if *kernelList == "" {
		t.Skip("boots virtual machines: needs -kernels (make test-kernels)")
	}
	dir := t.TempDir()
	tests := filepath.Join(dir, "unwind.test")
	cmd := exec.Command("go", "test", "-c", "-o", tests, "github.com/allocsnoop/allocsnoop/test/unwind")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build tests: %v\n%s", err, out)
	}
	for _, p := range walkerPrograms {
		out := filepath.Join(dir, strings.Join(p, ""))
		args := append([]string{"-O2", "-o", out, filepath.Join("../unwind/testdata", p[0])}, p[1:]...)
		if msg, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
			t.Fatalf("gcc: %v\n%s", err, msg)
		}
	}
	eachKernel(t, func(t *testing.T, k *Kernel) {
		image := newImage(t)
		if err := image.AddBinary("/unwind.test", tests); err != nil {
			t.Fatal(err)
		}
		for _, p := range walkerPrograms {
			name := strings.Join(p, "")
			if err := image.AddBinary("/programs/"+name, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		result := boot(t, k, Job{
			Image: image,
			Command: []string{"/unwind.test", "-test.v", "-test.run",
				"TestStacksEqualUnwindBacktraces/a_static_program|TestThreadsDoNotDisturb"},
			Env:    []string{"UNWIND_PREBUILT=/programs"},
			Append: "preempt=full",
		})
		t.Logf("%s", result.Output)
		if result.ExitCode != 0 {
			t.Errorf("exit code %d", result.ExitCode)
		}
	})
}
