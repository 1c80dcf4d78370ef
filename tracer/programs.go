package tracer

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// programs is the loaded BPF side.
type programs struct {
	bpf.CurrentObjects          // Legacy objects have the same maps and programs but for the session
	haveCookie         bool     // 5.15: probes know their function, and perf events take links
	haveSession        bool     // 6.13: one probe for entry and return, the return only where it is wanted
	session            *loading // CallSession, where there are sessions; nil before
	bytes              uint64   // memory of the maps
}

// loading is a program that is loaded beside the trace: what only a step of precision needs is not waited for at the start.
type loading struct {
	done    chan struct{}
	program *ebpf.Program
	err     error
}

// get waits for the program.
func (l *loading) get() (*ebpf.Program, error) {
	<-l.done
	return l.program, l.err
}

// now is the program, nil as long as it is loaded.
func (l *loading) now() *ebpf.Program {
	if l == nil {
		return nil
	}
	select {
	case <-l.done:
		return l.program
	default:
		return nil
	}
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
	session := only(spec, "call_session")
	delete(spec.Programs, "call_session")
	if current && kernel.HaveFindVMA() != nil {
		delete(spec.Programs, "real_file")
	}
	if o.Mode == Growth {
		delete(spec.Programs, "call_entered")
		delete(spec.Programs, "call_returned")
	}
	empty, err := ebpf.NewCollection(only(spec))
	if err != nil {
		return nil, fmt.Errorf("%w: make maps: %w", ErrNoBPF, err)
	}
	defer empty.Close()
	if err := p.load(spec, session, empty.Maps); err != nil {
		return nil, errors.Join(err, p.Close())
	}
	return p, nil
}

// only is a copy of the BPF side with no other programs than the named ones.
func only(spec *ebpf.CollectionSpec, programs ...string) *ebpf.CollectionSpec {
	c := spec.Copy()
	maps.DeleteFunc(c.Programs, func(name string, _ *ebpf.ProgramSpec) bool { return !slices.Contains(programs, name) })
	return c
}

// load loads the programs upon the maps. The two largest are loaded beside the others, as the verifier keeps one processor
// busy with each for a third of a second.
func (p *programs) load(spec, session *ebpf.CollectionSpec, maps map[string]*ebpf.Map) error {
	o := ebpf.CollectionOptions{MapReplacements: maps, Cache: btf.NewCache()}
	var entered *loading
	if spec.Programs["call_entered"] != nil {
		entered = loadBeside(only(spec, "call_entered"), "call_entered", o, nil)
		delete(spec.Programs, "call_entered")
	}
	if p.haveSession {
		p.session = loadBeside(session, "call_session", o, entered)
	}
	rest, err := ebpf.NewCollectionWithOptions(spec, o)
	if err == nil {
		defer rest.Close()
		err = p.take(rest)
	}
	if entered != nil {
		var enteredErr error
		p.CallEntered, enteredErr = entered.get()
		err = errors.Join(err, enteredErr)
	}
	if err != nil {
		return fmt.Errorf("%w: load programs: %w", ErrNoBPF, err)
	}
	return nil
}

// loadBeside loads one program in the background, after another one if that is not nil. The options' maps may be closed
// meanwhile.
func loadBeside(spec *ebpf.CollectionSpec, name string, o ebpf.CollectionOptions, after *loading) *loading {
	l := &loading{done: make(chan struct{})}
	maps := map[string]*ebpf.Map{}
	for name, m := range o.MapReplacements {
		if maps[name], l.err = m.Clone(); l.err != nil {
			break
		}
	}
	o.MapReplacements = maps
	go func() {
		defer close(l.done)
		defer func() {
			for _, m := range maps {
				_ = m.Close()
			}
		}()
		if after != nil {
			<-after.done
		}
		if l.err != nil {
			return
		}
		var c *ebpf.Collection
		if c, l.err = ebpf.NewCollectionWithOptions(spec, o); l.err == nil {
			l.program = c.DetachProgram(name)
			c.Close()
		}
	}()
	return l
}

// close waits for the program and unloads it.
func (l *loading) close() error {
	if l == nil {
		return nil
	}
	program, _ := l.get() // a failure was told to whoever asked for it
	l.program = nil
	if program == nil {
		return nil
	}
	return program.Close()
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
		"unwind_bin_use": &p.UnwindBinUse, "unwind_rowcache": &p.UnwindRowcache,
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
		"call_returned": &p.CallReturned,
		"enter_mmap":    &p.EnterMmap, "enter_munmap": &p.EnterMunmap, "enter_mremap": &p.EnterMremap, "enter_brk": &p.EnterBrk,
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
	return errors.Join(p.session.close(), p.CurrentObjects.Close())
}

// syscalls are those that move memory, and the programs for their starts.
func (p *programs) syscalls() map[string]*ebpf.Program {
	return map[string]*ebpf.Program{"mmap": p.EnterMmap, "munmap": p.EnterMunmap, "mremap": p.EnterMremap, "brk": p.EnterBrk}
}
