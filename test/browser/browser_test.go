// Package browser tests the page of allocsnoop view in a real browser: Debian's chromium, driven by playwright-core.
package browser

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/profiletest"
	"github.com/allocsnoop/allocsnoop/test/live"
)

func at(m *profile.Mapping, offset uint64, functions ...string) *profile.Location {
	l := &profile.Location{Address: m.Start + offset, Mapping: m}
	for i, f := range functions {
		l.Lines = append(l.Lines, profile.Line{Function: f, SystemName: f, File: "src/" + f + ".c", Line: 20 + i})
	}
	return l
}

// service is a trace of nginx with an encryption library: the old build leaks its sessions, the new one grows a table.
func service(newBuild bool) *profile.Snapshot {
	built := time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)
	nginx := &profile.Mapping{Start: 0x400000, Limit: 0x600000, File: "/usr/sbin/nginx", BuildID: strings.Repeat("aa11", 10), Version: "nginx version: nginx/1.22.1", ModTime: built}
	libc := &profile.Mapping{Start: 0x7f1000000000, Limit: 0x7f1000200000, File: "/lib/x86_64-linux-gnu/libc.so.6", BuildID: strings.Repeat("c1b2", 10), Version: "GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.", ModTime: built}
	lua := &profile.Mapping{Start: 0x7f3000000000, Limit: 0x7f3000100000, File: "/usr/lib/x86_64-linux-gnu/libluajit-5.1.so.2", BuildID: strings.Repeat("1ab0", 10), Version: "LuaJIT 2.1.0-beta3", ModTime: built}
	enc := &profile.Mapping{Start: 0x7f2000000000, Limit: 0x7f2000100000, File: "/opt/app/lib/libenc.so", BuildID: strings.Repeat("01d0", 10), Version: "libenc 1.0.3", ModTime: built}
	if newBuild {
		enc.BuildID, enc.Version, enc.ModTime = strings.Repeat("beef", 10), "libenc 1.0.4", built.AddDate(0, 3, 0)
	}
	malloc, main := at(libc, 0x9000, "malloc"), at(nginx, 0x10, "main")
	cycle, worker := at(nginx, 0x20, "ngx_process_events_and_timers"), at(nginx, 0x30, "ngx_worker_process_cycle")
	outer := []*profile.Location{cycle, worker, main}
	thread := at(nginx, 0x40, "ngx_http_lua_run_thread")
	stack := func(kind profile.Kind, label string, perSecond, size, keep int64, course func(second int64) int64, frames ...*profile.Location) *profile.Stack {
		s := &profile.Stack{Kind: kind, Label: label, PID: 942, Complete: true, Frames: append(frames, outer...)}
		book := func(t int64) (a, f int64) { a = perSecond * t; return a, a - min(course(t), a) }
		for t := int64(1); t < 60; t++ {
			a, f := book(t)
			s.History = append(s.History, profile.Point{At: time.Duration(t) * time.Second, AllocObjects: a, AllocBytes: a * size, FreeObjects: f, FreeBytes: f * size})
		}
		s.AllocObjects, s.FreeObjects = book(60)
		s.AllocBytes, s.FreeBytes = s.AllocObjects*size, s.FreeObjects*size
		s.Ages = &profile.Ages{Min: time.Millisecond, Median: 29 * time.Second, Max: 59 * time.Second, Old: keep}
		return s
	}
	all := func(t int64) int64 { return 687 * t }
	flat := func(level int64) func(int64) int64 { return func(int64) int64 { return level } }
	swing := func(t int64) int64 { return 300 + 290*(t%7)/6 }
	s := &profile.Snapshot{
		Command: "allocsnoop --pid 942 --duration 60s", Started: time.Date(2026, 11, 24, 9, 30, 0, 0, time.UTC),
		Taken:     time.Date(2026, 11, 24, 9, 31, 0, 0, time.UTC),
		Unwind:    []profile.Counter{{Name: "complete", Count: 99980}, {Name: "no unwind table", Count: 20}},
		Overhead:  &profile.Overhead{Hits: 12720180, CostPerHit: 810 * time.Nanosecond, CPUFraction: 0.046, Budget: 0.05},
		Processes: []*profile.Process{{PID: 942, Comm: "nginx", Exe: nginx.File, Mappings: []*profile.Mapping{nginx, enc, lua, libc}}},
	}
	session := func() []*profile.Location {
		return []*profile.Location{malloc, at(enc, 0x111, "session_new", "enc_session"), at(enc, 0x222, "enc_open"), {Mark: "[LuaJIT]"}, at(lua, 0x333, "lj_vm_ffi_call"), thread}
	}
	if newBuild {
		s.Stacks = append(s.Stacks, stack("malloc", "", 687, 1627, 0, flat(0), session()...),
			stack("malloc", "", 200, 1019, 6000, func(t int64) int64 { return 200 * t }, malloc, at(enc, 0x444, "table_grow"), thread))
	} else {
		s.Stacks = append(s.Stacks, stack("malloc", "", 687, 1627, 20011, all, session()...))
	}
	s.Stacks = append(s.Stacks,
		stack("malloc", "", 20000, 4096, 9, swing, malloc, at(nginx, 0x50, "ngx_palloc_large"), at(nginx, 0x60, "ngx_palloc"), at(nginx, 0x70, "ngx_http_process_request")),
		stack("malloc", "", 3000, 8209, 700, flat(1499), malloc, at(lua, 0x80, "lj_alloc_malloc"), at(lua, 0x90, "lj_str_new"), thread),
		stack("malloc", "", 900, 509, 2900, func(t int64) int64 { return min(900*t, 3001) }, malloc, at(nginx, 0xa0, "ngx_slab_alloc"), at(nginx, 0xb0, "ngx_http_file_cache_open")),
		stack("mmap", "thread stack", 1, 8392704, 4, flat(4), at(libc, 0xa000, "mmap"), at(libc, 0xb000, "pthread_create"), at(nginx, 0xc0, "ngx_thread_pool_init")),
	)
	return s
}

