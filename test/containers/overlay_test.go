package containers

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// overlay mounts a layer of its own above an image's, as runtimes do for each container.
func overlay(t *testing.T, lower string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	root := filepath.Join(dir, "root")
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)
	if err := syscall.Mount("overlay", root, "overlay", 0, options); err != nil {
		t.Fatalf("mount an overlay file system: %v", err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(root, syscall.MNT_DETACH) })
	return root
}

// probes is what the summary says of probed functions, by file and function.
func probes(t *testing.T, result *live.Result) map[string]int {
	t.Helper()
	var summary struct {
		Probes []struct {
			File     string `json:"file"`
			Function string `json:"function"`
		} `json:"probes"`
	}
	if err := json.Unmarshal([]byte(result.Stdout), &summary); err != nil {
		t.Fatalf("%v\n%s", err, result.Stdout)
	}
	counts := map[string]int{}
	for _, p := range summary.Probes {
		counts[p.File+" "+p.Function]++
	}
	return counts
}

func TestContainersOfOneImageShareProbes(t *testing.T) {
	live.RequireBPF(t)
	image := muslRoot(t)
	var all []*container
	var args []string
	for range 3 {
		c := namespaced(t, overlay(t, image))
		all = append(all, c)
		args = append(args, "--container", c.id)
	}
	if same := devices(t, all, "/usr/lib/libleak.so"); len(same) != len(all) {
		t.Logf("maps have the file under %d device numbers: this kernel tells of the layer's file by itself", len(same))
	}
	tr := live.TraceArgs(t, append(args, "--mode", "exact", "--json")...)
	for i, c := range all {
		c.leak(t, fmt.Sprintf("leak %d 1009", 11+i))
	}
	result := tr.Stop(t)
	for i, c := range all {
		checkLeak(t, result, labelled(result.Profile, "container", c.id[:12]), blocks(int64(11+i), 1009))
	}
	counts := probes(t, result)
	if counts["/lib/ld-musl-x86_64.so.1 malloc"] != 1 {
		t.Errorf("malloc is not probed once: %v", counts)
	}
	for function, n := range counts {
		if n != 1 {
			t.Errorf("%s is probed %d times, though three containers have one file of it", function, n)
		}
	}
}

// A file that a container has written to is another one than the image's, though the overlay numbers both alike.
func TestAFileThatOneContainerChangedHasProbesOfItsOwn(t *testing.T) {
	live.RequireBPF(t)
	image := muslRoot(t)
	plain, changed := overlay(t, image), overlay(t, image)
	// A change of mode copies the file up, with its size and its time.
	if err := os.Chmod(filepath.Join(changed, "lib/ld-musl-x86_64.so.1"), 0o555); err != nil {
		t.Fatal(err)
	}
	a, b := namespaced(t, plain), namespaced(t, changed)
	tr := live.TraceArgs(t, "--container", a.id, "--container", b.id, "--mode", "exact", "--json")
	a.leak(t, "leak 23 1009")
	b.leak(t, "leak 29 2003")
	result := tr.Stop(t)
	checkLeak(t, result, labelled(result.Profile, "container", a.id[:12]), blocks(23, 1009))
	checkLeak(t, result, labelled(result.Profile, "container", b.id[:12]), blocks(29, 2003))
	if counts := probes(t, result); counts["/lib/ld-musl-x86_64.so.1 malloc"] != 2 {
		t.Errorf("two files define malloc, probed are %v", counts)
	}
}

// devices are the device numbers that the containers' maps have for a file.
func devices(t *testing.T, all []*container, path string) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	for _, c := range all {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", c.pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 5 && fields[5] == path {
				found[fields[3]] = true
			}
		}
	}
	return found
}
