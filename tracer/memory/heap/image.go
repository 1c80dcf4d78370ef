package heap

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// NewSpace is the memory of an image: a live process or a dump.
func NewSpace(img memory.Image) *Space {
	s := &Space{Mem: &watchedReader{mem: img}, Extents: img.Extents}
	for _, r := range img.Ranges() {
		s.Ranges = append(s.Ranges, Range{Start: r.Start, End: r.End, Perms: r.Perms.String(), Path: r.Path, Kind: r.Kind})
	}
	info := img.Info()
	for _, t := range info.Threads {
		s.Threads = append(s.Threads, Thread{TID: t.TID, SP: stackPointer(info.Arch, t.Registers), Registers: t.Registers})
	}
	return s
}

// watchedReader remembers the first error that ends all reading: the process is gone, the file is damaged. The walk itself
// takes every failed read for an absent page.
type watchedReader struct {
	mem   io.ReaderAt
	fatal atomic.Pointer[error]
}

func (r *watchedReader) ReadAt(b []byte, addr int64) (int, error) {
	n, err := r.mem.ReadAt(b, addr)
	if err != nil && !errors.Is(err, memory.ErrAbsent) && !errors.Is(err, io.EOF) {
		r.fatal.CompareAndSwap(nil, &err)
	}
	return n, err
}

// err returns what ended all reading, if anything did.
func (s *Space) err() error {
	if r, ok := s.Mem.(*watchedReader); ok && r.fatal.Load() != nil {
		return *r.fatal.Load()
	}
	return nil
}

// stackPointer finds it among the registers of the kernel's user_regs_struct.
func stackPointer(arch string, registers []uint64) uint64 {
	index := map[string]int{"amd64": 19, "arm64": 31}
	if i, ok := index[arch]; ok && i < len(registers) {
		return registers[i]
	}
	return 0
}

// LiveThreads tells where the threads of a live process stand that wait in the kernel: their stack pointers and the
// arguments of their system calls. A running thread does not tell.
func LiveThreads(pid int) []Thread {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var threads []Thread
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		text, _ := os.ReadFile(dir + "/" + e.Name() + "/syscall")
		t := parseSyscall(string(text))
		t.TID = tid
		threads = append(threads, t)
	}
	return threads
}

// parseSyscall reads "NR ARG*6 SP PC", "-1 SP PC" outside a system call, or "running".
func parseSyscall(text string) (t Thread) {
	fields := strings.Fields(text)
	if len(fields) < 3 {
		return t
	}
	for _, f := range fields[1:] {
		v, err := strconv.ParseUint(f, 0, 64)
		if err != nil {
			return Thread{}
		}
		t.Registers = append(t.Registers, v)
	}
	t.SP = t.Registers[len(t.Registers)-2]
	return t
}
