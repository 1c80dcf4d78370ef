package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
)

const maxFuncs = 512 // MAX_FUNCS of bpf/allocsnoop.bpf.c

// probes is the set of probed functions. A function is defined once as a uprobe event of its file, carries its program
// on an anchor event, and is then opened for each process: the kernel puts breakpoints only into those.
type probes struct {
	programs *programs
	tracefs  *tracefs
	group    string // of the event names; tells whose they are
	inherit  bool
	kinds    *kinds

	mu    sync.Mutex
	known map[probeKey]*probe
	// sessionsForThrowing: functions that an exception may leave are never probed in another way
	sessionsForThrowing bool
	shared              []io.Closer // sessions in every process that maps the file
	watches             int
	order               []*probe
}

type probeKey struct {
	file   allocator.FileID
	offset uint64
}

type probe struct {
	id         uint32
	allocator  allocator.Probe
	path       string // leads to the open file
	entry, ret uint64 // ids of the events; ret 0: none
	names      []string
	anchors    []io.Closer
	session    bool // only ever probed by a session, which every process shares that maps the file
	open       bool // that session
}

var probeSets atomic.Uint32

func newProbes(p *programs, fs *tracefs, kinds *kinds, inherit bool) *probes {
	return &probes{
		programs: p, tracefs: fs, kinds: kinds, inherit: inherit,
		group: fmt.Sprintf("allocsnoop_%d_%d", os.Getpid(), probeSets.Add(1)),
		known: map[probeKey]*probe{},
	}
}

// define makes sure that the function has a number. file is its file, kept open by the caller as long as the set lives.
func (s *probes) define(a allocator.Probe, file *os.File) (*probe, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := probeKey{a.ID, a.ProbeOffset()}
	if p := s.known[key]; p != nil {
		return p, nil
	}
	if len(s.order) == maxFuncs {
		return nil, fmt.Errorf("probe %s: more than %d functions", a.Name, maxFuncs)
	}
	f, err := s.function(a)
	if err != nil {
		return nil, fmt.Errorf("probe %s: %w", a.Name, err)
	}
	p := &probe{id: uint32(len(s.order)), allocator: a, path: fmt.Sprintf("/proc/self/fd/%d", file.Fd())}
	if a.Throws() && s.sessionsForThrowing {
		p.session = true
		f.Flags |= uint32(bpf.CurrentFuncFlagFUNC_SESSION)
	}
	if err := s.programs.Funcs.Put(p.id, f); err != nil {
		return nil, fmt.Errorf("probe %s: %w", a.Name, err)
	}
	s.known[key] = p
	s.order = append(s.order, p)
	return p, nil
}

// events makes the probe's uprobe events, once.
func (s *probes) events(p *probe) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(p.anchors) > 0 {
		return nil
	}
	var err error
	offset := p.allocator.ProbeOffset()
	p.entry, err = s.event(p, "", p.path, offset, s.programs.CallEntered, false)
	if err == nil && p.allocator.Op.NeedsReturn() {
		p.ret, err = s.event(p, "_ret", p.path, offset, s.programs.CallReturned, true)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("probe %s of %s: %w", p.allocator.Name, p.allocator.Path, err), s.remove(p))
	}
	return nil
}

// shareSessions puts probes into every process that maps their files, now or later, once: those that were not in yet are
// returned. A session of a single process is also met by the children that it forks, but there the kernel only arms the
// return and never asks the program whether it may: an exception of the child would end it.
func (s *probes) shareSessions(list []*probe) ([]*probe, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fresh := slices.DeleteFunc(slices.Clone(list), func(p *probe) bool { return p.open })
	links, err := s.sessions(fresh, 0)
	if err != nil {
		return nil, err
	}
	s.shared = append(s.shared, links...)
	for _, p := range fresh {
		p.open = true
	}
	return fresh, nil
}

// takeShared hands over the shared sessions to somebody who closes them.
func (s *probes) takeShared() []io.Closer {
	s.mu.Lock()
	defer s.mu.Unlock()
	shared := s.shared
	s.shared = nil
	for _, p := range s.order {
		p.open = false
	}
	return shared
}

// sessions puts probes into a process, 0 for all, that serve entry and return at once. Children do not inherit them.
func (s *probes) sessions(list []*probe, pid int) ([]io.Closer, error) {
	var links []io.Closer
	byPath := map[string]*kernel.SessionOptions{}
	for _, p := range list {
		o := byPath[p.path]
		if o == nil {
			o = &kernel.SessionOptions{PID: pid}
			byPath[p.path] = o
		}
		o.Offsets = append(o.Offsets, p.allocator.ProbeOffset())
		o.Cookies = append(o.Cookies, uint64(p.id))
	}
	if len(byPath) == 0 {
		return nil, nil
	}
	prog, err := s.programs.session.get()
	if err != nil {
		return nil, fmt.Errorf("load session program: %w", err)
	}
	for path, o := range byPath {
		l, err := kernel.UprobeSession(prog, path, *o)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("probe process %d: %w", pid, err), closeAll(links))
		}
		links = append(links, l)
	}
	return links, nil
}

