package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"
)

// State is how a check came out.
type State string

// The states. Limited means that a trace works and loses something; missing means that a trace is not possible.
const (
	OK      State = "ok"
	Limited State = "limited"
	Missing State = "missing"
)

// Check is one thing that a trace wants from the machine.
type Check struct {
	Name   string `json:"name"`
	State  State  `json:"state"`
	Detail string `json:"detail"`        // what was found
	Fix    string `json:"fix,omitempty"` // what to do about it; empty when all is well
}

// Machine reads what is asked of a machine. The zero value is this one; tests give it other roots.
type Machine struct {
	Proc, Sys string // mount points of procfs and sysfs; empty: /proc and /sys
}

func (m Machine) proc(elem ...string) string { return under(m.Proc, "/proc", elem) }
func (m Machine) sys(elem ...string) string  { return under(m.Sys, "/sys", elem) }

func under(root, standard string, elem []string) string {
	if root == "" {
		root = standard
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

// Checks looks at everything a trace wants, the essential first.
func (m Machine) Checks() []Check {
	checks := []Check{m.release(), m.load(), m.btf(), feature("uprobes", HaveUprobes(), Missing,
		"user-space functions can be probed", "build the kernel with CONFIG_UPROBE_EVENTS, and mount sysfs at /sys")}
	checks = append(checks, featureChecks()...)
	return append(checks, m.capabilities(), m.tracefs(), m.paranoid(), m.lockdown(), m.cgroup(), m.memlock(), m.pidNamespace())
}

func featureChecks() []Check {
	const newer = "a newer kernel has it; nothing is lost without"
	return []Check{
		feature("ring buffer", HaveRingBuffer(), Missing, "events arrive in order, losses are counted", "needs Linux 5.8"),
		feature("task storage", HaveTaskStorage(), Limited, "calls are kept with their thread",
			"Linux 5.13 or newer has it; without, stacks may be cut when a thread is preempted"),
		feature("cookies", HaveCookie(), Limited, "one program serves all probes", newer+" (5.15)"),
		feature("user registers", HaveTaskPtRegs(), Limited, "system calls have full stacks",
			"Linux 5.15 or newer has it; without, stacks of mmap and brk may be short"),
		feature("uprobe_multi", HaveUprobeMulti(), Limited, "all probes are attached by one call", newer+" (6.6)"),
		feature("uprobe session", HaveUprobeSession(), Limited, "the return of a call that is not sampled costs nothing",
			newer+" (6.13)"),
	}
}

func feature(name string, err error, without State, with, fix string) Check {
	switch {
	case err == nil:
		return Check{name, OK, with, ""}
	case errors.Is(err, ebpf.ErrNotSupported):
		return Check{name, without, "not in this kernel", fix}
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return Check{name, without, "not allowed to look", "run as root"}
	}
	return Check{name, without, firstLine(err.Error()), fix}
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

func (m Machine) release() Check {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return Check{"kernel", Limited, err.Error(), ""}
	}
	release := unix.ByteSliceToString(u.Release[:])
	c := Check{"kernel", OK, fmt.Sprintf("Linux %s, %s", release, runtime.GOARCH), ""}
	if major, minor, ok := version(release); ok && (major < 5 || major == 5 && minor < 10) {
		c.State, c.Fix = Missing, "tracing needs Linux 5.10; maps, dump and inspect work here"
	}
	if runtime.GOARCH != "amd64" && runtime.GOARCH != "arm64" {
		c.State, c.Fix = Missing, "tracing knows x86-64 and arm64; maps works here"
	}
	return c
}

func version(release string) (major, minor int, ok bool) {
	first, rest, _ := strings.Cut(release, ".")
	second, _, _ := strings.Cut(rest, ".")
	digits := second
	if i := strings.IndexFunc(second, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = second[:i]
	}
	major, err1 := strconv.Atoi(first)
	minor, err2 := strconv.Atoi(digits)
	return major, minor, err1 == nil && err2 == nil
}

// load tries the one thing that everything else hangs on.
func (m Machine) load() Check {
	c := Check{"load a program", OK, "allowed", ""}
	// Needed below 5.11 only, and may be forbidden where it is not needed: the load itself is the judge.
	_ = rlimit.RemoveMemlock()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "doctor", Type: ebpf.Kprobe, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err == nil {
		prog.Close()
		return c
	}
	c.State, c.Detail = Missing, firstLine(err.Error())
	switch {
	case errors.Is(err, unix.EPERM):
		c.Detail = "not permitted"
		c.Fix = "run as root, or with CAP_BPF and CAP_PERFMON; in a container also let seccomp pass bpf()"
	case errors.Is(err, unix.ENOSYS):
		c.Fix = "build the kernel with CONFIG_BPF_SYSCALL"
	default:
		c.Fix = "see lockdown and capabilities below"
	}
	return c
}

func (m Machine) btf() Check {
	c := Check{"BTF", OK, "the kernel describes its types", ""}
	if _, err := os.Stat(m.sys("kernel/btf/vmlinux")); err != nil {
		c.State, c.Detail, c.Fix = Missing, "no "+m.sys("kernel/btf/vmlinux"), "use a kernel built with CONFIG_DEBUG_INFO_BTF"
	}
	return c
}

// needed are the capabilities that a trace uses, with what is lost without them. CAP_SYS_ADMIN stands in for the first
// two and for CAP_CHECKPOINT_RESTORE.
var needed = []struct {
	bit     int
	name    string
	without State
	lost    string
}{
	{unix.CAP_BPF, "CAP_BPF", Missing, "no program can be loaded"},
	{unix.CAP_PERFMON, "CAP_PERFMON", Missing, "no probe can be attached"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", Limited, "processes of other users cannot be looked into"},
	{unix.CAP_CHECKPOINT_RESTORE, "CAP_CHECKPOINT_RESTORE", Limited, "deleted or replaced libraries cannot be read"},
	{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", OK, ""}, // of no account since 5.11
}

func (m Machine) capabilities() Check {
	c := Check{Name: "capabilities", State: OK}
	status, err := os.ReadFile(m.proc("self/status"))
	if err != nil {
		return Check{"capabilities", Limited, firstLine(err.Error()), "mount procfs at /proc"}
	}
	effective, ok := capEff(string(status))
	if !ok {
		return Check{"capabilities", Limited, "no CapEff in /proc/self/status", "mount procfs at /proc"}
	}
	has := func(bit int) bool { return effective&(1<<bit) != 0 }
	var have, fixes []string
	for _, n := range needed {
		byAdmin := has(unix.CAP_SYS_ADMIN) && n.bit != unix.CAP_SYS_PTRACE && n.bit != unix.CAP_SYS_RESOURCE
		switch {
		case has(n.bit):
			have = append(have, strings.TrimPrefix(n.name, "CAP_"))
		case byAdmin, n.without == OK:
		default:
			c.State = worse(c.State, n.without)
			fixes = append(fixes, fmt.Sprintf("add %s (without it %s)", n.name, n.lost))
		}
	}
	if has(unix.CAP_SYS_ADMIN) {
		have = append(have, "SYS_ADMIN")
	}
	c.Detail, c.Fix = strings.Join(have, " "), strings.Join(fixes, "; ")
	if c.Detail == "" {
		c.Detail = "none of those that matter"
	}
	return c
}

func capEff(status string) (uint64, bool) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return n, err == nil
		}
	}
	return 0, false
}

func worse(a, b State) State {
	rank := map[State]int{OK: 0, Limited: 1, Missing: 2}
	if rank[b] > rank[a] {
		return b
	}
	return a
}

func (m Machine) tracefs() Check {
	c := Check{"tracefs", OK, "", ""}
	for _, dir := range []string{m.sys("kernel/tracing"), m.sys("kernel/debug/tracing")} {
		if _, err := os.Stat(filepath.Join(dir, "events")); err == nil {
			c.Detail = "mounted at " + dir
			return c
		}
	}
	filesystems, _ := os.ReadFile(m.proc("filesystems"))
	if strings.Contains(string(filesystems), "\ttracefs\n") {
		c.Detail = "not mounted; a private one is used"
		return c
	}
	c.State, c.Detail, c.Fix = Limited, "not in this kernel", "build the kernel with CONFIG_FTRACE: system calls cannot be traced without"
	return c
}

func (m Machine) paranoid() Check {
	value, err := os.ReadFile(m.proc("sys/kernel/perf_event_paranoid"))
	if err != nil {
		return Check{"perf events", Missing, "not in this kernel", "build the kernel with CONFIG_PERF_EVENTS"}
	}
	return Check{"perf events", OK, "perf_event_paranoid is " + strings.TrimSpace(string(value)) + ", of no account with CAP_PERFMON", ""}
}

// lockdown: in confidentiality mode the kernel refuses to let programs read memory.
func (m Machine) lockdown() Check {
	value, err := os.ReadFile(m.sys("kernel/security/lockdown"))
	if err != nil {
		return Check{"lockdown", OK, "off", ""}
	}
	mode := "none"
	if _, rest, ok := strings.Cut(string(value), "["); ok {
		mode, _, _ = strings.Cut(rest, "]")
	}
	c := Check{"lockdown", OK, mode, ""}
	if mode == "confidentiality" {
		c.State = Missing
		c.Fix = "boot with lockdown=integrity or none: stacks cannot be read in this mode"
	}
	return c
}

func (m Machine) cgroup() Check {
	controllers := m.sys("fs/cgroup/cgroup.controllers")
	if _, err := os.Stat(controllers); err == nil {
		return Check{"cgroups", OK, "version 2", ""}
	}
	if _, err := os.Stat(m.sys("fs/cgroup/memory")); err == nil {
		return Check{"cgroups", OK, "version 1", ""}
	}
	return Check{"cgroups", Limited, "none at " + m.sys("fs/cgroup"), "mount cgroups: --cgroup and --container need them"}
}

func (m Machine) memlock() Check {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		return Check{"locked memory", OK, firstLine(err.Error()), ""}
	}
	size := "unlimited"
	if limit.Cur != unix.RLIM_INFINITY {
		size = strconv.FormatUint(limit.Cur>>10, 10) + " KiB"
	}
	return Check{"locked memory", OK, "limit " + size + ", counted only before Linux 5.11", ""}
}

// pidNamespace: pids given by a person in another namespace are translated, and some processes cannot be seen.
func (m Machine) pidNamespace() Check {
	const initial = "pid:[4026531836]"
	name, err := os.Readlink(m.proc("self/ns/pid"))
	switch {
	case err != nil:
		return Check{"pid namespace", Limited, firstLine(err.Error()), "mount procfs at /proc"}
	case name != initial:
		return Check{"pid namespace", Limited, "not the host's",
			"only processes of this container can be named; run with --pid=host to see all"}
	}
	return Check{"pid namespace", OK, "the host's", ""}
}

// Able reports whether nothing essential is missing.
func Able(checks []Check) bool {
	for _, c := range checks {
		if c.State == Missing {
			return false
		}
	}
	return true
}
