package tracer

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/procfs"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/inventory"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/target"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// member is one image of one traced process: exec ends it and begins another. All fields are guarded by Tracer.mu.
type member struct {
	key     uint64 // of struct proc: generation and tgid
	pid     int
	process *profile.Process
	space   *unwind.Space
	regions *regions
	brk     uint64
	// clan is the key of the member whose probes this one inherited, its own when it has probes of its own. The kernel takes
	// inherited probes out when the first ones are closed, so that those outlive their process as long as there is an heir.
	clan   uint64
	users  int             // processes that live in its memory
	calls  []io.Closer     // probes of allocator functions
	guards []io.Closer     // probes of unwinders; the last to go
	probed uint64          // when its last probes were in, by the monotonic clock: what it forked before did not inherit them
	marked bool            // the BPF side knows that they are
	opened map[*probe]bool // of the process: they outlive exec
	placed map[*probe]bool // whose places in this image are noted
	// objects of the mappings, and the code of allocators: what such code maps is internal.
	objects    map[*profile.Mapping]*object
	allocators []codeRange
	locations  map[uint64]*profile.Location
	inForce    string
	ended      bool
	execed     bool // the image was replaced: its blocks are gone, and were no leak
}

type codeRange struct{ start, end uint64 }

func newMember(key uint64, pid int) *member {
	return &member{
		key: key, pid: pid, clan: key, users: 1, regions: newRegions(), opened: map[*probe]bool{}, placed: map[*probe]bool{}, objects: map[*profile.Mapping]*object{},
		locations: map[uint64]*profile.Location{}, process: &profile.Process{PID: pid, Started: time.Now()},
	}
}

// identify reads what a person knows the process by.
func (m *member) identify() {
	p, err := target.Read(memory.FS{}, m.pid)
	if err != nil {
		return
	}
	m.process.Comm, m.process.Exe, m.process.Container = p.Comm, p.Exe, p.Container.Short()
}

// child is the member that a fork makes: it has its parent's memory, but nothing that was counted for the parent.
func (m *member) child(key uint64, pid int) *member {
	c := newMember(key, pid)
	c.clan, c.brk = m.clan, m.brk
	c.process.Comm, c.process.Exe, c.process.Container = m.process.Comm, m.process.Exe, m.process.Container
	c.inForce = m.inForce
	c.allocators = slices.Clone(m.allocators)
	for _, old := range m.process.Mappings {
		mapping := *old
		c.process.Mappings = append(c.process.Mappings, &mapping)
		c.objects[&mapping] = m.objects[old]
	}
	return c
}

// initialBrk is where the heap ends, or where it would begin.
func initialBrk(pid int, ranges []memory.Range) uint64 {
	for i := range ranges {
		if ranges[i].Path == "[heap]" {
			return ranges[i].End
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	const startBrk = 47 - 3 // field 47 of proc(5); fields from the third on follow the command's last parenthesis
	_, rest, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) <= startBrk {
		return 0
	}
	n, _ := strconv.ParseUint(fields[startBrk], 10, 64)
	return n
}

// refresh brings unwind tables, files and probes of a member up to what it has mapped now. It is called when the member
// joins, after exec, and when it mapped code.
func (t *Tracer) refresh(m *member) error {
	ranges, err := memory.FS{}.Maps(m.pid)
	if err != nil {
		return fmt.Errorf("read mappings of process %d: %w", m.pid, err)
	}
	if m.brk == 0 {
		m.brk = initialBrk(m.pid, ranges)
	}
	errTables := t.publish(m)
	t.noteMappings(m, ranges)
	return errors.Join(errTables, t.probe(m, ranges))
}

// publish gives the unwinder the member's mappings.
func (t *Tracer) publish(m *member) error {
	old := m.space
	var space *unwind.Space
	var err error
	if old == nil {
		space, err = t.tables.Publish(m.pid)
	} else {
		space, err = t.tables.Refresh(old)
	}
	if err != nil {
		return fmt.Errorf("prepare unwind tables of process %d: %w", m.pid, err)
	}
	if space == old {
		return nil
	}
	m.space = space
	err = t.updateProc(m, func(p *bpf.Proc) { p.Slot = space.Slot })
	if old != nil {
		t.tables.Release(old)
	}
	return err
}

// updateProc changes the BPF side's record of a member, unless it stands for a later image by now.
func (t *Tracer) updateProc(m *member, change func(*bpf.Proc)) error {
	var p bpf.Proc
	tgid := uint32(m.pid)
	if err := t.programs.Procs.Lookup(tgid, &p); err != nil {
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // it is gone; its exit event is on the way
		}
		return fmt.Errorf("look up process %d: %w", m.pid, err)
	}
	if p.Key != m.key {
		return nil
	}
	change(&p)
	if err := t.programs.Procs.Update(tgid, p, ebpf.UpdateExist); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("update process %d: %w", m.pid, err)
	}
	return nil
}

