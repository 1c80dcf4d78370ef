// Package rootfs opens files as a process with another root directory sees them.
//
// The trap: /proc/PID/root/etc/x is not enough. A symbolic link below it is followed in the opener's own root, so that a
// target can make a tracer that runs as root read any file of the host; and what is found may be a pipe or a device, which
// hangs or acts when it is opened.
package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNotRegular is returned for what is no regular file; it was not opened.
var ErrNotRegular = errors.New("not a regular file")

// Open opens a regular file for reading. root is a directory, usually /proc/PID/root; name is resolved inside of it, with
// its symbolic links and "..", which end at root.
func Open(root, name string) (*os.File, error) {
	fd, err := OpenPath(root, name)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return Reopen(fd, name)
}

// OpenLink opens the regular file that a link of procfs (map_files, exe) leads to. Such a link needs no root: it is the
// file itself, which may be a device.
func OpenLink(link string) (*os.File, error) {
	fd, err := unix.Open(link, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: link, Err: err}
	}
	defer unix.Close(fd)
	return Reopen(fd, link)
}

// ReadFile reads a regular file of at most limit bytes.
func ReadFile(root, name string, limit int64) ([]byte, error) {
	f, err := Open(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("read %s: %d bytes are more than the %d allowed", name, info.Size(), limit)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}

// OpenPath resolves a name to a handle (O_PATH), for any type of file. Nothing is opened by that; the caller closes it.
func OpenPath(root, name string) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &fs.PathError{Op: "open root", Path: root, Err: err}
	}
	defer unix.Close(dir)
	fd, err := openat2(dir, name)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) { // before 5.6, or an old seccomp filter
		fd, err = walk(dir, name)
	}
	if err != nil {
		return -1, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return fd, nil
}

// openat2 leaves the resolving to the kernel. It asks for a repetition when the tree changes below it.
func openat2(dir int, name string) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for i := 0; ; i++ {
		fd, err := unix.Openat2(dir, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) || i == 100 {
			return fd, err
		}
	}
}

// maxLinks is the kernel's own bound.
const maxLinks = 40

// walk resolves a name one part after the other. ".." goes back through handles that were kept, never through the
// directory's own "..", which somebody may have moved out of the root meanwhile.
func walk(root int, name string) (int, error) {
	w := walker{root: root}
	defer w.close()
	rest := strings.Split(name, "/")
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		target, err := w.step(part)
		if err != nil {
			return -1, err
		}
		if target == "" {
			continue
		}
		if links++; links > maxLinks {
			return -1, unix.ELOOP
		}
		if path.IsAbs(target) {
			w.close()
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return unix.FcntlInt(uintptr(w.top()), unix.F_DUPFD_CLOEXEC, 0)
}

type walker struct {
	root  int
	stack []int // handles of the directories below root on the way here
}

func (w *walker) top() int {
	if n := len(w.stack); n > 0 {
		return w.stack[n-1]
	}
	return w.root
}

func (w *walker) close() {
	for _, fd := range w.stack {
		unix.Close(fd)
	}
	w.stack = nil
}

// step goes on by one part of a name. When that is a symbolic link, it stays and returns where the link points.
func (w *walker) step(part string) (link string, err error) {
	if part == "" || part == "." {
		return "", nil
	}
	if part == ".." {
		if n := len(w.stack); n > 0 {
			unix.Close(w.stack[n-1])
			w.stack = w.stack[:n-1]
		}
		return "", nil
	}
	fd, err := unix.Openat(w.top(), part, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	link, err = readLink(fd)
	if err != nil || link != "" {
		unix.Close(fd)
		return link, err
	}
	w.stack = append(w.stack, fd)
	return "", nil
}

// readLink is where a handle's symbolic link points; "" when it is none. Links of procfs are magic: what they say is not
// where they lead.
func readLink(fd int) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFLNK {
		return "", nil
	}
	var where unix.Statfs_t
	if err := unix.Fstatfs(fd, &where); err != nil || where.Type == unix.PROC_SUPER_MAGIC {
		return "", unix.ELOOP
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// Reopen turns a handle into a file to read if it is a regular file. name is for messages.
func Reopen(fd int, name string) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, &fs.PathError{Op: "open", Path: name, Err: ErrNotRegular}
	}
	opened, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(opened), name), nil
}
