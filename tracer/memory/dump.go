package memory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Sizes of a dump's parts.
const (
	chunkSize = 256 << 10 // copied at once: small enough that the second copy finds it in the CPU's cache
	flushSize = 16 << 20  // written before the page cache is emptied
	// maxHole is the longest run of untouched memory that stays in the file as a hole. Beyond it the file leaves the addresses
	// out, since file systems cannot hold the terabytes that some programs reserve.
	maxHole    = 1 << 30
	maxWorkers = 4
)

// DumpOptions say what to dump and how. The zero value is a raw dump of the default selection.
type DumpOptions struct {
	Selection
	Core      bool // an ELF core instead of a raw file
	Registers bool // with Core: stop all threads for as long as reading their registers and stacks takes
	// Progress is called from time to time with the bytes of memory done and in all.
	Progress func(done, total uint64)
}

// DumpResult is what came of a dump. Sizes are bytes.
type DumpResult struct {
	Path    string
	Ranges  int    // dumped
	Span    uint64 // addresses dumped
	Data    uint64 // read from memory or files and not zero: what the file takes on disk
	Zero    uint64 // known to be zeros: untouched, or read and found so
	Lost    uint64 // vanished or unreadable; zeros in the file, and marked in its index
	Swapped uint64 // of Data and Zero: was swapped out, and is back in memory by the reading
	Took    time.Duration
	Threads int           // with registers in the file
	Stop    time.Duration // how long threads were stopped; 0 when they were not
	Skipped int           // threads whose registers are missing, and
	Why     string        // why, when there are any
	Partial string        // why the file is not whole; empty when it is
}

// Dump writes memory of a live process to a file, which has its name only once it is whole. When ctx ends, the file is finished with
// what it has by then, says so in its index, and Partial tells; that is no error.
func (fs FS) Dump(ctx context.Context, pid int, path string, opts DumpOptions) (*DumpResult, error) {
	p, err := fs.OpenProcess(pid)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	ranges, err := fs.Smaps(pid)
	if err != nil {
		return nil, err
	}
	pieces, err := opts.pick(ranges)
	if err != nil {
		return nil, err
	}
	d := &dumper{p: p, opts: opts, ranges: ranges, pieces: pieces, started: time.Now()}
	defer d.files.close()
	if opts.Core {
		d.base = d.coreHeaderSize()
	}
	if err := d.plan(); err != nil {
		return nil, err
	}
	if err := d.checkRoom(path); err != nil {
		return nil, err
	}
	if err := d.write(ctx, path); err != nil {
		return nil, fmt.Errorf("dump pid %d: %w", pid, err)
	}
	d.result.Path = path
	return &d.result, nil
}

// segment is a run of addresses that has its place in the file, holes included.
type segment struct {
	start, end, off uint64
	rng             *RangeUsage
}

func (s *segment) size() uint64 { return s.end - s.start }

// dumper is one dump in the making.
type dumper struct {
	p        *Process
	opts     DumpOptions
	ranges   []RangeUsage
	pieces   []piece
	base     uint64 // where memory starts in the file
	segments []segment
	byAddr   []*segment // the segments in ascending order of addresses
	gaps     []Extent   // of the pieces, left out of the file: zeros
	total    uint64     // bytes that hold something, as planned
	started  time.Time
	files    mappedFiles
	out      *os.File
	onDisk   bool // the file system has a page cache to be emptied

	taken               []Extent     // stacks that were copied during the stop
	stops               []threadRegs // registers
	done                atomic.Uint64
	mu                  sync.Mutex
	lost                []Extent
	result              DumpResult
	data, zero, swapped atomic.Uint64
}

// plan gives each piece its place in the file and counts what there is to read.
func (d *dumper) plan() error {
	off := d.base
	for i := range d.pieces {
		piece := &d.pieces[i]
		d.result.Span += piece.size()
		d.result.Ranges++
		start := piece.start
		flush := func(end uint64) {
			if end > start {
				d.segments = append(d.segments, segment{start, end, off, piece.rng})
				off += alignPage(end - start)
			}
		}
		err := d.eachSource(piece.rng, piece.start, piece.end, func(run pageRun, src source) error {
			if src != fromNowhere {
				d.total += run.end - run.start
				return nil
			}
			if run.end-run.start >= maxHole {
				flush(run.start)
				d.gaps = append(d.gaps, Extent{run.start, run.end, Zero})
				start = run.end
			}
			return nil
		})
		if err != nil {
			return err
		}
		flush(piece.end)
	}
	for i := range d.segments {
		d.byAddr = append(d.byAddr, &d.segments[i])
	}
	slices.SortFunc(d.byAddr, func(a, b *segment) int { return cmp.Compare(a.start, b.start) })
	return nil
}

