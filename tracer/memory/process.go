package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Process is the memory of a live process. It is safe for concurrent use.
type Process struct {
	fs      FS
	pid     int
	mem     *os.File // bound to the address space that the process had when it was opened
	pagemap *os.File
	info    Info
	ranges  []Range
	noVM    atomic.Bool // process_vm_readv is forbidden here (a container's seccomp filter): read /proc/PID/mem
}

var _ Image = (*Process)(nil)

// OpenProcess opens a live process's memory. Nothing is stopped: the memory changes while it is read.
func OpenProcess(pid int) (*Process, error) { return FS{}.OpenProcess(pid) }

// OpenProcess opens a live process's memory.
func (fs FS) OpenProcess(pid int) (*Process, error) {
	state := fs.State(pid)
	if state.KernelThread {
		return nil, fmt.Errorf("open memory of pid %d (%s): %w", pid, state.Comm, ErrKernelThread)
	}
	if state.Gone() {
		return nil, fmt.Errorf("open memory of pid %d: %w", pid, ErrGone)
	}
	p := &Process{fs: fs, pid: pid}
	if err := p.open(); err != nil {
		p.Close()
		return nil, err
	}
	p.info = Info{PID: pid, Comm: state.Comm, Arch: runtime.GOARCH, Started: startTime(state.StartTicks), Taken: time.Now()}
	p.info.Exe, _ = os.Readlink(fs.Path(pid, "exe"))
	p.info.Exe = strings.TrimSuffix(p.info.Exe, " (deleted)")
	p.info.Auxv, _ = os.ReadFile(fs.Path(pid, "auxv"))
	tids, _ := fs.threads(pid)
	for _, tid := range tids {
		p.info.Threads = append(p.info.Threads, Thread{TID: tid})
	}
	return p, nil
}

// startTime turns the ticks since boot that /proc/PID/stat has into a time.
func startTime(ticks uint64) time.Time {
	const ticksPerSecond = 100 // USER_HZ, which the kernel never changes
	var up unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(ticks)*(time.Second/ticksPerSecond) - time.Duration(up.Nano()))
}

func (p *Process) open() (err error) {
	if p.mem, err = os.Open(p.fs.Path(p.pid, "mem")); err != nil {
		return p.fs.Explain(p.pid, "open memory", err)
	}
	if p.pagemap, err = os.Open(p.fs.Path(p.pid, "pagemap")); err != nil {
		return p.fs.Explain(p.pid, "open page state", err)
	}
	p.ranges, err = p.fs.Maps(p.pid)
	return err
}

// Close lets go of the process. It may be called twice.
func (p *Process) Close() error {
	var errs []error
	for _, f := range []*os.File{p.mem, p.pagemap} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	p.mem, p.pagemap = nil, nil
	return errors.Join(errs...)
}

// Info says whose memory it is.
func (p *Process) Info() *Info { return &p.info }

// Ranges are those at the time of opening.
func (p *Process) Ranges() []Range { return p.ranges }

// ReadAt reads memory at an address. A never touched page reads as zeros (and is mapped by that: see Extents).
func (p *Process) ReadAt(b []byte, addr int64) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, at := 0, uint64(addr)
	for n < len(b) {
		m, err := p.readSome(b[n:], at+uint64(n))
		n += m
		if err != nil {
			return n, err
		}
	}
	// The pid may belong to another process by now, or to another program after an exec. The file cannot.
	return n, p.vouch(at)
}

// readSome reads a byte or more, or says why it cannot.
func (p *Process) readSome(b []byte, addr uint64) (int, error) {
	n, err := p.readVM(b, addr)
	if !errors.Is(err, errNoVM) {
		return n, err
	}
	return p.readFile(b, addr)
}

var errNoVM = errors.New("process_vm_readv is not to be had")

// readVM copies with one system call, twice as fast as the file does. It stops at an unreadable page.
func (p *Process) readVM(b []byte, addr uint64) (int, error) {
	if p.noVM.Load() {
		return 0, errNoVM
	}
	local := []unix.Iovec{{Base: &b[0]}}
	local[0].SetLen(len(b))
	remote := []unix.RemoteIovec{{Base: uintptr(addr), Len: len(b)}}
	n, err := unix.ProcessVMReadv(p.pid, local, remote, 0)
	switch err {
	case nil:
		return n, nil
	case unix.EFAULT:
		// Memory without read permission is still readable through the file: one page, then this way again.
		return p.readFile(b[:min(len(b), PageSize-int(addr%PageSize))], addr)
	case unix.ESRCH:
		return 0, p.gone()
	}
	p.noVM.Store(true)
	return 0, errNoVM
}

