package unwind

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// mapped is a BPF array mapped into memory: writing a million rows takes a millisecond instead of 300 system calls.
type mapped struct {
	mem    []byte
	stride int
	n      uint32
}

func mapArray(m *ebpf.Map, valueSize int) (*mapped, error) {
	if m == nil || m.Type() != ebpf.Array || m.Flags()&unix.BPF_F_MMAPABLE == 0 || m.ValueSize() != uint32(valueSize) {
		return nil, fmt.Errorf("map into memory: want a mappable array of %d-byte values, got %v", valueSize, m)
	}
	a := &mapped{stride: (valueSize + 7) &^ 7, n: m.MaxEntries()}
	page := unix.Getpagesize()
	size := (a.stride*int(a.n) + page - 1) / page * page
	mem, err := unix.Mmap(m.FD(), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s into memory: %w", m, err)
	}
	a.mem = mem
	return a, nil
}

func (a *mapped) close() error {
	if a == nil || a.mem == nil {
		return nil
	}
	mem := a.mem
	a.mem = nil
	return unix.Munmap(mem)
}

// word is a 32-bit field of an entry, for stores that the walker may see at any moment.
func (a *mapped) word(entry uint32, off uintptr) *atomic.Uint32 {
	return (*atomic.Uint32)(unsafe.Pointer(&a.mem[int(entry)*a.stride+int(off)]))
}

func at[T any](a *mapped, entry uint32) *T {
	return (*T)(unsafe.Pointer(&a.mem[int(entry)*a.stride]))
}
