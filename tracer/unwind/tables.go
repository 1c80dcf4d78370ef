// Package unwind feeds the stack walker of bpf/unwind.h: it reads the unwind tables of all files that a process executes
// and keeps them, with each process's mappings, in BPF maps. Files are shared between processes by build-id.
//
// The trap: the walker runs all the time. Whatever it may be reading is either fresh memory that no slot points to, or
// changed by single words with the slot's generation raised afterwards, at which the walker throws its stack away.
package unwind

import (
	"cmp"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/tracer/unwind/internal/ehframe"
)

type segment = ehframe.Segment

// Layout of bpf/unwind.h; a test compares it with the types of the compiled programs.
const (
	maxMappings = 512
	maxRules    = 16384
	maxBins     = 65536
	flagAnon    = 1
)

type bpfMapping struct {
	Start, End, Bias       uint64
	Row0, Rows, Bin, Flags uint32
}

type bpfSlot struct {
	Gen, N                        uint32
	LuaCur, LuaCframe, LuaSize, _ uint32
	M                             [maxMappings]bpfMapping
}

// quarantine keeps a released slot unused for a while: a walker may have looked its number up just before the switch.
const quarantine = time.Second

// Errors that Publish returns.
var (
	ErrClosed = os.ErrClosed
	ErrSlots  = errors.New("more processes than slots for their mappings")
)

// Maps are the walker's maps of a loaded collection, named as in bpf/unwind.h.
type Maps struct {
	Rows, Rules, Slots, BinUse *ebpf.Map
}

// Options of New; nil and zero values mean the defaults.
type Options struct {
	Proc    string        // where procfs is mounted; /proc
	Workers int           // files read at the same time; 2
	Wait    time.Duration // how long Refresh waits for new files' tables before it publishes without them; 50 ms
}

// RowsFor is the number of entries of the map of rows for a limit in bytes. Set it before the collection is loaded.
func RowsFor(tableBytes uint64) uint32 {
	return uint32(max(min(tableBytes/uint64(unsafe.Sizeof(ehframe.Row{})), 1<<28), 4096))
}

// Tables owns the contents of the walker's maps. All methods may be called from any goroutine.
type Tables struct {
	proc    string
	wait    time.Duration
	workers chan struct{}
	reading sync.WaitGroup

	rows, rules, slots, use *mapped

	mu           sync.Mutex
	closed       bool
	space        *rowSpace
	numbers      map[ehframe.Rule]uint16
	files        map[fileKey]*binary
	identities   map[string]*binary
	states       []slotState
	free         []uint32 // released first, reused first
	bins         uint32
	publications uint64
	evicted      []string
	over         int
}

type slotState struct {
	refs  int
	freed time.Time
	space *Space
	bins  []*binary // of the slot's entries, nil for anonymous memory
}

// fileKey names a file's content as well as the kernel lets it be named without reading it.
type fileKey struct {
	dev, ino    uint64
	mtime, size int64
}

// New takes over the maps of a loaded collection, which must be fresh and outlive it.
func New(maps Maps, opts *Options) (*Tables, error) {
	o := Options{}
	if opts != nil {
		o = *opts
	}
	t := &Tables{
		proc:       cmp.Or(o.Proc, "/proc"),
		wait:       cmp.Or(o.Wait, 50*time.Millisecond),
		workers:    make(chan struct{}, cmp.Or(o.Workers, 2)),
		numbers:    map[ehframe.Rule]uint16{},
		files:      map[fileKey]*binary{},
		identities: map[string]*binary{},
	}
	var err error
	for _, m := range []struct {
		to   **mapped
		from *ebpf.Map
		size uintptr
	}{
		{&t.rows, maps.Rows, unsafe.Sizeof(ehframe.Row{})},
		{&t.rules, maps.Rules, unsafe.Sizeof(ehframe.Rule{})},
		{&t.slots, maps.Slots, unsafe.Sizeof(bpfSlot{})},
		{&t.use, maps.BinUse, 4},
	} {
		*m.to, err = mapArray(m.from, int(m.size))
		if err != nil {
			return nil, errors.Join(err, t.unmap())
		}
	}
	t.space = newRowSpace(t.rows.n)
	t.states = make([]slotState, t.slots.n)
	for i := range t.slots.n {
		t.free = append(t.free, i)
	}
	if _, err := t.ruleNumber(ehframe.Invalid); err != nil {
		return nil, errors.Join(err, t.unmap())
	}
	return t, nil
}

