// Package symbolize names the frames of a profile: functions, source lines and inlined calls, from what is in the object
// itself, in separate debug files, on debuginfod servers and in symbol tables.
//
// The trap: a wrong name is worse than none. A file counts only when its build-id is that of the mapped object (or, for files
// without one, when the debug link's checksum fits), a symbol names only addresses inside its size, and what stays unknown
// is printed as libenc.so+0x1234, where the number is the offset in the file.
package symbolize

import (
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Options tells where to look. The zero value uses /usr/lib/debug and no network.
type Options struct {
	DebugDirs      []string // searched for debug files and objects, before /usr/lib/debug
	DebuginfodURLs []string // servers to ask by build-id; none means that no network is used
	CacheDir       string   // of what servers sent; empty means that of the elfutils client
	NoInlines      bool     // only the outermost function of an address, with the innermost line
	MaxMemory      uint64   // held at once for debug data, roughly; 0 means 128 MiB
	// Warn is told once of everything that makes names worse; may be nil. Progress is told of downloads; may be nil.
	// Both may be called from several goroutines, but not at the same time.
	Warn, Progress func(string)
}

const (
	defaultDebugDir  = "/usr/lib/debug"
	defaultMaxMemory = 128 << 20
	parallel         = 2 // objects resolved at the same time
)

// Symbolizer resolves addresses. It may be used by several goroutines.
type Symbolizer struct {
	options    Options
	debuginfod *downloads
	slots      chan struct{}
	big        sync.Mutex // held while an object with large debug data is read: only one at a time

	mu     sync.Mutex
	warned map[string]bool
	walked map[string]map[string][]string // per directory of DebugDirs: build-id to path
}

// New returns a Symbolizer.
func New(o Options) *Symbolizer {
	o.DebugDirs = slices.Clone(o.DebugDirs)
	if o.MaxMemory == 0 {
		o.MaxMemory = defaultMaxMemory
	}
	s := &Symbolizer{options: o, slots: make(chan struct{}, parallel), warned: map[string]bool{}, walked: map[string]map[string][]string{}}
	s.debuginfod = newDownloads(s)
	return s
}

func (s *Symbolizer) warn(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.warned[text] || s.options.Warn == nil {
		return
	}
	s.warned[text] = true
	s.options.Warn(text)
}

func (s *Symbolizer) progress(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.options.Progress != nil {
		s.options.Progress(text)
	}
}

// File is an open object. A file that knows its size says so through Size() int64 or Stat() (fs.FileInfo, error).
type File interface {
	io.ReaderAt
	io.Closer
}

// FileSource opens the objects of a profile. A nil File without an error means that there is none to open.
type FileSource interface {
	Open(*profile.Mapping) (File, error)
}

// Object is what addresses are resolved in.
type Object struct {
	Path    string // as the process saw it
	BuildID string // lower-case hex; empty when unknown
	File    File   // nil when only debug files can help; not closed
	// TextOffset and TextSize are the file offset and the length of the executable mapping. They are needed only without
	// File: a debug file's program headers have lost the offsets.
	TextOffset, TextSize uint64
}

func (o *Object) name() string {
	if o.Path == "" {
		return "[build-id " + o.BuildID + "]"
	}
	return path.Base(o.Path)
}

// Unknown is the line of an offset in the object that nothing names.
func (o *Object) Unknown(offset uint64) profile.Line {
	name := fmt.Sprintf("%s+%#x", o.name(), offset)
	line := profile.Line{Function: name, SystemName: name}
	if o.BuildID != "" && o.Path != "" {
		line.SystemName += " [build-id " + o.BuildID + "]"
	}
	return line
}

// Snapshot fills the lines of all locations that have a mapping and no mark. Locations of one object are resolved together,
// two objects at a time. What cannot be read is a warning; the only errors are those of ctx.
func (s *Symbolizer) Snapshot(ctx context.Context, snapshot *profile.Snapshot, files FileSource) error {
	groups := groupLocations(snapshot)
	var wait sync.WaitGroup
	for _, g := range groups {
		wait.Go(func() { s.resolveGroup(ctx, g, files) })
	}
	wait.Wait()
	return ctx.Err()
}

// group is the locations of one object.
type group struct {
	mappings  []*profile.Mapping
	locations []*profile.Location
}

func groupLocations(snapshot *profile.Snapshot) []*group {
	type key struct {
		file, buildID string
		mapping       *profile.Mapping // tells objects without a build-id apart
	}
	groups := map[key]*group{}
	var order []*group
	seen := map[*profile.Location]bool{}
	grouped := map[*profile.Mapping]bool{} // each has one key; a service may have had thousands of processes
	for _, stack := range snapshot.Stacks {
		for _, l := range stack.Frames {
			m := l.Mapping
			if seen[l] || m == nil || l.Mark != "" && m.File != vdsoName {
				continue
			}
			seen[l] = true
			k := key{file: m.File, buildID: m.BuildID}
			if m.BuildID == "" {
				k.mapping = m
			}
			g := groups[k]
			if g == nil {
				g = &group{}
				groups[k] = g
				order = append(order, g)
			}
			if !grouped[m] {
				grouped[m] = true
				g.mappings = append(g.mappings, m)
			}
			g.locations = append(g.locations, l)
		}
	}
	return order
}

const vdsoName = "[vdso]"

func (s *Symbolizer) resolveGroup(ctx context.Context, g *group, files FileSource) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return
	}
	first := g.mappings[0]
	object := Object{Path: first.File, BuildID: first.BuildID, TextOffset: first.Offset, TextSize: first.Limit - first.Start}
	file := s.openFirst(g, files)
	if file != nil {
		object.File = file
		defer file.Close()
	}
	if first.File == vdsoName && file == nil {
		return // the mark stays
	}
	offsets, index := g.offsets()
	lines, err := s.Resolve(ctx, object, offsets)
	if err != nil {
		return // ctx ended
	}
	for i, l := range g.locations {
		of := lines[index[i]]
		if l.Mark != "" && len(of) == 1 && of[0].Line == 0 && of[0] == object.Unknown(offsets[index[i]]) {
			continue
		}
		l.Lines = of
		if l.Mapping.File == vdsoName {
			l.Mark = ""
		}
	}
}