// noteMappings adds mappings of code that were not there before to the inventory. Those that are gone stay: stacks from
// their time are still to be named.
func (t *Tracer) noteMappings(m *member, ranges []memory.Range) {
	for i := range ranges {
		r := &ranges[i]
		vdso := r.Path == "[vdso]"
		if r.Perms&memory.Exec == 0 || !r.IsFile() && !vdso || hasMapping(m.process.Mappings, r) {
			continue
		}
		mapping := &profile.Mapping{Start: r.Start, Limit: r.End, Offset: r.Offset, File: r.Path}
		if !vdso {
			o, err := t.files.open(m.pid, r)
			if err != nil {
				continue
			}
			mapping.Size, mapping.ModTime = o.size, o.time
			mapping.BuildID = o.buildID
			mapping.Replaced = inventory.Replaced(o.file, memory.FS{}.Path(m.pid, "root"), r.Path, o.buildID)
			m.objects[mapping] = o
		}
		m.process.Mappings = append(m.process.Mappings, mapping)
	}
}

func hasMapping(mappings []*profile.Mapping, r *memory.Range) bool {
	return slices.ContainsFunc(mappings, func(m *profile.Mapping) bool {
		return m.Start == r.Start && m.Limit == r.End && m.Offset == r.Offset && m.File == r.Path
	})
}

// probe puts probes on the allocator functions of the files that the member has mapped.
func (t *Tracer) probe(m *member, ranges []memory.Range) error {
	if t.options.Mode == Growth {
		return nil
	}
	at := map[*object][]*memory.Range{}
	for i := range ranges {
		r := &ranges[i]
		if r.Perms&memory.Exec == 0 || !r.IsFile() {
			continue
		}
		o, err := t.files.open(m.pid, r)
		if err != nil {
			if !gone(m.pid) {
				t.options.Warn(err.Error())
			}
			continue
		}
		at[o] = append(at[o], r)
	}
	plan, err := t.scanner.Plan(m.pid)
	if err != nil {
		return fmt.Errorf("look for allocators in process %d: %w", m.pid, err)
	}
	m.inForce = plan.InForce
	errs := []error{t.guardExceptions(m, &plan)}
	m.notes(t, plan)
	var fresh []*probe
	for _, a := range plan.Probes {
		o := t.files.find(a.ID)
		if len(at[o]) == 0 {
			continue
		}
		p, err := t.defineFunction(m, a, o, at[o])
		errs = append(errs, err)
		if p != nil && !m.opened[p] {
			fresh = append(fresh, p)
		}
	}
	slices.SortStableFunc(fresh, freesFirst)
	errs = append(errs, t.openProbes(m, fresh), t.markProbed(m))
	return errors.Join(errs...)
}

// freesFirst is the order in which probes go into a process at work: a block that is seen to be made has its end seen too.
func freesFirst(a, b *probe) int { return cmp.Compare(a.rank(), b.rank()) }

func (p *probe) rank() int {
	if p.allocator.Op == allocator.Free || p.allocator.Op == allocator.PoolDestroy {
		return 0
	}
	return 1
}

// maxNotes bounds what is said of a service of many containers.
const maxNotes = 32

func (m *member) notes(t *Tracer, plan allocator.Plan) {
	for _, note := range plan.Notes {
		if len(t.notes) < maxNotes && !slices.Contains(t.notes, note) {
			t.notes = append(t.notes, note)
		}
	}
}

