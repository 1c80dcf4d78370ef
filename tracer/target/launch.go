package target

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Command is a program to start and trace.
type Command struct {
	Args []string // the program, looked up in PATH, and its arguments
	// User runs it as another user: a name or uid, with an own group after a colon ("nginx", "1000:1000"). Groups, HOME,
	// USER and LOGNAME change too.
	User string
	Dir  string
	// Mapped is called with the process's pid while it stands still: once right after exec, when its program and its loader
	// are mapped, and again each time the loader has mapped executable code of a file. None of that code has run yet, so that
	// probes placed here miss nothing. An error ends the process.
	Mapped func(pid int) error
}

// Child is a started command.
type Child struct {
	process *os.Process
	status  *syscall.WaitStatus // when it ended before it was let go
}

// Start starts the command and returns once its program is about to run its first instruction, with all libraries that
// it is linked with mapped.
//
// Until then the process is traced with ptrace, as no live target ever is: it is this process's own child. Nothing less
// works. A stop at exec alone comes too early, the libraries are not mapped yet; a stop at the program's entry comes too
// late, constructors of libraries have run and allocated. So the loader's system calls are watched, from exec until the
// instruction at the entry, which is replaced for the time by one that traps. Then the process is let go for good.
func Start(c Command) (*Child, error) {
	path, attr, err := c.prepare()
	if err != nil {
		return nil, err
	}
	type result struct {
		child *Child
		err   error
	}
	done := make(chan result)
	go func() {
		// A traced process obeys the thread that traces it, no other.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		child, err := c.start(path, attr)
		done <- result{child, err}
	}()
	r := <-done
	return r.child, r.err
}

func (c Command) prepare() (string, *os.ProcAttr, error) {
	if len(c.Args) == 0 || c.Args[0] == "" {
		return "", nil, errors.New("start command: no command is given after --")
	}
	path, err := exec.LookPath(c.Args[0])
	if err != nil {
		return "", nil, fmt.Errorf("start command: %w", err)
	}
	attr := &os.ProcAttr{
		Dir:   c.Dir,
		Env:   os.Environ(),
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Ptrace: true},
	}
	if c.User == "" {
		return path, attr, nil
	}
	u, credential, err := lookupUser(c.User)
	if err != nil {
		return "", nil, fmt.Errorf("--user %s: %w", safe(c.User), err)
	}
	attr.Sys.Credential = credential
	attr.Env = userEnvironment(attr.Env, u)
	return path, attr, nil
}

func (c Command) start(path string, attr *os.ProcAttr) (*Child, error) {
	process, err := os.StartProcess(path, c.Args, attr)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("start %s: %w (kernel.yama.ptrace_scope=3 and some container filters forbid to start a program stopped; "+
			"start it by yourself and trace it with --pid)", safe(path), err)
	}
	if err != nil {
		return nil, fmt.Errorf("start command: %w", err)
	}
	s := &starter{pid: process.Pid, mapped: c.Mapped}
	if err := s.run(); err != nil {
		process.Kill()
		if s.ended == nil {
			process.Wait()
		}
		return nil, fmt.Errorf("start %s: %w", safe(path), err)
	}
	return &Child{process, s.ended}, nil
}

// starter brings a traced process from exec to its program's entry.
type starter struct {
	pid    int
	mapped func(int) error
	ended  *syscall.WaitStatus

	entry uint64 // address of the program's first instruction
	saved []byte // what stood there
	call  call   // the system call under way
}

type call struct {
	inside bool
	nr     uint64
	args   [6]uint64
}

func (s *starter) run() error {
	status, err := s.wait()
	if err != nil || s.ended != nil {
		return err
	}
	if status.StopSignal() != unix.SIGTRAP {
		return fmt.Errorf("it stopped with %v before exec", status.StopSignal())
	}
	// Without EXITKILL the process would stand still for ever if this one were killed.
	if err := unix.PtraceSetOptions(s.pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL); err != nil {
		return fmt.Errorf("set trace options: %w", err)
	}
	if err := s.report(); err != nil {
		return err
	}
	static, err := s.setTrap()
	if err != nil {
		return err
	}
	if !static {
		if err := s.untilEntry(); err != nil || s.ended != nil {
			return err
		}
	}
	if err := unix.PtraceDetach(s.pid); err != nil {
		return fmt.Errorf("let it go: %w", err)
	}
	return nil
}

