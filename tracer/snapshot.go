package tracer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/unwind"
)

// bookKey names a stack's book across kinds.
type bookKey struct {
	stackKey
	kind  profile.Kind
	label string
}

// book is what one stack allocated and freed.
type book struct {
	allocObjects, allocBytes, freeObjects, freeBytes int64
	// of the blocks in use, from the live map
	objectsVar, bytesVar float64
	live                 []time.Duration // ages
	oldObjects, oldBytes float64         // of blocks older than Options.OlderThan
}

// moment is the books as they stood at one time of the trace.
type moment struct {
	at    time.Duration
	books map[bookKey]profile.Point
}

// maxMoments bounds the course of the books: when it is reached every other moment goes and the distance doubles.
const (
	maxMoments  = 64
	firstMoment = 200 * time.Millisecond
)

// Note keeps how the books stand now, for the growth over time that verdicts are made of. It is to be called often: it does
// nothing until the next moment is due.
func (t *Tracer) Note() error {
	t.mu.Lock()
	if t.spacing == 0 {
		t.spacing = firstMoment
	}
	due := time.Since(t.started) >= t.noted+t.spacing
	t.mu.Unlock()
	if !due {
		return nil
	}
	books, err := t.readBooks(false)
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	at := time.Since(t.started)
	m := moment{at, make(map[bookKey]profile.Point, len(books))}
	for k, b := range books {
		if !t.shutAt.IsZero() && k.kind != profile.KindMmap && k.kind != profile.KindBrk {
			continue // its books have ended
		}
		m.books[k] = profile.Point{At: at, AllocObjects: b.allocObjects, AllocBytes: b.allocBytes, FreeObjects: b.freeObjects, FreeBytes: b.freeBytes}
	}
	t.noted = at
	t.history = append(t.history, m)
	if len(t.history) == maxMoments {
		t.history = everyOther(t.history)
		t.spacing *= 2
	}
	return nil
}

func everyOther(moments []moment) []moment {
	var kept []moment
	for i := 1; i < len(moments); i += 2 {
		kept = append(kept, moments[i])
	}
	return kept
}

// readBooks reads the rows of the BPF side and the mappings of ours. With live it also walks the blocks in use.
func (t *Tracer) readBooks(live bool) (map[bookKey]*book, error) {
	if err := t.readers.flush(); err != nil {
		return nil, err
	}
	if live {
		t.thinning.Lock()
		defer t.thinning.Unlock()
	}
	rows, err := t.readRows()
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	books := map[bookKey]*book{}
	for k, r := range rows {
		kind := t.kinds.name(k.Kind)
		if kind == "" {
			continue
		}
		a := t.adjustments[k]
		books[bookKey{stackKey{k.Proc, k.Stack}, kind, ""}] = &book{
			allocObjects: objects(r.AllocObjects + uint64(a.objects)), allocBytes: int64(r.AllocBytes) + a.bytes,
			freeObjects: objects(r.FreeObjects), freeBytes: int64(r.FreeBytes),
		}
	}
	t.addUnfollowed(books)
	for _, m := range t.members {
		t.addRegions(books, m, live)
	}
	if live {
		sums, err := t.addLive(books)
		if err != nil {
			return nil, err
		}
		t.compare(rows, sums)
	}
	for k, b := range books {
		if m := t.members[k.proc]; m != nil && m.execed {
			b.freeObjects, b.freeBytes = b.allocObjects, b.allocBytes
		}
		if live && t.options.OlderThan > 0 {
			b.freeObjects = b.allocObjects - int64(math.Round(b.oldObjects))
			b.freeBytes = b.allocBytes - int64(math.Round(b.oldBytes))
		}
	}
	return books, nil
}

func (t *Tracer) readRows() (map[bpf.RowKey]bpf.Row, error) {
	rows := map[bpf.RowKey]bpf.Row{}
	err := eachEntry(t.programs.RowsOfStacks, func(k *bpf.RowKey, r *bpf.Row) {
		if r.AllocObjects != 0 {
			rows[*k] = *r
		}
	})
	if err != nil {
		return nil, fmt.Errorf("read the books: %w", err)
	}
	return rows, nil
}

