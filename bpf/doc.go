// Package bpf holds the kernel side in C and what bpf2go makes of it. Types and numbers shared with user space come
// from types.h; change them there and run make generate.
//
// The trap: the Current objects do not load below 5.13 and the Legacy ones lose a stack when two threads share a CPU's
// scratch. tracer chooses between them when it loads.
package bpf

// The types of the maps and ring buffers, as C has them.
type (
	Func       = CurrentFunc
	Proc       = CurrentProc
	LiveKey    = CurrentLiveKey
	Block      = CurrentBlock
	RowKey     = CurrentRowKey
	Row        = CurrentRow
	Event      = CurrentEvent
	StackHead  = CurrentStackHead
	ProbeAt    = CurrentProbeAt
	MappedFile = CurrentMappedFile
)