// wait is the next stop of the process; its end is noted in ended.
func (s *starter) wait() (syscall.WaitStatus, error) {
	for {
		var status syscall.WaitStatus
		_, err := syscall.Wait4(s.pid, &status, syscall.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return status, fmt.Errorf("wait for it: %w", err)
		}
		if status.Exited() || status.Signaled() {
			s.ended = &status
		}
		return status, nil
	}
}

func (s *starter) report() error {
	if s.mapped == nil {
		return nil
	}
	return s.mapped(s.pid)
}

// setTrap puts a trapping instruction at the program's entry. A program without a loader stands there already.
func (s *starter) setTrap() (static bool, err error) {
	auxv, err := os.ReadFile("/proc/" + strconv.Itoa(s.pid) + "/auxv")
	if err != nil {
		return false, fmt.Errorf("find entry: %w", err)
	}
	s.entry = auxvValue(auxv, atEntry)
	info, err := syscallInfo(s.pid)
	if err != nil {
		return false, fmt.Errorf("find entry: %w", err)
	}
	if s.entry == 0 || info.ip == s.entry || auxvValue(auxv, atBase) == 0 {
		return true, nil
	}
	trap := trapInstruction[runtime.GOARCH]
	s.saved = make([]byte, len(trap))
	if _, err := unix.PtracePeekText(s.pid, uintptr(s.entry), s.saved); err != nil {
		return false, fmt.Errorf("read entry: %w", err)
	}
	if _, err := unix.PtracePokeText(s.pid, uintptr(s.entry), trap); err != nil {
		return false, fmt.Errorf("write entry: %w", err)
	}
	return false, nil
}

// trapInstruction are undefined instructions: they leave the program counter where it is, so that no register needs to
// be set back.
var trapInstruction = map[string][]byte{"amd64": {0x0f, 0x0b}, "arm64": {0, 0, 0, 0}}

// untilEntry lets the loader run, from system call to system call, until the program begins.
func (s *starter) untilEntry() error {
	deliver := 0
	for {
		if err := unix.PtraceSyscall(s.pid, deliver); err != nil {
			return fmt.Errorf("let the loader run: %w", err)
		}
		status, err := s.wait()
		if err != nil || s.ended != nil {
			return err
		}
		deliver = 0
		switch signal := status.StopSignal(); signal {
		case unix.SIGTRAP | 0x80:
			if err := s.onSyscall(); err != nil {
				return err
			}
		case unix.SIGILL:
			info, err := syscallInfo(s.pid)
			if err != nil {
				return fmt.Errorf("read registers: %w", err)
			}
			if info.ip != s.entry {
				deliver = int(signal)
				continue
			}
			if _, err := unix.PtracePokeText(s.pid, uintptr(s.entry), s.saved); err != nil {
				return fmt.Errorf("restore entry: %w", err)
			}
			return nil
		case unix.SIGTRAP: // an exec inside of the loader, which no loader does
		default:
			deliver = int(signal)
		}
	}
}

// onSyscall notes a system call at its entry and draws the consequence at its exit.
func (s *starter) onSyscall() error {
	info, err := syscallInfo(s.pid)
	if err != nil {
		return fmt.Errorf("read system call: %w", err)
	}
	switch info.op {
	case syscallEntry:
		s.call = call{true, info.data[0], [6]uint64(info.data[1:7])}
	case syscallExit:
		c := s.call
		s.call = call{}
		if c.inside && int64(info.data[0]) >= 0 && c.mapsCode() {
			return s.report()
		}
	}
	return nil
}

// mapsCode says whether the call made code executable: a file mapped so, or made so afterwards.
func (c call) mapsCode() bool {
	return c.nr == unix.SYS_MMAP && c.args[2]&unix.PROT_EXEC != 0 && c.args[3]&unix.MAP_ANONYMOUS == 0 ||
		c.nr == unix.SYS_MPROTECT && c.args[2]&unix.PROT_EXEC != 0
}

