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
	// real tells which file lies below an open one of an overlay file system; nil where the kernel does not.
	real func(*os.File) (allocator.FileID, error)

	mu     sync.Mutex
	ranges map[rangeFile]*object
	known  map[allocator.FileID]*object // by what stat says; several may be one
	all    map[allocator.FileID]*object // by the object's own id
}

// rangeFile is what maps says of a file. On overlay file systems it is not what stat says.
type rangeFile struct {
	dev   memory.Dev
	inode uint64
}

// object is one file of the kernel: what containers of one image map of it is one object, though each sees it on an overlay
// file system of its own, with another device number. Probes and tables are of objects.
type object struct {
	id      allocator.FileID
	file    *os.File
	size    int64
	time    time.Time
	buildID string
	version func() string // reads the whole file, once
}

func newFiles() *files {
	return &files{ranges: map[rangeFile]*object{}, known: map[allocator.FileID]*object{}, all: map[allocator.FileID]*object{}}
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
	o, err := f.object(file, r.Path)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("stat %s: %w", r.Path, err), file.Close())
	}
	f.ranges[rangeFile{r.Dev, r.Inode}] = o
	if o.file != file {
		return o, file.Close()
	}
	return o, nil
}

// object is the one that an open file belongs to: one that is known, or a new one that keeps the file.
func (f *files) object(file *os.File, path string) (*object, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &st); err != nil {
		return nil, err
	}
	seen := allocator.FileID{Device: uint64(st.Dev), Inode: st.Ino}
	if o := f.known[seen]; o != nil {
		return o, nil
	}
	id := f.identity(file, seen)
	o := f.all[id]
	if o == nil {
		o = &object{id: id, file: file, size: st.Size, time: time.Unix(st.Mtim.Sec, st.Mtim.Nsec)}
		o.buildID, _ = symbolize.BuildID(file) // none is an answer too
		o.version = sync.OnceValue(func() string { return inventory.Version(file, path) })
		f.all[id] = o
	}
	f.known[seen] = o
	return o, nil
}

// identity is what the kernel knows a file by. A file of an overlay that cannot be looked through keeps what stat says:
// then it has probes of its own, which is dear but right.
func (f *files) identity(file *os.File, seen allocator.FileID) allocator.FileID {
	var where unix.Statfs_t
	if f.real == nil || unix.Fstatfs(int(file.Fd()), &where) != nil || where.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return seen
	}
	id, err := f.real(file)
	if err != nil {
		return seen
	}
	return id
}

// find is the object of a file that stat knows by an id and that was opened before.
func (f *files) find(seen allocator.FileID) *object {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.known[seen]
}

// Close closes all files. It may be called twice.
func (f *files) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for _, o := range f.all {
		errs = append(errs, o.file.Close())
	}
	clear(f.all)
	clear(f.known)
	clear(f.ranges)
	return errors.Join(errs...)
}

// borrowed is a kept file handed to somebody who closes what he opened.
type borrowed struct{ *os.File }

func (borrowed) Close() error { return nil }

var _ io.ReaderAt = borrowed{}
