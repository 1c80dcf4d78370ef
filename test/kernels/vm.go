package kernels

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Job is one boot.
type Job struct {
	Image   *Image
	Command []string // run with stdout and stderr together; Command[0] is looked up inside the image
	Dir     string   // working directory inside; / when empty
	Env     []string // added to PATH, HOME and TERM
	// Modules are loaded before the command, in this order; see modules for what there is.
	Modules  []string
	MemoryMB int    // 2048 when 0
	CPUs     int    // 2 when 0
	Append   string // more kernel command line
	// CgroupV1 mounts the v1 memory controller at /sys/fs/cgroup/memory in place of cgroup v2 at /sys/fs/cgroup.
	CgroupV1 bool
}

// Result is what came out of it.
type Result struct {
	Output   []byte // of the command
	ExitCode int
	Console  []byte // the kernel's log and init's messages
}

// errNoInit is a machine that died before init ran. Emulated kernels do so now and then (a lost timer, a corrupted
// list); it says nothing about the job.
var errNoInit = errors.New("the machine did not reach init")

// Run boots the kernel, runs the job's command and waits for the machine to power off. An error means that the machine
// did not get that far; a command that fails is a Result with its exit code.
func (k *Kernel) Run(ctx context.Context, job Job) (*Result, error) {
	const attempts = 4
	for i := 1; ; i++ {
		result, err := k.runOnce(ctx, job)
		if i == attempts || !errors.Is(err, errNoInit) {
			return result, err
		}
	}
}

func (k *Kernel) runOnce(ctx context.Context, job Job) (*Result, error) {
	dir, err := os.MkdirTemp("", "kernels-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := k.writeInitramfs(filepath.Join(dir, "initramfs"), job); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", k.qemuArgs(dir, job)...)
	if out, err := cmd.CombinedOutput(); err != nil && ctx.Err() == nil {
		return nil, fmt.Errorf("run qemu: %w: %s", err, bytes.TrimSpace(out))
	}
	result, err := readResult(dir)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		err = fmt.Errorf("kernel %s: %w\n%s", k.Package, err, lastLines(result.Console, 25))
	}
	return result, err
}

// readResult reads what the three serial ports wrote. The status port says "started" and then the exit code.
func readResult(dir string) (*Result, error) {
	var result Result
	result.Console, _ = os.ReadFile(filepath.Join(dir, "console"))
	result.Output, _ = os.ReadFile(filepath.Join(dir, "output"))
	status, _ := os.ReadFile(filepath.Join(dir, "status"))
	code, started := strings.CutPrefix(string(status), "started\n")
	if !started {
		return &result, errNoInit
	}
	var err error
	if result.ExitCode, err = strconv.Atoi(strings.TrimSpace(code)); err != nil {
		return &result, errors.New("powered off before the command ended")
	}
	return &result, nil
}

// qemuArgs wires three serial ports: the kernel's console, the command's output, the command's exit status.
func (k *Kernel) qemuArgs(dir string, job Job) []string {
	memory, cpus := job.MemoryMB, job.CPUs
	if memory == 0 {
		memory = 2048
	}
	if cpus == 0 {
		cpus = 2
	}
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-reboot", "-display", "none",
		"-m", strconv.Itoa(memory), "-smp", strconv.Itoa(cpus),
		"-kernel", k.Image(), "-initrd", filepath.Join(dir, "initramfs"),
		"-append", "console=ttyS0 panic=-1 quiet " + job.Append,
	}
	for _, name := range []string{"console", "output", "status"} {
		args = append(args, "-serial", "file:"+filepath.Join(dir, name))
	}
	return args
}

func (k *Kernel) writeInitramfs(name string, job Job) error {
	if job.Image == nil || len(job.Command) == 0 {
		return errors.New("a job needs an image and a command")
	}
	job.Image.Add("/init", 0o755, []byte(initScript(job)))
	for _, module := range job.Modules {
		if err := job.Image.AddFile("/modules/"+module+".ko", filepath.Join(k.dir, module+".ko")); err != nil {
			return err
		}
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = job.Image.WriteTo(f)
	return errors.Join(err, f.Close())
}

func initScript(job Job) string {
	var s strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&s, format+"\n", args...) }
	line("#!/bin/busybox sh")
	line("/bin/busybox --install -s /bin")
	line("mount -t devtmpfs none /dev; for t in 1 2; do stty -F /dev/ttyS$t raw -echo; done # or \\n would become \\r\\n")
	line("echo started >/dev/ttyS2")
	line("export PATH=/bin:/usr/bin:/sbin HOME=/root TERM=dumb")
	for _, m := range []string{"proc /proc", "sysfs /sys", "tmpfs /tmp"} {
		kind, where, _ := strings.Cut(m, " ")
		line("mount -t %s none %s", kind, where)
	}
	line("mount -t tracefs none /sys/kernel/tracing; mount -t bpf none /sys/fs/bpf")
	if job.CgroupV1 {
		line("mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory; mount -t cgroup -o memory none /sys/fs/cgroup/memory")
	} else {
		line("mount -t cgroup2 none /sys/fs/cgroup; echo +memory +pids >/sys/fs/cgroup/cgroup.subtree_control")
	}
	line("ip link set lo up")
	for _, module := range job.Modules {
		line("insmod /modules/%s.ko", module)
	}
	for _, v := range job.Env {
		line("export %s", quote(v))
	}
	dir := job.Dir
	if dir == "" {
		dir = "/"
	}
	line("cd %s", quote(dir))
	quoted := make([]string, len(job.Command))
	for i, arg := range job.Command {
		quoted[i] = quote(arg)
	}
	line("%s >/dev/ttyS1 2>&1 </dev/null", strings.Join(quoted, " "))
	line("echo $? >/dev/ttyS2")
	line("poweroff -f")
	return s.String()
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func lastLines(b []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte("\n"))
}
