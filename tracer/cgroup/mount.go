package cgroup

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Membership is one line of /proc/PID/cgroup: the group a process is in, in one hierarchy.
type Membership struct {
	Hierarchy   int      // 0 for version 2
	Controllers []string // "memory", "name=systemd"; none for version 2
	Path        string   // as seen from the reader's cgroup namespace, where "/.." is outside of it
}

// V2 says whether the line is that of the unified hierarchy.
func (m Membership) V2() bool { return m.Hierarchy == 0 && len(m.Controllers) == 0 }

// maxProcCgroup bounds /proc/PID/cgroup: 13 hierarchies with paths of 4,096 bytes.
const maxProcCgroup = 256 << 10

// ParseMemberships reads the format of /proc/PID/cgroup. Paths may hold colons; the kernel escapes nothing but newlines.
func ParseMemberships(r io.Reader) ([]Membership, error) {
	text, err := io.ReadAll(io.LimitReader(r, maxProcCgroup))
	if err != nil {
		return nil, fmt.Errorf("read cgroup membership: %w", err)
	}
	var list []Membership
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 || !strings.HasPrefix(fields[2], "/") {
			return nil, fmt.Errorf("parse cgroup membership: line %q", line)
		}
		id, err := strconv.Atoi(fields[0])
		if err != nil || id < 0 {
			return nil, fmt.Errorf("parse cgroup membership: hierarchy number in line %q", line)
		}
		m := Membership{Hierarchy: id, Path: strings.TrimSuffix(fields[2], " (deleted)")}
		if fields[1] != "" {
			m.Controllers = strings.Split(fields[1], ",")
		}
		list = append(list, m)
	}
	return list, nil
}

// MemoryPath is the path of the group whose memory limit holds: that of the v1 memory controller, else the unified one.
func MemoryPath(list []Membership) string {
	unified := ""
	for _, m := range list {
		if slices.Contains(m.Controllers, "memory") {
			return m.Path
		}
		if m.V2() {
			unified = m.Path
		}
	}
	return unified
}

// Mount is a mounted cgroup hierarchy.
type Mount struct {
	Dir         string // where it is mounted
	Root        string // the group that Dir shows; "/" except inside containers
	V2          bool
	Controllers []string // of version 1
}

// maxMountinfo bounds the mount table: hosts with thousands of overlay mounts have some MB.
const maxMountinfo = 64 << 20

// ParseMounts picks the cgroup hierarchies out of the format of /proc/PID/mountinfo.
func ParseMounts(r io.Reader) ([]Mount, error) {
	in := bufio.NewScanner(io.LimitReader(r, maxMountinfo))
	in.Buffer(nil, 1<<20)
	var mounts []Mount
	for in.Scan() {
		if m, ok := parseMount(in.Text()); ok {
			mounts = append(mounts, m)
		}
	}
	if err := in.Err(); err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	return mounts, nil
}

// parseMount reads "ID PARENT DEV ROOT MOUNTPOINT OPTIONS [TAG...] - TYPE SOURCE SUPEROPTIONS".
func parseMount(line string) (Mount, bool) {
	before, after, ok := strings.Cut(line, " - ")
	left, right := strings.Fields(before), strings.Fields(after)
	if !ok || len(left) < 6 || len(right) < 3 {
		return Mount{}, false
	}
	m := Mount{Dir: unescape(left[4]), Root: unescape(left[3])}
	switch right[0] {
	case "cgroup2":
		m.V2 = true
		return m, true
	case "cgroup":
		m.Controllers = strings.Split(right[2], ",")
		return m, true
	}
	return Mount{}, false
}

// unescape undoes the octal escapes of mountinfo (\040 for a space).
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Mounts are the hierarchies that this process sees.
func Mounts() ([]Mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup mounts: %w", err)
	}
	defer f.Close()
	return ParseMounts(f)
}