// Close lets go of the maps once files being read are done. It may be called twice.
func (t *Tables) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.reading.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.unmap()
}

func (t *Tables) unmap() error {
	return errors.Join(t.rows.close(), t.rules.close(), t.slots.close(), t.use.close())
}

// Publish reads the mappings of a process, waits for all tables, and fills a slot, whose number the BPF side is then to
// be told. The caller releases it in the end.
func (t *Tables) Publish(pid int) (*Space, error) {
	return t.publish(pid, nil, nil)
}

// Refresh reads the mappings again. When they did not change it returns s itself; otherwise a new Space in a new slot:
// switch the BPF side over, then release s.Slot. A table that takes long comes into the new slot by itself.
func (t *Tables) Refresh(s *Space) (*Space, error) {
	timer := time.NewTimer(t.wait)
	defer timer.Stop()
	return t.publish(s.PID, s, timer.C)
}

func (t *Tables) publish(pid int, old *Space, deadline <-chan time.Time) (*Space, error) {
	areas, err := readAreas(filepath.Join(t.proc, strconv.Itoa(pid), "maps"))
	if err != nil {
		return nil, err
	}
	s := &Space{PID: pid}
	var done []<-chan struct{}
	s.Mappings, done, err = t.resolve(pid, areas)
	if err != nil {
		return nil, err
	}
	s.Mappings, s.Over = trim(s.Mappings)
	if old != nil {
		if slices.EqualFunc(old.Mappings, s.Mappings, Mapping.same) {
			return old, nil
		}
		s.Gone = gone(old, s.Mappings)
	}
	waitAll(done, deadline)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("publish mappings of %d: %w", pid, ErrClosed)
	}
	t.over += s.Over
	return s, t.fill(s)
}

// waitAll waits for tables until the deadline; a nil deadline never comes.
func waitAll(done []<-chan struct{}, deadline <-chan time.Time) {
	for _, d := range done {
		select {
		case <-d:
		case <-deadline:
			return
		}
	}
}

// resolve finds the file behind each area and starts reading those not known yet.
func (t *Tables) resolve(pid int, areas []area) (ms []Mapping, done []<-chan struct{}, err error) {
	t.mu.Lock()
	t.publications++
	publication := t.publications
	t.mu.Unlock()
	files := map[fileOfArea]*binary{}
	for _, a := range areas {
		m := Mapping{Start: a.start, End: a.end, Offset: a.off, Path: a.path, dev: a.dev, inode: a.inode}
		if a.anonymous() {
			if n := len(ms); n > 0 && ms[n-1].bin == nil && ms[n-1].End == a.start {
				ms[n-1].End = a.end
				continue
			}
			m.Path = ""
		} else {
			key := fileOfArea{a.dev, a.inode, a.path}
			b, ok := files[key]
			if !ok {
				var ready <-chan struct{}
				b, ready, err = t.open(pid, a, publication)
				if err != nil {
					return nil, nil, err
				}
				files[key] = b
				done = append(done, ready)
			}
			m.bin = b
		}
		ms = append(ms, m)
	}
	return ms, done, nil
}

type fileOfArea struct {
	dev   string
	inode uint64
	path  string
}

// trim drops what a slot cannot hold, anonymous memory first.
func trim(ms []Mapping) ([]Mapping, int) {
	over := len(ms) - maxMappings
	if over <= 0 {
		return ms, 0
	}
	drop := over
	for i := len(ms) - 1; i >= 0 && drop > 0; i-- {
		if ms[i].bin == nil {
			ms = slices.Delete(ms, i, i+1)
			drop--
		}
	}
	return ms[:min(len(ms), maxMappings)], over
}

