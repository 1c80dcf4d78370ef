package heap

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// BenchmarkInspect inspects a heap of 64 MiB, or of ALLOCSNOOP_MEGABYTES, in blocks of 120 bytes on average. CPU time is
// given too: on a busy machine it is the figure that counts.
func BenchmarkInspect(b *testing.B) {
	megabytes := os.Getenv("ALLOCSNOOP_MEGABYTES")
	if megabytes == "" {
		megabytes = "64"
	}
	pid, _ := start(b, nil, build(b, "testdata/gigabyte.c", "-O2"), megabytes)
	began := cpuTime(b)
	var blocks uint64
	for b.Loop() {
		p, err := memory.OpenProcess(pid)
		if err != nil {
			b.Fatal(err)
		}
		r, err := Inspect(b.Context(), p, InspectOptions{Live: true})
		if err != nil {
			b.Fatal(err)
		}
		p.Close()
		if !r.Exact {
			b.Fatalf("the walk is not exact: %+v", r.Heap.Problems)
		}
		blocks = r.Total.InUse.Blocks
		b.SetBytes(int64(r.Total.InUse.Bytes))
	}
	b.ReportMetric((cpuTime(b)-began)/float64(b.N), "cpu-s/op")
	b.ReportMetric(float64(blocks), "blocks")
}

func cpuTime(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
