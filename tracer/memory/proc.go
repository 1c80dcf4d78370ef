package memory

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// FS is a mounted procfs. Root is where; empty means /proc.
type FS struct{ Root string }

// Sentinels; the errors that wrap them say which process, and why.
var (
	ErrGone         = errors.New("the process is gone")
	ErrKernelThread = errors.New("a kernel thread has no memory of its own")
	ErrNoPermission = errors.New("permission denied")
)

// Path is a file of a process, or with pid 0 of procfs itself.
func (fs FS) Path(pid int, elem ...string) string {
	root := fs.Root
	if root == "" {
		root = "/proc"
	}
	if pid != 0 {
		root = filepath.Join(root, strconv.Itoa(pid))
	}
	return filepath.Join(append([]string{root}, elem...)...)
}

// Maps reads the ranges of a process, with thread stacks recognised by where the threads' stack pointers are.
func (fs FS) Maps(pid int) ([]Range, error) {
	var ranges []Range
	err := fs.read(pid, "maps", func(r io.Reader) (err error) {
		ranges, err = ParseMaps(r)
		return err
	})
	if err == nil {
		err = fs.checkMapped(pid, len(ranges))
	}
	if err != nil {
		return nil, err
	}
	markThreadStacks(len(ranges), func(i int) *Range { return &ranges[i] }, fs.stackPointers(pid))
	return ranges, nil
}

// Smaps reads the ranges of a process and what each uses. It makes the kernel walk every page table of the process, under
// its lock: milliseconds for each GiB.
func (fs FS) Smaps(pid int) ([]RangeUsage, error) {
	ranges, err := fs.readSmaps(pid)
	if err != nil {
		return nil, err
	}
	markThreadStacks(len(ranges), func(i int) *Range { return &ranges[i].Range }, fs.stackPointers(pid))
	return ranges, nil
}

// readSmaps is Smaps without a look at each thread.
func (fs FS) readSmaps(pid int) ([]RangeUsage, error) {
	var ranges []RangeUsage
	err := fs.read(pid, "smaps", func(r io.Reader) (err error) {
		ranges, err = ParseSmaps(r)
		return err
	})
	if err == nil {
		err = fs.checkMapped(pid, len(ranges))
	}
	if err != nil {
		return nil, err
	}
	return ranges, nil
}

// Rollup reads what a whole process uses; on kernels before 4.14 by adding up smaps.
func (fs FS) Rollup(pid int) (Usage, error) {
	var sum Usage
	err := fs.read(pid, "smaps_rollup", func(r io.Reader) (err error) {
		sum, err = ParseSmapsRollup(r)
		return err
	})
	if !errors.Is(err, os.ErrNotExist) || fs.State(pid).Gone() {
		return sum, err
	}
	ranges, err := fs.Smaps(pid)
	for i := range ranges {
		sum.Add(&ranges[i].Usage)
	}
	return sum, err
}

// RSSByKind is the resident memory of a process by kind of range, in bytes.
func RSSByKind(pid int) (map[string]uint64, error) { return FS{}.RSSByKind(pid) }

// RSSByKind is the resident memory of a process by kind of range, in bytes.
func (fs FS) RSSByKind(pid int) (map[string]uint64, error) {
	ranges, err := fs.Smaps(pid)
	if err != nil {
		return nil, err
	}
	sums := map[string]uint64{}
	for i := range ranges {
		if rss := ranges[i].RSS; rss > 0 {
			sums[string(ranges[i].Kind)] += rss
		}
	}
	return sums, nil
}

// read opens a file of a process and has it parsed; a failure is explained.
func (fs FS) read(pid int, name string, parse func(io.Reader) error) error {
	f, err := os.Open(fs.Path(pid, name))
	if err != nil {
		return fs.Explain(pid, "read "+name, err)
	}
	defer f.Close()
	if err := parse(f); err != nil {
		return fs.Explain(pid, "read "+name, err)
	}
	return nil
}

