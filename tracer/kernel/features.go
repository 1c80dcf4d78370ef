// Package kernel finds out what the running kernel can do for a trace, by trying it, and attaches what the eBPF library
// does not know yet.
//
// The trap: a version number says little. Distributions port features back, configurations and security modules take
// them away, so every answer here comes from a tiny program that was loaded or refused.
package kernel

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// AttachTraceUprobeSession is the attach type of a program that runs at a function's entry and, if it asks for it, at
// its return (6.13). It is the program's expected attach type as well as the link's.
const AttachTraceUprobeSession = ebpf.AttachType(57)

// HaveRingBuffer reports whether events can reach user space in order through one buffer (5.8).
func HaveRingBuffer() error { return features.HaveMapType(ebpf.RingBuf) }

// HaveTaskStorage reports whether a probe can keep state with the thread that it runs in (5.13 in probes).
func HaveTaskStorage() error {
	return errors.Join(
		features.HaveMapType(ebpf.TaskStorage),
		features.HaveProgramHelper(ebpf.Kprobe, asm.FnTaskStorageGet),
		features.HaveProgramHelper(ebpf.Kprobe, asm.FnGetCurrentTaskBtf),
	)
}

// HaveTaskPtRegs reports whether a tracepoint's program can read the user registers of the thread (5.15).
func HaveTaskPtRegs() error { return features.HaveProgramHelper(ebpf.Kprobe, asm.FnTaskPtRegs) }

// HaveCookie reports whether a probe can learn which of its attachments was hit (5.15).
func HaveCookie() error { return features.HaveProgramHelper(ebpf.Kprobe, asm.FnGetAttachCookie) }

// HaveFindVMA reports whether a program that is called like a function can look behind a mapping (5.17). Kernels without
// it have maps tell of files below overlay file systems, so that nobody needs it there.
func HaveFindVMA() error { return features.HaveProgramHelper(ebpf.Syscall, asm.FnFindVma) }

// HaveUprobeMulti reports whether many uprobes can be attached by one cheap call (6.6).
func HaveUprobeMulti() error { return features.HaveBPFLinkUprobeMulti() }

// HaveBoundedLoops reports whether the verifier accepts loops (5.3).
func HaveBoundedLoops() error { return features.HaveBoundedLoops() }

// HaveUprobes reports whether the kernel has uprobes and lets us use them.
func HaveUprobes() error {
	_, err := os.Stat("/sys/bus/event_source/devices/uprobe/type")
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("uprobes: no perf event source: %w", ebpf.ErrNotSupported)
	}
	return err
}

// HaveUprobeSession reports whether one probe can serve entry and return, the return only when the entry wants it
// (6.13).
func HaveUprobeSession() error { return haveUprobeSession() }

var haveUprobeSession = sync.OnceValue(func() error {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "probe_session", Type: ebpf.Kprobe, AttachType: AttachTraceUprobeSession, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.E2BIG) {
		return fmt.Errorf("uprobe session: %w", ebpf.ErrNotSupported)
	}
	if err != nil {
		return fmt.Errorf("uprobe session: %w", err)
	}
	defer prog.Close()
	// The kernel looks at the attach type before the path, and at the path before it attaches anything: a directory
	// is refused with EBADF by a kernel that knows sessions.
	_, err = UprobeSession(prog, "/", SessionOptions{Offsets: []uint64{0}})
	switch {
	case errors.Is(err, unix.EBADF):
		return nil
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("uprobe session: %w", ebpf.ErrNotSupported)
	case err == nil:
		return errors.New("uprobe session: a directory was accepted as a file")
	}
	return err
})

// SessionOptions say where a session goes.
type SessionOptions struct {
	Offsets []uint64 // in the file
	Cookies []uint64 // one for each offset, or none
	PID     int      // 0: every process
}

// linkCreateUprobeMulti is the kernel's union bpf_attr for BPF_LINK_CREATE of an uprobe_multi link.
type linkCreateUprobeMulti struct {
	progFD, targetFD, attachType, flags   uint32
	path, offsets, refCtrOffsets, cookies uint64
	count, multiFlags, pid, _             uint32
}

const bpfLinkCreate = 28

// UprobeSession attaches a program loaded with AttachTraceUprobeSession to places in a file.
func UprobeSession(prog *ebpf.Program, path string, options SessionOptions) (link.Link, error) {
	if len(options.Offsets) == 0 {
		return nil, errors.New("attach uprobe session: no offsets")
	}
	if n := len(options.Cookies); n != 0 && n != len(options.Offsets) {
		return nil, fmt.Errorf("attach uprobe session: %d cookies for %d offsets", n, len(options.Offsets))
	}
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return nil, fmt.Errorf("attach uprobe session: %w", err)
	}
	// The attribute holds addresses as numbers, which the garbage collector does not see: pin what they point to.
	var pinner runtime.Pinner
	defer pinner.Unpin()
	pin := func(p unsafe.Pointer) uint64 {
		pinner.Pin(p)
		return uint64(uintptr(p))
	}
	attr := linkCreateUprobeMulti{
		progFD: uint32(prog.FD()), attachType: uint32(AttachTraceUprobeSession),
		path: pin(unsafe.Pointer(name)), offsets: pin(unsafe.Pointer(&options.Offsets[0])),
		count: uint32(len(options.Offsets)), pid: uint32(options.PID),
	}
	if len(options.Cookies) > 0 {
		attr.cookies = pin(unsafe.Pointer(&options.Cookies[0]))
	}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, bpfLinkCreate, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(prog)
	if errno != 0 {
		return nil, fmt.Errorf("attach uprobe session to %s: %w", path, errno)
	}
	return link.NewFromFD(int(fd))
}

// EmulatesLongNops reports whether the kernel emulates nops of several bytes under a uprobe instead of single-stepping
// them (6.18). It goes by the version: no program can see the difference but in its cost.
func EmulatesLongNops() bool {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return false
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 6 || major == 6 && minor >= 18
}
