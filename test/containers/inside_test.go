package containers

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"golang.org/x/sys/unix"
)

// inside is what `docker run --privileged --pid=host` makes for allocsnoop: another root and mount namespace with the
// machine's processes in /proc, a /sys that is read-only, no tracefs, no debugfs, no cgroup file system, a network and a
// cgroup namespace of its own. $1 is the root, $2 a directory that both sides see, the rest is the command.
const inside = `set -e
root=$1 shared=$2; shift 2
mount --make-rprivate /
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mkdir -p "$root$shared"
mount --bind "$shared" "$root$shared"
mount -o remount,bind,ro "$root"
cd "$root"
pivot_root . old
exec /bin/busybox sh -c '/bin/busybox umount -l /old && exec "$@"' sh "$@"
`

// inContainer starts allocsnoop in such a container. Nothing but it and busybox is in its root.
func inContainer(t *testing.T) func(string, ...string) *exec.Cmd {
	t.Helper()
	root := emptyRoot(t)
	if err := unix.Mknod(filepath.Join(root, "dev/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	shared := filepath.Dir(t.TempDir()) // of all of this test's
	return func(allocsnoop string, args ...string) *exec.Cmd {
		install(t, allocsnoop, filepath.Join(root, "bin/allocsnoop"))
		args = append([]string{"--mount", "--net", "--uts", "--ipc", "--cgroup", "sh", "-c", inside, "sh", root, shared, "/bin/allocsnoop"}, args...)
		return exec.Command("unshare", args...)
	}
}

func TestAllocsnoopInAPrivilegedContainerTracesOthers(t *testing.T) {
	live.RequireBPF(t)
	c := namespaced(t, muslRoot(t))
	command := inContainer(t)
	tr := live.TraceCmd(t, command, "--container", c.id[:12], "--mode", "exact")
	if text, err := os.ReadFile("/proc/" + strconv.Itoa(tr.PID()) + "/mountinfo"); err != nil || strings.Contains(string(text), "tracefs") || strings.Contains(string(text), "cgroup") {
		t.Errorf("allocsnoop's container has mounts that it should do without: %v\n%s", err, text)
	}
	c.leak(t, "leak 23 1009")
	c.leak(t, "fork 29 2003")
	result := tr.Stop(t)
	if result.ExitCode != 130 {
		t.Errorf("exit code %d, want 130\n%s%s", result.ExitCode, result.Stdout, result.Stderr)
	}
	checkLeak(t, result, result.Profile, live.Book{
		AllocObjects: 52, AllocBytes: 23*1009 + 29*2003, InUseObjects: 52, InUseBytes: 23*1009 + 29*2003,
	})
	mapping(t, result.Profile, "/usr/lib/libleak.so")
}

// The runtime's socket is in the machine's root only.
func TestAllocsnoopInAPrivilegedContainerAsksTheMachinesRuntimes(t *testing.T) {
	d := startContainerd(t)
	d.load(t, "prod")
	p := ioDir(t)
	d.start(t, "prod", "db", p)
	tr := live.TraceCmd(t, inContainer(t), "--container", "db", "--mode", "exact")
	p.leak(t, "leak 31 1013")
	result := tr.Stop(t)
	checkLeak(t, result, result.Profile, blocks(31, 1013))
}