// checkMapped tells an end in the middle of the reading, which looks like an end of file, from a whole list.
func (fs FS) checkMapped(pid, n int) error {
	state := fs.State(pid)
	switch {
	case state.KernelThread:
		return fmt.Errorf("pid %d (%s): %w", pid, state.Comm, ErrKernelThread)
	case state.Gone(), n == 0:
		return fmt.Errorf("read maps of pid %d: %w", pid, ErrGone)
	}
	return nil
}

// State is what /proc/PID/stat says about a process.
type State struct {
	Comm         string
	Letter       byte // R, S, D, T, Z, ...; 0 when there is no such process
	PPID         int
	Threads      int
	StartTicks   uint64 // after boot; with the pid it names a process for good
	KernelThread bool
}

// Gone says whether the process has no memory any more: it ended, though its parent may not have noticed (a zombie).
func (s State) Gone() bool { return s.Letter == 0 || s.Letter == 'Z' || s.Letter == 'X' }

// State reads /proc/PID/stat; a process that does not exist has the zero State.
func (fs FS) State(pid int) State {
	text, err := os.ReadFile(fs.Path(pid, "stat"))
	if err != nil {
		return State{}
	}
	return parseStat(text)
}

// parseStat reads "PID (COMM) STATE PPID ...". COMM may hold spaces and parentheses.
func parseStat(text []byte) State {
	const kernelThread = 0x00200000 // PF_KTHREAD
	open, shut := bytes.IndexByte(text, '('), bytes.LastIndexByte(text, ')')
	if open < 0 || shut < open {
		return State{}
	}
	fields := strings.Fields(string(text[shut+1:]))
	if len(fields) < 20 {
		return State{}
	}
	number := func(field int) uint64 { // numbered as in proc(5), where comm is 2
		v, _ := strconv.ParseUint(fields[field-3], 10, 64)
		return v
	}
	return State{
		Comm:         string(text[open+1 : shut]),
		Letter:       fields[0][0],
		PPID:         int(number(4)),
		Threads:      int(number(20)),
		StartTicks:   number(22),
		KernelThread: number(9)&kernelThread != 0,
	}
}

// maxThreads bounds how many threads are looked at for their stack pointers.
const maxThreads = 20000

// stackPointers are those of the threads that wait in the kernel; a running one does not tell.
func (fs FS) stackPointers(pid int) []uint64 {
	tids, err := fs.threads(pid)
	if err != nil || len(tids) < 2 {
		return nil // the first thread's stack has a name
	}
	var pointers []uint64
	for _, tid := range tids[:min(len(tids), maxThreads)] {
		text, err := os.ReadFile(fs.Path(pid, "task", strconv.Itoa(tid), "syscall"))
		if errors.Is(err, os.ErrPermission) {
			return nil
		}
		if sp := parseSyscallSP(text); sp != 0 {
			pointers = append(pointers, sp)
		}
	}
	return pointers
}

// parseSyscallSP reads "NR ARG*6 SP PC", or "-1 SP PC" outside a system call, or "running".
func parseSyscallSP(text []byte) uint64 {
	fields := bytes.Fields(text)
	if len(fields) < 3 {
		return 0
	}
	sp, _ := strconv.ParseUint(string(fields[len(fields)-2]), 0, 64)
	return sp
}