// open is the binary of an area's file. A file that cannot be opened is one without a table.
func (t *Tables) open(pid int, a area, publication uint64) (*binary, <-chan struct{}, error) {
	f, key, err := t.openArea(pid, a)
	if err != nil {
		b := &binary{path: a.path, done: make(chan struct{})}
		b.setReason(err.Error())
		close(b.done)
		return b, b.done, nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		f.Close()
		return nil, nil, fmt.Errorf("open %s: %w", a.path, ErrClosed)
	}
	b, ok := t.files[key]
	if ok && !t.worthReading(b) {
		b.published = publication
		f.Close()
		return b, b.done, nil
	}
	if !ok {
		b = &binary{path: a.path, size: key.size}
		if t.bins < maxBins-1 {
			t.bins++
			b.id = t.bins
		}
		t.files[key] = b
	}
	b.published = publication
	b.done = make(chan struct{})
	b.setReason(reasonPending)
	t.reading.Add(1)
	go t.read(b, f, b.done)
	return b, b.done, nil
}

// worthReading is true for a table that was evicted and would fit again.
func (t *Tables) worthReading(b *binary) bool {
	select {
	case <-b.done:
	default:
		return false
	}
	b = b.real()
	r := b.reason()
	return b.twin.Load() == nil && (r == reasonEvicted || r == reasonFull) && t.rows.n-t.space.used >= b.nrows
}

// read makes the table of a file and puts it into the kernel, also into slots that wait for it.
func (t *Tables) read(b *binary, f source, done chan struct{}) {
	defer t.reading.Done()
	defer close(done)
	defer f.Close()
	if twin := t.twin(b, f); twin != nil {
		t.join(b, twin)
		return
	}
	t.workers <- struct{}{}
	defer func() { <-t.workers }()

	table, err := ehframe.Extract(f, machine())
	info := &fileInfo{segments: table.Segments, buildID: ehframe.BuildID(f), lua: findLua(f, table)}
	b.info.Store(info)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	if err != nil {
		b.setReason(err.Error())
		return
	}
	t.place(b, table)
	t.patch(b)
}

