package target

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// ID names a process for good: pids are reused, a pid and a start time are not.
type ID struct {
	PID   int    // in the pid namespace of the /proc that is read
	Start uint64 // clock ticks after boot, field 22 of /proc/PID/stat; 0 when the process was gone before it was read
}

// Process is what is known about a process. Strings are as the process chose them: escape them before they are printed.
type Process struct {
	ID
	Parent int
	Comm   string
	// Exe is the program's path as the process sees it; empty when it cannot be read.
	Exe string
	// Cgroup is the path of its group in the hierarchy with memory limits.
	Cgroup    string
	Container Container
	// NSPIDs are the process's ids in its pid namespaces, outermost (that of /proc) first; the last one is its own.
	NSPIDs []int
}

// InnerPID is the pid that the process itself sees.
func (p *Process) InnerPID() int {
	if n := len(p.NSPIDs); n > 0 {
		return p.NSPIDs[n-1]
	}
	return p.PID
}

// String names the process in messages: "942 (nginx)", "942 (nginx, 7 in container 4f1c8d9a0b2e)".
func (p *Process) String() string {
	where := ""
	if inner := p.InnerPID(); inner != p.PID {
		where = fmt.Sprintf(", %d in", inner)
		if id := p.Container.Short(); id != "" {
			where += " container " + safe(id)
		} else {
			where += " its namespace"
		}
	}
	return fmt.Sprintf("%d (%s%s)", p.PID, safe(p.Comm), where)
}

// Read reads what is known about a process. The error is memory.ErrGone, among others, when it does not exist.
func Read(fs memory.FS, pid int) (Process, error) {
	state := fs.State(pid)
	if state.Gone() {
		return Process{}, fmt.Errorf("read process %d: %w", pid, memory.ErrGone)
	}
	p := Process{ID: ID{pid, state.StartTicks}, Parent: state.PPID, Comm: state.Comm}
	if state.KernelThread {
		return p, fmt.Errorf("read process %d (%s): %w", pid, safe(p.Comm), memory.ErrKernelThread)
	}
	p.Exe = readExe(fs, pid)
	p.readCgroup(fs)
	p.NSPIDs = readNSPIDs(fs, pid)
	// Only now it is certain that all of this was one process.
	if fs.State(pid).StartTicks != p.Start {
		return Process{}, fmt.Errorf("read process %d: %w", pid, memory.ErrGone)
	}
	return p, nil
}

// readExe is the program's path inside the process's root. The kernel prints it from our root when it can reach it, as for
// a chroot, and from the root of the mount namespace otherwise.
func readExe(fs memory.FS, pid int) string {
	exe, err := os.Readlink(fs.Path(pid, "exe"))
	if err != nil {
		return ""
	}
	if root, err := os.Readlink(fs.Path(pid, "root")); err == nil && root != "/" {
		if inner, ok := strings.CutPrefix(exe, root); ok && strings.HasPrefix(inner, "/") {
			exe = inner
		}
	}
	return strings.TrimSuffix(exe, " (deleted)")
}

func (p *Process) readCgroup(fs memory.FS) {
	f, err := os.Open(fs.Path(p.PID, "cgroup"))
	if err != nil {
		return
	}
	defer f.Close()
	list, err := cgroup.ParseMemberships(f)
	if err != nil {
		return
	}
	p.Cgroup = cgroup.MemoryPath(list)
	p.Container = containerOfAny(p.Cgroup, list)
}

// containerOfAny asks the memory hierarchy first: a process may sit in the host's group of hierarchies that its runtime
// does not use.
func containerOfAny(memoryPath string, list []cgroup.Membership) Container {
	c := ContainerOf(memoryPath)
	for i := 0; c.ID == "" && i < len(list); i++ {
		c = ContainerOf(list[i].Path)
	}
	return c
}

// readNSPIDs reads the NSpid line of status (kernel 4.1); without it, the pid is the only one known.
func readNSPIDs(fs memory.FS, pid int) []int {
	status, err := os.ReadFile(fs.Path(pid, "status"))
	if err != nil {
		return nil
	}
	var pids []int
	for _, field := range strings.Fields(statusLine(status, "NSpid:")) {
		n, err := strconv.Atoi(field)
		if err != nil {
			return nil
		}
		pids = append(pids, n)
	}
	return pids
}

// statusLine is the rest of the line of /proc/PID/status that starts with key.
func statusLine(status []byte, key string) string {
	for line := range bytes.Lines(status) {
		if rest, ok := bytes.CutPrefix(line, []byte(key)); ok {
			return string(bytes.TrimSpace(rest))
		}
	}
	return ""
}

// listPIDs are the processes in /proc, in ascending order of the directory (not of number).
func listPIDs(fs memory.FS) ([]int, error) {
	dir, err := os.Open(fs.Path(0))
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// skippable says that a process cannot be a target now and is no reason to complain: it ended, or belongs to the kernel.
func skippable(err error) bool {
	return errors.Is(err, memory.ErrGone) || errors.Is(err, memory.ErrKernelThread)
}
