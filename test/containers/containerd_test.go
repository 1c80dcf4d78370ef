package containers

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// containerd is a daemon of the test's own, with its own state, beside one that the machine may run.
type containerd struct {
	socket string
	image  string
}

// startContainerd runs Debian's containerd with runc until the test ends.
func startContainerd(t *testing.T) *containerd {
	t.Helper()
	live.RequireBPF(t)
	requireTool(t, "runc")
	path := requireTool(t, "containerd")
	dir := shortDir(t)
	d := &containerd{socket: filepath.Join(dir, "c.sock"), image: image(t)}
	// The pod's own container asks for more protection from the OOM killer than a machine without CAP_SYS_RESOURCE gives.
	config := fmt.Sprintf(`version = 2
root = %q
state = %q
[grpc]
address = %q
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
restrict_oom_score_adj = true
`, dir+"/root", dir+"/state", d.socket, imageName)
	if err := os.WriteFile(dir+"/config.toml", []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(dir + "/log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(path, "-c", dir+"/config.toml", "-l", "warn")
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-done
		if text, _ := os.ReadFile(dir + "/log"); t.Failed() {
			t.Logf("containerd's log: %s", text)
		}
	})
	await(t, "containerd's answer", func() bool {
		select {
		case <-done:
			text, _ := os.ReadFile(dir + "/log")
			t.Fatalf("containerd does not run here: %s", text)
		default:
		}
		_, err := try("ctr", "-a", d.socket, "version")
		return err == nil
	})
	t.Setenv("CONTAINERD_ADDRESS", d.socket)
	return d
}

func (d *containerd) ctr(t *testing.T, namespace string, args ...string) string {
	t.Helper()
	return run(t, "ctr", append([]string{"-a", d.socket, "-n", namespace}, args...)...)
}

// load puts the image into a namespace.
func (d *containerd) load(t *testing.T, namespace string) {
	t.Helper()
	d.ctr(t, namespace, "image", "import", d.image)
	t.Cleanup(func() { d.ctr(t, namespace, "image", "rm", "--sync", imageName) })
}

// start runs a leaker in a container and returns its pid on the host.
func (d *containerd) start(t *testing.T, namespace, name string, p *pipes) int {
	t.Helper()
	d.ctr(t, namespace, "run", "-d", "--null-io", "--mount", "type=bind,src="+p.dir+",dst=/io,options=rbind:rw", imageName, name, "/bin/leaker", "/io")
	t.Cleanup(func() { d.remove(t, namespace, name) })
	p.expect(t, "ready")
	for line := range strings.Lines(d.ctr(t, namespace, "tasks", "ls")) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == name {
			pid, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			return pid
		}
	}
	t.Fatalf("ctr does not list the task %s", name)
	return 0
}

// remove ends a container if it is there.
func (d *containerd) remove(t *testing.T, namespace, name string) {
	t.Helper()
	ctr := func(args ...string) error {
		_, err := try("ctr", append([]string{"-a", d.socket, "-n", namespace}, args...)...)
		return err
	}
	if ctr("containers", "info", name) != nil {
		return
	}
	_ = ctr("tasks", "kill", "-s", "KILL", name)
	await(t, "the end of container "+name, func() bool { _ = ctr("tasks", "rm", name); return ctr("containers", "rm", name) == nil })
}

func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", patience, what)
		}
	}
}

func TestAContainerOfContainerdIsTracedThroughItsRestart(t *testing.T) {
	d := startContainerd(t)
	d.load(t, "default")
	for whom, args := range map[string][]string{
		"by name":          {"--container", "web"},
		"by control group": {"--cgroup", "/default/web"},
	} {
		t.Run(whom, func(t *testing.T) {
			p := ioDir(t)
			first := d.start(t, "default", "web", p)
			tr := live.TraceArgs(t, append(args, "--mode", "exact")...)
			p.leak(t, "leak 23 1009")
			probes := live.Breakpoints(t, first)
			d.remove(t, "default", "web")
			second := d.start(t, "default", "web", p)
			awaitProbed(t, second, probes)
			p.leak(t, "leak 29 2003")
			result := tr.Stop(t)
			if result.ExitCode != 130 {
				t.Errorf("exit code %d, want 130\n%s%s", result.ExitCode, result.Stdout, result.Stderr)
			}
			checkLeak(t, result, labelled(result.Profile, "pid", strconv.Itoa(first)), blocks(23, 1009))
			checkLeak(t, result, labelled(result.Profile, "pid", strconv.Itoa(second)), blocks(29, 2003))
			mapping(t, result.Profile, "/usr/lib/libleak.so")
		})
	}
}

// The control group /prod/db tells nothing: only containerd knows that it is a container.
func TestAContainerInAnotherNamespaceOfContainerdIsFoundByItsSocket(t *testing.T) {
	d := startContainerd(t)
	d.load(t, "prod")
	p, other := ioDir(t), ioDir(t)
	d.start(t, "prod", "db", p)
	d.start(t, "prod", "db2", other)
	tr := live.TraceArgs(t, "--container", "db", "--mode", "exact")
	p.leak(t, "leak 31 1013")
	other.leak(t, "leak 37 1019")
	result := tr.Stop(t)
	checkLeak(t, result, result.Profile, blocks(31, 1013))
}