// segmentOf is the segment that holds addr, or nil.
func (d *dumper) segmentOf(addr uint64) *segment {
	i := sort.Search(len(d.byAddr), func(i int) bool { return d.byAddr[i].end > addr })
	if i < len(d.byAddr) && d.byAddr[i].start <= addr {
		return d.byAddr[i]
	}
	return nil
}

func alignPage(n uint64) uint64 { return (n + PageSize - 1) &^ (PageSize - 1) }

// source says where a page's content comes from.
type source uint8

const (
	fromMemory  source = iota
	fromFile           // not mapped yet, but the mapped file has it: reading memory would map it at the target's expense
	fromNowhere        // zeros
)

// eachSource calls f for the page runs between two addresses of a range.
func (d *dumper) eachSource(r *RangeUsage, start, end uint64, f func(pageRun, source) error) error {
	if r.Kind == KindKernel {
		return f(pageRun{start: start, end: end, present: true}, fromMemory)
	}
	absent := fromNowhere
	if r.IsFile() && r.Kind != KindAnonymous {
		absent = fromFile
	} else if r.RSS+r.Swap+r.Hugetlb == 0 && end-start >= maxHole {
		// Untouched since smaps was read; a walk over the page state of a terabyte takes seconds.
		return f(pageRun{start: start, end: end}, fromNowhere)
	}
	return d.p.eachRun(start, end, func(run pageRun) error {
		if run.present || run.swapped {
			return f(run, fromMemory)
		}
		return f(run, absent)
	})
}

// checkRoom refuses to fill a disk, or the memory that the target needs.
func (d *dumper) checkRoom(path string) error {
	dir := filepath.Dir(path)
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return fmt.Errorf("look at %s: %w", dir, err)
	}
	room := uint64(stat.Bavail) * uint64(stat.Bsize)
	if need := d.total + d.base + 4<<20; room < need {
		return fmt.Errorf("dump pid %d: %s are needed in %s and %s are free: choose another place with -o, or fewer ranges",
			d.p.pid, profile.FormatBytes(need), dir, profile.FormatBytes(room))
	}
	const tmpfs, ramfs = 0x01021994, 0x858458f6
	inMemory := int64(stat.Type) == tmpfs || int64(stat.Type) == ramfs
	d.onDisk = !inMemory
	if !inMemory {
		return nil
	}
	left, group, ok := d.p.fs.roomBeside(d.p.pid)
	if ok && left < d.total+d.total/8 {
		return fmt.Errorf("dump pid %d: %s is memory, this command runs in the target's cgroup %s, and its limit leaves %s for %s: "+
			"the dump could have the target killed; write to a disk, or run outside the container", d.p.pid, dir, group.Path,
			profile.FormatBytes(left), profile.FormatBytes(d.total))
	}
	return nil
}

// write makes the file under a temporary name and renames it.
func (d *dumper) write(ctx context.Context, path string) (err error) {
	if stat, err := os.Lstat(path); err == nil && !stat.Mode().IsRegular() {
		return fmt.Errorf("write %s: it exists and is no regular file", path)
	}
	d.out, err = os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".part-*") // mode 0600
	if err != nil {
		return fmt.Errorf("create dump: %w", err)
	}
	temp := d.out.Name()
	defer func() {
		d.out.Close()
		if err != nil {
			os.Remove(temp)
		}
	}()
	if err := d.fill(ctx); err != nil {
		return err
	}
	if d.onDisk {
		if err := d.out.Sync(); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		unix.Fadvise(int(d.out.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	if err := d.out.Close(); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.Rename(temp, path); err != nil {
		return fmt.Errorf("name the dump: %w", err)
	}
	return nil
}

// fill writes memory, then what describes it.
func (d *dumper) fill(ctx context.Context) error {
	if d.opts.Registers {
		if err := d.stopAndRead(); err != nil {
			return err
		}
	}
	end, err := d.copyAll(ctx)
	if err != nil {
		return err
	}
	d.result.Data, d.result.Zero, d.result.Swapped = d.data.Load(), d.zero.Load(), d.swapped.Load()
	for _, e := range d.lost {
		d.result.Lost += e.Size()
	}
	for _, gap := range d.gaps {
		d.result.Zero += gap.Size()
	}
	d.result.Took = time.Since(d.started)
	if d.opts.Core {
		return d.finishCore(end)
	}
	return d.finishRaw(end)
}

// position is a point of the dump: everything before offset at of segment seg was handled.
type position struct {
	seg int
	at  uint64
}

// copyAll copies all segments and returns how far it came, which is the end unless ctx ended or the process did.
func (d *dumper) copyAll(ctx context.Context) (position, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	workers := min(maxWorkers, max(1, runtime.GOMAXPROCS(0)))
	work := make(chan position)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() { d.copyChunks(work, cancel) })
	}
	end := d.handOut(ctx, work)
	close(work)
	wg.Wait()
	err := context.Cause(ctx)
	switch {
	case end.seg == len(d.segments) && (err == nil || errors.Is(err, context.Canceled)):
		return end, nil
	case errors.Is(err, ErrGone):
		d.result.Partial = "the process ended while it was read"
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		d.result.Partial = "interrupted"
	default:
		return end, err
	}
	if d.data.Load() == 0 {
		return end, fmt.Errorf("nothing was read: %w", err)
	}
	return end, nil
}