// callInfo is the kernel's struct ptrace_syscall_info.
type callInfo struct {
	op   uint8
	_    [3]uint8
	arch uint32
	ip   uint64
	sp   uint64
	data [8]uint64 // at entry: number and arguments; at exit: result, is-error
}

const (
	ptraceGetSyscallInfo = 0x420e // Linux 5.3
	syscallEntry         = 1
	syscallExit          = 2
	atBase, atEntry      = 7, 9
)

// syscallInfo reads where a stopped process stands, on any architecture.
func syscallInfo(pid int) (callInfo, error) {
	var info callInfo
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetSyscallInfo, uintptr(pid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return info, errno
	}
	return info, nil
}

// auxvValue is an entry of the auxiliary vector, pairs of words; 0 when it is not there.
func auxvValue(auxv []byte, key uint64) uint64 {
	for ; len(auxv) >= 16; auxv = auxv[16:] {
		if binary.NativeEndian.Uint64(auxv) == key {
			return binary.NativeEndian.Uint64(auxv[8:])
		}
	}
	return 0
}

// PID is the command's process id.
func (c *Child) PID() int { return c.process.Pid }

// Signal sends it a signal.
func (c *Child) Signal(s os.Signal) error { return c.process.Signal(s) }

// Wait waits for its end and returns the exit code as a shell would: 128 and the number of the signal that killed it.
func (c *Child) Wait() (int, error) {
	status := c.status
	if status == nil {
		state, err := c.process.Wait()
		if err != nil {
			return 0, fmt.Errorf("wait for the command: %w", err)
		}
		waited := state.Sys().(syscall.WaitStatus)
		status = &waited
	}
	if status.Signaled() {
		return 128 + int(status.Signal()), nil
	}
	return status.ExitStatus(), nil
}

// lookupUser reads NAME, UID, NAME:GROUP or UID:GID.
func lookupUser(text string) (*user.User, *syscall.Credential, error) {
	name, group, withGroup := strings.Cut(text, ":")
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	uid, numberErr := strconv.ParseUint(name, 10, 32)
	if err != nil && numberErr == nil {
		// A number needs no entry in /etc/passwd.
		u, err = &user.User{Uid: name, Gid: strconv.FormatUint(uid, 10), Username: name, HomeDir: "/"}, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("no such user: %w", err)
	}
	credential := &syscall.Credential{}
	if id, err := strconv.ParseUint(u.Uid, 10, 32); err == nil {
		credential.Uid = uint32(id)
	}
	gid := u.Gid
	if withGroup {
		if gid, err = lookupGroup(group); err != nil {
			return nil, nil, err
		}
	} else if groups, err := u.GroupIds(); err == nil {
		credential.Groups = numbers(groups)
	}
	id, err := strconv.ParseUint(gid, 10, 32)
	if err != nil {
		return nil, nil, fmt.Errorf("group %q: %w", gid, err)
	}
	credential.Gid = uint32(id)
	return u, credential, nil
}

func lookupGroup(name string) (string, error) {
	if g, err := user.LookupGroup(name); err == nil {
		return g.Gid, nil
	}
	if _, err := strconv.ParseUint(name, 10, 32); err != nil {
		return "", fmt.Errorf("no such group: %s", safe(name))
	}
	return name, nil
}

func numbers(texts []string) []uint32 {
	var list []uint32
	for _, text := range texts {
		if n, err := strconv.ParseUint(text, 10, 32); err == nil {
			list = append(list, uint32(n))
		}
	}
	return list
}

func userEnvironment(env []string, u *user.User) []string {
	changed := map[string]string{"HOME": u.HomeDir, "USER": u.Username, "LOGNAME": u.Username}
	var out []string
	for _, v := range env {
		name, _, _ := strings.Cut(v, "=")
		if _, ours := changed[name]; !ours {
			out = append(out, v)
		}
	}
	for _, name := range []string{"HOME", "USER", "LOGNAME"} {
		out = append(out, name+"="+changed[name])
	}
	return out
}
