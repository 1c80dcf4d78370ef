package memory

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// OpenMapped opens the very file that a range of a process maps, be it deleted or replaced: through map_files, which needs
// CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE, or by its path as the target sees it if that still is the same file.
func (fs FS) OpenMapped(pid int, r *Range) (*os.File, error) {
	if !r.IsFile() {
		return nil, fmt.Errorf("open mapped file: no file backs %x-%x", r.Start, r.End)
	}
	link := fs.Path(pid, "map_files", fmt.Sprintf("%x-%x", r.Start, r.End))
	fd, err := unix.Open(link, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		fd, err = fs.openInRoot(pid, r.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("open mapped file %q: %w", r.Path, err)
	}
	defer unix.Close(fd)
	f, err := reopen(fd, r)
	if err != nil {
		return nil, fmt.Errorf("open mapped file %q: %w", r.Path, err)
	}
	return f, nil
}

// openInRoot looks a path up as the target does: its symbolic links must not lead into this process's file system.
func (fs FS) openInRoot(pid int, path string) (int, error) {
	root, err := unix.Open(fs.Path(pid, "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // before 5.6, or an old seccomp filter
		return unix.Open(fs.Path(pid, "root")+path, unix.O_PATH|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	}
	return fd, err
}

// reopen turns a path handle into a file to read, if it is a regular file (a device may do something when opened) and the one
// that is mapped.
func reopen(fd int, r *Range) (*os.File, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errors.New("no regular file")
	}
	if stat.Ino != r.Inode {
		return nil, errors.New("another file has this name now")
	}
	return os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_RDONLY|unix.O_NONBLOCK, 0)
}
