package symbolize

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// debugDirs returns the directories to search, the caller's first.
func (s *Symbolizer) debugDirs() []string {
	return append(s.options.DebugDirs[:len(s.options.DebugDirs):len(s.options.DebugDirs)], defaultDebugDir)
}

// openRegular opens regular files only. A file names the place of its debug file itself, so that it may be a pipe, which
// hangs whoever opens it, or a device, which acts.
func openRegular(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	handle := os.NewFile(uintptr(fd), path)
	defer handle.Close()
	info, err := handle.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", path)
	}
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
}

func openPath(path string) (*object, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	o, err := openELF(f, path)
	if err != nil {
		f.Close()
		return nil, err
	}
	o.close = f.Close
	return o, nil
}

func validBuildID(id string) bool {
	if len(id) < 4 || len(id)%2 != 0 || len(id) > 128 {
		return false
	}
	return strings.Trim(id, "0123456789abcdef") == ""
}

// openBuildID opens a file that must have that build-id; nil when there is none. A file with another one is a warning.
func (s *Symbolizer) openBuildID(path, id string) *object {
	o, err := openPath(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoELF) {
			s.warn("%v", err)
		}
		return nil
	}
	if o.buildID != id {
		s.warn("%s is not used: its build-id is %s, not %s", path, orNone(o.buildID), id)
		o.Close()
		return nil
	}
	return o
}

// findByID looks for a file of the build-id under the .build-id directories, with the suffix ".debug" or without one.
func (s *Symbolizer) findByID(id, suffix string) *object {
	if !validBuildID(id) {
		return nil
	}
	for _, dir := range s.debugDirs() {
		if o := s.openBuildID(filepath.Join(dir, ".build-id", id[:2], id[2:]+suffix), id); o != nil {
			return o
		}
	}
	return nil
}

// findInDirs looks for any file of the build-id in the directories that the caller named, whatever its name is.
func (s *Symbolizer) findInDirs(id string, accept func(*object) bool) *object {
	if !validBuildID(id) {
		return nil
	}
	for _, dir := range s.options.DebugDirs {
		for _, path := range s.index(dir)[id] {
			o := s.openBuildID(path, id)
			if o != nil && accept(o) {
				return o
			}
			o.Close()
		}
	}
	return nil
}

const maxIndexed = 20_000 // files of one directory tree

// index reads the build-ids of all files in a directory tree, once.
func (s *Symbolizer) index(dir string) map[string][]string {
	s.mu.Lock()
	ids, ok := s.walked[dir]
	s.mu.Unlock()
	if ok {
		return ids
	}
	ids = map[string][]string{}
	files := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() {
			return nil // what cannot be read is not there
		}
		if files++; files > maxIndexed {
			s.warn("%s: more than %d files: the rest are not searched", dir, maxIndexed)
			return fs.SkipAll
		}
		o, err := openPath(path)
		if err != nil {
			return nil
		}
		if o.buildID != "" {
			ids[o.buildID] = append(ids[o.buildID], path)
		}
		return o.Close()
	})
	if err != nil {
		s.warn("search %s: %v", dir, err)
	}
	s.mu.Lock()
	s.walked[dir] = ids
	s.mu.Unlock()
	return ids
}

// debugLink reads .gnu_debuglink: the name of the debug file and the CRC-32 of its bytes.
func (o *object) debugLink() (name string, crc uint32, ok bool) {
	for _, s := range o.Sections {
		if s.Name != ".gnu_debuglink" {
			continue
		}
		b := o.at(s.Offset, s.FileSize)
		end := bytes.IndexByte(b, 0)
		if end <= 0 {
			return "", 0, false
		}
		at := (end + 4) &^ 3
		if at+4 > len(b) {
			return "", 0, false
		}
		return string(b[:end]), o.ByteOrder.Uint32(b[at:]), true
	}
	return "", 0, false
}

// findByLink follows the debug link of o, which the process saw at path.
func (s *Symbolizer) findByLink(o *object, path string) *object {
	name, crc, ok := o.debugLink()
	if !ok || strings.Contains(name, "/") {
		return nil
	}
	dir := filepath.Dir(path)
	var places []string
	if o.isAt(path) {
		places = []string{filepath.Join(dir, name), filepath.Join(dir, ".debug", name)}
	}
	for _, d := range s.debugDirs() {
		places = append(places, filepath.Join(d, dir, name), filepath.Join(d, name))
	}
	for _, place := range places {
		d, err := openPath(place)
		if err != nil {
			continue
		}
		if err := d.isDebugFileOf(o, crc); err != nil {
			s.warn("%s is not used: %v", place, err)
			d.Close()
			continue
		}
		return d
	}
	return nil
}

// isAt tells whether the path leads to the object here too: a process with a root of its own, say in a container, has
// other files by the same paths.
func (o *object) isAt(path string) bool {
	f, ok := o.r.(interface{ Stat() (os.FileInfo, error) })
	if !ok {
		return false
	}
	mine, err := f.Stat()
	if err != nil {
		return false
	}
	here, err := os.Stat(path)
	return err == nil && os.SameFile(mine, here)
}

func (o *object) isDebugFileOf(stripped *object, crc uint32) error {
	if o.buildID != "" && stripped.buildID != "" {
		if o.buildID != stripped.buildID {
			return fmt.Errorf("its build-id is %s, not %s", o.buildID, stripped.buildID)
		}
		return nil
	}
	sum := crc32.NewIEEE()
	if _, err := io.Copy(sum, io.NewSectionReader(o.r, 0, o.size)); err != nil {
		return err
	}
	if sum.Sum32() != crc {
		return fmt.Errorf("its checksum is %08x, the link says %08x", sum.Sum32(), crc)
	}
	return nil
}

// findAlt opens the file that dwz moved shared entries to.
func (s *Symbolizer) findAlt(o *object) *object {
	for _, sec := range o.Sections {
		if sec.Name != ".gnu_debugaltlink" {
			continue
		}
		b := o.at(sec.Offset, sec.FileSize)
		end := bytes.IndexByte(b, 0)
		if end <= 0 {
			return nil
		}
		name, id := string(b[:end]), fmt.Sprintf("%x", b[end+1:])
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(filepath.Dir(realPath(o.path)), name)
		}
		if alt := s.openBuildID(path, id); alt != nil {
			return alt
		}
		if alt := s.findByID(id, ".debug"); alt != nil {
			return alt
		}
		for _, d := range s.options.DebugDirs {
			if alt := s.openBuildID(filepath.Join(d, ".dwz", filepath.Base(name)), id); alt != nil {
				return alt
			}
		}
		return s.findInDirs(id, func(*object) bool { return true })
	}
	return nil
}

// realPath resolves symbolic links: .build-id directories may consist of them, and relative names start at the target.
func realPath(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// findDebug looks for a file with the DWARF of the object, best source first.
func (s *Symbolizer) findDebug(ctx context.Context, o *object, path, id string) *object {
	if d := s.findByID(id, ".debug"); d != nil {
		return d
	}
	if o != nil {
		if d := s.findByLink(o, path); d != nil {
			return d
		}
	}
	if d := s.findInDirs(id, func(d *object) bool { return d.has(".debug_info") || d.has(".symtab") }); d != nil {
		return d
	}
	return s.debuginfod.debugInfo(ctx, id)
}
