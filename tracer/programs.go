package tracer

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// programs is the loaded BPF side.
type programs struct {
	bpf.CurrentObjects        // Legacy objects have the same maps and programs but for the session
	haveCookie         bool   // 5.15: probes know their function, and perf events take links
	haveSession        bool   // 6.13: one probe for entry and return, the return only where it is wanted
	bytes              uint64 // memory of the maps
}

// ErrNoBPF wraps the reason why the kernel does not take the programs.
var ErrNoBPF = errors.New("BPF cannot be used here")

func loadPrograms(o Options) (*programs, error) {
	// Below 5.11 map memory counts against the limit; above, a refusal means nothing.
	_ = rlimit.RemoveMemlock()
	if err := kernel.HaveRingBuffer(); err != nil {
		return nil, fmt.Errorf("%w: allocsnoop needs Linux 5.10 or later and CAP_BPF with CAP_PERFMON (or CAP_SYS_ADMIN): %w",
			ErrNoBPF, err)
	}
	p := &programs{haveCookie: kernel.HaveCookie() == nil}
	current := kernel.HaveTaskStorage() == nil
	load := bpf.LoadLegacy
	if current {
		load = bpf.LoadCurrent
	}
	spec, err := load()
	if err != nil {
		return nil, fmt.Errorf("read BPF objects: %w", err)
	}
	if err := configure(spec, o, p.haveCookie); err != nil {
		return nil, err
	}
	// Each program that unwinds costs the verifier time: what is not attached is not loaded.
	p.haveSession = current && p.haveCookie && o.Mode != Growth && kernel.HaveUprobeSession() == nil
	if !p.haveSession {
		delete(spec.Programs, "call_session")
	}
	if current && kernel.HaveFindVMA() != nil {
		delete(spec.Programs, "real_file")
	}
	if o.Mode == Growth {
		delete(spec.Programs, "call_entered")
		delete(spec.Programs, "call_returned")
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return nil, fmt.Errorf("%w: load programs: %w", ErrNoBPF, err)
	}
	defer collection.Close()
	if err := p.take(collection); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

func configure(spec *ebpf.CollectionSpec, o Options, cookie bool) error {
	set := func(name string, value any) error {
		v := spec.Variables[name]
		if v == nil {
			return fmt.Errorf("set BPF variable %s: no such variable", name)
		}
		if err := v.Set(value); err != nil {
			return fmt.Errorf("set BPF variable %s: %w", name, err)
		}
		return nil
	}
	spec.Maps["live"].MaxEntries = o.MaxLive + o.liveReserve()
	spec.Maps["rows_of_stacks"].MaxEntries = o.MaxStacks + rowsReserve
	spec.Maps["procs"].MaxEntries = 4 * o.MaxProcs
	spec.Maps["unwind_slots"].MaxEntries = o.MaxProcs
	spec.Maps["unwind_rows"].MaxEntries = unwind.RowsFor(o.MaxTableMiB << 20)
	if o.Mode == Growth {
		spec.Maps["live"].MaxEntries = 1
	}
	if hasPools(o.Definitions) {
		spec.Maps["pools"].MaxEntries = o.MaxLive
		spec.Maps["pool_next"].MaxEntries = o.MaxLive
	}
	flag := func(b bool) uint32 {
		if b {
			return 1
		}
		return 0
	}
	return errors.Join(
		set("have_cookie", flag(cookie)),
		set("tell_execs", flag(o.Execed != nil)),
		set("unwind_max_frames", o.MaxFrames),
	)
}

func hasPools(definitions []allocator.Definition) bool {
	return slices.ContainsFunc(definitions, func(d allocator.Definition) bool { return d.Op == allocator.PoolAlloc })
}

// take moves what the tracer uses out of the collection.
func (p *programs) take(c *ebpf.Collection) error {
	for name, to := range map[string]**ebpf.Map{
		"live": &p.Live, "rows_of_stacks": &p.RowsOfStacks, "counters": &p.Counters, "ends": &p.Ends, "procs": &p.Procs,
		"funcs": &p.Funcs, "hits": &p.Hits, "func_at": &p.FuncAt, "events": &p.Events, "frames": &p.Frames,
		"pools": &p.Pools, "pool_next": &p.PoolNext, "unwind_rows": &p.UnwindRows, "unwind_rules": &p.UnwindRules, "unwind_slots": &p.UnwindSlots,
		"unwind_bin_use": &p.UnwindBinUse, "unwind_rowcache": &p.UnwindRowcache, "unwind_lua": &p.UnwindLua,
	} {
		*to = c.DetachMap(name)
		if *to == nil {
			return fmt.Errorf("find BPF map %s: no such map", name)
		}
		if info, err := (*to).Info(); err == nil {
			if bytes, ok := info.Memlock(); ok {
				p.bytes += bytes
			}
		}
	}
	for name, to := range map[string]**ebpf.Program{
		"call_entered": &p.CallEntered, "call_returned": &p.CallReturned, "call_session": &p.CallSession,
		"lua_entered": &p.LuaEntered,
		"enter_mmap":  &p.EnterMmap, "enter_munmap": &p.EnterMunmap, "enter_mremap": &p.EnterMremap, "enter_brk": &p.EnterBrk,
		"syscall_exit": &p.SyscallExit, "real_file": &p.RealFile,
		"process_forked": &p.ProcessForked, "process_execed": &p.ProcessExeced, "process_exited": &p.ProcessExited,
	} {
		*to = c.DetachProgram(name)
	}
	for name, to := range map[string]**ebpf.Variable{
		"gate": &p.Gate, "calls_shut": &p.CallsShut, "sessions": &p.Sessions, "window": &p.Window,
		"always_granted": &p.AlwaysGranted, "max_maps": &p.MaxMaps, "sampling": &p.Sampling, "sample_prob": &p.SampleProb,
		"may_sample": &p.MaySample, "live_reserve": &p.LiveReserve, "rows_reserve": &p.RowsReserve,
		"thinning": &p.Thinning,
	} {
		*to = c.Variables[name]
	}
	return nil
}

// Close frees the maps and programs. It may be called twice.
func (p *programs) Close() error {
	return p.CurrentObjects.Close()
}

// syscalls are those that move memory, and the programs for their starts.
func (p *programs) syscalls() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{"mmap": p.EnterMmap, "munmap": p.EnterMunmap, "mremap": p.EnterMremap, "brk": p.EnterBrk}
}
