// Package target says which processes are traced: it finds them by pid, name, program, control group, container or
// library, follows them as they come and go, opens files as they see them, and starts commands to be traced.
//
// The traps: a pid is a name for a moment only, so that a process is always (pid, start time); everything under
// /proc/PID may vanish between two reads; and a target chooses its own name, paths and symbolic links, so that nothing
// read from it is printed unescaped and no path of it is followed outside of its root.
package target
