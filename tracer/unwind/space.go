package unwind

import (
	"slices"
	"sync/atomic"
)

// Why a file has no table in the kernel, or "" when it has one.
const (
	reasonPending = "not read yet"
	reasonEvicted = "evicted"
	reasonFull    = "no room"
)

// Space is the executable memory of a process at one moment. It is never changed and stays valid after the process is
// gone and its slot released, so that old stacks can still be described.
type Space struct {
	PID  int
	Slot uint32
	// Mappings are sorted by start. Gone are earlier ones whose place was not taken since, the newest first.
	Mappings, Gone []Mapping
	// Over counts executable mappings beyond what a slot holds; stacks through them are cut.
	Over int
}

// Mapping is a stretch of executable memory.
type Mapping struct {
	Start, End, Offset uint64
	Path               string // as the target sees it; empty for anonymous memory
	dev                string
	inode              uint64
	bin                *binary // nil for anonymous memory
}

// NoTable says why the mapping's file has no unwind table, "" when it has one.
func (m Mapping) NoTable() string {
	if m.bin == nil {
		return "anonymous memory"
	}
	return m.bin.reason()
}

// BuildID is in lower-case hex, "" when there is none or the file is still being read.
func (m Mapping) BuildID() string {
	if m.bin == nil {
		return ""
	}
	info := m.bin.real().info.Load()
	if info == nil {
		return ""
	}
	return info.buildID
}

// Find is the mapping that holds an address, or held it earlier.
func (s *Space) Find(addr uint64) (Mapping, bool) {
	i, found := slices.BinarySearchFunc(s.Mappings, addr, func(m Mapping, a uint64) int {
		switch {
		case m.End <= a:
			return -1
		case m.Start > a:
			return 1
		}
		return 0
	})
	if found {
		return s.Mappings[i], true
	}
	for _, m := range s.Gone {
		if m.Start <= addr && addr < m.End {
			return m, true
		}
	}
	return Mapping{}, false
}

func (m Mapping) same(o Mapping) bool {
	return m.Start == o.Start && m.End == o.End && m.Offset == o.Offset && m.bin == o.bin && m.Path == o.Path
}

// gone are the mappings of old that the new ones neither repeat nor cover.
func gone(old *Space, now []Mapping) []Mapping {
	var left []Mapping
	for _, m := range slices.Concat(old.Mappings, old.Gone) {
		i, _ := slices.BinarySearchFunc(now, m.Start, func(n Mapping, a uint64) int {
			if n.End <= a {
				return -1
			}
			return 1
		})
		if i == len(now) || now[i].Start >= m.End {
			left = append(left, m)
		}
	}
	return left[:min(len(left), maxGone)]
}

// maxGone bounds what a process that loads and unloads for ever can pile up.
const maxGone = 4096

// binary is a file with, maybe, a table in the kernel. From done on fields are guarded by Tables.mu.
type binary struct {
	id   uint32 // bin of bpf/unwind.h
	path string // first seen
	size int64
	info atomic.Pointer[fileInfo]
	why  atomic.Pointer[string]
	twin atomic.Pointer[binary] // the binary of the same content that has the table; nil for that one itself

	done        chan struct{}
	resident    bool
	row0, nrows uint32
	useBase     uint32 // counter of frames when it was placed
	published   uint64 // number of the last publication that wanted it
}

// fileInfo is what reading the file brought up, whether or not it has a table.
type fileInfo struct {
	buildID  string
	segments []segment
	lua      *luaLayout
}

func (b *binary) real() *binary {
	if twin := b.twin.Load(); twin != nil {
		return twin
	}
	return b
}

func (b *binary) reason() string {
	b = b.real()
	if r := b.why.Load(); r != nil {
		return *r
	}
	return ""
}

func (b *binary) setReason(r string) { b.why.Store(&r) }
