package profile

import "time"

// exampleSnapshot is a small trace of two nginx workers that call a leaking .so, with every field in use.
func exampleSnapshot() *Snapshot {
	started := time.Date(2026, 11, 24, 9, 30, 0, 123456789, time.UTC)
	built := time.Date(2024, 2, 29, 12, 0, 0, 0, time.UTC)
	inventory := func() (nginx, libenc, libc *Mapping) {
		return &Mapping{Start: 0x400000, Limit: 0x500000, Offset: 0, File: "/usr/sbin/nginx", BuildID: "aa11bb22cc33", Size: 1234567, ModTime: built},
			&Mapping{Start: 0x7f0000000000, Limit: 0x7f0000010000, Offset: 0x1000, File: "/opt/app/lib/libenc.so", BuildID: "8f3a2b1c9d", Replaced: true, Size: 77777, ModTime: built, Version: "libenc 1.0.3"},
			&Mapping{Start: 0x7f1000000000, Limit: 0x7f1000200000, Offset: 0x28000, File: "/lib/x86_64-linux-gnu/libc.so.6", BuildID: "deadbeef01", Size: 1900000, ModTime: built, Version: "GNU C Library 2.36"}
	}
	nginx, libenc, libc := inventory()
	nginx2, libenc2, libc2 := inventory()
	malloc := &Location{Address: 0x7f1000012345, Mapping: libc, Lines: []Line{{"malloc", "__libc_malloc", "malloc.c", 3287, 3270}}}
	open := &Location{Address: 0x7f0000001234, Mapping: libenc, Lines: []Line{
		{"json_dup", "json_dup", "session.c", 19, 17}, {"session_new", "session_new", "session.c", 42, 40},
	}}
	lua := &Location{Mark: "[LuaJIT]"}
	run := &Location{Address: 0x412345, Mapping: nginx, Lines: []Line{{"ngx_http_lua_run_thread", "ngx_http_lua_run_thread", "", 0, 0}}}
	palloc := &Location{Address: 0x401111, Mapping: nginx, Lines: []Line{{"ngx_palloc_large", "ngx_palloc_large", "", 0, 0}}}
	nameless := &Location{Address: 0x7f0000002222, Mapping: libenc}
	cut := &Location{Address: 0x7f0000003333, Mapping: libenc, Mark: "[truncated: no unwind table for libenc.so]"}
	other := &Location{Address: 0x7f1000012345, Mapping: libc2, Lines: []Line{{"malloc", "__libc_malloc", "malloc.c", 3287, 3270}}}

	leak := &Stack{
		Kind: KindMalloc, PID: 942, Frames: []*Location{malloc, open, lua, run}, Complete: true,
		AllocObjects: 41213, AllocBytes: 41213 * 1627, InUseObjectsVar: 12.5, InUseBytesVar: 3.25e7,
		Ages: &Ages{Min: time.Millisecond, Median: 31 * time.Second, Max: 59*time.Second + 1, Old: 20011},
	}
	for i := range int64(13) {
		leak.History = append(leak.History, Point{time.Duration(i) * 5 * time.Second, 41213 * i / 12, 41213 * i / 12 * 1627, 0, 0})
	}
	return &Snapshot{
		Command: "allocsnoop --pid 942 --duration 60s", Started: started, Taken: started.Add(time.Minute),
		Processes: []*Process{
			{PID: 942, Comm: "nginx", Exe: "/usr/sbin/nginx", Container: "3f2a77", Started: started.Add(-time.Hour), Mappings: []*Mapping{nginx, libenc, libc}},
			{PID: 947, Comm: "nginx", Exe: "/usr/sbin/nginx", Container: "3f2a77", Exited: true, Exit: "killed by signal 9", Mappings: []*Mapping{nginx2, libenc2, libc2}},
		},
		Stacks: []*Stack{
			leak,
			{
				Kind: KindMalloc, PID: 942, Frames: []*Location{malloc, palloc, run}, Complete: true,
				AllocObjects: 50021, AllocBytes: 50021 * 4099, FreeObjects: 50004, FreeBytes: 50004 * 4099,
			},
			{Kind: KindMalloc, PID: 947, Frames: []*Location{other, nameless, cut}, AllocObjects: 7, AllocBytes: 7 * 8209, FreeObjects: 2, FreeBytes: 2 * 8209},
			{Kind: KindMmap, PID: 942, Label: "thread stack", Frames: []*Location{run}, Complete: true, AllocObjects: 1, AllocBytes: 8392704},
		},
		SampleBytes: 524288, LossStated: true,
		Notes:     []string{"/usr/lib/libjemalloc.so.2: _Znwm is not probed and its blocks are not seen"},
		Losses:    []Counter{{"live_map_full", 23, "blocks not followed, use --max-live"}, {"ring_full", 3, ""}},
		PreAttach: PreAttach{Frees: 1009, Reallocs: 3, ReallocBytes: 4096, Inherited: 2},
		Unwind:    []Counter{{"complete", 99980, ""}, {"no unwind table", 20, ""}},
		Probes: []Probe{
			{"malloc", "/lib/x86_64-linux-gnu/libc.so.6", "deadbeef01", 4, 123457, true},
			{"free, cfree", "/lib/x86_64-linux-gnu/libc.so.6", "deadbeef01", 0, 100003, false},
		},
		Events:   []Event{{1500 * time.Millisecond, "exact -> sampled, one block per 512 KiB"}, {2 * time.Second, "process 947 joined"}},
		Overhead: &Overhead{212003, 810 * time.Nanosecond, 0.046, 0.05, 20 * time.Second, 700 * time.Millisecond, 40 << 20, 96 << 20},
		RSS: &RSSChange{
			Before: map[string]uint64{"heap": 10 << 20, "arena": 0, "anonymous": 30 << 20, "thread stack": 1 << 20, "file": 20 << 20},
			After:  map[string]uint64{"heap": 76 << 20, "arena": 0, "anonymous": 34 << 20, "thread stack": 1 << 20, "file": 21 << 20},
		},
	}
}
