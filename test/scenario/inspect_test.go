package scenario

import (
	"testing"

	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// What inspect finds in a worker's memory must be what the library says it holds there, to the block.
func TestInspectCountsSessionRecordsLikeTheLibrary(t *testing.T) {
	s := start(t, Options{Build: Old})
	load(t, s, Load{Requests: 3001, Concurrency: 8})
	for _, pid := range s.Workers() {
		want, err := s.Stats(pid)
		if err != nil {
			t.Fatal(err)
		}
		img, err := memory.OpenProcess(pid)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		report, err := heap.Inspect(t.Context(), img, heap.InspectOptions{Live: true})
		if err != nil {
			t.Fatal(err)
		}
		if report.Heap == nil || !report.Exact {
			t.Fatalf("the walk of worker %d is not exact: %+v", pid, report.Heap)
		}
		found := int64(0)
		for _, g := range report.Groups {
			if g.Kind == content.JSON && g.Detail == "{uid, token, scope, payload}" {
				found += int64(g.Count)
			}
		}
		if found != want.Blocks {
			t.Errorf("worker %d: %d blocks with session records, the library counts %d", pid, found, want.Blocks)
		}
	}
}