// defineWatch puts a program that does no books on an instruction: one that helps an unwinder.
func (s *probes) defineWatch(id allocator.FileID, offset uint64, file *os.File, prog *ebpf.Program) (*probe, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := probeKey{id, offset}
	if p := s.known[key]; p != nil {
		return p, nil
	}
	s.watches++
	p := &probe{}
	var err error
	p.entry, err = s.event(p, fmt.Sprintf("_watch%d", s.watches), fmt.Sprintf("/proc/self/fd/%d", file.Fd()), offset, prog, false)
	if err != nil {
		return nil, errors.Join(err, s.remove(p))
	}
	s.known[key] = p
	return p, nil
}

// event defines one uprobe and anchors the program on it. The anchor is an event of allocsnoop's own process, which does
// not map the file, so that it puts no breakpoint anywhere.
func (s *probes) event(p *probe, suffix, path string, offset uint64, prog *ebpf.Program, ret bool) (uint64, error) {
	name := fmt.Sprintf("%s/f%d%s", s.group, p.id, suffix)
	id, err := s.tracefs.defineUprobe(name, path, offset, ret)
	if err != nil {
		return 0, err
	}
	p.names = append(p.names, name)
	perf, err := openTracepoint(id, os.Getpid(), false)
	if err != nil {
		return 0, fmt.Errorf("open uprobe event: %w", err)
	}
	h, err := setProgram(perf, prog, uint64(p.id), s.programs.haveCookie)
	if err != nil {
		return 0, err
	}
	p.anchors = append(p.anchors, h)
	return id, nil
}

// maxThreads bounds the threads of one process that get events of their own, at about 30 file descriptors each.
const maxThreads = 256

// openAll puts probes into a process. One event would do for all of its threads, but it serves only what its own thread
// forks, and it ends with its thread, even if the process lives on. So every thread gets events; those that it makes
// later inherit them.
func (s *probes) openAll(list []*probe, pid int) ([]io.Closer, error) {
	var hooks []io.Closer
	var ended error
	for _, tid := range s.threads(pid) {
		fresh, err := s.openThread(list, tid)
		hooks = append(hooks, fresh...)
		switch {
		case errors.Is(err, unix.ESRCH): // the main thread too may end before the others
			ended = err
		case err != nil:
			return nil, errors.Join(fmt.Errorf("probe process %d: %w", pid, err), closeAll(hooks))
		}
	}
	if len(hooks) == 0 && ended != nil {
		return nil, fmt.Errorf("probe process %d: %w", pid, ended)
	}
	return hooks, nil
}

// threads are the threads of a process, the main one first; only that where children are not followed.
func (s *probes) threads(pid int) []int {
	list := []int{pid}
	if !s.inherit {
		return list
	}
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // none: it is gone, as opening will tell
	for _, e := range entries {
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != pid && len(list) < maxThreads {
			list = append(list, tid)
		}
	}
	return list
}

func (s *probes) openThread(list []*probe, tid int) ([]io.Closer, error) {
	var hooks []io.Closer
	if s.inherit {
		var err error
		if hooks, err = keepEvents(tid); err != nil {
			return nil, err
		}
	}
	for _, p := range list {
		if err := s.events(p); err != nil {
			return hooks, err
		}
		for _, id := range []uint64{p.entry, p.ret} {
			if id == 0 {
				continue
			}
			perf, err := openTracepoint(id, tid, s.inherit)
			if err != nil {
				return hooks, fmt.Errorf("open probe of %s: %w", p.allocator.Name, err)
			}
			hooks = append(hooks, &hook{perf: perf, link: -1})
		}
	}
	return hooks, nil
}

// address tells the programs of kernels without cookies where a process has the probed instruction.
func (s *probes) address(p *probe, pid int, ip uint64) error {
	if s.programs.haveCookie {
		return nil
	}
	if err := s.programs.FuncAt.Put(bpf.ProbeAt{Ip: ip, Tgid: uint32(pid)}, p.id); err != nil {
		return fmt.Errorf("note address of %s: %w", p.allocator.Name, err)
	}
	return nil
}

func (s *probes) remove(p *probe) error {
	errs := []error{closeAll(p.anchors)}
	for _, name := range p.names {
		errs = append(errs, s.tracefs.removeUprobe(name))
	}
	p.names, p.anchors = nil, nil
	return errors.Join(errs...)
}

// Close takes the definitions away. The hooks of all processes must be closed by then. It may be called twice.
func (s *probes) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var anchors []io.Closer
	for _, p := range s.known {
		anchors = append(anchors, p.anchors...)
		p.anchors = nil
	}
	errs := []error{closeAll(anchors)}
	for _, p := range s.known {
		errs = append(errs, s.remove(p))
	}
	return errors.Join(errs...)
}