// memory says whether the mount's groups carry memory limits.
func (m Mount) memory() bool {
	if !m.V2 {
		return slices.Contains(m.Controllers, "memory")
	}
	controllers, err := os.ReadFile(filepath.Join(m.Dir, "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(controllers)), "memory")
}

// dir is where the mount shows a group; false when the group lies outside of what it shows.
func (m Mount) dir(group string) (string, bool) {
	rel, ok := group, true
	if m.Root != "/" && !strings.HasPrefix(m.Root, "/..") {
		rel, ok = strings.CutPrefix(group, m.Root)
		ok = ok && (rel == "" || rel[0] == '/')
	}
	if !ok || strings.HasPrefix(path.Clean("/"+rel), "/..") || hasDotDot(rel) {
		return "", false
	}
	return filepath.Join(m.Dir, rel), true
}

func hasDotDot(p string) bool { return slices.Contains(strings.Split(p, "/"), "..") }

// Group is one control group. The zero value is no group.
type Group struct {
	Dir  string // in the file system
	Path string // in its hierarchy, "/kubepods/pod1"
	V2   bool
	// top is the mount point: ancestors are walked up to it.
	top string
	// controllers are those of the group's v1 hierarchy.
	controllers []string
}

// Contains says whether a process is in the group or in one below it.
func (g Group) Contains(list []Membership) bool {
	for _, m := range list {
		if m.V2() != g.V2 || !g.V2 && !slices.ContainsFunc(m.Controllers, func(c string) bool { return slices.Contains(g.controllers, c) }) {
			continue
		}
		rest, ok := strings.CutPrefix(m.Path, strings.TrimSuffix(g.Path, "/"))
		return ok && (rest == "" || rest[0] == '/')
	}
	return false
}

// ErrNotFound is returned when no mounted hierarchy has the group.
var ErrNotFound = errors.New("no such control group")

// Find returns the group that a person names: a directory (/sys/fs/cgroup/memory/web), or a path inside a hierarchy as
// /proc/PID/cgroup prints it (/web, web). Where several hierarchies have the path, the one with memory limits wins.
func Find(name string) (Group, error) {
	mounts, err := Mounts()
	if err != nil {
		return Group{}, err
	}
	return FindIn(mounts, name)
}

// FindIn is Find in given hierarchies.
func FindIn(mounts []Mount, name string) (Group, error) {
	mounts = byUse(mounts)
	if len(mounts) == 0 {
		return Group{}, fmt.Errorf("%w: %q: no cgroup hierarchy is mounted here (mount -t cgroup2 none /sys/fs/cgroup)", ErrNotFound, name)
	}
	if g, ok := findDir(mounts, name); ok {
		return g, nil
	}
	for _, m := range mounts {
		group := path.Clean("/" + name)
		dir, ok := m.dir(group)
		if ok && isGroup(dir) {
			return Group{Dir: dir, Path: group, V2: m.V2, top: m.Dir, controllers: m.Controllers}, nil
		}
	}
	var dirs []string
	for _, m := range mounts {
		dirs = append(dirs, m.Dir)
	}
	return Group{}, fmt.Errorf("%w: %q is neither a directory of a hierarchy nor a group below %s", ErrNotFound, name, strings.Join(dirs, ", "))
}

// byUse puts the hierarchies first in which memory is limited, then the unified one, then the others.
func byUse(mounts []Mount) []Mount {
	rank := func(m Mount) int {
		switch {
		case m.memory():
			return 0
		case m.V2:
			return 1
		}
		return 2
	}
	sorted := slices.Clone(mounts)
	slices.SortStableFunc(sorted, func(a, b Mount) int { return rank(a) - rank(b) })
	return sorted
}

// findDir takes the name as a directory, symbolic links resolved (/sys/fs/cgroup/cpu often is one).
func findDir(mounts []Mount, name string) (Group, bool) {
	dir, err := filepath.EvalSymlinks(name)
	if err != nil || !filepath.IsAbs(dir) || !isGroup(dir) {
		return Group{}, false
	}
	for _, m := range mounts {
		rel, err := filepath.Rel(m.Dir, dir)
		if err != nil || hasDotDot(rel) {
			continue
		}
		root := m.Root
		if strings.HasPrefix(root, "/..") {
			root = "/"
		}
		return Group{Dir: dir, Path: path.Join(root, rel), V2: m.V2, top: m.Dir, controllers: m.Controllers}, true
	}
	return Group{}, false
}

func isGroup(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.procs"))
	return err == nil
}

// Of is the group that limits a process's memory.
func Of(list []Membership) (Group, error) {
	name := MemoryPath(list)
	if name == "" {
		return Group{}, fmt.Errorf("%w: the process is in no group with a memory controller", ErrNotFound)
	}
	return Find(name)
}

// PIDs are the processes in the group and in the groups below it, as this process's pid namespace numbers them. Groups
// that go away meanwhile are skipped.
func (g Group) PIDs() ([]int, error) {
	var pids []int
	err := g.walk(func(dir string) error {
		list, err := readPIDs(filepath.Join(dir, "cgroup.procs"))
		pids = append(pids, list...)
		return err
	})
	slices.Sort(pids)
	return slices.Compact(pids), err
}

// walk calls f for the group's directory and those below it.
func (g Group) walk(f func(dir string) error) error {
	if _, err := os.Stat(g.Dir); err != nil {
		return fmt.Errorf("%w: %s", ErrNotFound, g.Path)
	}
	return filepath.WalkDir(g.Dir, func(p string, d os.DirEntry, err error) error {
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err != nil || !d.IsDir() {
			return nil
		}
		return f(p)
	})
}

func readPIDs(name string) ([]int, error) {
	text, err := os.ReadFile(name)
	if isGone(err) || errors.Is(err, errThreaded) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for field := range bytes.FieldsSeq(text) {
		// 0 stands for a process outside of this pid namespace.
		if pid, err := strconv.Atoi(string(field)); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}