// objects rounds a sum of weights, kept in units of 2^-20, to whole blocks.
func objects(weights uint64) int64 {
	const shift = 20
	return int64((weights + 1<<(shift-1)) >> shift)
}

func (t *Tracer) addRegions(books map[bookKey]*book, m *member, ages bool) {
	for k, b := range m.regions.books {
		if b.allocObjects == 0 {
			continue
		}
		if s := t.stacks[stackKey{m.key, k.stack}]; s != nil && m.isInternal(s.frames) {
			continue
		}
		books[regionBookKey(m, k)] = &book{
			allocObjects: b.allocObjects, allocBytes: b.allocBytes, freeObjects: b.freeObjects, freeBytes: b.freeBytes,
		}
	}
	if !ages {
		return
	}
	now := t.nowNS()
	seen := map[*region]bool{}
	for _, p := range m.regions.pieces {
		if seen[p.of] {
			continue
		}
		seen[p.of] = true
		b := books[regionBookKey(m, p.of.key)]
		if b == nil {
			continue
		}
		a := age(now, p.of.time)
		b.live = append(b.live, a)
		if a >= t.options.OlderThan {
			b.oldObjects++
			b.oldBytes += float64(p.of.left)
		}
	}
}

func regionBookKey(m *member, k regionKey) bookKey {
	kind := profile.KindMmap
	if k.brk {
		kind = profile.KindBrk
	}
	return bookKey{stackKey{m.key, k.stack}, kind, k.label}
}

// nowNS is the monotonic time that ages are measured at: the end of the trace once it has ended.
func (t *Tracer) nowNS() uint64 {
	if t.stopped.IsZero() {
		return monotonic()
	}
	return t.startNS + uint64(t.stopped.Sub(t.started))
}

func age(now, then uint64) time.Duration {
	if then > now {
		return 0
	}
	return time.Duration(now - then)
}

// addLive walks the blocks in use for their ages and, when sampled, for the variance of the estimates. It returns the sum
// of each row's blocks.
func (t *Tracer) addLive(books map[bookKey]*book) (map[bpf.RowKey]held, error) {
	now := t.nowNS()
	sums := map[bpf.RowKey]held{}
	err := eachEntry(t.programs.Live, func(k *bpf.LiveKey, v *bpf.Block) {
		row := rowOf(k, v)
		sums[row] = sums[row].with(v)
		b := books[bookKey{stackKey{k.Proc, v.Stack}, t.kinds.name(uint32(k.Addr >> kindShift)), ""}]
		if b == nil {
			return
		}
		a, p := age(now, v.Time), share(v.Prob)
		b.live = append(b.live, a)
		if a >= t.options.OlderThan {
			b.oldObjects += 1 / p
			b.oldBytes += float64(v.Size) / p
		}
		objects, bytes := varianceOf(v)
		b.objectsVar += objects
		b.bytesVar += bytes
	})
	if err != nil {
		return nil, fmt.Errorf("walk the blocks in use: %w", err)
	}
	return sums, nil
}

// varianceOf is what a sampled block adds to the variance of the figures that it is part of.
func varianceOf(b *bpf.Block) (objects, bytes float64) {
	p, size := share(b.Prob), float64(b.Size)
	objects = (1 - p) / (p * p)
	return objects, size * size * objects
}

// eachEntry visits a hash map in batches, and one by one where the kernel has no batches.
func eachEntry[K, V any](m *ebpf.Map, visit func(*K, *V)) error {
	const batch = 4096
	keys, values := make([]K, batch), make([]V, batch)
	var cursor ebpf.MapBatchCursor
	for {
		n, err := m.BatchLookup(&cursor, keys, values, nil)
		if errors.Is(err, ebpf.ErrNotSupported) {
			return eachSingly(m, visit)
		}
		for i := range n {
			visit(&keys[i], &values[i])
		}
		switch {
		case errors.Is(err, ebpf.ErrKeyNotExist):
			return nil
		case err != nil:
			return err
		}
	}
}