// readFile reads through /proc/PID/mem.
func (p *Process) readFile(b []byte, addr uint64) (int, error) {
	n, err := unix.Pread(int(p.mem.Fd()), b, int64(addr))
	switch {
	case err == unix.EIO, err == unix.EFAULT, err == unix.EINVAL, err == unix.ENXIO, err == unix.EOVERFLOW:
		return 0, &AbsentError{addr}
	case err != nil:
		return 0, p.fs.Explain(p.pid, "read memory", err)
	case n == 0:
		return 0, p.gone()
	}
	return n, nil
}

// vouch makes sure that the address space is alive, and with it the pid: an end of file says it is not.
func (p *Process) vouch(addr uint64) error {
	var one [1]byte
	n, err := unix.Pread(int(p.mem.Fd()), one[:], int64(addr))
	if n == 0 && err == nil {
		return p.gone()
	}
	return nil
}

func (p *Process) gone() error {
	if p.fs.State(p.pid).Gone() {
		return fmt.Errorf("read memory of pid %d: %w", p.pid, ErrGone)
	}
	return fmt.Errorf("read memory of pid %d: %w: it runs another program now", p.pid, ErrGone)
}

// Extents says which pages hold something. Anonymous pages that were never touched are zeros; pages of a file that are not
// mapped yet count as data, and so do swapped pages.
func (p *Process) Extents(start, end uint64) ([]Extent, error) {
	var out []Extent
	for i := range p.ranges {
		r := &p.ranges[i]
		low, high := max(start, r.Start), min(end, r.End)
		if low >= high || r.Kind == KindReserved {
			continue
		}
		if r.Kind != KindAnonymous && !r.IsAnonymous() {
			out = appendExtent(out, Extent{low, high, Data})
			continue
		}
		err := p.eachRun(low, high, func(run pageRun) error {
			kind := Zero
			if run.present || run.swapped {
				kind = Data
			}
			out = appendExtent(out, Extent{run.start, run.end, kind})
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

// appendExtent joins an extent with the last one if it goes on there.
func appendExtent(list []Extent, e Extent) []Extent {
	if n := len(list); n > 0 && list[n-1].End == e.Start && list[n-1].Kind == e.Kind {
		list[n-1].End = e.End
		return list
	}
	return append(list, e)
}

// pageRun is a run of pages in one state. A page that is neither present nor swapped was never touched, or was dropped.
type pageRun struct {
	start, end       uint64
	present, swapped bool
}

// Bits of a /proc/PID/pagemap entry.
const (
	pagemapPresent = 1 << 63
	pagemapSwapped = 1 << 62
)

// eachRun calls f for the page runs between two addresses. One read covers 32 MiB of addresses.
func (p *Process) eachRun(start, end uint64, f func(pageRun) error) error {
	const entries = 8192
	size := uint64(os.Getpagesize())
	buf := make([]byte, 8*entries)
	var run pageRun
	start &^= size - 1
	for at := start; at < end; {
		want := min(entries, int((end-at+size-1)/size))
		n, err := p.pagemap.ReadAt(buf[:8*want], int64(at/size*8))
		if n < 8 {
			if err == nil || errors.Is(err, io.EOF) {
				return p.gone()
			}
			return p.fs.Explain(p.pid, "read page state", err)
		}
		for i := 0; i+8 <= n; i += 8 {
			entry := binary.NativeEndian.Uint64(buf[i:])
			page := pageRun{at, at + size, entry&pagemapPresent != 0, entry&pagemapSwapped != 0}
			at += size
			if page.present == run.present && page.swapped == run.swapped && run.end == page.start {
				run.end = page.end
				continue
			}
			if run.end > 0 {
				if err := f(run); err != nil {
					return err
				}
			}
			run = page
		}
	}
	if run.end == 0 {
		return nil
	}
	run.end = min(run.end, end)
	return f(run)
}
