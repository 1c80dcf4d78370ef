package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// A hook is one perf event with a BPF program on it.
//
// cilium/ebpf's links cannot ask for inherited uprobes, which are what makes a forked child's first allocation seen. So
// the few system calls stand here. Inherited uprobes must be defined through tracefs: those of the
// uprobe PMU keep a pointer to their path in the tracer's memory, and a fork of the target that inherits one fails.
type hook struct {
	perf int // perf event, -1 when closed
	link int // BPF link, -1 where the program was set by ioctl (before 5.15)
}

// Close detaches the program. It may be called twice.
func (h *hook) Close() error {
	var errs []error
	for _, fd := range []*int{&h.link, &h.perf} {
		if *fd < 0 {
			continue
		}
		errs = append(errs, unix.Close(*fd))
		*fd = -1
	}
	return errors.Join(errs...)
}

// openTracepoint opens the tracepoint with the given id for one process (all of its threads see a uprobe's), or on all CPUs
// with pid -1. inherit carries it into the children that the process's main thread forks, before they run.
func openTracepoint(id uint64, pid int, inherit bool) (int, error) {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Config: id, Sample: 1, Wakeup: 1}
	attr.Size = uint32(unsafe.Sizeof(attr))
	cpu := -1
	if pid < 0 {
		cpu = 0 // programs on a tracepoint run on all CPUs, whatever the event says
	}
	if inherit {
		attr.Bits |= unix.PerfBitInherit
		if keepsEvents() {
			attr.Sample_type = readingSample
		}
	}
	return unix.PerfEventOpen(&attr, pid, cpu, -1, unix.PERF_FLAG_FD_CLOEXEC)
}

// When a CPU goes from a process to its child, or to another child of the same parent, and both have the same inherited
// events, the kernel exchanges the events rather than to switch them. A uprobe's event stays bound to the memory of the
// process that it was made for, and ends with the process that it has come to: the probes of a child would vanish when its
// sibling ends. Events that read their counts with each sample are not exchanged (6.13); no sample is ever taken here.
const readingSample = unix.PERF_SAMPLE_READ | unix.PERF_SAMPLE_TID

// keepsEvents tells whether the kernel knows inherited events that are not exchanged.
var keepsEvents = sync.OnceValue(func() bool {
	attr := dummyEvent()
	attr.Bits |= unix.PerfBitInherit
	attr.Sample_type = readingSample
	fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return false
	}
	_ = unix.Close(fd)
	return true
})

func dummyEvent() unix.PerfEventAttr {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_DUMMY, Bits: unix.PerfBitDisabled}
	attr.Size = uint32(unsafe.Sizeof(attr))
	return attr
}

// keepEvents keeps a process's inherited events from being exchanged with those of its children and siblings where they do
// not do so themselves: an event that is not inherited makes the two sets differ.
func keepEvents(pid int) ([]io.Closer, error) {
	if keepsEvents() {
		return nil, nil
	}
	attr := dummyEvent()
	fd, err := unix.PerfEventOpen(&attr, pid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("keep the events of process %d: %w", pid, err)
	}
	return []io.Closer{&hook{perf: fd, link: -1}}, nil
}

// attachTracepoint puts prog on the tracepoint with the given id, on all CPUs.
func attachTracepoint(prog *ebpf.Program, id uint64, haveLink bool) (*hook, error) {
	perf, err := openTracepoint(id, -1, false)
	if err != nil {
		return nil, fmt.Errorf("open tracepoint %d: %w", id, err)
	}
	return setProgram(perf, prog, 0, haveLink)
}

func setProgram(perf int, prog *ebpf.Program, cookie uint64, haveLink bool) (*hook, error) {
	h := &hook{perf: perf, link: -1}
	if err := h.set(prog, cookie, haveLink); err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

func (h *hook) set(prog *ebpf.Program, cookie uint64, haveLink bool) error {
	if haveLink {
		link, err := createPerfLink(prog.FD(), h.perf, cookie)
		if err != nil {
			return fmt.Errorf("link program to perf event: %w", err)
		}
		h.link = link
	} else if err := unix.IoctlSetInt(h.perf, unix.PERF_EVENT_IOC_SET_BPF, prog.FD()); err != nil {
		return fmt.Errorf("set program of perf event: %w", err)
	}
	if err := unix.IoctlSetInt(h.perf, unix.PERF_EVENT_IOC_ENABLE, 0); err != nil {
		return fmt.Errorf("enable perf event: %w", err)
	}
	return nil
}

const (
	bpfLinkCreate = 28
	bpfPerfEvent  = 41
)

// createPerfLink is BPF_LINK_CREATE for a perf event (5.15), with a cookie.
func createPerfLink(prog, perf int, cookie uint64) (int, error) {
	attr := struct {
		prog, target uint32
		attachType   uint32
		flags        uint32
		cookie       uint64
	}{uint32(prog), uint32(perf), bpfPerfEvent, 0, cookie}
	return bpfCall(bpfLinkCreate, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
}

func bpfCall(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func readNumber(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 0, 64)
}

// tracefs is a mount of its own that no other process sees: the file system may be mounted nowhere, and mounting it
// where everybody looks would leave a trace behind.
type tracefs struct{ fd int }

func openTracefs() (*tracefs, error) {
	fs, err := unix.Fsopen("tracefs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open tracefs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("create tracefs: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("mount tracefs: %w", err)
	}
	return &tracefs{fd}, nil
}

func (t *tracefs) Close() error {
	if t.fd < 0 {
		return nil
	}
	fd := t.fd
	t.fd = -1
	return unix.Close(fd)
}

// id is the number of a tracepoint ("syscalls/sys_enter_mmap").
func (t *tracefs) id(name string) (uint64, error) {
	fd, err := unix.Openat(t.fd, "events/"+name+"/id", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("find tracepoint %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	var id uint64
	if _, err := fmt.Fscan(f, &id); err != nil {
		return 0, fmt.Errorf("read id of tracepoint %s: %w", name, err)
	}
	return id, nil
}

// defineUprobe makes a uprobe event of the file behind path. It costs nothing until a perf event is opened on it.
func (t *tracefs) defineUprobe(name, path string, offset uint64, ret bool) (id uint64, err error) {
	kind := 'p'
	if ret {
		kind = 'r'
	}
	if err := t.command(fmt.Sprintf("%c:%s %s:%#x", kind, name, path, offset)); err != nil {
		return 0, fmt.Errorf("define uprobe at %s+%#x: %w", path, offset, err)
	}
	return t.id(name)
}

// removeUprobe takes a definition away. The kernel lets go of closed events a little later than Close returns, and calls
// the definition busy until then.
func (t *tracefs) removeUprobe(name string) error {
	var err error
	for range 100 {
		err = t.command("-:" + name)
		if !errors.Is(err, unix.EBUSY) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		return fmt.Errorf("remove uprobe %s: %w", name, err)
	}
	return nil
}

func (t *tracefs) command(line string) error {
	fd, err := unix.Openat(t.fd, "uprobe_events", unix.O_WRONLY|unix.O_APPEND|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(line))
	return err
}
