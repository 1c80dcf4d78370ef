package allocator

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
)

// maxCached bounds the scanned files that a Scanner remembers.
const maxCached = 4096

// Scanner scans the files of processes, each file once however many processes map it.
type Scanner struct {
	FS          memory.FS
	Rules       Rules
	Prefixes    []string
	Definitions []Definition

	mu    sync.Mutex
	cache map[cacheKey]*File
}

// cacheKey tells a file from its successor at the same inode.
type cacheKey struct {
	id       FileID
	size     int64
	modified time.Time
	path     string // definitions go by it
}

// Files returns the files that a process has mapped executable, the executable itself first, with what they define.
// A file that cannot be read stands there with its error.
func (s *Scanner) Files(pid int) ([]MappedFile, error) {
	ranges, err := s.FS.Maps(pid)
	if err != nil {
		return nil, err
	}
	mem, err := os.Open(s.FS.Path(pid, "mem"))
	if err == nil {
		defer mem.Close()
	}
	var files []MappedFile
	seen := map[FileID]bool{}
	for i := range ranges {
		r := &ranges[i]
		if r.Perms&memory.Exec == 0 || !r.IsFile() {
			continue
		}
		m := s.mapped(pid, r)
		if m.Err == nil && seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		if m.File != nil && mem != nil {
			m.Patched = patched(mem, ranges, r, m.File)
		}
		files = append(files, m)
	}
	s.executableFirst(pid, files)
	return files, nil
}

// Plan scans a process's files and decides what to probe in it.
func (s *Scanner) Plan(pid int) (Plan, error) {
	files, err := s.Files(pid)
	if err != nil {
		return Plan{}, err
	}
	return Select(files), nil
}

func (s *Scanner) executableFirst(pid int, files []MappedFile) {
	var st unix.Stat_t
	if unix.Stat(s.FS.Path(pid, "exe"), &st) != nil {
		return
	}
	exe := FileID{uint64(st.Dev), st.Ino}
	slices.SortStableFunc(files, func(a, b MappedFile) int {
		switch {
		case a.ID == exe && b.ID != exe:
			return -1
		case a.ID != exe && b.ID == exe:
			return 1
		}
		return 0
	})
}

// mapped opens and scans the file behind a range.
func (s *Scanner) mapped(pid int, r *memory.Range) MappedFile {
	m := MappedFile{Path: r.Path}
	f, err := s.open(pid, r)
	if err != nil {
		m.Err = err
		return m
	}
	defer f.Close()
	m.OpenPath = f.Name()
	info, err := f.Stat()
	if err != nil {
		m.Err = err
		return m
	}
	st := info.Sys().(*syscall.Stat_t)
	m.ID = FileID{uint64(st.Dev), st.Ino}
	m.File, m.Err = s.scan(f, cacheKey{m.ID, info.Size(), info.ModTime(), r.Path})
	if m.File != nil {
		m.BuildID = m.File.BuildID
	}
	return m
}

// open opens the very file that is mapped, also when its name is gone or now means another file. Where map_files is
// not allowed (it needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE), the name is used and must lead to the same inode.
func (s *Scanner) open(pid int, r *memory.Range) (*os.File, error) {
	name := fmt.Sprintf("%x-%x", r.Start, r.End)
	f, err := rootfs.OpenLink(s.FS.Path(pid, "map_files", name))
	if err == nil || errors.Is(err, rootfs.ErrNotRegular) {
		return f, err
	}
	f, byName := rootfs.Open(s.FS.Path(pid, "root"), r.Path)
	if byName != nil {
		return nil, errors.Join(err, byName)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Ino != r.Inode {
		f.Close()
		return nil, fmt.Errorf("%s was replaced since it was mapped", r.Path)
	}
	return f, nil
}

func (s *Scanner) scan(f *os.File, key cacheKey) (*File, error) {
	declared := DeclaredFor(s.Definitions, key.path)
	if len(declared) == 0 {
		key.path = ""
	}
	s.mu.Lock()
	file := s.cache[key]
	s.mu.Unlock()
	if file != nil {
		return file, nil
	}
	file, err := Scan(f, &Options{Rules: s.Rules, Prefixes: s.Prefixes, Declared: declared})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cache == nil || len(s.cache) >= maxCached {
		s.cache = map[cacheKey]*File{}
	}
	s.cache[key] = file
	return file, nil
}

// patched returns the addresses (the file's own) of functions whose code in memory is not the file's: another tool has
// written a jump there. Breakpoints of other uprobes are no patch.
func patched(mem *os.File, ranges []memory.Range, executable *memory.Range, file *File) []uint64 {
	var addresses []uint64
	for i := range file.Found {
		f := &file.Found[i]
		at := addressInProcess(ranges, executable, f.Offset)
		if at == 0 || len(f.code) == 0 {
			continue
		}
		now := make([]byte, len(f.code))
		if n, err := mem.ReadAt(now, int64(at)); err != nil || n != len(now) {
			continue
		}
		if differs(f.code, now) {
			addresses = append(addresses, f.Address)
		}
	}
	return addresses
}

func addressInProcess(ranges []memory.Range, executable *memory.Range, offset uint64) uint64 {
	for i := range ranges {
		r := &ranges[i]
		if r.Inode == executable.Inode && r.Path == executable.Path && r.Perms&memory.Exec != 0 &&
			offset >= r.Offset && offset-r.Offset < r.Size() {
			return r.Start + offset - r.Offset
		}
	}
	return 0
}

func differs(file, now []byte) bool {
	const breakpoint = 0xcc
	for i := range file {
		if file[i] != now[i] && now[i] != breakpoint {
			return true
		}
	}
	return false
}

// readBuildID finds the GNU build-id in the notes, empty when there is none.
func (s *scanner) readBuildID() string {
	const maxNotes = 1 << 16
	for _, p := range s.elf.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := readAt(p, min(p.Filesz, maxNotes))
		if err != nil {
			continue
		}
		if id := buildIDNote(notes, max(p.Align, 4)); id != "" {
			return id
		}
	}
	return ""
}

func buildIDNote(notes []byte, align uint64) string {
	const gnuBuildID, header, maxID = 3, 12, 64
	if align != 8 {
		align = 4
	}
	round := func(n uint64) uint64 { return (n + align - 1) &^ (align - 1) }
	for len(notes) >= header {
		nameSize, size := uint64(binary.LittleEndian.Uint32(notes)), uint64(binary.LittleEndian.Uint32(notes[4:]))
		start := round(header + nameSize)
		end := start + size
		if end > uint64(len(notes)) {
			return ""
		}
		if binary.LittleEndian.Uint32(notes[8:]) == gnuBuildID && bytes.HasPrefix(notes[header:], []byte("GNU\x00")) && size <= maxID {
			return fmt.Sprintf("%x", notes[start:end])
		}
		notes = notes[min(round(end), uint64(len(notes))):]
	}
	return ""
}