// all are the probes of allocator functions by number.
func (s *probes) all() []*probe {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.order)
}

// pairs are the probes that are pairs of entry and return where sessions are not in use.
func (s *probes) pairs() []*probe {
	return slices.DeleteFunc(s.all(), func(p *probe) bool { return p.session })
}

// function is the BPF side's view of a function.
func (s *probes) function(a allocator.Probe) (bpf.Func, error) {
	f := a.AtProbe()
	kind, err := s.kinds.number(f.Kind)
	if err != nil {
		return bpf.Func{}, err
	}
	op, ok := map[allocator.Op]bpf.CurrentOp{
		allocator.Alloc: bpf.CurrentOpOP_ALLOC, allocator.Realloc: bpf.CurrentOpOP_REALLOC, allocator.Free: bpf.CurrentOpOP_FREE,
		allocator.PoolCreate: bpf.CurrentOpOP_ALLOC, allocator.PoolAlloc: bpf.CurrentOpOP_POOL_ALLOC,
		allocator.PoolDestroy: bpf.CurrentOpOP_POOL_DESTROY, allocator.Expand: bpf.CurrentOpOP_EXPAND, allocator.LuaAlloc: bpf.CurrentOpOP_LUA_ALLOC,
		allocator.Wrap: bpf.CurrentOpOP_WRAP,
	}[f.Op]
	if !ok {
		return bpf.Func{}, fmt.Errorf("operation %v is not supported", f.Op)
	}
	b := bpf.Func{
		Op: uint8(op), Size: uint8(f.Size), Count: uint8(f.Count), Ptr: uint8(f.Ptr), Out: uint8(f.Out), Pool: uint8(f.Pool), Kind: kind,
	}
	if f.Op == allocator.PoolDestroy {
		b.Ptr = uint8(f.Pool) // a pool made with a size is a block of its own
	}
	for flag, bit := range map[allocator.Flags]bpf.CurrentFuncFlag{
		allocator.ZeroSizeFrees: bpf.CurrentFuncFlagFUNC_ZERO_FREES, allocator.FreesOnFailure: bpf.CurrentFuncFlagFUNC_FAIL_FREES,
		allocator.StatusZero: bpf.CurrentFuncFlagFUNC_STATUS, allocator.StatusNonZero: bpf.CurrentFuncFlagFUNC_TRUTH,
		allocator.IntSize: bpf.CurrentFuncFlagFUNC_INT_SIZE, allocator.PtrIsOut: bpf.CurrentFuncFlagFUNC_PTR_IS_OUT,
		allocator.ExpandReturnsSize: bpf.CurrentFuncFlagFUNC_REAL_SIZE, allocator.MayThrow: bpf.CurrentFuncFlagFUNC_THROWS,
	} {
		if f.Flags&flag != 0 {
			b.Flags |= uint32(bit)
		}
	}
	if f.Kind == profile.KindMalloc || f.Kind == profile.KindLuaJIT {
		b.Flags |= uint32(bpf.CurrentFuncFlagFUNC_ALLOCATOR)
	}
	if a.Place.Bare {
		b.Flags |= uint32(bpf.CurrentFuncFlagFUNC_AT_ENTRY)
	}
	if f.Op == allocator.Alloc && callsNoOther(a.Family) {
		b.Flags |= uint32(bpf.CurrentFuncFlagFUNC_LEAF)
	}
	return b, nil
}

// callsNoOther tells whether a family's functions that make blocks reach none of the others by a probed entry. (musl's
// calloc calls malloc.)
func callsNoOther(f allocator.Family) bool {
	return f == allocator.FamilyGlibc || f == allocator.FamilyJemalloc || f == allocator.FamilyTcmalloc
}

// kinds numbers the kinds that blocks can have; number 0 stands for stacks of mappings.
type kinds struct {
	mu    sync.Mutex
	names []profile.Kind
}

func newKinds() *kinds { return &kinds{names: []profile.Kind{""}} }

func (k *kinds) number(name profile.Kind) (uint8, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	i := slices.Index(k.names, name)
	if i < 0 {
		i = len(k.names)
		k.names = append(k.names, name)
	}
	if i > 127 {
		return 0, errors.New("more than 127 kinds of blocks")
	}
	return uint8(i), nil
}

func (k *kinds) name(number uint32) profile.Kind {
	k.mu.Lock()
	defer k.mu.Unlock()
	if int(number) >= len(k.names) {
		return ""
	}
	return k.names[number]
}

// closeAll closes hooks at the same time: each waits for the kernel's grace periods.
func closeAll(hooks []io.Closer) error {
	errs := make([]error, len(hooks))
	var wg sync.WaitGroup
	slots := make(chan struct{}, 64)
	for i, h := range hooks {
		wg.Go(func() {
			slots <- struct{}{}
			errs[i] = h.Close()
			<-slots
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
