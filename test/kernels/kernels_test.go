package kernels

import (
	"bytes"
	"context"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var kernelList = flag.String("kernels", "", `series to boot, "5.10,6.1" or "all"; without it no machine is started`)

// bootTimeout is far above the seconds a boot takes: emulation on a busy host is slow.
const bootTimeout = 5 * time.Minute

// eachKernel runs a test on every kernel of -kernels, one machine at a time.
func eachKernel(t *testing.T, test func(*testing.T, *Kernel)) {
	t.Helper()
	if *kernelList == "" {
		t.Skip("boots virtual machines and downloads kernels: needs -kernels (make test-kernels)")
	}
	list, err := Find(*kernelList)
	if err != nil {
		t.Fatal(err)
	}
	store, err := DefaultStore()
	if err != nil {
		t.Fatal(err)
	}
	for _, series := range list {
		t.Run(series.Name, func(t *testing.T) {
			k, err := store.Get(t.Context(), series)
			if err != nil {
				t.Fatal(err)
			}
			test(t, k)
		})
	}
}

func boot(t *testing.T, k *Kernel, job Job) *Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	result, err := k.Run(ctx, job)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

func newImage(t *testing.T) *Image {
	t.Helper()
	image, err := NewImage()
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// goBinary builds a static program of this module.
func goBinary(t *testing.T, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-o", out, "github.com/allocsnoop/allocsnoop/"+pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, msg)
	}
	return out
}

func TestMachineRunsTheCommandAndReturnsItsOutputAndExitCode(t *testing.T) {
	eachKernel(t, func(t *testing.T, k *Kernel) {
		image := newImage(t)
		image.Add("/data/a file", 0o644, []byte("line\nwithout end"))
		var modules []string
		if k.HasModule("overlay") {
			modules = []string{"overlay"}
		}
		result := boot(t, k, Job{
			Image:   image,
			Command: []string{"sh", "-c", `cat "a file"; echo; uname -r; echo "$X"; cat /sys/fs/cgroup/cgroup.controllers; ls /sys/kernel/btf/vmlinux; exit 17`},
			Dir:     "/data",
			Env:     []string{"X=it's"},
			Modules: modules,
		})
		if result.ExitCode != 17 {
			t.Errorf("exit code %d, want 17", result.ExitCode)
		}
		lines := strings.Split(string(result.Output), "\n")
		version := strings.TrimPrefix(strings.TrimPrefix(k.Package, "linux-image-"), "linux-binary-")
		want := []string{"line", "without end", version, "it's"}
		for i, w := range want {
			if i >= len(lines) || lines[i] != w {
				t.Fatalf("output:\n%s\nwant it to begin with %q", result.Output, want)
			}
		}
		for _, w := range []string{"memory", "/sys/kernel/btf/vmlinux\n"} {
			if !bytes.Contains(result.Output, []byte(w)) {
				t.Errorf("output lacks %q:\n%s", w, result.Output)
			}
		}
	})
}

// bpfObjects are the compiled programs of the repository for this architecture.
func bpfObjects(t *testing.T) []string {
	t.Helper()
	var objects []string
	for _, dir := range []string{"../../bpf", "../unwind"} {
		found, err := filepath.Glob(dir + "/*_x86_bpfel.o")
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, found...)
	}
	if len(objects) == 0 {
		t.Fatal("no BPF objects found")
	}
	return objects
}

// mustLoad says whether an object is for the kernel: 5.10 has variants of its own, without task storage.
func mustLoad(series, object string) bool {
	return series != "5.10" || strings.HasPrefix(filepath.Base(object), "legacy")
}

func TestEveryBPFObjectLoads(t *testing.T) {
	objects := bpfObjects(t)
	eachKernel(t, func(t *testing.T, k *Kernel) {
		image := newImage(t)
		if err := image.AddBinary("/loadall", goBinary(t, "test/kernels/loadall")); err != nil {
			t.Fatal(err)
		}
		command := []string{"/loadall"}
		for _, o := range objects {
			if !mustLoad(k.Series.Name, o) {
				continue
			}
			name := strings.TrimPrefix(strings.TrimPrefix(o, "../"), "../")
			if err := image.AddFile(name, o); err != nil {
				t.Fatal(err)
			}
			command = append(command, "/"+name)
		}
		result := boot(t, k, Job{Image: image, Command: command})
		t.Logf("%s", result.Output)
		if result.ExitCode != 0 {
			t.Errorf("exit code %d", result.ExitCode)
		}
	})
}
