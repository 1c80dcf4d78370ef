package memory

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
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
		fd, err = rootfs.OpenPath(fs.Path(pid, "root"), r.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("open mapped file %q: %w", r.Path, err)
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("open mapped file %q: %w", r.Path, err)
	}
	if stat.Ino != r.Inode {
		return nil, fmt.Errorf("open mapped file %q: %w", r.Path, errReplaced)
	}
	return rootfs.Reopen(fd, r.Path)
}

var errReplaced = errors.New("another file has this name now")