func eachSingly[K, V any](m *ebpf.Map, visit func(*K, *V)) error {
	var k K
	var v V
	it := m.Iterate()
	for it.Next(&k, &v) {
		visit(&k, &v)
	}
	return it.Err()
}

// Snapshot turns the books into a profile without names; see Symbolize.
func (t *Tracer) Snapshot() (*profile.Snapshot, error) {
	books, err := t.readBooks(true)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	taken := t.stopped
	if taken.IsZero() {
		taken = time.Now()
	}
	s := &profile.Snapshot{
		Command: strings.Join(os.Args, " "), Started: t.started, Taken: taken, Mode: t.options.Mode.String(),
		Probes: t.probed(), Events: slices.Clone(t.events), Notes: slices.Clone(t.notes),
	}
	if t.options.Mode == Sample {
		s.SampleBytes = t.options.SampleBytes
	}
	owners := map[uint64]bool{}
	for k := range books {
		owners[k.proc] = true
	}
	for _, key := range slices.Sorted(maps.Keys(t.members)) {
		m := t.members[key]
		if m.ended && !owners[key] {
			continue // a process that came and went without an allocation
		}
		process := *m.process // events go on changing the original
		process.Mappings = slices.Clone(process.Mappings)
		s.Processes = append(s.Processes, &process)
	}
	lost := 0
	t.keys = make(map[*profile.Stack]bookKey, len(books))
	for k, b := range books {
		m := t.members[k.proc]
		if m == nil {
			continue
		}
		st := t.stackOf(m, k, b)
		if t.stacks[k.stackKey] == nil && k.hash != otherStack {
			lost++
		}
		t.keys[st] = k
		s.Stacks = append(s.Stacks, st)
	}
	slices.SortFunc(s.Stacks, func(a, b *profile.Stack) int { return int(min(max(b.InUseBytes()-a.InUseBytes(), -1), 1)) })
	t.addCounters(s, lost)
	s.Overhead = t.overhead()
	t.windows.tell(s, t.callsShut)
	if t.rss.Before != nil && t.rss.After != nil {
		rss := t.rss
		s.RSS = &rss
	}
	return s, nil
}

func (t *Tracer) stackOf(m *member, k bookKey, b *book) *profile.Stack {
	st := &profile.Stack{
		Kind: k.kind, Label: k.label, PID: m.pid,
		AllocObjects: b.allocObjects, AllocBytes: b.allocBytes, FreeObjects: b.freeObjects, FreeBytes: b.freeBytes,
		InUseObjectsVar: b.objectsVar, InUseBytesVar: b.bytesVar,
		Ages: ages(b.live, t.nowNS()-t.startNS),
	}
	st.Frames, st.Complete = t.framesOf(m, k.stackKey)
	for _, h := range t.history {
		p, ok := h.books[k]
		switch {
		case ok:
			st.History = append(st.History, p)
		case k.kind == profile.KindMmap || k.kind == profile.KindBrk || t.shutAt.IsZero() || h.at < t.shutAt.Sub(t.started):
			st.History = append(st.History, profile.Point{At: h.at}) // not met yet
		}
	}
	return st
}

func ages(live []time.Duration, traced uint64) *profile.Ages {
	if len(live) == 0 {
		return nil
	}
	slices.Sort(live)
	a := &profile.Ages{Min: live[0], Median: live[len(live)/2], Max: live[len(live)-1]}
	half, _ := slices.BinarySearch(live, time.Duration(traced/2))
	a.Old = int64(len(live) - half)
	return a
}

// framesOf makes locations of a stack's addresses; those of one address are shared within a process.
func (t *Tracer) framesOf(m *member, k stackKey) ([]*profile.Location, bool) {
	if k.hash == otherStack {
		return []*profile.Location{{Mark: "[other call stacks: more than --max-stacks]"}}, false
	}
	s := t.stacks[k]
	if s == nil {
		return []*profile.Location{{Mark: "[stack lost: buffer full]"}}, false
	}
	frames := make([]*profile.Location, 0, len(s.frames)+1)
	for _, raw := range s.frames {
		frames = append(frames, m.location(raw))
	}
	end := unwind.End(s.end)
	if end.Whole() {
		return frames, true
	}
	mark := "[truncated: no unwind tables yet]"
	if m.space != nil {
		var last uint64
		if len(s.frames) > 0 {
			last = s.frames[len(s.frames)-1]
		}
		mark = m.space.Describe(end, len(s.frames), last)
	}
	return append(frames, &profile.Location{Mark: mark}), false
}