// twin is another file with the same content, as its build-id and size tell: the same package in two containers.
func (t *Tables) twin(b *binary, f source) *binary {
	id := ehframe.BuildID(f)
	if id == "" {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	key := fmt.Sprintf("%s %d", id, b.size)
	twin, ok := t.identities[key]
	if ok && twin != b {
		return twin
	}
	t.identities[key] = b
	return nil
}

// join makes b another name of twin once that one has been read.
func (t *Tables) join(b, twin *binary) {
	t.mu.Lock()
	done := twin.done
	t.mu.Unlock()
	<-done
	t.mu.Lock()
	defer t.mu.Unlock()
	b.twin.Store(twin)
	twin.published = max(twin.published, b.published)
	for i := range t.states {
		for j, other := range t.states[i].bins {
			if other == b {
				t.states[i].bins[j] = twin
			}
		}
	}
	if !t.closed {
		t.patch(twin)
	}
}

// place copies a table into the map of rows.
func (t *Tables) place(b *binary, table *ehframe.Table) {
	if len(table.Rows) == 0 {
		b.setReason(ehframe.ErrNoTable.Error())
		return
	}
	numbers := make([]uint16, len(table.Rules))
	for i, r := range table.Rules {
		n, err := t.ruleNumber(r)
		if err != nil {
			b.setReason(err.Error())
			return
		}
		numbers[i] = n
	}
	n := uint32(len(table.Rows))
	b.nrows = n
	at, ok := t.room(b, n)
	if !ok {
		b.setReason(reasonFull)
		return
	}
	for i, r := range table.Rows {
		*rowAt(t.rows, at+uint32(i)) = ehframe.Row{VAddr: r.VAddr, Rule: numbers[r.Rule]}
	}
	b.row0, b.resident = at, true
	b.useBase = t.used(b)
	b.setReason("")
}

func rowAt(m *mapped, i uint32) *ehframe.Row {
	return at[ehframe.Row](m, i)
}

func (t *Tables) ruleNumber(r ehframe.Rule) (uint16, error) {
	n, ok := t.numbers[r]
	if ok {
		return n, nil
	}
	if len(t.numbers) >= int(min(t.rules.n, maxRules)) {
		return 0, errors.New("too many different unwind rules")
	}
	n = uint16(len(t.numbers))
	*at[ehframe.Rule](t.rules, uint32(n)) = r
	t.numbers[r] = n
	return n, nil
}

// used counts the frames seen in a file, roughly: one walk in sixteen counts.
func (t *Tables) used(b *binary) uint32 {
	if b.id == 0 || b.id >= t.use.n {
		return 0
	}
	return t.use.word(b.id, 0).Load()
}

// room finds a place for n rows, and evicts the least used tables when there is none.
func (t *Tables) room(b *binary, n uint32) (uint32, bool) {
	if n > t.rows.n {
		return 0, false
	}
	for {
		at, ok := t.space.alloc(n)
		if ok {
			return at, true
		}
		victim := t.victim(b)
		if victim == nil {
			return 0, false
		}
		t.evict(victim)
	}
}

// victim is the table to go: those of no living process first, then the one with the fewest frames. Before any stack was
// walked nothing is known, and the tables of the same process stay.
func (t *Tables) victim(newcomer *binary) *binary {
	live := map[*binary]bool{}
	for _, s := range t.states {
		for _, b := range s.bins {
			live[b] = true
		}
	}
	walked := false
	var best *binary
	rank := func(b *binary) (int, uint32, uint64) {
		if live[b] || b.published == newcomer.published {
			return 1, t.used(b) - b.useBase, b.published
		}
		return 0, t.used(b) - b.useBase, b.published
	}
	for _, b := range t.files {
		if !b.resident || b == newcomer {
			continue
		}
		walked = walked || t.used(b) != b.useBase
		if best == nil {
			best = b
			continue
		}
		l1, u1, p1 := rank(b)
		l2, u2, p2 := rank(best)
		if cmp.Or(cmp.Compare(l1, l2), cmp.Compare(u1, u2), cmp.Compare(p1, p2)) < 0 {
			best = b
		}
	}
	if best != nil && !walked && best.published == newcomer.published {
		return nil
	}
	return best
}

// evict takes a table out of all slots and only then gives its rows away.
func (t *Tables) evict(b *binary) {
	b.resident = false
	b.setReason(reasonEvicted)
	t.evicted = append(t.evicted, filepath.Base(b.path))
	t.patch(b)
	t.space.release(b.row0, b.nrows)
}

// patch brings the entries of a file up to date in all slots in use, word by word, and tells walkers on their way.
func (t *Tables) patch(b *binary) {
	for i := range t.states {
		if !slices.Contains(t.states[i].bins, b) {
			continue
		}
		slot := at[bpfSlot](t.slots, uint32(i))
		for j, other := range t.states[i].bins {
			if other != b {
				continue
			}
			m := &slot.M[j]
			if !b.resident {
				atomic.StoreUint32(&m.Rows, 0)
				continue
			}
			bias, ok := b.bias(t.states[i].space.Mappings[j])
			if !ok {
				continue
			}
			atomic.StoreUint32(&m.Bin, b.id)
			atomic.StoreUint64(&m.Bias, bias)
			atomic.StoreUint32(&m.Row0, b.row0)
			atomic.StoreUint32(&m.Rows, b.nrows)
		}
		if info := b.info.Load(); info != nil && info.lua != nil {
			slot.setLua(info.lua)
		}
		atomic.AddUint32(&slot.Gen, 1)
	}
}

func (s *bpfSlot) setLua(l *luaLayout) {
	atomic.StoreUint32(&s.LuaCframe, l.cframe)
	atomic.StoreUint32(&s.LuaSize, l.size)
	atomic.StoreUint32(&s.LuaCur, l.cur)
}

// bias is what to take off an address in the mapping to get the file's own address for it.
func (b *binary) bias(m Mapping) (uint64, bool) {
	info := b.info.Load()
	if info == nil {
		return 0, false
	}
	for _, s := range info.segments {
		// the kernel maps whole pages, so that a mapping may begin below the segment
		if m.Offset+(m.End-m.Start) <= s.Off || m.Offset >= s.Off+s.FileSize {
			continue
		}
		return m.Start - (m.Offset - s.Off + s.VAddr), true
	}
	return 0, false
}

// fill writes a Space into a free slot.
func (t *Tables) fill(s *Space) error {
	n, ok := t.takeSlot()
	if !ok {
		return fmt.Errorf("publish mappings of %d: %w (%d)", s.PID, ErrSlots, t.slots.n)
	}
	s.Slot = n
	slot := at[bpfSlot](t.slots, n)
	bins := make([]*binary, len(s.Mappings))
	atomic.AddUint32(&slot.Gen, 1)
	atomic.StoreUint32(&slot.LuaCur, 0)
	for i, m := range s.Mappings {
		slot.M[i] = bpfMapping{Start: m.Start, End: m.End, Flags: flagAnon}
		if m.bin == nil {
			continue
		}
		b := m.bin.real()
		bins[i] = b
		slot.M[i] = b.entry(m)
		if info := b.info.Load(); info != nil && info.lua != nil {
			slot.setLua(info.lua)
		}
	}
	atomic.StoreUint32(&slot.N, uint32(len(s.Mappings)))
	atomic.AddUint32(&slot.Gen, 1)
	t.states[n] = slotState{refs: 1, space: s, bins: bins}
	return nil
}

func (b *binary) entry(m Mapping) bpfMapping {
	e := bpfMapping{Start: m.Start, End: m.End, Bin: b.id}
	bias, ok := b.bias(m)
	if ok && b.resident {
		e.Bias, e.Row0, e.Rows = bias, b.row0, b.nrows
	}
	return e
}

// takeSlot prefers slots that were released long ago.
func (t *Tables) takeSlot() (uint32, bool) {
	if len(t.free) == 0 {
		return 0, false
	}
	for i, n := range t.free {
		if time.Since(t.states[n].freed) >= quarantine {
			t.free = slices.Delete(t.free, i, i+1)
			return n, true
		}
	}
	n := t.free[0]
	t.free = t.free[1:]
	return n, true
}

// Share counts one more user of a slot: a child born by fork executes in the same mappings until it changes them.
func (t *Tables) Share(s *Space, pid int) *Space {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || t.states[s.Slot].space == nil {
		return nil
	}
	t.states[s.Slot].refs++
	child := *s
	child.PID = pid
	return &child
}

// Release gives back one use of the slot. The Space stays good for questions.
func (t *Tables) Release(s *Space) {
	t.mu.Lock()
	defer t.mu.Unlock()
	state := &t.states[s.Slot]
	if t.closed || state.refs == 0 {
		return
	}
	state.refs--
	if state.refs > 0 {
		return
	}
	atomic.AddUint32(&at[bpfSlot](t.slots, s.Slot).Gen, 1)
	*state = slotState{freed: time.Now()}
	t.free = append(t.free, s.Slot)
}

// Stats is what the tables cost and what they lack.
type Stats struct {
	Files, Rows, RowsMax, Rules int
	Slots, SlotsMax             int
	// Bytes is the memory of the maps, all of it taken when the collection is loaded.
	Bytes uint64
	// Evicted are files whose table gave way to another, in order.
	Evicted []string
	// Missing are the files without a table, and why.
	Missing []Missing
	// MappingsOver counts executable mappings beyond what a slot holds.
	MappingsOver int
}

// Missing is a file without a table.
type Missing struct{ Path, Reason string }

// Stats may be asked at any time.
func (t *Tables) Stats() Stats {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := Stats{Rows: int(t.space.used), RowsMax: int(t.rows.n), Rules: len(t.numbers), SlotsMax: int(t.slots.n),
		Slots: int(t.slots.n) - len(t.free), Evicted: slices.Clone(t.evicted), MappingsOver: t.over}
	for _, m := range []*mapped{t.rows, t.rules, t.slots, t.use} {
		s.Bytes += uint64(m.stride) * uint64(m.n)
	}
	s.Bytes += rowCacheBytes
	for _, b := range t.files {
		if b.twin.Load() != nil {
			continue
		}
		if b.resident {
			s.Files++
		} else if r := b.reason(); r != "" {
			s.Missing = append(s.Missing, Missing{b.path, r})
		}
	}
	slices.SortFunc(s.Missing, func(a, b Missing) int { return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.Reason, b.Reason)) })
	return s
}

const rowCacheBytes = 65536 * 8

func machine() elf.Machine {
	if runtime.GOARCH == "arm64" {
		return elf.EM_AARCH64
	}
	return elf.EM_X86_64
}
