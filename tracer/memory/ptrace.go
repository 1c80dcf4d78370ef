package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Register sets of PTRACE_GETREGSET that unix does not name.
const (
	regsGeneral = 1     // NT_PRSTATUS
	regsFloat   = 2     // NT_PRFPREG
	regsXState  = 0x202 // NT_X86_XSTATE: AVX and more
	regsTLS     = 0x401 // NT_ARM_TLS
)

// generalSize is the size of the general registers of a 64-bit thread.
var generalSize = map[string]int{"amd64": 27 * 8, "arm64": 34 * 8}[runtime.GOARCH]

// Bounds of a stop.
const (
	stopPatience   = 2 * time.Second // for threads that sleep where no signal wakes them
	stackCopy      = 256 << 10       // of each stack, from the stack pointer on
	allStacksCopy  = 64 << 20        // of all stacks together: tens of milliseconds
	allXStatesSize = 8 << 20         // AVX registers take up to 11 KiB a thread; beyond this they are left out
)

// threadRegs are the registers of one thread as the kernel has them in notes of a core.
type threadRegs struct {
	tid     int
	general []byte
	float   []byte
	extra   []byte // of type extraType
	extraTy uint32
}

// stopAndRead stops all threads, takes their registers and copies the used part of their stacks into the file, so that both
// belong to one moment, and lets them go on.
func (d *dumper) stopAndRead() error {
	type outcome struct {
		err error
	}
	done := make(chan outcome)
	go func() {
		// Ptrace binds to this OS thread, which ends with this goroutine since it stays locked. Whatever goes wrong, the kernel then
		// lets go of every thread.
		runtime.LockOSThread()
		s := &stopper{fs: d.p.fs, pid: d.p.pid}
		err := s.stop()
		if err == nil {
			d.stops = s.readAll()
			err = d.copyStacks()
		}
		s.release()
		d.result.Stop, d.result.Skipped, d.result.Why = s.length, s.skipped, s.why
		done <- outcome{err}
	}()
	if got := <-done; got.err != nil {
		return got.err
	}
	d.result.Threads = len(d.stops)
	return nil
}

// stopper holds the threads of a process.
type stopper struct {
	fs      FS
	pid     int
	seized  []int       // in order
	stopped map[int]int // tid to the signal that its stop withheld
	began   time.Time
	length  time.Duration
	skipped int
	why     string
}

// stop seizes and interrupts every thread, those as well that are born meanwhile.
func (s *stopper) stop() error {
	s.stopped = map[int]int{}
	known := map[int]bool{}
	for {
		fresh, err := s.seizeNew(known)
		if err != nil {
			return err
		}
		if len(fresh) == 0 {
			break
		}
		if s.began.IsZero() {
			s.began = time.Now()
		}
		for _, tid := range fresh {
			if err := ptrace(unix.PTRACE_INTERRUPT, tid, 0, 0); err != nil && err != unix.ESRCH {
				return fmt.Errorf("stop thread %d: %w", tid, err)
			}
		}
		s.await(fresh)
	}
	if len(s.stopped) == 0 {
		return s.fs.Explain(s.pid, "stop threads", errors.New("none of them stopped"))
	}
	return nil
}

func (s *stopper) seizeNew(known map[int]bool) ([]int, error) {
	tids, err := s.fs.threads(s.pid)
	if err != nil {
		return nil, err
	}
	var fresh []int
	for _, tid := range tids {
		if known[tid] {
			continue
		}
		known[tid] = true
		err := ptrace(unix.PTRACE_SEIZE, tid, 0, 0)
		if err == unix.ESRCH {
			continue // it ended
		}
		if err != nil {
			return nil, s.explainSeize(tid, err)
		}
		fresh = append(fresh, tid)
	}
	s.seized = append(s.seized, fresh...)
	return fresh, nil
}

func (s *stopper) explainSeize(tid int, err error) error {
	status, _ := os.ReadFile(s.fs.Path(s.pid, "status"))
	if tracer := statusLine(status, "TracerPid:"); tracer != "" && tracer != "0" {
		return fmt.Errorf("stop thread %d of pid %d: another debugger (pid %s) holds it already: %w", tid, s.pid, tracer, err)
	}
	return s.fs.Explain(s.pid, fmt.Sprintf("stop thread %d", tid), err)
}

