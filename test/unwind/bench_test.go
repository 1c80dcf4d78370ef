package unwindtest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// BenchmarkEvent measures a whole probed call and what the walk adds to it, against an empty probe and the kernel's
// frame-pointer walk, turn by turn in one run: the machine's noise hits all of them. The program keeps frame pointers,
// so that the kernel's walk, too, finds every frame. What is compared are medians.
func BenchmarkEvent(b *testing.B) {
	const frames, calls = 19, 20_000
	w := newWalker(b, options{})
	exe := build(b, "bench.c", "-fno-omit-frame-pointer")
	// probed, deep 0 to n, main, two of the C library, _start
	p := start(b, exe, strconv.Itoa(frames-6), strconv.Itoa(calls))
	w.publish(b, p.pid)
	variants := []struct {
		name string
		prog *ebpf.Program
	}{{"bare", nil}, {"empty", w.objs.BenchEmpty}, {"get_stack", w.objs.BenchGetStack}, {"unwind", w.objs.BenchUnwind}}
	times := map[string][]float64{}
	found := map[string]float64{}
	for b.Loop() {
		for _, v := range variants {
			ns, perEvent := w.round(b, p, exe, v.prog, calls)
			times[v.name] = append(times[v.name], ns/calls)
			found[v.name] = perEvent
		}
	}
	median := func(name string) float64 {
		slices.Sort(times[name])
		return times[name][len(times[name])/2]
	}
	bare, empty, kernel, own := median("bare"), median("empty"), median("get_stack"), median("unwind")
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(empty-bare, "ns/empty-event")
	b.ReportMetric(kernel-bare, "ns/get_stack-event")
	b.ReportMetric(own-bare, "ns/unwind-event")
	b.ReportMetric((own-empty)/found["unwind"], "ns/frame")
	b.ReportMetric((own-bare)/(kernel-bare), "unwind/get_stack")
	b.ReportMetric(found["unwind"], "frames")
	b.ReportMetric(found["get_stack"], "get_stack-frames")
}

// round runs the target once under a program and tells the nanoseconds and the frames per event.
func (w *walker) round(b *testing.B, p *target, exe string, prog *ebpf.Program, calls int) (ns, frames float64) {
	b.Helper()
	if prog != nil {
		x, err := link.OpenExecutable(exe)
		if err != nil {
			b.Fatal(err)
		}
		l, err := x.Uprobe("probed", prog, &link.UprobeOptions{PID: p.pid})
		if err != nil {
			b.Fatal(err)
		}
		defer l.Close()
	}
	before := w.totals(b)
	fmt.Fprintln(p.in)
	line, err := p.out.ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	ns, err = strconv.ParseFloat(strings.TrimSpace(line), 64)
	if err != nil {
		b.Fatal(err)
	}
	after := w.totals(b)
	if n := after.Events - before.Events; prog != nil && n != uint64(calls) {
		b.Fatalf("%d events of %d calls", n, calls)
	}
	return ns, float64(after.Frames-before.Frames) / float64(calls)
}

// BenchmarkPublish measures from nothing to a slot with all tables.
func BenchmarkPublish(b *testing.B) {
	for _, tt := range []struct {
		name  string
		start func(testing.TB) *target
	}{
		{"nginx", startNginx},
		{"python", func(t testing.TB) *target { return start(t, "/usr/bin/python3", "testdata/work.py") }},
		{"clang", startClang},
	} {
		b.Run(tt.name, func(b *testing.B) {
			p := tt.start(b)
			var rows, mappings int
			for b.Loop() {
				b.StopTimer()
				w := newWalker(b, options{})
				b.StartTimer()
				s := w.publish(b, p.pid)
				rows, mappings = w.tables.Stats().Rows, len(s.Mappings)
			}
			b.ReportMetric(float64(rows), "rows")
			b.ReportMetric(float64(mappings), "mappings")
			b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(b.N), "ms/op")
			b.ReportMetric(0, "ns/op")
		})
	}
}
