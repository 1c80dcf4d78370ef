// Package cgroup finds control groups of both versions, the processes in them, what memory they use and may use, and
// reports when usage passes a share of the limit and when the OOM killer takes a process.
//
// The traps: the limit that kills is often an ancestor's (a pod's, not the container's); usage counts page cache, which
// the kernel gives up before it kills anyone, so that a healthy group stands at 100 % for days; and the same path
// is a different group in each v1 hierarchy.
package cgroup
