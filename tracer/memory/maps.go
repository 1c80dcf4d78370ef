package memory

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// maxLine bounds a line of maps: a path of 4,096 bytes, each of which may be an escape of four.
const maxLine = 32 << 10

// Perms are the access rights of a range.
type Perms uint8

// The rights; a range that is not Shared is private (copy on write).
const (
	Read Perms = 1 << iota
	Write
	Exec
	Shared
)

// String prints the rights as the kernel does: "rw-p".
func (p Perms) String() string {
	text := []byte("---p")
	for i, letter := range []byte("rwxs") {
		if p&(1<<i) != 0 {
			text[i] = letter
		}
	}
	return string(text)
}

// Dev is the device that holds a mapped file.
type Dev struct{ Major, Minor uint32 }

// String prints the device as the kernel does in maps: two hex numbers.
func (d Dev) String() string { return fmt.Sprintf("%02x:%02x", d.Major, d.Minor) }

// Range is one line of /proc/PID/maps.
type Range struct {
	Start, End uint64
	Offset     uint64 // in the file
	Inode      uint64
	// Path is the file's name as the target sees it, or a name in brackets that the kernel or the program gave. The kernel
	// writes a newline as \012 and leaves backslashes alone, so a name with a literal \012 comes out with a newline.
	Path    string
	Kind    Kind
	Dev     Dev
	Perms   Perms
	Deleted bool // the name is gone from the file system (or ends in " (deleted)" of its own)
}

// Size is the length of the range in bytes.
func (r *Range) Size() uint64 { return r.End - r.Start }

// Contains says whether an address lies in the range.
func (r *Range) Contains(addr uint64) bool { return addr >= r.Start && addr < r.End }

// IsFile says whether a file with a path backs the range (which includes deleted ones and shared memory with a name).
func (r *Range) IsFile() bool { return strings.HasPrefix(r.Path, "/") }

// IsAnonymous says whether nothing but memory backs the range.
func (r *Range) IsAnonymous() bool { return r.Inode == 0 && !r.IsFile() }

// ParseMaps reads the format of /proc/PID/maps. The ranges come out classified by what the file alone tells.
func ParseMaps(r io.Reader) ([]Range, error) {
	var ranges []Range
	names := map[string]string{}
	err := eachLine(r, func(line []byte) error {
		parsed, err := parseMapsLine(line, names)
		if err != nil {
			return err
		}
		ranges = append(ranges, parsed)
		return checkOrder(ranges)
	})
	if err != nil {
		return nil, fmt.Errorf("parse maps: %w", err)
	}
	classify(len(ranges), func(i int) *Range { return &ranges[i] })
	return ranges, nil
}

// checkOrder holds the parsers to what every user of ranges relies on: ascending, without overlap.
func checkOrder(ranges []Range) error {
	n := len(ranges)
	if n > 1 && ranges[n-1].Start < ranges[n-2].End {
		return fmt.Errorf("range %x overlaps the one before it", ranges[n-1].Start)
	}
	return nil
}

// eachLine calls f for each line, without its newline and valid until f returns.
func eachLine(r io.Reader, f func([]byte) error) error {
	in := bufio.NewReaderSize(r, maxLine)
	for number := 1; ; number++ {
		line, err := in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			return fmt.Errorf("line %d: longer than %d bytes", number, maxLine)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return fmt.Errorf("line %d: %w", number, err)
		}
		if line = bytes.TrimSuffix(line, []byte("\n")); len(line) > 0 {
			if err := f(line); err != nil {
				return fmt.Errorf("line %d: %w", number, err)
			}
		}
		if err != nil {
			return nil
		}
	}
}

// parseMapsLine reads "START-END PERMS OFFSET MAJOR:MINOR INODE    PATH". Equal paths share their bytes through names.
func parseMapsLine(line []byte, names map[string]string) (Range, error) {
	var fields [5][]byte
	rest := line
	for i := range fields {
		var found bool
		fields[i], rest, found = bytes.Cut(rest, []byte(" "))
		if !found && i < len(fields)-1 {
			return Range{}, fmt.Errorf("%d fields instead of 5", i+1)
		}
	}
	var r Range
	var ok [7]bool
	start, end, _ := bytes.Cut(fields[0], []byte("-"))
	r.Start, ok[0] = parseHex(start)
	r.End, ok[1] = parseHex(end)
	r.Perms, ok[2] = parsePerms(fields[1])
	r.Offset, ok[3] = parseHex(fields[2])
	r.Dev, ok[4] = parseDev(fields[3])
	r.Inode, ok[5] = parseDecimal(fields[4])
	ok[6] = r.Start < r.End
	for _, good := range ok {
		if !good {
			return Range{}, fmt.Errorf("no range of memory: %.80q", line)
		}
	}
	r.Path, r.Deleted = parsePath(bytes.TrimLeft(rest, " "), names)
	return r, nil
}

func parsePath(text []byte, names map[string]string) (path string, deleted bool) {
	text, deleted = bytes.CutSuffix(text, []byte(" (deleted)"))
	path, known := names[string(text)]
	if !known {
		path = strings.ReplaceAll(string(text), `\012`, "\n")
		names[string(text)] = path
	}
	return path, deleted
}

func parsePerms(text []byte) (Perms, bool) {
	if len(text) != 4 {
		return 0, false
	}
	var p Perms
	for i, letter := range []byte("rwxs") {
		switch {
		case text[i] == letter:
			p |= 1 << i
		case text[i] == '-' && i < 3, text[i] == 'p' && i == 3:
		default:
			return 0, false
		}
	}
	return p, true
}

func parseDev(text []byte) (Dev, bool) {
	major, minor, _ := bytes.Cut(text, []byte(":"))
	a, okA := parseHex(major)
	b, okB := parseHex(minor)
	return Dev{uint32(a), uint32(b)}, okA && okB && a <= 1<<32-1 && b <= 1<<32-1
}

// parseHex is strconv.ParseUint without a conversion to string: smaps of a big process has millions of numbers.
func parseHex(text []byte) (uint64, bool) {
	if len(text) == 0 || len(text) > 16 {
		return 0, false
	}
	var v uint64
	for _, c := range text {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		default:
			return 0, false
		}
		v = v<<4 | uint64(c)
	}
	return v, true
}

func parseDecimal(text []byte) (uint64, bool) {
	if len(text) < 19 {
		var v uint64
		for _, c := range text {
			if c < '0' || c > '9' {
				return 0, false
			}
			v = v*10 + uint64(c-'0')
		}
		return v, len(text) > 0
	}
	v, err := strconv.ParseUint(string(text), 10, 64)
	return v, err == nil
}