// defineFunction makes the function a probe and notes where the member has it.
func (t *Tracer) defineFunction(m *member, a allocator.Probe, o *object, at []*memory.Range) (*probe, error) {
	a.ID = o.id // another container may have the file under another number
	p, err := t.probes.define(a, o.file)
	if err != nil || m.placed[p] {
		return p, err
	}
	m.placed[p] = true
	for _, r := range at {
		entry, ok := addressOf(r, a.Offset)
		if !ok {
			continue
		}
		code := codeRange{entry, entry + max(a.Length, 1)}
		if a.AllocatorOnly {
			code = codeRange{r.Start, r.End}
		}
		if !slices.Contains(m.allocators, code) {
			m.allocators = append(m.allocators, code)
		}
		if err := t.probes.address(p, m.pid, entry+a.Place.Offset); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// openProbes puts probes into a member, of the sort that the trace's precision asks for.
func (t *Tracer) openProbes(m *member, list []*probe) error {
	if t.callsShut {
		return nil
	}
	var always, pairs []*probe
	for _, p := range list {
		if p.session {
			always = append(always, p)
		} else {
			pairs = append(pairs, p)
		}
	}
	if err := t.openShared(m, always); err != nil {
		return err
	}
	if t.useSessions {
		return t.openSessions(m, pairs)
	}
	if len(pairs) == 0 {
		return nil
	}
	calls, err := t.probes.openAll(pairs, m.pid)
	if err != nil {
		return err
	}
	m.calls = append(m.calls, calls...)
	for _, p := range pairs {
		m.opened[p] = true
	}
	return nil
}

// markProbed lets the BPF side enter the calls of sessions: with them alone, allocations would be seen and frees not.
func (t *Tracer) markProbed(m *member) error {
	if m.marked {
		return nil
	}
	m.marked = true
	err := t.updateProc(m, func(p *bpf.Proc) { p.Flags |= uint32(bpf.CurrentProcFlagPROC_PROBED) })
	m.probed = monotonic()
	return err
}

// openShared puts probes into all processes that map the files, and says so when there are others than the traced ones.
func (t *Tracer) openShared(m *member, list []*probe) error {
	fresh, err := t.probes.shareSessions(list)
	if err != nil {
		return err
	}
	for _, p := range list {
		m.opened[p] = true
	}
	if len(fresh) == 0 || t.windows.count > 0 {
		return nil
	}
	if n := t.strangers(m, fresh); n > 0 {
		t.announce("operator new of %s is probed in every process that maps it, %d of them not traced: on this kernel no other probe lets "+
			"exceptions of children pass. Their calls are not counted, but each costs them a trap", fresh[0].allocator.Path, n)
	}
	return nil
}

// strangers counts the processes that are not traced and map a file of the probes.
func (t *Tracer) strangers(m *member, list []*probe) int {
	fs := memory.FS{}
	files := map[mappedFile]bool{}
	ranges, _ := fs.Maps(m.pid) // none: it has ended
	for i := range ranges {
		if slices.ContainsFunc(list, func(p *probe) bool { return p.allocator.Path == ranges[i].Path }) {
			files[mappedFile{ranges[i].Dev, ranges[i].Inode}] = true
		}
	}
	n := 0
	processes, _ := procfs.AllProcs() // none: no harm is known of
	for _, p := range processes {
		var known bpf.Proc // a child whose birth was not read yet
		if p.PID == m.pid || t.programs.Procs.Lookup(uint32(p.PID), &known) == nil {
			continue
		}
		ranges, _ := fs.Maps(p.PID) // none: it has ended, or is a kernel thread
		if slices.ContainsFunc(ranges, func(r memory.Range) bool { return files[mappedFile{r.Dev, r.Inode}] }) {
			n++
		}
	}
	return n
}

// mappedFile names a file as the maps of all processes do.
type mappedFile struct {
	dev   memory.Dev
	inode uint64
}

func (t *Tracer) openSessions(m *member, list []*probe) error {
	links, err := t.probes.sessions(list, m.pid)
	if err != nil {
		return err
	}
	m.calls = append(m.calls, links...)
	for _, p := range list {
		m.opened[p] = true
	}
	return nil
}

// openWatch puts a program that does no books into a member, once.
func (t *Tracer) openWatch(m *member, to *[]io.Closer, o *object, offset uint64, prog *ebpf.Program) error {
	p, err := t.probes.defineWatch(o.id, offset, o.file, prog)
	if err != nil || m.opened[p] {
		return err
	}
	hooks, err := t.probes.openAll([]*probe{p}, m.pid)
	if err != nil {
		return err
	}
	m.opened[p] = true
	*to = append(*to, hooks...)
	return nil
}

// addressOf is where a process has a file's byte, if the range holds it.
func addressOf(r *memory.Range, offset uint64) (uint64, bool) {
	if offset < r.Offset || offset-r.Offset >= r.Size() {
		return 0, false
	}
	return r.Start + offset - r.Offset, true
}

// isInternal tells whether a stack leads through an allocator: what it maps holds blocks that have books of their own.
func (m *member) isInternal(frames []uint64) bool {
	for _, raw := range frames {
		addr, mark := unwind.Frame(raw)
		if mark == "" && slices.ContainsFunc(m.allocators, func(c codeRange) bool { return addr >= c.start && addr < c.end }) {
			return true
		}
	}
	return false
}
