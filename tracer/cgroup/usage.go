package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// NoLimit is the limit of a group that has none.
const NoLimit = math.MaxUint64

// errThreaded is what reading cgroup.procs of a threaded v2 group gives; its processes stand in the group above.
var errThreaded = syscall.EOPNOTSUPP

// isGone says that a group was removed while it was looked at.
func isGone(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) }

// Usage is the memory of one group at one moment, in bytes.
type Usage struct {
	Current uint64 // what the limit is held against; page cache is in it
	Limit   uint64 // NoLimit when there is none
	// InactiveFile is page cache that the kernel drops first; Current without it is the "working set" of Kubernetes.
	InactiveFile uint64
	// Anon is memory of processes that no file backs.
	Anon uint64
}

// WorkingSet is the usage that the kernel cannot get rid of easily.
func (u Usage) WorkingSet() uint64 {
	if u.InactiveFile > u.Current {
		return 0
	}
	return u.Current - u.InactiveFile
}

// Share is the working set as a part of the limit; 0 without a limit.
func (u Usage) Share() float64 {
	if u.Limit == NoLimit || u.Limit == 0 {
		return 0
	}
	return float64(u.WorkingSet()) / float64(u.Limit)
}

// Usage reads the group's own figures.
func (g Group) Usage() (Usage, error) {
	u, err := g.brief()
	if err != nil {
		return u, err
	}
	stat, err := os.ReadFile(filepath.Join(g.Dir, "memory.stat"))
	if err != nil {
		return u, fmt.Errorf("read memory statistics of %s: %w", g.Path, err)
	}
	// The plain v1 names are the group's alone, usage_in_bytes holds those below too: the total_ names fit.
	u.InactiveFile = flatValue(stat, g.file("inactive_file", "total_inactive_file"))
	u.Anon = flatValue(stat, g.file("anon", "total_rss"))
	return u, nil
}

// brief is Usage without the statistics.
func (g Group) brief() (Usage, error) {
	var u Usage
	var err error
	if u.Current, err = g.number(g.file("memory.current", "memory.usage_in_bytes")); err != nil {
		return u, fmt.Errorf("read memory usage of %s: %w", g.Path, err)
	}
	u.Limit, err = g.Limit()
	return u, err
}

// Limit reads the group's own limit. The root group has no file for it and no limit.
func (g Group) Limit() (uint64, error) {
	limit, err := g.number(g.file("memory.max", "memory.limit_in_bytes"))
	if errors.Is(err, os.ErrNotExist) && isGroup(g.Dir) {
		return NoLimit, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read memory limit of %s: %w", g.Path, err)
	}
	// v1 writes "none" as the largest page-aligned int64 (or uint64 before 3.19, less a page).
	if !g.V2 && limit >= math.MaxInt64-(1<<20) {
		return NoLimit, nil
	}
	return limit, nil
}

// Ancestors are the group itself and the groups above it, nearest first. Any of them may have the limit that kills. Before
// 5.11 a v1 group without memory.use_hierarchy limits nobody below.
func (g Group) Ancestors() []Group {
	list := []Group{g}
	for up := g; up.Dir != up.top && up.top != "" && strings.HasPrefix(up.Dir, up.top); {
		up = Group{Dir: filepath.Dir(up.Dir), Path: filepath.Dir(up.Path), V2: g.V2, top: g.top}
		if !isGroup(up.Dir) || up.flat() {
			break
		}
		list = append(list, up)
	}
	return list
}

// flat says that the group's figures are without those of the groups below.
func (g Group) flat() bool {
	hierarchy, err := g.number("memory.use_hierarchy")
	return !g.V2 && err == nil && hierarchy == 0
}

// Tightest is the group among the group and its ancestors that is nearest to its limit, and its usage. Without any
// limit it is the group itself.
func (g Group) Tightest() (Group, Usage, error) {
	var best Group
	var bestUsage Usage
	for _, a := range g.Ancestors() {
		u, err := a.Usage()
		if errors.Is(err, os.ErrNotExist) && a.Dir != g.Dir {
			continue // the root of v2 tells neither usage nor limit
		}
		if err != nil {
			return g, u, err
		}
		if best.Dir == "" || u.Share() > bestUsage.Share() {
			best, bestUsage = a, u
		}
	}
	return best, bestUsage, nil
}

// Kills is the number of processes that the OOM killer took from the group and those below it since each was made. v1
// counts since kernel 4.13; before, ok is false.
func (g Group) Kills() (kills uint64, ok bool, err error) {
	if g.V2 {
		text, err := os.ReadFile(filepath.Join(g.Dir, "memory.events"))
		if err != nil {
			return 0, false, fmt.Errorf("read OOM kills of %s: %w", g.Path, err)
		}
		return flatValue(text, "oom_kill"), true, nil
	}
	err = g.walk(func(dir string) error {
		text, err := os.ReadFile(filepath.Join(dir, "memory.oom_control"))
		if isGone(err) {
			return nil
		}
		kills += flatValue(text, "oom_kill")
		ok = ok || bytes.Contains(text, []byte("\noom_kill "))
		return err
	})
	return kills, ok, err
}

func (g Group) file(v2, v1 string) string {
	if g.V2 {
		return v2
	}
	return v1
}

// number reads a file that holds one number; "max" is NoLimit.
func (g Group) number(name string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(g.Dir, name))
	if err != nil {
		return 0, err
	}
	return parseNumber(string(text))
}

func parseNumber(text string) (uint64, error) {
	text = strings.TrimSpace(text)
	if text == "max" {
		return NoLimit, nil
	}
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse number %q: %w", text, err)
	}
	return v, nil
}

// flatValue is the number behind a key in a file of "key number" lines; 0 when it is not there.
func flatValue(text []byte, key string) uint64 {
	for line := range bytes.Lines(text) {
		name, value, ok := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		if ok && string(name) == key {
			v, _ := strconv.ParseUint(string(value), 10, 64)
			return v
		}
	}
	return 0
}
