package memory

import "strings"

// Kind says what a range is for. The names are what people read and what JSON carries.
type Kind string

// The kinds of range.
const (
	KindHeap        Kind = "heap"          // moved by brk: glibc's main arena
	KindArena       Kind = "arena"         // a 64 MiB arena of one thread or more (glibc; Go's heap has the same shape)
	KindThreadStack Kind = "thread stack"  // of any thread but the first
	KindStack       Kind = "stack"         // of the first thread
	KindAnonymous   Kind = "anonymous"     // private memory of nobody else: big mallocs, other allocators, JIT code
	KindLibraryData Kind = "library data"  // variables of the program and its libraries, .data and .bss
	KindFile        Kind = "file"          // code, constants, mapped files
	KindShared      Kind = "shared memory" // shared anonymous, SysV, memfd and /dev/shm
	KindReserved    Kind = "reserved"      // addresses without access: guards and room to grow
	KindKernel      Kind = "kernel"        // [vdso], [vvar], [vsyscall], [uprobes]
)

func (k Kind) known() bool {
	switch k {
	case KindHeap, KindArena, KindThreadStack, KindStack, KindAnonymous, KindLibraryData, KindFile, KindShared, KindReserved, KindKernel:
		return true
	}
	return false
}

// arenaSize is the size and alignment of a glibc arena on 64-bit machines (HEAP_MAX_SIZE).
const arenaSize = 64 << 20

// maxGuard is the largest inaccessible range below a stack that is taken for its guard.
const maxGuard = 1 << 20

// classify fills in the kind of n ranges in ascending order.
func classify(n int, at func(int) *Range) {
	none := new(Range)
	for i := range n {
		prev, next := none, none
		if i > 0 {
			prev = at(i - 1)
		}
		if i+1 < n {
			next = at(i + 1)
		}
		r := at(i)
		if r.Kind = kindByName(r); r.Kind == KindAnonymous && !strings.HasPrefix(r.Path, "/") {
			r.Kind = kindByNeighbours(r, prev, next)
		}
	}
}

// kindByName is what a range's name, or its lack of one, tells.
func kindByName(r *Range) Kind {
	if r.IsFile() {
		return kindOfFile(r)
	}
	if r.Inode != 0 {
		return KindFile // anon_inode:[...] and the like
	}
	switch {
	case r.Path == "[heap]":
		return KindHeap
	case r.Path == "[stack]":
		return KindStack
	case strings.HasPrefix(r.Path, "[stack:"): // kernels 3.4 to 4.4
		return KindThreadStack
	case strings.HasPrefix(r.Path, "[anon_shmem"):
		return KindShared
	case strings.HasPrefix(r.Path, "[anon:"):
		return kindOfNamed(r)
	case r.Path != "":
		return KindKernel
	case r.Perms&(Read|Write|Exec) == 0:
		return KindReserved
	}
	return KindAnonymous
}

// kindOfNamed judges a name that the program gave with prctl(PR_SET_VMA): glibc does with the decorate_maps tunable.
func kindOfNamed(r *Range) Kind {
	switch {
	case r.Perms&(Read|Write|Exec) == 0:
		return KindReserved
	case strings.Contains(r.Path, "malloc arena"):
		return KindArena
	case strings.Contains(r.Path, "pthread stack"), strings.Contains(r.Path, "stack_and_tls"):
		return KindThreadStack
	}
	return KindAnonymous
}

func kindOfFile(r *Range) Kind {
	switch {
	case strings.HasPrefix(r.Path, "/anon_hugepage"), r.Path == "/dev/zero" && r.Perms&Shared == 0:
		return KindAnonymous
	case isSharedMemory(r.Path):
		return KindShared
	case r.Perms&(Write|Shared) == Write:
		return KindLibraryData
	}
	return KindFile
}

func isSharedMemory(path string) bool {
	for _, prefix := range []string{"/dev/zero", "/dev/shm/", "/SYSV", "/memfd:", "/[aio]"} {
		if strings.HasPrefix(path, prefix) {
			return true
		}
	}
	return false
}

// kindByNeighbours tells apart what anonymous memory is for by the ranges around it.
func kindByNeighbours(r, prev, next *Range) Kind {
	if r.Perms != Read|Write {
		return KindAnonymous
	}
	below := prev.End == r.Start
	switch {
	case isArena(r, next):
		return KindArena
	case below && prev.Kind == KindLibraryData && prev.IsFile():
		return KindLibraryData // .bss beyond the last page of the file
	case below && prev.Kind == KindReserved && prev.Size() <= maxGuard && isStackSize(r, prev):
		return KindThreadStack
	}
	return KindAnonymous
}

// isArena knows the shape of a glibc arena: readable memory from a 64 MiB boundary on and inaccessible room for the rest of
// the 64 MiB. Both may have merged with neighbours of their own kind, so the ends are no evidence, only the boundary is.
func isArena(r, next *Range) bool {
	base := (r.End - 1) &^ (arenaSize - 1)
	if r.Start > base {
		return false
	}
	if r.End == base+arenaSize {
		return r.Size() == arenaSize // full
	}
	// Not writable is all that a core made by gcore says of it.
	return next.Perms&(Write|Exec) == 0 && next.IsAnonymous() && next.Start == r.End && next.End >= base+arenaSize
}

// isStackSize: a stack's size is a round number, with its guard (glibc) or without (musl).
func isStackSize(r, guard *Range) bool {
	const round = 64 << 10
	return r.Size()%round == 0 || (r.Size()+guard.Size())%round == 0
}

// markThreadStacks makes the ranges that hold a thread's stack pointer thread stacks: the only sign of a stack without a guard
// range (glibc 2.42 uses MADV_GUARD_INSTALL).
func markThreadStacks(n int, at func(int) *Range, pointers []uint64) {
	for _, sp := range pointers {
		i := searchRange(n, at, sp)
		if i < n && at(i).Contains(sp) && at(i).Kind == KindAnonymous {
			at(i).Kind = KindThreadStack
		}
	}
}

// searchRange is the index of the first range that ends above addr.
func searchRange(n int, at func(int) *Range, addr uint64) int {
	low, high := 0, n
	for low < high {
		mid := int(uint(low+high) >> 1)
		if at(mid).End > addr {
			high = mid
		} else {
			low = mid + 1
		}
	}
	return low
}
