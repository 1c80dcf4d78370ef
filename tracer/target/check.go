package target

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"golang.org/x/sys/unix"
)

// Sentinels of Check; the errors that wrap them are sentences for a person.
var (
	ErrThread       = errors.New("this is a thread")
	ErrZombie       = errors.New("the process has ended")
	ErrArchitecture = errors.New("the program is of another kind than this tracer")
	ErrSelf         = errors.New("a tracer cannot trace itself")
)

// Check says why a process cannot be traced, and what to do about it; nil when nothing speaks against it. Whether there
// is an allocator in it is for the scan of its files to say.
func Check(fs memory.FS, pid int) error {
	state := fs.State(pid)
	switch {
	case state.Letter == 0:
		return fmt.Errorf("no process %d: %w; %s", pid, memory.ErrGone, whereElse(fs))
	case state.KernelThread:
		return fmt.Errorf("process %d (%s): %w, there is nothing to trace", pid, safe(state.Comm), memory.ErrKernelThread)
	case state.Gone():
		return fmt.Errorf("process %d (%s): %w and waits for its parent %d to notice (a zombie); it has no memory", pid,
			safe(state.Comm), ErrZombie, state.PPID)
	case pid == os.Getpid():
		return fmt.Errorf("process %d: %w", pid, ErrSelf)
	}
	if leader := threadOf(fs, pid); leader != 0 {
		return fmt.Errorf("%d (%s): %w of process %d; trace that: --pid %d", pid, safe(state.Comm), ErrThread, leader, leader)
	}
	return checkProgram(fs, pid, state.Comm)
}

// whereElse helps a person who took the pid from a place with another pid namespace.
func whereElse(fs memory.FS) string {
	if pids := readNSPIDs(fs, os.Getpid()); len(pids) > 1 {
		return "this tracer runs in a pid namespace of its own: start it on the host, or in a container with --pid=host"
	}
	return "pids are as ps shows them on this machine; the one inside of a container is another (try --container)"
}

// threadOf is the process that a thread belongs to; 0 when pid is a process. /proc answers for threads too, though it
// does not list them.
func threadOf(fs memory.FS, pid int) int {
	status, err := os.ReadFile(fs.Path(pid, "status"))
	if err != nil {
		return 0
	}
	leader, err := strconv.Atoi(statusLine(status, "Tgid:"))
	if err != nil || leader == pid {
		return 0
	}
	return leader
}

// checkProgram looks at the head of the program's file.
func checkProgram(fs memory.FS, pid int, comm string) error {
	f, err := os.Open(fs.Path(pid, "exe"))
	if err != nil {
		return fs.Explain(pid, "open program", err)
	}
	defer f.Close()
	var head [20]byte
	if _, err := f.ReadAt(head[:], 0); err != nil || string(head[:4]) != elf.ELFMAG {
		return nil // no reason to refuse: the scan will say what is wrong with it
	}
	class, machine := elf.Class(head[elf.EI_CLASS]), elf.Machine(uint16(head[18])|uint16(head[19])<<8)
	if class == elf.ELFCLASS32 {
		return fmt.Errorf("process %d (%s): %w: 32 bits (%s); only 64-bit programs can be traced", pid, safe(comm), ErrArchitecture,
			strings.TrimPrefix(machine.String(), "EM_"))
	}
	if native := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[runtime.GOARCH]; machine != native {
		return fmt.Errorf("process %d (%s): %w: its file is for %s and runs in an emulator", pid, safe(comm), ErrArchitecture,
			strings.TrimPrefix(machine.String(), "EM_"))
	}
	return nil
}

// capabilities that a trace needs, any name of each group.
var needed = []struct {
	any []string
	bit []uint
	why string
}{
	{[]string{"CAP_BPF", "CAP_SYS_ADMIN"}, []uint{unix.CAP_BPF, unix.CAP_SYS_ADMIN}, "to load BPF programs"},
	{[]string{"CAP_PERFMON", "CAP_SYS_ADMIN"}, []uint{unix.CAP_PERFMON, unix.CAP_SYS_ADMIN}, "to place probes"},
	{[]string{"CAP_SYS_PTRACE"}, []uint{unix.CAP_SYS_PTRACE}, "to read other users' processes"},
}

// MissingCapabilities are those that this process lacks for a trace, in words; none for root on a host. Inside a user
// namespace capabilities count for nothing where BPF is concerned, and that is what is said.
func MissingCapabilities(fs memory.FS) []string {
	status, err := os.ReadFile(fs.Path(0, "self/status"))
	if err != nil {
		return nil
	}
	effective, err := strconv.ParseUint(statusLine(status, "CapEff:"), 16, 64)
	if err != nil {
		return nil
	}
	var missing []string
	for _, n := range needed {
		have := false
		for _, bit := range n.bit {
			have = have || effective&(1<<bit) != 0
		}
		if !have {
			missing = append(missing, strings.Join(n.any, " or ")+" "+n.why)
		}
	}
	if inUserNamespace(fs) {
		missing = append(missing, "the host's user namespace: this process runs in a user namespace of its own (rootless container?), "+
			"whose root may not use BPF")
	}
	return missing
}

// inUserNamespace reads the mapping of user ids: only the first namespace maps all of them onto themselves.
func inUserNamespace(fs memory.FS) bool {
	text, err := os.ReadFile(fs.Path(0, "self/uid_map"))
	if err != nil {
		return false
	}
	return strings.Join(strings.Fields(string(text)), " ") != "0 0 4294967295"
}
