package tracer

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
)

// realFile looks through an overlay file system: it maps the file into this process and asks the kernel what is mapped.
//
// Nothing else tells. stat has the overlay's device and, by chance of its options, the layer's inode; so has maps since
// Linux 6.8, which had the layer's before.
func (p *programs) realFile(file *os.File) (allocator.FileID, error) {
	page, err := unix.Mmap(int(file.Fd()), 0, 1, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return allocator.FileID{}, fmt.Errorf("map file: %w", err)
	}
	defer unix.Munmap(page)
	ask := bpf.MappedFile{Address: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(page))))}
	for range 100 {
		answer := ask
		result, err := p.RealFile.Run(&ebpf.RunOptions{Context: &ask, ContextOut: &answer})
		if err != nil {
			return allocator.FileID{}, fmt.Errorf("look below a mapping: %w", err)
		}
		if result == 0 && answer.Device != 0 {
			return allocator.FileID{Device: deviceOf(answer.Device), Inode: answer.Inode}, nil
		}
		if errno := unix.Errno(-int32(result)); errno != unix.EBUSY {
			return allocator.FileID{}, fmt.Errorf("look below a mapping: %w", errno)
		}
		runtime.Gosched()
	}
	return allocator.FileID{}, errors.New("look below a mapping: the kernel is busy")
}

// deviceOf turns the kernel's own device number into the one of stat.
func deviceOf(device uint64) uint64 { return unix.Mkdev(uint32(device>>20), uint32(device&(1<<20-1))) }
