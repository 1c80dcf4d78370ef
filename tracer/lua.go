package tracer

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// luaWatch is the probes on LuaJIT's entries in a member. They tell which VM a thread runs, so that the unwinder can cross
// compiled code. A trap for each call of Lua is dear, and most threads run one VM as long as they live: the probes go out once
// a thread is known. A stack that meets compiled code without knowing its VM, or with one that is gone, calls for a refresh, which
// puts them in again.
type luaWatch struct {
	hooks   []io.Closer
	probes  []*probe
	learned time.Time // when a thread's VM was first seen to be known, with the probes in
	opened  int       // times
	asked   time.Time // when a stack last called for a refresh
}

// mayAsk tells whether a stack that could not be finished is reason enough for a refresh. While the probes are in and stacks
// still end in compiled code, it mostly is not: the thread has yet to enter its VM.
func (w *luaWatch) mayAsk() bool {
	if len(w.hooks) > 0 && time.Since(w.asked) < time.Second {
		return false
	}
	w.asked = time.Now()
	return true
}

const (
	// luaSettles is how long the probes stay in once a thread is known: others may follow.
	luaSettles = 500 * time.Millisecond
	// luaPatience is how often the probes go in again before they stay: the threads change their VMs all the time.
	luaPatience = 8
)

// probeLua puts the probes in.
func (t *Tracer) probeLua(m *member, ranges []memory.Range) error {
	if t.programs.LuaEntered == nil || t.callsShut && !t.windows.on {
		return nil
	}
	before := len(m.lua.hooks)
	for i := range ranges {
		u, ok := m.space.Find(ranges[i].Start)
		if !ok || !ranges[i].IsFile() {
			continue
		}
		for _, hook := range u.LuaHooks() {
			o, err := t.files.open(m.pid, &ranges[i])
			if err != nil {
				return err
			}
			p, err := t.openWatch(m, &m.lua.hooks, o, hook.Offset, t.programs.LuaEntered)
			if err != nil {
				return fmt.Errorf("probe LuaJIT: %w", err)
			}
			m.lua.probes = append(m.lua.probes, p)
		}
	}
	if len(m.lua.hooks) > before {
		m.lua.opened++
	}
	return nil
}

// settleLua takes the probes out of members whose threads are known. The caller holds mu.
func (t *Tracer) settleLua() {
	for pid, m := range t.current {
		w := &m.lua
		switch {
		case len(w.hooks) == 0 || m.pid != pid || w.opened > luaPatience:
		case w.learned.IsZero():
			if t.knowsVM(pid) {
				w.learned = time.Now()
			}
		case time.Since(w.learned) > luaSettles:
			t.closeLua(m)
		}
	}
}

func (t *Tracer) closeLua(m *member) {
	t.closeLater(m.lua.hooks)
	for _, p := range m.lua.probes {
		delete(m.opened, p)
	}
	m.lua = luaWatch{opened: m.lua.opened}
}

// knowsVM tells whether any thread of a process has entered a VM.
func (t *Tracer) knowsVM(pid int) bool {
	threads, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid)) // none: it has ended
	for _, e := range threads {
		var g uint64
		tid, err := strconv.Atoi(e.Name())
		if err == nil && t.programs.UnwindLua.Lookup(uint64(pid)<<32|uint64(tid), &g) == nil {
			return true
		}
	}
	return false
}