// await waits until threads have stopped, or ended, or patience has.
func (s *stopper) await(tids []int) {
	deadline := time.Now().Add(stopPatience)
	for _, tid := range tids {
		for pause := 20 * time.Microsecond; ; pause = min(2*pause, time.Millisecond) {
			var status unix.WaitStatus
			got, err := unix.Wait4(tid, &status, unix.WALL|unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if got == tid && status.Stopped() {
				s.stopped[tid] = withheld(status)
			}
			if got == tid || err != nil {
				break
			}
			if time.Now().After(deadline) {
				s.skipped++
				s.why = "they sleep in the kernel where no signal reaches them"
				break
			}
			time.Sleep(pause)
		}
	}
}

// withheld is the signal that a stop kept from a thread; 0 when it is the stop that was asked for.
func withheld(status unix.WaitStatus) int {
	const eventStop = 128 // PTRACE_EVENT_STOP
	if uint32(status)>>16 == eventStop {
		return 0
	}
	return int(status.StopSignal())
}

// readAll reads the registers of the stopped threads, the first thread's first.
func (s *stopper) readAll() []threadRegs {
	var all []threadRegs
	extraSum := 0
	for _, tid := range s.seized {
		if _, ok := s.stopped[tid]; !ok {
			continue
		}
		regs := threadRegs{tid: tid, general: readRegs(tid, regsGeneral, 1024)}
		if len(regs.general) != generalSize {
			s.skipped++
			s.why = "they run 32-bit code, or ended"
			continue
		}
		regs.float = readRegs(tid, regsFloat, 1024)
		if extraSum < allXStatesSize {
			regs.extraTy = map[string]uint32{"amd64": regsXState, "arm64": regsTLS}[runtime.GOARCH]
			regs.extra = widenXState(readRegs(tid, uint(regs.extraTy), 32<<10))
			extraSum += len(regs.extra)
		}
		all = append(all, regs)
	}
	slices.SortStableFunc(all, func(a, b threadRegs) int {
		switch s.pid {
		case a.tid:
			return -1
		case b.tid:
			return 1
		}
		return 0
	})
	return all
}

func readRegs(tid int, set uint, size int) []byte {
	buf := make([]byte, size)
	vec := &unix.Iovec{Base: &buf[0]}
	vec.SetLen(size)
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GETREGSET, uintptr(tid), uintptr(set), uintptr(unsafe.Pointer(vec)), 0, 0)
	if errno != 0 {
		return nil
	}
	return slices.Clip(slices.Clone(buf[:vec.Len]))
}

// widenXState gives the AVX-512 registers of AMD processors, which keep them 256 bytes closer, the places that they have with
// Intel: debuggers before gdb 14 know no others, and those after recognise both.
func widenXState(raw []byte) []byte {
	const (
		xcr0At               = 464
		avx512               = 0xe0
		amdStart, intelStart = 832, 1088
		amdSize, amdSizePKRU = 2432, 2440
	)
	if len(raw) != amdSize && len(raw) != amdSizePKRU || raw[xcr0At]&avx512 != avx512 {
		return raw
	}
	wide := make([]byte, len(raw)+intelStart-amdStart)
	copy(wide, raw[:amdStart])
	copy(wide[intelStart:], raw[amdStart:])
	return wide
}

// release lets all threads go on, with the signals that their stops withheld.
func (s *stopper) release() {
	for _, tid := range s.seized {
		if signal, ok := s.stopped[tid]; ok {
			ptrace(unix.PTRACE_DETACH, tid, 0, uintptr(signal))
		}
	}
	if !s.began.IsZero() {
		s.length = time.Since(s.began)
	}
}

func ptrace(request int, tid int, addr, data uintptr) error {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// copyStacks copies the used part of each thread's stack to its place in the file while nothing moves.
func (d *dumper) copyStacks() error {
	const redZone = 128
	budget := uint64(allStacksCopy)
	buf := make([]byte, stackCopy+2*PageSize)
	for i := range d.stops {
		thread := Thread{Registers: words(d.stops[i].general)}
		sp := thread.sp(runtime.GOARCH)
		seg := d.segmentOf(sp)
		if seg == nil {
			continue // not selected
		}
		start := max((sp-redZone)&^(PageSize-1), seg.start)
		end := min(alignPage(sp+stackCopy), seg.end, start+uint64(len(buf)))
		for _, part := range without(Extent{start, end, Data}, d.taken) {
			if budget < part.Size() {
				return nil
			}
			budget -= part.Size()
			if err := d.copyChunk(seg, part.Start, part.End, buf); err != nil {
				return fmt.Errorf("read stack of thread %d: %w", d.stops[i].tid, err)
			}
			at := findExtent(d.taken, part.Start)
			d.taken = slices.Insert(d.taken, at, part)
		}
	}
	return nil
}

func words(raw []byte) []uint64 {
	out := make([]uint64, len(raw)/8)
	for i := range out {
		out[i] = binary.LittleEndian.Uint64(raw[8*i:])
	}
	return out
}

// statNumbers are the fields of /proc/PID/stat from the fourth on, for the notes of a core.
func (fs FS) statNumbers(pid int) []int64 {
	text, _ := os.ReadFile(fs.Path(pid, "stat"))
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	var out []int64
	for _, f := range fields[min(1, len(fields)):] {
		v, _ := strconv.ParseInt(f, 10, 64)
		out = append(out, v)
	}
	return out
}
