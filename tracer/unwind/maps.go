package unwind

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// area is a line of /proc/PID/maps with execute permission.
type area struct {
	start, end, off uint64
	dev             string
	inode           uint64
	path            string // as the kernel prints it: may hold spaces, end in " (deleted)", or be empty
}

// anonymous executable memory has no file; a name in brackets or an anon_inode's is no file either.
func (a area) anonymous() bool { return a.inode == 0 && a.path != "[vdso]" }

// readAreas reads the executable areas of a process in one go, since the file changes below a slow reader.
func readAreas(path string) ([]area, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read mappings: %w", err)
	}
	return parseAreas(bytes.NewReader(b))
}

func parseAreas(r io.Reader) ([]area, error) {
	var areas []area
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		a, perms, err := parseArea(sc.Text())
		if err != nil {
			return nil, err
		}
		// The kernel's own pages at fixed places: [vsyscall] traps, [uprobes] is the return probes' trampoline, which the
		// walker knows how to repair and must find unmapped.
		if len(perms) < 3 || perms[2] != 'x' || a.path == "[vsyscall]" || a.path == "[uprobes]" ||
			a.path == "[uprobes-trampoline]" {
			continue
		}
		areas = append(areas, a)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read mappings: %w", err)
	}
	return areas, nil
}

func parseArea(line string) (a area, perms string, err error) {
	var fields [5]string
	rest := line
	for i := range fields {
		rest = strings.TrimLeft(rest, " ")
		fields[i], rest, _ = strings.Cut(rest, " ")
	}
	a.path = strings.TrimLeft(rest, " ")
	a.dev = fields[3]
	from, to, ok := strings.Cut(fields[0], "-")
	if !ok {
		return a, "", fmt.Errorf("mapping line %q: no range", line)
	}
	for _, n := range []struct {
		s    string
		base int
		to   *uint64
	}{{from, 16, &a.start}, {to, 16, &a.end}, {fields[2], 16, &a.off}, {fields[4], 10, &a.inode}} {
		*n.to, err = strconv.ParseUint(n.s, n.base, 64)
		if err != nil {
			return a, "", fmt.Errorf("mapping line %q: %w", line, err)
		}
	}
	if a.end <= a.start {
		return a, "", fmt.Errorf("mapping line %q: empty range", line)
	}
	return a, fields[1], nil
}