// handOut gives the workers one chunk after the other, so that what was done when it stops is all up to one position.
func (d *dumper) handOut(ctx context.Context, work chan<- position) position {
	var flushed, written, reported uint64
	for seg := range d.segments {
		s := &d.segments[seg]
		for at := uint64(0); at < s.size(); at += chunkSize {
			if ctx.Err() != nil {
				return position{seg, at}
			}
			select {
			case work <- position{seg, at}:
			case <-ctx.Done():
				return position{seg, at}
			}
			if done := d.done.Load(); d.opts.Progress != nil && done-reported >= 4<<20 {
				d.opts.Progress(min(done, d.total), d.total)
				reported = done
			}
			if written += chunkSize; d.onDisk && written-flushed >= flushSize {
				d.flush(s.off + at)
				flushed = written
			}
		}
	}
	return position{len(d.segments), 0}
}

// flush starts writing to disk what is before off and drops from the page cache what is on disk: the cache is charged to a
// cgroup, maybe the target's, and crowds out what others keep there.
func (d *dumper) flush(off uint64) {
	fd := int(d.out.Fd())
	unix.SyncFileRange(fd, int64(off-min(off, flushSize)), flushSize, unix.SYNC_FILE_RANGE_WRITE)
	if off < 2*flushSize {
		return
	}
	before := int64(off - 2*flushSize)
	unix.SyncFileRange(fd, before, flushSize,
		unix.SYNC_FILE_RANGE_WAIT_BEFORE|unix.SYNC_FILE_RANGE_WRITE|unix.SYNC_FILE_RANGE_WAIT_AFTER)
	unix.Fadvise(fd, 0, before+flushSize, unix.FADV_DONTNEED)
}

// copyChunks is a worker.
func (d *dumper) copyChunks(work <-chan position, cancel context.CancelCauseFunc) {
	buf := make([]byte, chunkSize)
	for pos := range work {
		s := &d.segments[pos.seg]
		start := s.start + pos.at
		if err := d.copyChunk(s, start, min(start+chunkSize, s.end), buf); err != nil {
			cancel(err)
			d.lose(start, min(start+chunkSize, s.end))
		}
	}
}