// offsets are where the locations lie in the file, each once however many processes have been there, and which of them is
// that of each location.
func (g *group) offsets() (offsets []uint64, index []int) {
	known := map[uint64]int{}
	for _, l := range g.locations {
		offset := l.Address - l.Mapping.Start + l.Mapping.Offset
		at, ok := known[offset]
		if !ok {
			at = len(offsets)
			known[offset] = at
			offsets = append(offsets, offset)
		}
		index = append(index, at)
	}
	return offsets, index
}

// openFirst opens the object through any of its mappings and notes when it is not the file that was mapped.
func (s *Symbolizer) openFirst(g *group, files FileSource) File {
	if files == nil {
		return nil
	}
	for _, m := range g.mappings {
		f, err := files.Open(m)
		if err != nil {
			s.warn("open %s: %v: names come from its debug files only", m.File, err)
			continue
		}
		if f == nil {
			continue
		}
		on, err := BuildID(f)
		if err == nil && m.BuildID != "" && on != m.BuildID {
			s.warn("%s was replaced: build-id %s is in memory, %s on disk: names come from debug files of the first", m.File, m.BuildID, orNone(on))
			m.Replaced = true
			f.Close()
			continue
		}
		return f
	}
	return nil
}

func orNone(id string) string {
	if id == "" {
		return "none"
	}
	return id
}

// Resolve returns the lines of each file offset of an object, innermost inlined function first, and never no line at all.
// What cannot be read is a warning; the only errors are those of ctx.
func (s *Symbolizer) Resolve(ctx context.Context, object Object, offsets []uint64) ([][]profile.Line, error) {
	r, err := s.open(ctx, &object)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return r.resolve(ctx, offsets)
}
