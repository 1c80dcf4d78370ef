package profile

import (
	"cmp"
	"regexp"
	"slices"
	"time"
)

// Library is one build of a file that is mapped into the traced processes, or lies in a folder.
type Library struct {
	File     string // path as the target sees it
	Name     string // last part of it
	BuildID  string
	Version  string
	Size     int64
	ModTime  time.Time
	Replaced bool
	Package  string // name and version from the target's package database; empty when unknown
	PIDs     []int  // the processes that map it
}

// Libraries lists what the processes of a snapshot have mapped, each build of each file once, the programs first.
func Libraries(s *Snapshot) []Library {
	type key struct{ file, buildID string }
	at := map[key]int{}
	exe := map[string]bool{}
	var out []Library
	for _, p := range s.Processes {
		exe[p.Exe] = true
		for _, m := range p.Mappings {
			if m.File == "" || m.File[0] == '[' {
				continue
			}
			k := key{m.File, m.BuildID}
			i, known := at[k]
			if !known {
				i = len(out)
				at[k] = i
				out = append(out, Library{
					File: m.File, Name: baseName(m), BuildID: m.BuildID, Version: m.Version, Size: m.Size, ModTime: m.ModTime,
				})
			}
			out[i].Replaced = out[i].Replaced || m.Replaced
			if !slices.Contains(out[i].PIDs, p.PID) {
				out[i].PIDs = append(out[i].PIDs, p.PID)
			}
		}
	}
	SortLibraries(out, exe)
	return out
}

// SortLibraries puts the programs first and then goes by name.
func SortLibraries(list []Library, programs map[string]bool) {
	first := func(l Library) int {
		if programs[l.File] {
			return 0
		}
		return 1
	}
	slices.SortStableFunc(list, func(a, b Library) int {
		return cmp.Or(cmp.Compare(first(a), first(b)), cmp.Compare(a.Name, b.Name), cmp.Compare(a.File, b.File), cmp.Compare(a.BuildID, b.BuildID))
	})
}

// LibraryChange is a library that two places do not have alike: Old or New is nil when it is in one of them only.
type LibraryChange struct {
	Name     string
	Old, New *Library
}

// DiffLibraries compares two inventories by file name: other builds first, then what is in one only. Where a name carries
// its version (libfoo-1.2.so against libfoo-1.3.so), the rest of the name is enough.
func DiffLibraries(old, new []Library) []LibraryChange {
	olds, news := withoutCommon(old, new), withoutCommon(new, old)
	changes := pairUp(&olds, &news, func(l *Library) string { return l.Name })
	changes = append(changes, pairUp(&olds, &news, func(l *Library) string { return stem(l.Name) })...)
	byName := func(a, b LibraryChange) int { return cmp.Compare(a.Name, b.Name) }
	slices.SortStableFunc(changes, byName)
	for _, l := range olds {
		changes = append(changes, LibraryChange{l.Name, l, nil})
	}
	for _, l := range news {
		changes = append(changes, LibraryChange{l.Name, nil, l})
	}
	return changes
}

// withoutCommon leaves out what the other side has too: the same name with the same build. A file without a build-id is
// told by its size.
func withoutCommon(list, other []Library) []*Library {
	type key struct {
		name, buildID string
		size          int64
	}
	keyOf := func(l *Library) key {
		if l.BuildID != "" {
			return key{l.Name, l.BuildID, 0}
		}
		return key{l.Name, "", l.Size}
	}
	has := map[key]bool{}
	for i := range other {
		has[keyOf(&other[i])] = true
	}
	var out []*Library
	for i := range list {
		k := keyOf(&list[i])
		if !has[k] {
			has[k] = true // one entry for a build that lies at two paths
			out = append(out, &list[i])
		}
	}
	return out
}

// pairUp takes out of both lists what has the same name, in order.
func pairUp(olds, news *[]*Library, name func(*Library) string) []LibraryChange {
	var changes []LibraryChange
	*olds = slices.DeleteFunc(*olds, func(o *Library) bool {
		i := slices.IndexFunc(*news, func(n *Library) bool { return name(n) == name(o) })
		if i < 0 {
			return false
		}
		changes = append(changes, LibraryChange{o.Name, o, (*news)[i]})
		*news = slices.Delete(*news, i, i+1)
		return true
	})
	return changes
}

var versionInName = regexp.MustCompile(`[-_.]?v?\d+(\.\d+)*|\.so.*$`)

// stem is a library's name without versions and ending.
func stem(name string) string { return versionInName.ReplaceAllString(name, "") }
