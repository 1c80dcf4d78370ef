package memory

import (
	"bytes"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Limit is the memory limit that a process will meet first: of its cgroup or one above it.
type Limit struct {
	Path  string // of the cgroup that has the limit, as this process sees it
	Bytes uint64
	// Used is what cannot be had back at once: usage without inactive page cache, as Kubernetes counts it.
	Used uint64
}

// Left is how far the limit is away in bytes.
func (l *Limit) Left() uint64 { return l.Bytes - min(l.Used, l.Bytes) }

// Cgroups finds memory limits; it remembers where cgroups are mounted.
type Cgroups struct {
	fs     FS
	v1, v2 cgroupMount
}

// cgroupMount is a mounted hierarchy: root is the cgroup that is visible at point.
type cgroupMount struct{ point, root string }

// Cgroups looks up the mounted hierarchies.
func (fs FS) Cgroups() *Cgroups {
	c := &Cgroups{fs: fs}
	f, err := os.Open(fs.Path(0, "self/mountinfo"))
	if err != nil {
		return c
	}
	defer f.Close()
	c.v1, c.v2 = parseCgroupMounts(f)
	return c
}

// parseCgroupMounts finds the v1 memory hierarchy and the v2 hierarchy in /proc/self/mountinfo.
func parseCgroupMounts(r io.Reader) (v1, v2 cgroupMount) {
	eachLine(r, func(line []byte) error {
		before, after, ok := bytes.Cut(line, []byte(" - "))
		left, right := bytes.Fields(before), bytes.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			return nil
		}
		mount := cgroupMount{unescape(left[4]), unescape(left[3])}
		switch {
		case string(right[0]) == "cgroup2" && v2.point == "":
			v2 = mount
		case string(right[0]) == "cgroup" && hasOption(string(right[2]), "memory") && v1.point == "":
			v1 = mount
		}
		return nil
	})
	return v1, v2
}

func hasOption(options, want string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == want {
			return true
		}
	}
	return false
}

// unescape undoes the octal escapes of mountinfo: space, tab, newline and backslash.
func unescape(text []byte) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(string(text))
}

// Of is the directory of the cgroup that accounts for a process's memory, and whether it is one of v2; "" when there is none.
func (c *Cgroups) Of(pid int) (dir string, v2 bool) {
	text, err := os.ReadFile(c.fs.Path(pid, "cgroup"))
	if err != nil {
		return "", false
	}
	v1Path, v2Path := parseCgroup(text)
	if v1Path != "" && c.v1.point != "" {
		return c.v1.dir(v1Path), false
	}
	if v2Path != "" && c.v2.point != "" {
		return c.v2.dir(v2Path), true
	}
	return "", false
}

// parseCgroup reads the "ID:CONTROLLERS:PATH" lines of /proc/PID/cgroup.
func parseCgroup(text []byte) (v1, v2 string) {
	for line := range strings.Lines(string(text)) {
		parts := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		switch {
		case len(parts) < 3:
		case hasOption(parts[1], "memory"):
			v1 = parts[2]
		case parts[0] == "0" && parts[1] == "":
			v2 = parts[2]
		}
	}
	return v1, v2
}

// dir is where a cgroup is visible. One that lies outside of what is mounted has a path with "..", or one that does not start
// with the mount's root; then the mount itself is the nearest thing to it.
func (m cgroupMount) dir(path string) string {
	if rest, ok := strings.CutPrefix(path, m.root); ok && m.root != "/" {
		path = rest
	}
	if strings.HasPrefix(path, "/..") {
		return m.point
	}
	dir := filepath.Join(m.point, path)
	if _, err := os.Stat(dir); err != nil {
		return m.point
	}
	return dir
}

// Limit is the limit that is nearest to being met among those of a cgroup and all above it. ok is false when none is set.
func (c *Cgroups) Limit(dir string, v2 bool) (limit Limit, ok bool) {
	if dir == "" {
		return Limit{}, false
	}
	mount := c.v1.point
	if v2 {
		mount = c.v2.point
	}
	for {
		if l, found := readLimit(dir, v2); found && (!ok || l.Left() < limit.Left()) {
			limit, ok = l, true
		}
		if dir == mount || !strings.HasPrefix(dir, mount) || len(dir) <= 1 {
			return limit, ok
		}
		dir = filepath.Dir(dir)
	}
}

// noLimit is above every limit that somebody set: v1 shows "none" as almost 2^63.
const noLimit = math.MaxInt64 - 1<<30

func readLimit(dir string, v2 bool) (Limit, bool) {
	limitFile, usageFile, cacheKey := "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "
	if v2 {
		limitFile, usageFile, cacheKey = "memory.max", "memory.current", "inactive_file "
	}
	bytes, ok := readNumber(filepath.Join(dir, limitFile)) // v2 says "max", which is no number
	if !ok || bytes >= noLimit {
		return Limit{}, false
	}
	used, ok := readNumber(filepath.Join(dir, usageFile))
	if !ok {
		return Limit{}, false
	}
	stat, _ := os.ReadFile(filepath.Join(dir, "memory.stat"))
	cache, _ := strconv.ParseUint(statusLine(stat, cacheKey), 10, 64)
	return Limit{dir, bytes, used - min(cache, used)}, true
}

func readNumber(path string) (uint64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return v, err == nil
}

// sharedLimit is the limit on a process's cgroup if this process is charged to the same one.
func (fs FS) sharedLimit(pid int) (Limit, bool) {
	c := fs.Cgroups()
	dir, v2 := c.Of(pid)
	if own, _ := c.Of(os.Getpid()); own != dir {
		return Limit{}, false
	}
	return c.Limit(dir, v2)
}
