package heap

// Thread is where a thread stood when the memory was read.
type Thread struct {
	TID       int
	SP        uint64   // 0 when it was running, and so unknown
	Registers []uint64 // those that are known; of a process that is not stopped few or none are
}
