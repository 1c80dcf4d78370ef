// Package profiletest makes snapshots for tests and benchmarks of more than one package.
package profiletest

import (
	"fmt"
	"strings"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
)

const (
	largeFunctions = 5000
	largeDepth     = 20
	largePoints    = 12
)

// Large is a trace of one minute with n different stacks of 20 frames out of 5,000 functions in four libraries, each with
// a course of 12 points. Where two calls of it differ in skew, some stacks hold more.
func Large(n, skew int) *profile.Snapshot {
	began := time.Date(2026, 11, 24, 9, 30, 0, 0, time.UTC)
	s := &profile.Snapshot{Command: "allocsnoop --pid 942 --duration 60s", Mode: "exact", Started: began, Taken: began.Add(time.Minute)}
	p := &profile.Process{PID: 942, Comm: "nginx", Exe: "/usr/sbin/nginx"}
	for i, file := range []string{"/usr/sbin/nginx", "/opt/app/lib/libenc.so", "/usr/lib/libluajit-5.1.so.2", "/lib/libc.so.6"} {
		start := uint64(i+1) << 32
		p.Mappings = append(p.Mappings, &profile.Mapping{Start: start, Limit: start + 1<<24, File: file, BuildID: strings.Repeat(fmt.Sprintf("%x", 10+i), 40)})
	}
	s.Processes = []*profile.Process{p}
	locations := make([]*profile.Location, largeFunctions)
	for i := range locations {
		m := p.Mappings[i%len(p.Mappings)]
		name := fmt.Sprintf("function_%d", i)
		locations[i] = &profile.Location{Address: m.Start + uint64(64*i), Mapping: m, Lines: []profile.Line{{Function: name, SystemName: name, File: "src/" + name + ".c", Line: i}}}
	}
	for i := range n {
		s.Stacks = append(s.Stacks, largeStack(i, skew, locations))
	}
	return s
}

func largeStack(i, skew int, locations []*profile.Location) *profile.Stack {
	size := int64(16 + i%4093)
	s := &profile.Stack{Kind: profile.KindMalloc, PID: 942, Complete: true, AllocObjects: int64(11 + i%97), FreeObjects: int64(i % 11)}
	if skew > 0 && i%1009 == 0 {
		s.AllocObjects += int64(1000 * skew)
	}
	s.AllocBytes, s.FreeBytes = s.AllocObjects*size, s.FreeObjects*size
	for depth := range largeDepth {
		s.Frames = append(s.Frames, locations[((i>>depth)*31+(largeDepth-1-depth)*257)%len(locations)])
	}
	for k := range int64(largePoints) {
		part := func(v int64) int64 { return v * (k + 1) / largePoints }
		s.History = append(s.History, profile.Point{
			At:           time.Duration(k+1) * 5 * time.Second,
			AllocObjects: part(s.AllocObjects), AllocBytes: part(s.AllocBytes), FreeObjects: part(s.FreeObjects), FreeBytes: part(s.FreeBytes),
		})
	}
	return s
}