// threads lists the thread ids of a process in ascending order.
func (fs FS) threads(pid int) ([]int, error) {
	entries, err := os.ReadDir(fs.Path(pid, "task"))
	if err != nil {
		return nil, fs.Explain(pid, "list threads", err)
	}
	tids := make([]int, 0, len(entries))
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// Explain turns a failure on a process into an error that says what to do about it. A nil error stays nil.
func (fs FS) Explain(pid int, action string, err error) error {
	if err == nil {
		return nil
	}
	state := fs.State(pid)
	switch {
	case state.KernelThread:
		return fmt.Errorf("%s of pid %d (%s): %w", action, pid, state.Comm, ErrKernelThread)
	case state.Gone():
		return fmt.Errorf("%s of pid %d: %w", action, pid, ErrGone)
	case errors.Is(err, os.ErrPermission):
		cause := ""
		if why := bare(err); why.Error() != ErrNoPermission.Error() { // EPERM reads differently, and tells something
			cause = fmt.Sprintf(" (%v)", why)
		}
		return fmt.Errorf("%s of pid %d (%s): %w%s: %s", action, pid, state.Comm, ErrNoPermission, cause,
			strings.Join(fs.denials(pid), "; "))
	}
	return fmt.Errorf("%s of pid %d: %w", action, pid, err)
}

// bare takes the path, which the message has already, out of an error.
func bare(err error) error {
	var path *os.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// denials are the reasons why the kernel may refuse to show a process's memory, the most likely first.
func (fs FS) denials(pid int) []string {
	var reasons []string
	uid, ok := fs.owner(pid)
	if ok && os.Geteuid() != 0 && int(uid) != os.Geteuid() {
		reasons = append(reasons, fmt.Sprintf("it runs as user %d and you are %d: run as root", uid, os.Geteuid()))
	}
	if !hasCapability(fs, unix.CAP_SYS_PTRACE) {
		reasons = append(reasons,
			"this process has no CAP_SYS_PTRACE (sudo; in a container: docker run --cap-add SYS_PTRACE, "+
				"in Kubernetes securityContext.capabilities.add: [SYS_PTRACE])")
	}
	if scope := fs.ptraceScope(); scope > 0 {
		reasons = append(reasons, fmt.Sprintf("kernel.yama.ptrace_scope is %d: %s", scope, scopeMeaning(scope)))
	}
	if fs.inOtherUserNamespace(pid) {
		reasons = append(reasons, "it lives in a container with a user namespace of its own: run on the host as root, "+
			"or inside that container")
	}
	if len(reasons) == 0 {
		reasons = append(reasons, "a security module (SELinux, AppArmor, seccomp) forbids it: see the kernel's audit log")
	}
	return reasons
}

func scopeMeaning(scope int) string {
	switch scope {
	case 1:
		return "only a parent may look, or CAP_SYS_PTRACE (sysctl kernel.yama.ptrace_scope=0)"
	case 2:
		return "only CAP_SYS_PTRACE may look (sysctl kernel.yama.ptrace_scope=0)"
	}
	return "nobody may look until the next boot"
}

func (fs FS) ptraceScope() int {
	text, err := os.ReadFile(fs.Path(0, "sys/kernel/yama/ptrace_scope"))
	if err != nil {
		return 0
	}
	scope, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	return scope
}

func (fs FS) owner(pid int) (uid uint32, ok bool) {
	text, err := os.ReadFile(fs.Path(pid, "status"))
	if err != nil {
		return 0, false
	}
	fields := strings.Fields(statusLine(text, "Uid:"))
	if len(fields) < 2 {
		return 0, false
	}
	v, err := strconv.ParseUint(fields[1], 10, 32)
	return uint32(v), err == nil
}

func hasCapability(fs FS, number uint) bool {
	text, err := os.ReadFile(fs.Path(0, "self/status"))
	if err != nil {
		return true // unknown: do not blame it
	}
	caps, err := strconv.ParseUint(strings.TrimSpace(statusLine(text, "CapEff:")), 16, 64)
	return err != nil || caps&(1<<number) != 0
}

func (fs FS) inOtherUserNamespace(pid int) bool {
	own, err1 := os.Readlink(fs.Path(0, "self/ns/user"))
	other, err2 := os.Readlink(fs.Path(pid, "ns/user"))
	return err1 == nil && err2 == nil && own != other
}

// statusLine is the rest of the line of /proc/PID/status that starts with key.
func statusLine(text []byte, key string) string {
	for line := range bytes.Lines(text) {
		if rest, ok := bytes.CutPrefix(line, []byte(key)); ok {
			return string(bytes.TrimSpace(rest))
		}
	}
	return ""
}
