// Package memory reads what a process has mapped and what is in it: maps, smaps, page state, live memory, and the dump and
// core files made of them. It needs no BPF and works on any kernel with /proc/PID/smaps.
//
// The traps: reading can change the target. A page that was never touched gets mapped by the read, a swapped page comes
// back into memory, a hole of a shared file is filled at the target's expense; so page state is looked at first and only
// pages that hold something are read. And a pid may name another process by the time it is used, so that one open
// /proc/PID/mem, which stays with the address space it was opened for, vouches for every read.
package memory
