package unwind

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"golang.org/x/sys/unix"
)

// source is an open ELF image: a file, or the vDSO as bytes.
type source interface {
	io.ReaderAt
	io.Closer
}

// openArea opens the file behind an area, whatever happened to its path since.
func (t *Tables) openArea(pid int, a area) (source, fileKey, error) {
	dir := filepath.Join(t.proc, strconv.Itoa(pid))
	if a.path == "[vdso]" {
		return readVDSO(filepath.Join(dir, "mem"), a)
	}
	path, deleted := strings.CutSuffix(a.path, " (deleted)")
	f, err := memory.FS{Root: t.proc}.OpenMapped(pid, &memory.Range{Start: a.start, End: a.end, Inode: a.inode, Path: path, Deleted: deleted})
	if err != nil {
		return nil, fileKey{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fileKey{}, fmt.Errorf("stat: %w", err)
	}
	return f, fileKey{uint64(st.Dev), st.Ino, st.Mtim.Nano(), st.Size}, nil
}

// maxVDSO is far above the real size, two pages.
const maxVDSO = 1 << 20

type image struct{ *strings.Reader }

func (image) Close() error { return nil }

// readVDSO copies the kernel's library out of the target's memory. All 64-bit processes have the same one, so that its
// key is the length alone; the addresses inside do not depend on where it lies.
func readVDSO(mem string, a area) (source, fileKey, error) {
	size := a.end - a.start
	if size > maxVDSO {
		return nil, fileKey{}, fmt.Errorf("read vDSO: %d bytes", size)
	}
	f, err := os.Open(mem)
	if err != nil {
		return nil, fileKey{}, fmt.Errorf("read vDSO: %w", err)
	}
	defer f.Close()
	b := make([]byte, size)
	if _, err := f.ReadAt(b, int64(a.start)); err != nil {
		return nil, fileKey{}, fmt.Errorf("read vDSO: %w", err)
	}
	return image{strings.NewReader(string(b))}, fileKey{size: int64(size)}, nil
}
