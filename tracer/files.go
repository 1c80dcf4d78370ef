package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/allocsnoop/allocsnoop/symbolize"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/inventory"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
	"golang.org/x/sys/unix"
)

// files are the objects that traced processes execute, opened once each as the processes see them and kept open, so that
// a process that is gone, or whose files were replaced, can still be probed and symbolized.
type files struct {
	mu     sync.Mutex
	ranges map[rangeFile]*object
	known  map[allocator.FileID]*object
}

// rangeFile is what maps says of a file. On overlay file systems it is not what stat says.
type rangeFile struct {
	dev   memory.Dev
	inode uint64
}

type object struct {
	id      allocator.FileID
	file    *os.File
	size    int64
	time    time.Time
	buildID string
	version func() string // reads the whole file, once
}

func newFiles() *files {
	return &files{ranges: map[rangeFile]*object{}, known: map[allocator.FileID]*object{}}
}

// open opens the file behind a range of a process. map_files leads to the very file that is mapped, whatever root the
// process has and whatever became of the path.
func (f *files) open(pid int, r *memory.Range) (*object, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := f.ranges[rangeFile{r.Dev, r.Inode}]; o != nil {
		return o, nil
	}
	file, err := rootfs.OpenLink(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, r.Start, r.End))
	if err != nil {
		return nil, fmt.Errorf("open %s as process %d has it: %w", r.Path, pid, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nil, errors.Join(fmt.Errorf("stat %s: %w", r.Path, err), file.Close())
	}
	o := &object{
		id:   allocator.FileID{Device: uint64(st.Dev), Inode: st.Ino},
		file: file, size: st.Size, time: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	if known := f.known[o.id]; known != nil {
		f.ranges[rangeFile{r.Dev, r.Inode}] = known
		return known, file.Close()
	}
	o.buildID, _ = symbolize.BuildID(file) // none is an answer too
	o.version = sync.OnceValue(func() string { return inventory.Version(file, r.Path) })
	f.known[o.id] = o
	f.ranges[rangeFile{r.Dev, r.Inode}] = o
	return o, nil
}

// Close closes all files. It may be called twice.
func (f *files) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, o := range f.known {
		errs = append(errs, o.file.Close())
	}
	clear(f.known)
	clear(f.ranges)
	return errors.Join(errs...)
}

// borrowed is a kept file handed to somebody who closes what he opened.
type borrowed struct{ *os.File }

func (borrowed) Close() error { return nil }

var _ io.ReaderAt = borrowed{}
