package memory

import (
	"fmt"
	"os"

	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
)

// memoryGroup is the group that a process's memory is charged to.
func (fs FS) memoryGroup(pid int) (cgroup.Group, error) {
	f, err := os.Open(fs.Path(pid, "cgroup"))
	if err != nil {
		return cgroup.Group{}, fs.Explain(pid, "read cgroup", err)
	}
	defer f.Close()
	memberships, err := cgroup.ParseMemberships(f)
	if err != nil {
		return cgroup.Group{}, fmt.Errorf("cgroup of pid %d: %w", pid, err)
	}
	return cgroup.Of(memberships)
}

// roomBeside is what the limit on a process's group leaves, if this process is charged to the same group.
func (fs FS) roomBeside(pid int) (room uint64, limited cgroup.Group, ok bool) {
	group, err := fs.memoryGroup(pid)
	if err != nil {
		return 0, group, false
	}
	own, err := fs.memoryGroup(os.Getpid())
	if err != nil || own.Dir != group.Dir {
		return 0, group, false
	}
	limited, usage, err := group.Tightest()
	if err != nil || usage.Limit == cgroup.NoLimit {
		return 0, group, false
	}
	return usage.Limit - min(usage.WorkingSet(), usage.Limit), limited, true
}
