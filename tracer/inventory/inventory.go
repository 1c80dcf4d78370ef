// Package inventory says which builds of which files a process runs, or a folder holds: build-id, version strings, package,
// and whether the file on disk still is the one in memory.
//
// The trap: the path in maps is a name in the target's root and at the moment of mapping. What lies there now, here or
// there, may be another file; only map_files leads to the one in memory.
package inventory

import (
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
)

// OfProcess lists the files that a live process executes code from.
func OfProcess(proc memory.FS, pid int) ([]profile.Library, error) {
	ranges, err := proc.Maps(pid)
	if err != nil {
		return nil, fmt.Errorf("list libraries: %w", err)
	}
	root := proc.Path(pid, "root")
	exe, _ := os.Readlink(proc.Path(pid, "exe"))
	var out []profile.Library
	seen := map[string]bool{}
	for i := range ranges {
		r := &ranges[i]
		key := fmt.Sprintf("%s %d %s", r.Dev, r.Inode, r.Path)
		if !r.IsFile() || r.Perms&memory.Exec == 0 || seen[key] {
			continue
		}
		seen[key] = true
		out = append(out, mapped(proc, pid, r, root))
	}
	addPackages(out, root)
	profile.SortLibraries(out, map[string]bool{exe: true})
	return out, nil
}

func mapped(proc memory.FS, pid int, r *memory.Range, root string) profile.Library {
	l := profile.Library{File: r.Path, Name: filepath.Base(r.Path), Replaced: r.Deleted, PIDs: []int{pid}}
	f, err := proc.OpenMapped(pid, r)
	if err != nil { // gone from disk, and no right to map_files: the name is all there is
		l.Replaced = true
		return l
	}
	defer f.Close()
	describe(&l, f)
	l.Replaced = Replaced(f, root, r.Path, l.BuildID)
	return l
}

// Replaced says whether the file of that name is another one than f, a file that a process has mapped. The same build
// installed again is not another one.
func Replaced(f *os.File, root, name, buildID string) bool {
	onDisk, err := rootfs.Open(root, name)
	if errors.Is(err, fs.ErrPermission) {
		return false // not known
	}
	if err != nil {
		return true
	}
	defer onDisk.Close()
	var mine, theirs unix.Stat_t
	if unix.Fstat(int(f.Fd()), &mine) != nil || unix.Fstat(int(onDisk.Fd()), &theirs) != nil {
		return false
	}
	if mine.Dev == theirs.Dev && mine.Ino == theirs.Ino {
		return false
	}
	id, err := symbolize.BuildID(onDisk)
	return err != nil || id == "" || id != buildID
}

// describe fills in what the file itself says.
func describe(l *profile.Library, f *os.File) {
	if info, err := f.Stat(); err == nil {
		l.Size, l.ModTime = info.Size(), info.ModTime()
	}
	l.BuildID, _ = symbolize.BuildID(f)
	l.Version = Version(f, l.Name)
}

// maxFiles bounds a walk through a folder that somebody named by mistake.
const maxFiles = 200_000

// OfFolder lists the ELF programs and shared objects below a folder; links are not followed.
func OfFolder(dir string) ([]profile.Library, error) {
	var out []profile.Library
	visited := 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil && path == dir {
			return err
		}
		if visited++; visited > maxFiles {
			return fmt.Errorf("more than %d files; name a smaller folder", maxFiles)
		}
		if err != nil || !entry.Type().IsRegular() {
			return nil // what cannot be read is not listed
		}
		if l, err := OfFile(path); err == nil {
			out = append(out, l)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list libraries of %s: %w", dir, err)
	}
	addPackages(out, "/")
	profile.SortLibraries(out, nil)
	return out, nil
}

// ErrNotELF is returned for a file that is no ELF program or shared object.
var ErrNotELF = errors.New("no ELF program or shared object")

// OfFile describes one ELF file.
func OfFile(path string) (profile.Library, error) {
	f, err := os.Open(path)
	if err != nil {
		return profile.Library{}, err
	}
	defer f.Close()
	if !isELF(f) {
		return profile.Library{}, fmt.Errorf("%s: %w", path, ErrNotELF)
	}
	l := profile.Library{File: path, Name: filepath.Base(path)}
	describe(&l, f)
	return l, nil
}

// isELF is true for programs and shared objects; object files (.o, .ko) and cores are none.
func isELF(r io.ReaderAt) bool {
	var head [18]byte
	if _, err := r.ReadAt(head[:], 0); err != nil || string(head[:4]) != elf.ELFMAG {
		return false
	}
	kind := elf.Type(head[16])
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		kind = elf.Type(head[17])
	}
	return kind == elf.ET_EXEC || kind == elf.ET_DYN
}
