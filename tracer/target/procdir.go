package target

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"golang.org/x/sys/unix"
)

// readProcDir lists the processes in /proc with the inode numbers of their directories. The kernel numbers the directory
// of each new process anew, so that a number that stayed means the same process, for the price of one system call for
// hundreds of them. A number may change without reason (the kernel forgot the directory), which costs a needless look.
func readProcDir(fs memory.FS) (map[int]uint64, error) {
	dir, err := os.Open(fs.Path(0))
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer dir.Close()
	entries := map[int]uint64{}
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(int(dir.Fd()), buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list processes: %w", err)
		}
		if n <= 0 {
			return entries, nil
		}
		parseDirents(buf[:n], entries)
	}
}

// parseDirents reads linux_dirent64: inode (8 bytes), offset (8), record length (2), type (1), name with a NUL.
func parseDirents(b []byte, into map[int]uint64) {
	const header = 19
	for len(b) >= header {
		size := int(binary.NativeEndian.Uint16(b[16:]))
		if size < header || size > len(b) {
			return
		}
		name, _, _ := bytes.Cut(b[header:size], []byte{0})
		if pid, err := strconv.Atoi(string(name)); err == nil && pid > 0 {
			into[pid] = binary.NativeEndian.Uint64(b)
		}
		b = b[size:]
	}
}
