// Package allocator knows which functions hand out and take back memory: what each of them means for the books, which
// of them an ELF file defines, which of those have to be probed in a process, and on which instruction the probe goes.
//
// The traps: a name proves little (musl's free calls __libc_free, libstdc++'s operator delete calls free: probing both
// counts a block twice), one address has many names (free = cfree = operator delete in tcmalloc), and the entry of a
// function is often the most expensive instruction to put a probe on.
package allocator

import (
	"slices"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Op is what a call does to the books.
type Op uint8

// The operations. Arguments that an operation does not name are 0 in its Function.
const (
	// Alloc makes a block of Size (times Count) bytes; its address is the return value, or is written to *Out.
	Alloc Op = iota + 1
	// Realloc changes the block Ptr to Size (times Count) bytes; NULL as Ptr makes a new block.
	Realloc
	// Free takes the block Ptr back, at entry. NULL is no block.
	Free
	// Expand changes the size of Ptr in place: it never moves. With ExpandReturnsSize it succeeded when the returned
	// size is at least Size, otherwise when the result is not NULL. A failure changes nothing.
	Expand
	// LuaAlloc is Lua's f(ud, ptr, osize, nsize): Size 0 frees Ptr; Ptr NULL allocates; everything else is a Realloc.
	LuaAlloc
	// PoolCreate makes a pool; its handle is the return value or *Out. A pool is no block by itself unless Size is set.
	PoolCreate
	// PoolAlloc makes a block as Alloc does that lives until its pool, argument Pool, is destroyed or cleared.
	PoolAlloc
	// PoolDestroy ends every block of the pool, argument Pool, at entry.
	PoolDestroy
	// Wrap passes on to another function of the table, which is probed, and rounds the size up on its way: the block that
	// one makes has Size bytes. Only the entry is probed.
	Wrap
)

var opNames = [...]string{
	Alloc: "alloc", Realloc: "realloc", Free: "free", Expand: "expand", LuaAlloc: "lua_alloc",
	PoolCreate: "pool_create", PoolAlloc: "pool_alloc", PoolDestroy: "pool_destroy",
	Wrap: "wrap",
}

func (o Op) String() string {
	if int(o) < len(opNames) && opNames[o] != "" {
		return opNames[o]
	}
	return "unknown"
}

// NeedsReturn reports whether the books need the call's result.
func (o Op) NeedsReturn() bool {
	switch o {
	case Free, PoolDestroy, Wrap:
		return false
	}
	return true
}

// Flags refine an Op.
type Flags uint16

const (
	// ZeroSizeFrees: realloc(p, 0) that returns NULL has freed p (glibc, jemalloc, tcmalloc). Without it NULL is a
	// failure at any size and p lives on (musl, mimalloc).
	ZeroSizeFrees Flags = 1 << iota
	// FreesOnFailure: the old block is freed when the call fails (reallocf, mi_reallocf).
	FreesOnFailure
	// StatusZero: the return value is an int, 0 is success and *Out holds the address (posix_memalign). On failure
	// *Out is stale.
	StatusZero
	// IntSize: Size and Count are C ints: only the low 32 bits count.
	IntSize
	// ExpandReturnsSize: the result is the real size of the block, not its address (xallocx).
	ExpandReturnsSize
	// PtrIsOut: Ptr points to the variable that holds the address (mi_reallocarr).
	PtrIsOut
	// StatusNonZero: the return value is a truth value and *Out holds the address on non-zero.
	StatusNonZero
	// MayThrow: a C++ exception may leave the function (operator new that finds no memory). A return probe on it needs
	// the help of probes on the unwinder; see Unwinder.
	MayThrow
)

var flagNames = []string{
	"zero_size_frees", "frees_on_failure", "status_zero", "int_size", "expand_returns_size", "ptr_is_out", "status_nonzero",
	"may_throw",
}

func (f Flags) String() string {
	var names []string
	for i, name := range flagNames {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// Function says what one function means. Arguments are 1-based positions in the C signature; 0 is none.
type Function struct {
	Name             string
	Op               Op
	Size, Count, Ptr int
	// Out is the argument that points to the variable which receives the address; 0: the address is returned.
	Out int
	// Pool is the argument that names the pool of PoolAlloc and PoolDestroy.
	Pool  int
	Kind  profile.Kind
	Flags Flags
}

// Args are the argument positions that the entry probe reads, ascending.
func (f Function) Args() []int {
	var args []int
	for _, a := range []int{f.Size, f.Count, f.Ptr, f.Out, f.Pool} {
		if a != 0 && !slices.Contains(args, a) {
			args = append(args, a)
		}
	}
	slices.Sort(args)
	return args
}

// Same reports whether two functions mean the same for the books, whatever their names.
func (f Function) Same(g Function) bool {
	f.Name, g.Name = "", ""
	return f == g
}

// Family is the allocator that a file holds, recognized by what the file defines, not by what it is called.
type Family string

// The families. FamilyOther is a file that defines malloc and free and is none of the others: an interposer, a
// sanitizer, a program with an allocator of its own.
const (
	FamilyGlibc     Family = "glibc"
	FamilyMusl      Family = "musl"
	FamilyJemalloc  Family = "jemalloc"
	FamilyTcmalloc  Family = "tcmalloc"
	FamilyMimalloc  Family = "mimalloc"
	FamilyCxx       Family = "c++ runtime"
	FamilyLuaJIT    Family = "luajit"
	FamilyOther     Family = "other"
	FamilyDeclared  Family = "declared"
	familyUndecided Family = ""
)

// zeroSizeFrees are the families whose realloc(p, 0) frees p and returns NULL.
func (f Family) zeroSizeFrees() bool {
	switch f {
	case FamilyMusl, FamilyMimalloc:
		return false
	}
	return true
}
