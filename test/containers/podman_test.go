package containers

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// podman keeps its images and containers in a directory of the test, and its service on a socket there.
type podman struct{ options []string }

func startPodman(t *testing.T) *podman {
	t.Helper()
	live.RequireBPF(t)
	requireTool(t, "runc")
	path := requireTool(t, "podman")
	dir := shortDir(t)
	p := &podman{[]string{
		"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp",
		// As this works without systemd, on both versions of control groups.
		"--cgroup-manager", "cgroupfs", "--runtime", "runc", "--storage-driver", "overlay", "--events-backend", "none",
	}}
	t.Cleanup(func() {
		// podman mounts its storage on itself and leaves that behind.
		_ = syscall.Unmount(dir+"/root/overlay", syscall.MNT_DETACH)
	})
	p.run(t, "load", "-q", "-i", image(t))
	socket := filepath.Join(dir, "p.sock")
	service := exec.Command(path, append(p.options, "system", "service", "--time", "0", "unix://"+socket)...)
	service.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := service.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = service.Process.Signal(syscall.SIGTERM)
		_ = service.Wait()
	})
	await(t, "podman's socket", func() bool { _, err := os.Stat(socket); return err == nil })
	t.Setenv("DOCKER_HOST", "unix://"+socket) // not CONTAINER_HOST, which would change podman's own command line
	return p
}

func (p *podman) run(t *testing.T, args ...string) string {
	t.Helper()
	return run(t, "podman", append(p.options, args...)...)
}

// start runs a leaker and returns the container's identifier and its pid on the host.
func (p *podman) start(t *testing.T, name string, io *pipes) (id string, pid int) {
	t.Helper()
	// Limits of its own: podman's are above what it may set inside of another container.
	id = p.run(t, "run", "-d", "--name", name, "--network", "none", "--read-only", "--ulimit", "nofile=512:512", "--ulimit", "nproc=512:512",
		"--volume", io.dir+":/io", imageName, "/bin/leaker", "/io")
	t.Cleanup(func() { _, _ = try("podman", append(p.options, "rm", "-f", "-t", "0", name)...) })
	io.expect(t, "ready")
	pid, err := strconv.Atoi(p.run(t, "inspect", name, "--format", "{{.State.Pid}}"))
	if err != nil {
		t.Fatal(err)
	}
	return id, pid
}

// Its storage is at no usual place, so that only the socket knows the name.
func TestAContainerOfPodmanIsTracedByNameThroughItsRestart(t *testing.T) {
	p := startPodman(t)
	io := ioDir(t)
	firstID, first := p.start(t, "web", io)
	tr := live.TraceArgs(t, "--container", "web", "--mode", "exact")
	io.leak(t, "leak 23 1009")
	probes := live.Breakpoints(t, first)
	p.run(t, "rm", "-f", "-t", "0", "web")
	secondID, second := p.start(t, "web", io)
	awaitProbed(t, second, probes)
	io.leak(t, "leak 29 2003")
	result := tr.Stop(t)
	checkLeak(t, result, labelled(result.Profile, "container", firstID[:12]), blocks(23, 1009))
	checkLeak(t, result, labelled(result.Profile, "container", secondID[:12]), blocks(29, 2003))
	if firstID == secondID {
		t.Error("both containers have the same identifier: the test would prove nothing")
	}
	mapping(t, result.Profile, "/usr/lib/libleak.so")
}
