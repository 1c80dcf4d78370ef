package containers

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

// container is a leaker in namespaces of its own, without a runtime.
type container struct {
	*pipes
	root string
	id   string // names its control group, as Docker does it
	pid  int    // the host's number
}

// enter makes the root read-only and the only one, and runs the leaker in it. The old root goes away, so that the leaker's
// mount namespace has nothing of the host.
const enter = `set -e
mount --make-rprivate /
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -o remount,bind,ro "$1"
cd "$1"
pivot_root . old
exec /bin/busybox sh -c '/bin/busybox umount -l /old && exec /bin/leaker /io'
`

// namespaced runs a leaker in new pid, mount, user, network, IPC and host name namespaces.
func namespaced(t *testing.T, root string) *container {
	t.Helper()
	c := &container{root: root, pipes: newPipes(t, filepath.Join(root, "io")), id: containerID(t, root)}
	group := newGroup(t, filepath.Join("docker", c.id))
	script := "echo $$ >" + group + "/cgroup.procs && exec " +
		`unshare --user --map-root-user --pid --mount --net --ipc --uts --fork --kill-child sh -c "$0" sh "$1"`
	p := live.StartCmd(t, exec.Command("sh", "-c", script, enter, root))
	c.expect(t, "ready")
	c.pid = leakerBelow(t, p.PID)
	return c
}

// containerID is like those of runtimes, another one for each container.
func containerID(t *testing.T, root string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(t.Name()+root+strconv.Itoa(os.Getpid()))))
}

// newGroup makes a control group in the hierarchy with memory limits, whichever version that is, and the groups above.
func newGroup(t *testing.T, name string) string {
	t.Helper()
	base := "/sys/fs/cgroup/memory"
	if _, err := os.Stat(base); err != nil {
		base = "/sys/fs/cgroup"
	}
	group := base
	for part := range strings.SplitSeq("allocsnoop-test/"+name, "/") {
		group = filepath.Join(group, part)
		if err := os.Mkdir(group, 0o755); err != nil && !os.IsExist(err) {
			t.Fatalf("make a control group: %v", err)
		}
	}
	t.Cleanup(func() {
		// The last process may be on its way out. The groups above go with their last child.
		for end := time.Now().Add(patience); os.Remove(group) != nil; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("control group %s cannot be removed", group)
				return
			}
		}
		for dir := filepath.Dir(group); dir != base && os.Remove(dir) == nil; dir = filepath.Dir(dir) {
		}
	})
	return group
}

// leakerBelow is the process below pid whose program is the leaker.
func leakerBelow(t *testing.T, pid int) int {
	t.Helper()
	for {
		if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); filepath.Base(exe) == "leaker" {
			return pid
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			t.Fatal(err)
		}
		if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
			t.Fatalf("find the leaker: children are %q", text)
		}
	}
}

// blocks is the book of n blocks that are in use.
func blocks(n, size int64) live.Book {
	return live.Book{AllocObjects: n, AllocBytes: n * size, InUseObjects: n, InUseBytes: n * size}
}

func checkLeak(t *testing.T, result *live.Result, p *profile.Profile, want live.Book) {
	t.Helper()
	if got := live.Sum(p, "malloc", "malloc", "leak_blocks", "leak", "main"); got != want {
		t.Errorf("malloc < leak_blocks < leak < main: got %+v, want %+v\n%s%s", got, want, result.Stdout, result.Stderr)
	}
}

// mapping is the profile's entry of a file, by the path that the target sees.
func mapping(t *testing.T, p *profile.Profile, path string) *profile.Mapping {
	t.Helper()
	var files []string
	for _, m := range p.Mapping {
		if m.File == path {
			return m
		}
		files = append(files, m.File)
	}
	t.Fatalf("the profile has no mapping of %s, only of %q", path, files)
	return nil
}

func TestAForeignReadOnlyRootInNamespacesIsTracedFromOutside(t *testing.T) {
	live.RequireBPF(t)
	for _, kind := range rootKinds {
		t.Run(kind.name, func(t *testing.T) {
			c := namespaced(t, kind.make(t))
			if _, err := os.Stat("/usr/lib/libleak.so"); err == nil {
				t.Fatal("the host has /usr/lib/libleak.so too: the test would prove nothing")
			}
			// 1 is the leaker's pid in its own namespace.
			for _, whom := range [][]string{{"--pid", strconv.Itoa(c.pid)}, {"--container", c.id[:12], "--pid", "1"}} {
				tr := live.TraceArgs(t, append(whom, "--mode", "exact")...)
				c.leak(t, "leak 23 1009")
				result := tr.Stop(t)
				if result.ExitCode != 130 {
					t.Fatalf("%s: exit code %d, want 130\n%s%s", whom, result.ExitCode, result.Stdout, result.Stderr)
				}
				checkLeak(t, result, result.Profile, blocks(23, 1009))
				mapping(t, result.Profile, "/usr/lib/libleak.so")
				mapping(t, result.Profile, kind.libc)
			}
		})
	}
}

func TestSymbolsComeFromFilesThatTheContainerDeletedOrReplaced(t *testing.T) {
	live.RequireBPF(t)
	for _, how := range []string{"deleted", "replaced"} {
		t.Run(how, func(t *testing.T) {
			root := muslRoot(t)
			c := namespaced(t, root)
			for _, name := range []string{"bin/leaker", "usr/lib/libleak.so", "lib/ld-musl-x86_64.so.1"} {
				path := filepath.Join(root, name)
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				if how == "replaced" {
					install(t, filepath.Join(root, "bin/busybox"), path)
				}
			}
			tr := live.TraceArgs(t, "--container", c.id, "--mode", "exact")
			c.leak(t, "leak 29 2003")
			result := tr.Stop(t)
			checkLeak(t, result, result.Profile, blocks(29, 2003))
		})
	}
}

func TestContainersThatOneProfileHoldsAreToldApart(t *testing.T) {
	live.RequireBPF(t)
	root := muslRoot(t)
	a := namespaced(t, root)
	second := filepath.Join(t.TempDir(), "root")
	if text, err := exec.Command("cp", "-a", root, second).CombinedOutput(); err != nil {
		t.Fatalf("copy the root: %v\n%s", err, text)
	}
	for _, name := range []string{"in", "out"} {
		if err := os.Remove(filepath.Join(second, "io", name)); err != nil {
			t.Fatal(err)
		}
	}
	b := namespaced(t, second)
	tr := live.TraceArgs(t, "--container", a.id, "--container", b.id, "--mode", "exact")
	a.leak(t, "leak 11 1009")
	b.leak(t, "leak 13 1013")
	b.leak(t, "fork 17 1019")
	result := tr.Stop(t)
	checkLeak(t, result, result.Profile, live.Book{
		AllocObjects: 41, AllocBytes: 11*1009 + 13*1013 + 17*1019, InUseObjects: 41, InUseBytes: 11*1009 + 13*1013 + 17*1019,
	})
	checkLeak(t, result, labelled(result.Profile, "container", a.id[:12]), blocks(11, 1009))
	checkLeak(t, result, labelled(result.Profile, "container", b.id[:12]), live.Book{
		AllocObjects: 30, AllocBytes: 13*1013 + 17*1019, InUseObjects: 30, InUseBytes: 13*1013 + 17*1019,
	})
}

// labelled keeps the samples with a label.
func labelled(p *profile.Profile, key, value string) *profile.Profile {
	only := p.Copy()
	only.Sample = nil
	for _, sample := range p.Sample {
		if values := sample.Label[key]; len(values) == 1 && values[0] == value {
			only.Sample = append(only.Sample, sample)
		}
	}
	return only
}
