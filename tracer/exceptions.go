package tracer

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/prometheus/procfs"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// exceptions are the programs that let exceptions pass return probes. They are loaded when the first target needs them,
// as the kernel logs a warning of every program that may write to a target's memory.
type exceptions struct {
	load           func() error
	thrown, caught *ebpf.Program
}

func newExceptions() *exceptions {
	e := &exceptions{}
	e.load = sync.OnceValue(e.loadPrograms)
	return e
}

func (e *exceptions) loadPrograms() error {
	if runtime.GOARCH != "amd64" {
		return errors.New("the probes of unwinders that prevent it are for x86-64")
	}
	spec, err := bpf.LoadException()
	if err != nil {
		return fmt.Errorf("read BPF objects: %w", err)
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("the kernel does not load the programs that prevent it (lockdown?): %w", err)
	}
	defer collection.Close()
	e.thrown, e.caught = collection.DetachProgram("exception_thrown"), collection.DetachProgram("exception_caught")
	return nil
}

// Close may be called twice.
func (e *exceptions) Close() error { return errors.Join(e.thrown.Close(), e.caught.Close()) }

// noHeapLimit refuses targets whose allocator keeps a limit of its own, of which the kernel knows nothing.
func noHeapLimit(pid int) error {
	environ, err := os.ReadFile(memory.FS{}.Path(pid, "environ"))
	if gone(pid) {
		return nil // nothing of it will be followed
	}
	if err != nil {
		return fmt.Errorf("read environment of process %d: %w", pid, err)
	}
	if bytes.Contains(environ, []byte("TCMALLOC_HEAP_LIMIT_MB=")) {
		return errors.New("the target has set TCMALLOC_HEAP_LIMIT_MB, which cannot be foreseen")
	}
	return nil
}

// updateGranted tells the BPF side how large a block may be that the kernel grants to a process without limits.
func (t *Tracer) updateGranted() error {
	fs, err := procfs.NewDefaultFS()
	if err != nil {
		return fmt.Errorf("read the kernel's memory: %w", err)
	}
	info, err := fs.Meminfo()
	if err != nil {
		return fmt.Errorf("read the kernel's memory: %w", err)
	}
	policy, err := readNumber("/proc/sys/vm/overcommit_memory")
	if err != nil {
		return fmt.Errorf("read overcommit policy: %w", err)
	}
	return t.programs.AlwaysGranted.Set(granted(policy, &info))
}

// granted is a size that one request may have without being refused, by vm.overcommit_memory: 0 refuses what is larger
// than all memory, 1 nothing, 2 what goes beyond a sum that others use up at any time.
func granted(policy uint64, info *procfs.Meminfo) uint64 {
	const others = 1 << 30
	value := func(n *uint64) uint64 {
		if n == nil {
			return 0
		}
		return *n
	}
	switch policy {
	case 0:
		return value(info.MemTotalBytes) + value(info.SwapTotalBytes)
	case 1:
		return 1 << 40
	}
	used := value(info.CommittedASBytes) + others
	return max(value(info.CommitLimitBytes), used) - used
}

// guardExceptions sees to it that no exception meets a return probe, which would end the program: probes on the unwinders
// put true return addresses back. Where the kernel does not allow that (lockdown), sessions follow only those calls that
// cannot fail; before 6.13 it takes the functions out of the plan.
func (t *Tracer) guardExceptions(m *member, plan *allocator.Plan) error {
	if len(plan.Unwinders) == 0 {
		return nil
	}
	if err := t.exceptions.load(); err != nil {
		if t.programs.haveSession {
			err = errors.Join(noHeapLimit(m.pid), t.preferSessions())
		}
		if err != nil {
			plan.WithoutThrowing(err.Error())
		}
		return nil
	}
	for _, u := range plan.Unwinders {
		prog := t.exceptions.thrown
		if u.Caught {
			prog = t.exceptions.caught
		}
		o := t.files.find(u.ID)
		if o == nil {
			continue
		}
		if err := t.openWatch(m, &m.guards, o, u.Offset, prog); err != nil {
			plan.WithoutThrowing(err.Error())
			return fmt.Errorf("probe unwinder in %s: %w", u.Path, err)
		}
	}
	return nil
}

// preferSessions lets functions that an exception may leave be probed by sessions, from the first one on.
func (t *Tracer) preferSessions() error {
	if t.probes.sessionsForThrowing {
		return nil
	}
	maps, err := readNumber("/proc/sys/vm/max_map_count")
	if err != nil {
		return fmt.Errorf("read the limit of mappings: %w", err)
	}
	if err := errors.Join(t.programs.MaxMaps.Set(uint32(maps)), t.updateGranted()); err != nil {
		return err
	}
	t.probes.sessionsForThrowing = true
	return nil
}