func (m *member) location(raw uint64) *profile.Location {
	if l := m.locations[raw]; l != nil {
		return l
	}
	addr, mark := unwind.Frame(raw)
	l := &profile.Location{Address: addr, Mark: mark}
	if mark == "" {
		l.Mapping = m.mappingAt(addr)
	}
	m.locations[raw] = l
	return l
}

// mappingAt is the newest mapping that holds an address.
func (m *member) mappingAt(addr uint64) *profile.Mapping {
	for _, p := range slices.Backward(m.process.Mappings) {
		if addr >= p.Start && addr < p.Limit {
			return p
		}
	}
	return nil
}

// probed is the list of probes with their hits.
func (t *Tracer) probed() []profile.Probe {
	var list []profile.Probe
	for _, p := range t.probes.all() {
		list = append(list, profile.Probe{
			Function: strings.Join(p.allocator.Names(), ", "), File: p.allocator.Path, BuildID: p.allocator.BuildID,
			Offset: p.allocator.Place.Offset, Hits: t.hitsOf(p), Emulated: p.allocator.Place.Emulated,
		})
	}
	return list
}

func (t *Tracer) hitsOf(p *probe) uint64 {
	var perCPU []uint64
	_ = t.programs.Hits.Lookup(p.id, &perCPU)
	return sum(perCPU)
}

// Hits is how often any probe was hit.
func (t *Tracer) Hits() uint64 {
	var n uint64
	for _, p := range t.probed() {
		n += p.Hits
	}
	return n
}

// InUse is the sum of bytes in use by kind at this moment, cheap enough for a progress line.
func (t *Tracer) InUse() (map[profile.Kind]int64, error) {
	books, err := t.readBooks(false)
	if err != nil {
		return nil, err
	}
	sums := map[profile.Kind]int64{}
	for k, b := range books {
		sums[k.kind] += b.allocBytes - b.freeBytes
	}
	return sums, nil
}

// Symbolize fills in the names of a snapshot of this tracer.
func (t *Tracer) Symbolize(ctx context.Context, s *profile.Snapshot, options symbolize.Options) error {
	t.addVersions()
	return symbolize.New(options).Snapshot(ctx, s, t.sources())
}

// addVersions reads which versions the mapped files say they are: at the end, as it reads whole files.
func (t *Tracer) addVersions() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range t.members {
		for mapping, o := range m.objects {
			if o != nil {
				mapping.Version = o.version()
			}
		}
	}
}

// sources are the files behind mappings, as the processes had them mapped. They stay good until the tracer is closed.
type sources map[*profile.Mapping]*object

func (t *Tracer) sources() sources {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := sources{}
	for _, m := range t.members {
		maps.Copy(all, m.objects)
	}
	return all
}

// Open implements symbolize.FileSource.
func (s sources) Open(m *profile.Mapping) (symbolize.File, error) {
	if o := s[m]; o != nil {
		return borrowed{o.file}, nil
	}
	return nil, nil
}

// residentByKind adds up the resident memory of all living members.
func (t *Tracer) residentByKind() map[string]uint64 {
	sums := map[string]uint64{}
	for pid, m := range t.current {
		if m.pid != pid {
			continue
		}
		kinds, err := memory.RSSByKind(pid)
		if err != nil {
			continue
		}
		for k, n := range kinds {
			sums[k] += n
		}
	}
	return sums
}

const (
	always     = math.MaxUint32
	otherStack = math.MaxUint64 // OTHER_STACK of bpf/types.h
)

func sum(ns []uint64) (total uint64) {
	for _, n := range ns {
		total += n
	}
	return total
}