// copyChunk copies the addresses from start to end of a segment, except those that were copied during the stop.
func (d *dumper) copyChunk(s *segment, start, end uint64, buf []byte) error {
	for _, part := range without(Extent{start, end, Data}, d.taken) {
		err := d.eachSource(s.rng, part.Start, part.End, func(run pageRun, src source) error {
			size := run.end - run.start
			if src == fromNowhere {
				d.zero.Add(size)
				return nil
			}
			b := buf[:size]
			if err := d.readRun(s.rng, run, src, b); err != nil {
				return err
			}
			if run.swapped {
				d.swapped.Add(size)
			}
			d.done.Add(size)
			return d.writeNonZero(b, s.off+run.start-s.start)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// readRun fills b with a run of pages; what cannot be read is zeros and counted.
func (d *dumper) readRun(r *RangeUsage, run pageRun, src source, b []byte) error {
	if src == fromFile {
		if !d.files.read(d.p, &r.Range, b, run.start) {
			clear(b)
			d.lose(run.start, run.end)
		}
		return nil
	}
	at := run.start
	for len(b) > 0 {
		n, err := d.p.ReadAt(b, int64(at))
		b, at = b[n:], at+uint64(n)
		if len(b) == 0 {
			return nil
		}
		if !errors.Is(err, ErrAbsent) {
			return err
		}
		gap := min(PageSize-int(at%PageSize), len(b))
		clear(b[:gap])
		d.lose(at, at+uint64(gap))
		b, at = b[gap:], at+uint64(gap)
	}
	return nil
}

func (d *dumper) lose(start, end uint64) {
	d.mu.Lock()
	d.lost = append(d.lost, Extent{start, end, Lost})
	d.mu.Unlock()
}

var zeroPage [PageSize]byte

// writeNonZero writes the pages that are not all zeros; the others stay holes of the file.
func (d *dumper) writeNonZero(b []byte, off uint64) error {
	for len(b) > 0 {
		zero := isZeroPage(b)
		n := min(PageSize, len(b))
		for n < len(b) && isZeroPage(b[n:]) == zero {
			n += min(PageSize, len(b)-n)
		}
		if zero {
			d.zero.Add(uint64(n))
		} else {
			d.data.Add(uint64(n))
			if _, err := d.out.WriteAt(b[:n], int64(off)); err != nil {
				return fmt.Errorf("write dump: %w", err)
			}
		}
		b, off = b[n:], off+uint64(n)
	}
	return nil
}

// isZeroPage looks at the first page of b. Most pages that are not zeros show it in their first words.
func isZeroPage(b []byte) bool {
	b = b[:min(PageSize, len(b))]
	return string(b) == string(zeroPage[:len(b)])
}

// without is an extent minus others, which are in ascending order.
func without(e Extent, others []Extent) []Extent {
	var parts []Extent
	for _, o := range others {
		if o.End <= e.Start || o.Start >= e.End {
			continue
		}
		if o.Start > e.Start {
			parts = append(parts, Extent{e.Start, o.Start, e.Kind})
		}
		if e.Start = o.End; e.Start >= e.End {
			return parts
		}
	}
	return append(parts, e)
}

// extents describes what the file has up to a position, in ascending order of addresses.
func (d *dumper) extents(end position) []fileExtent {
	slices.SortFunc(d.lost, func(a, b Extent) int { return cmp.Compare(a.Start, b.Start) })
	var out []fileExtent
	for i := range d.segments[:min(end.seg+1, len(d.segments))] {
		s := &d.segments[i]
		last := s.end
		if i == end.seg {
			last = s.start + end.at
		}
		if last == s.start {
			continue
		}
		low := findExtent(d.lost, s.start)
		lost := d.lost[low:]
		for _, part := range without(Extent{s.start, last, Data}, lost) {
			out = append(out, fileExtent{part, s.off + part.Start - s.start})
		}
		for _, l := range lost {
			if l.Start >= last {
				break
			}
			out = append(out, fileExtent{Extent: l})
		}
	}
	if d.result.Partial == "" {
		for _, gap := range d.gaps {
			out = append(out, fileExtent{Extent: gap})
		}
	}
	slices.SortFunc(out, func(a, b fileExtent) int { return cmp.Compare(a.Start, b.Start) })
	return out
}

// findExtent is the index of the first extent that ends above addr.
func findExtent(list []Extent, addr uint64) int {
	return sort.Search(len(list), func(i int) bool { return list[i].End > addr })
}

// dataEnd is the offset behind the memory in the file.
func (d *dumper) dataEnd() uint64 {
	if len(d.segments) == 0 {
		return d.base
	}
	last := &d.segments[len(d.segments)-1]
	return last.off + alignPage(last.size())
}

func (d *dumper) index() index {
	info := d.p.Info()
	head := index{Complete: d.result.Partial == "", Partial: d.result.Partial, PID: info.PID, Comm: info.Comm, Exe: info.Exe,
		Arch: info.Arch, Taken: d.started.UTC(), Seconds: d.result.Took.Seconds(), Auxv: info.Auxv}
	for _, t := range info.Threads {
		head.TIDs = append(head.TIDs, t.TID)
	}
	return head
}

// finishRaw writes the index and the footer behind the memory.
func (d *dumper) finishRaw(end position) error {
	foot := footer{off: d.dataEnd()}
	w := &crcWriter{w: io.NewOffsetWriter(d.out, int64(foot.off))}
	if err := writeIndex(w, d.index(), d.ranges, d.extents(end)); err != nil {
		return fmt.Errorf("write index: %w", err)
	}
	foot.size, foot.crc = w.n, w.crc
	if _, err := d.out.WriteAt(foot.encode(), int64(foot.off+foot.size)); err != nil {
		return fmt.Errorf("write footer: %w", err)
	}
	return nil
}

// mappedFiles opens the files behind ranges, each once.
type mappedFiles struct {
	mu   sync.Mutex
	open map[fileID]*os.File // nil when it cannot be opened
}

type fileID struct {
	dev   Dev
	inode uint64
}

// read fills b with what the file of a range has for addr on; ok is false when the file cannot be had.
func (m *mappedFiles) read(p *Process, r *Range, b []byte, addr uint64) (ok bool) {
	f := m.get(p, r)
	if f == nil {
		return false
	}
	n, err := f.ReadAt(b, int64(r.Offset+addr-r.Start))
	clear(b[n:])
	return err == nil || errors.Is(err, io.EOF)
}

func (m *mappedFiles) get(p *Process, r *Range) *os.File {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := fileID{r.Dev, r.Inode}
	f, known := m.open[id]
	if known {
		return f
	}
	if m.open == nil {
		m.open = map[fileID]*os.File{}
	}
	f, err := p.fs.OpenMapped(p.pid, r)
	if err != nil {
		f = nil
	}
	m.open[id] = f
	return f
}

func (m *mappedFiles) close() {
	for _, f := range m.open {
		if f != nil {
			f.Close()
		}
	}
}
