package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"golang.org/x/sys/unix"
)

// files are the objects that traced processes execute, opened once each as the processes see them and kept open, so that
// a process that is gone, or whose files were replaced, can still be probed and symbolized.
type files struct {
	options allocator.Options

	mu    sync.Mutex
	known map[allocator.FileID]*object
}

// object is one file. Its scan says which allocator functions it has.
type object struct {
	id   allocator.FileID
	path string // as the process that was met first sees it
	file *os.File
	size int64
	time time.Time

	once    sync.Once
	scan    *allocator.File
	scanErr error
}

func newFiles(declared []allocator.Function, longNops bool) *files {
	return &files{
		options: allocator.Options{Declared: declared, Rules: allocator.Rules{LongNops: longNops, RAX: true}},
		known:   map[allocator.FileID]*object{},
	}
}

// open opens the file behind a range of a process. map_files leads to the very file that is mapped, whatever root the
// process has and whatever became of the path.
func (f *files) open(pid int, r *memory.Range) (*object, error) {
	id := allocator.FileID{Device: unix.Mkdev(r.Dev.Major, r.Dev.Minor), Inode: r.Inode}
	f.mu.Lock()
	defer f.mu.Unlock()
	if o := f.known[id]; o != nil {
		return o, nil
	}
	file, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, r.Start, r.End))
	if err != nil {
		return nil, fmt.Errorf("open %s as process %d has it: %w", r.Path, pid, err)
	}
	o := &object{id: id, path: strings.TrimSuffix(r.Path, " (deleted)"), file: file}
	if info, err := file.Stat(); err == nil {
		o.size, o.time = info.Size(), info.ModTime()
	}
	f.known[id] = o
	return o, nil
}

// scanned is the file's allocator functions.
func (f *files) scanned(o *object) (*allocator.File, error) {
	o.once.Do(func() { o.scan, o.scanErr = allocator.Scan(o.file, &f.options) })
	return o.scan, o.scanErr
}

// Close closes all files. It may be called twice.
func (f *files) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	var errs []error
	for id, o := range f.known {
		errs = append(errs, o.file.Close())
		delete(f.known, id)
	}
	return errors.Join(errs...)
}

// borrowed is a kept file handed to somebody who closes what he opened.
type borrowed struct{ *os.File }

func (borrowed) Close() error { return nil }

var _ io.ReaderAt = borrowed{}