func write(t *testing.T, name string, s *profile.Snapshot) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := profile.Write(f, s); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// serve starts allocsnoop view and returns the address it prints.
func serve(t *testing.T, args ...string) string {
	t.Helper()
	p := live.Start(t, live.Allocsnoop(t), append([]string{"view"}, args...)...)
	line := p.Line(t)
	fields := strings.Fields(line)
	if len(fields) < 2 || fields[0] != "open" {
		t.Fatalf("view says %q", line)
	}
	return fields[1]
}

// check runs check.mjs and returns what it measured. SCREENSHOTS names a folder to keep the pictures in.
func check(t *testing.T, mode, url string) map[string]any {
	t.Helper()
	if _, err := os.Stat("node_modules"); err != nil {
		t.Fatal("test/browser has no node_modules: run `make setup` (or test/browser/setup.sh) first")
	}
	shots := os.Getenv("SCREENSHOTS")
	if shots == "" {
		shots = t.TempDir()
	}
	cmd := exec.Command("node", "check.mjs", mode, url, shots)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", mode, err, out)
	}
	var result map[string]any
	if err := json.Unmarshal(out, &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return result
}

func TestPageInABrowser(t *testing.T) {
	check(t, "single", serve(t, write(t, "old.pb.gz", service(false))))
}

func TestComparisonInABrowser(t *testing.T) {
	check(t, "compare", serve(t, write(t, "old.pb.gz", service(false)), write(t, "new.pb.gz", service(true))))
}

func TestFileThatStandsAlone(t *testing.T) {
	html := filepath.Join(t.TempDir(), "nginx.html")
	if out, err := exec.Command(live.Allocsnoop(t), "view", "--html", html, write(t, "old.pb.gz", service(false))).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check(t, "single", "file://"+html)
}

// Everything a traced program is called may be meant for the browser of whoever looks at the profile.
func TestHostileNamesStayText(t *testing.T) {
	const mark = `<script>window.owned=1</script>`
	s := service(false)
	for _, m := range s.Processes[0].Mappings {
		m.File, m.Version = m.File+"\"><img src=x onerror=window.owned=1>", "1.0\n"+mark
	}
	s.Processes[0].Comm, s.Command = "ng\ninx'"+mark, "allocsnoop </script>"+mark
	s.Processes[0].Exited, s.Processes[0].Exit = true, mark
	s.Losses = []profile.Counter{{Name: mark, Count: 7, Meaning: `"><svg onload=window.owned=1>`}}
	for _, stack := range s.Stacks {
		stack.Label = prefixedIf(stack.Label, mark)
		for _, l := range stack.Frames {
			for i := range l.Lines {
				l.Lines[i].Function += "\n\u2028{{.Data}}`${window.owned=1}`" + mark
				l.Lines[i].File = "javascript:window.owned=1//\"'><b>.c"
			}
		}
	}
	old, html := write(t, `a'"<b onclick=window.owned=1>.pb.gz`, s), filepath.Join(t.TempDir(), "alone.html")
	check(t, "hostile", serve(t, old))
	check(t, "hostile", serve(t, old, write(t, "new<i>.pb.gz", service(true))))
	if out, err := exec.Command(live.Allocsnoop(t), "view", "--html", html, old).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	check(t, "hostile", "file://"+html)
}

func prefixedIf(label, mark string) string {
	if label == "" {
		return ""
	}
	return label + mark
}

// The clock is only printed, as this machine has other work. What can be asserted without one is that the page comes in
// one piece and has a bounded size, whatever the profile's.
func TestLargeProfilesOpen(t *testing.T) {
	old, new := write(t, "large-old.pb.gz", profiletest.Large(100_000, 0)), write(t, "large-new.pb.gz", profiletest.Large(100_000, 1))
	for _, files := range [][]string{{new}, {old, new}} {
		began := time.Now()
		url := serve(t, files...)
		read := time.Since(began)
		got := check(t, "big", url)
		t.Logf("%d x 100,000 stacks: %s until the address is printed, %v ms until the page is ready (%v bytes, %v boxes)",
			len(files), read.Round(time.Millisecond), got["opened_ms"], got["bytes"], got["boxes"])
		if got["requests"] != 1.0 || got["bytes"].(float64) > 4<<20 || got["boxes"].(float64) > 10_000 {
			t.Errorf("%v requests, %v bytes, %v boxes; want one request for less than 4 MiB, and no more boxes than can be seen", got["requests"], got["bytes"], got["boxes"])
		}
	}
	out, err := exec.Command(live.Allocsnoop(t), "diff", old, new).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "beyond noise") {
		t.Errorf("diff: %v\n%.2000s", err, out)
	}
}
