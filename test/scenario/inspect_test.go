package scenario

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/profile/content"
	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// sessionKeys are those of session.lua's documents, as inspect shows them.
const sessionKeys = "{uid, token, scope, payload}"

// allocsnoop runs the command and reads its JSON document.
func allocsnoop(t *testing.T, document any, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), live.Allocsnoop(t), args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("allocsnoop %v: %v\n%s", args, err, &stderr)
	}
	if document == nil {
		return
	}
	if err := json.Unmarshal(out, document); err != nil {
		t.Fatalf("read the document of allocsnoop %v: %v", args, err)
	}
}

// sessionBlocks adds up the blocks that hold session records.
func sessionBlocks(groups []content.Group) (blocks int64) {
	for _, g := range groups {
		if g.Kind == content.JSON && g.Detail == sessionKeys {
			blocks += int64(g.Count)
		}
	}
	return blocks
}

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
		if found := sessionBlocks(report.Groups); found != want.Blocks {
			t.Errorf("worker %d: %d blocks with session records, the library counts %d", pid, found, want.Blocks)
		}
	}
}

// grownMegabytes is how large the worker of the test below gets; ALLOCSNOOP_MEGABYTES=500 is the story's own size.
func grownMegabytes(t *testing.T) int {
	text := os.Getenv("ALLOCSNOOP_MEGABYTES")
	if text == "" {
		return 40
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("read ALLOCSNOOP_MEGABYTES: %v", err)
	}
	return n
}

// topRounds is a running allocsnoop top --json, with one round read.
type topRounds struct{ documents *json.Decoder }

func startTop(t *testing.T) *topRounds {
	t.Helper()
	cmd := exec.Command(live.Allocsnoop(t), "top", "--interval", "200ms", "--limit", "0", "--json")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	rounds := &topRounds{json.NewDecoder(out)}
	if err := rounds.documents.Decode(new(any)); err != nil {
		t.Fatalf("read the first round of top: %v", err)
	}
	return rounds
}

// untilGrowing reads rounds until top lists a worker as the nginx process that grows most.
func (r *topRounds) untilGrowing(t *testing.T, pid int) {
	t.Helper()
	for range 100 {
		var round struct {
			Processes []struct {
				PID    int      `json:"pid"`
				Comm   string   `json:"comm"`
				Growth *float64 `json:"growth_per_minute"`
			} `json:"processes"`
		}
		if err := r.documents.Decode(&round); err != nil {
			t.Fatalf("read a round of top: %v", err)
		}
		for _, p := range round.Processes {
			if p.Comm == "nginx" && p.Growth != nil && *p.Growth > 0 {
				if p.PID != pid {
					t.Errorf("top puts process %d before worker %d", p.PID, pid)
				}
				return
			}
		}
	}
	t.Errorf("top does not show that worker %d grows", pid)
}

// From "which process" to "what these bytes are", in the four commands that a person would use.
func TestFromTheProcessThatGrowsToWhatIsInIt(t *testing.T) {
	s := start(t, Options{Build: Old, Workers: 1})
	pid := s.Workers()[0]
	size := uint64(grownMegabytes(t)) << 20

	rounds := startTop(t)
	const average = 2120 // bytes of a record
	grown := make(chan error, 1)
	go func() {
		_, err := s.Run(t.Context(), Load{Requests: 1, Path: fmt.Sprintf("/batch?uid=0&n=%d", size/average)})
		grown <- err
	}()
	rounds.untilGrowing(t, pid)
	if err := <-grown; err != nil {
		t.Fatal(err)
	}
	want, err := s.Stats(pid)
	if err != nil {
		t.Fatal(err)
	}
	if uint64(want.Bytes) < size {
		t.Fatalf("the worker has grown to %d bytes only", want.Bytes)
	}

	began := time.Now()
	var maps struct {
		Ranges []struct {
			Start, End string
			Kind       string `json:"kind"`
			RSS        uint64 `json:"rss"`
		} `json:"ranges"`
	}
	allocsnoop(t, &maps, "maps", strconv.Itoa(pid), "--sort", "rss", "--json")
	if r := maps.Ranges[0]; r.Kind != "heap" || r.RSS < size {
		t.Errorf("the first range of maps is %+v, want the heap with at least %d bytes", r, size)
	}

	// A stopped process has the same bytes for allocsnoop and for gdb.
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	dump := filepath.Join(t.TempDir(), "heap.dump")
	allocsnoop(t, nil, "dump", strconv.Itoa(pid), "--heap", "-o", dump)
	took := time.Since(began)
	compareWithGDB(t, pid, dump)
	if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}

	for _, target := range []string{strconv.Itoa(pid), dump} {
		var report heap.Report
		began = time.Now()
		allocsnoop(t, &report, "inspect", target, "--json")
		t.Logf("maps and dump of %d MB in %v, inspect %s in %v", size>>20, took.Round(time.Millisecond), filepath.Base(target),
			time.Since(began).Round(time.Millisecond))
		if !report.Exact {
			t.Errorf("the walk of %s is not exact: %+v", target, report.Heap.Problems)
		}
		if found := sessionBlocks(report.Groups); found != want.Blocks {
			t.Errorf("%s: %d blocks with session records, the library counts %d", target, found, want.Blocks)
		}
	}
}

// compareWithGDB wants the heap's ranges in a dump to be what gdb's "dump binary memory" writes of them.
func compareWithGDB(t *testing.T, pid int, dump string) {
	t.Helper()
	img, err := memory.Open(dump)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	compared := 0
	for _, r := range img.Ranges() {
		if r.Kind != memory.KindHeap && r.Kind != memory.KindArena {
			continue
		}
		path := filepath.Join(t.TempDir(), "gdb.bin")
		out, err := exec.CommandContext(t.Context(), "gdb", "-nx", "-batch", "-iex", "set auto-solib-add off", "-p", strconv.Itoa(pid),
			"-ex", fmt.Sprintf("dump binary memory %s %#x %#x", path, r.Start, r.End)).CombinedOutput()
		if err != nil {
			t.Fatalf("gdb: %v\n%s", err, out)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatalf("gdb wrote nothing: %v\n%s", err, out)
		}
		defer file.Close()
		sameBytes(t, file, io.NewSectionReader(img, int64(r.Start), int64(r.End-r.Start)))
		if compared++; compared == 1 {
			raw, err := os.Open(dump)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			if _, err := file.Seek(0, io.SeekStart); err != nil {
				t.Fatal(err)
			}
			sameBytes(t, file, io.LimitReader(raw, int64(r.End-r.Start))) // the file begins with them
		}
	}
	if compared == 0 {
		t.Errorf("the dump has no heap: %+v", img.Ranges())
	}
}

func sameBytes(t *testing.T, want, got io.Reader) {
	t.Helper()
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); ; at += int64(len(a)) {
		n, errA := io.ReadFull(want, a)
		m, errB := io.ReadFull(got, b)
		if !bytes.Equal(a[:n], b[:m]) {
			t.Fatalf("the dump differs from gdb's at or after byte %d", at)
		}
		if errA != nil || errB != nil {
			if !errors.Is(errA, errB) {
				t.Fatalf("the reads ended with %v and %v", errA, errB)
			}
			return
		}
	}
}

// stackContent is what inspect --stack --json and --json of a trace say about the blocks of one function's stacks.
type stackContent struct {
	Stacks []struct {
		Owner struct {
			Function string `json:"function"`
			File     string `json:"file"`
		} `json:"owner"`
		Content []struct {
			Shape  string `json:"shape"`
			Blocks int64  `json:"blocks"`
			Bytes  int64  `json:"bytes"`
		} `json:"content"`
	} `json:"stacks"`
	Trace *heap.Joined `json:"trace"`
}

// of returns the only shape of the blocks of a function's stacks, their number and bytes.
func (c *stackContent) of(t *testing.T, function string) (shape string, blocks, bytes int64) {
	t.Helper()
	for _, s := range c.Stacks {
		if s.Owner.Function != function {
			continue
		}
		for _, part := range s.Content {
			if shape != "" && shape != part.Shape {
				t.Errorf("blocks of %s hold %s, and %s", function, shape, part.Shape)
			}
			shape, blocks, bytes = part.Shape, blocks+part.Blocks, bytes+part.Bytes
		}
	}
	return shape, blocks, bytes
}

// The shape behind each stack is known while the trace runs, after it, from a dump, and from the profile alone.
func TestInspectNamesTheShapeBehindEachStack(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	pid := s.Workers()[0]
	load(t, s, Load{Requests: 500, Concurrency: 8})
	before, err := s.Stats(pid)
	if err != nil {
		t.Fatal(err)
	}
	tr := live.Trace(t, pid, "--mode", "exact", "--blocks", "--content")
	load(t, s, Load{Requests: 1009, Concurrency: 8, FirstUID: 500})
	after, err := s.Stats(pid)
	if err != nil {
		t.Fatal(err)
	}
	want := after.Sub(before)
	check := func(t *testing.T, args ...string) {
		t.Helper()
		var got stackContent
		allocsnoop(t, &got, append([]string{"inspect", "--json"}, args...)...)
		shape, blocks, bytes := got.of(t, "session_new")
		if shape != "JSON "+sessionKeys || blocks != want.Blocks || bytes != want.Bytes {
			t.Errorf("%v: session_new holds %d blocks of %d bytes, %s; the library counts %+v", args, blocks, bytes, shape, want)
		}
		if got.Trace == nil {
			return
		}
		if older := sessionBlocks(got.Trace.UntracedGroups); older != before.Blocks {
			t.Errorf("%v: %d records are from before the trace, the library counted %d then", args, older, before.Blocks)
		}
	}
	worker := strconv.Itoa(pid)
	t.Run("while the trace runs", func(t *testing.T) { check(t, worker, "--stack") })

	result := tr.Stop(t)
	dump := filepath.Join(t.TempDir(), "heap.dump")
	allocsnoop(t, nil, "dump", worker, "--heap", "-o", dump)
	t.Run("after the trace, in the process", func(t *testing.T) { check(t, worker, "--stack", result.Path) })
	t.Run("after the trace, in a dump", func(t *testing.T) { check(t, dump, "--stack="+result.Path) })
	t.Run("in the profile of a trace with --content", func(t *testing.T) { check(t, result.Path, "--stack") })
}

// A sampled trace follows some of the blocks only: what they hold is scaled up to the estimate of all.
func TestContentOfASampledTraceIsAnEstimateOfAllBlocks(t *testing.T) {
	live.RequireBPF(t)
	s := start(t, Options{Build: Old, Workers: 1})
	pid := s.Workers()[0]
	load(t, s, Load{Requests: 100, Concurrency: 8})
	tr := live.Trace(t, pid, "--mode", "sample", "--sample-bytes", "8KiB", "--max-overhead", "100%", "--content", "--json")
	load(t, s, Load{Requests: 1, Path: "/batch?uid=0&n=4001"})
	result := tr.Stop(t)
	if result.Profile == nil {
		t.Fatalf("no profile: %s", result.Stderr)
	}
	var got stackContent
	if err := json.Unmarshal([]byte(result.Stdout), &got); err != nil {
		t.Fatal(err)
	}
	shape, blocks, _ := got.of(t, "session_new")
	book := live.Sum(result.Profile, "malloc", "malloc", "session_new")
	if shape != "JSON "+sessionKeys || blocks < book.InUseObjects-1 || blocks > book.InUseObjects+1 {
		t.Errorf("the content of session_new's stacks is %d blocks, %s; the estimate is %d blocks", blocks, shape, book.InUseObjects)
	}
	if book.InUseObjects < 3000 || book.InUseObjects > 5000 {
		t.Errorf("the estimate of 4,001 blocks is %d", book.InUseObjects)
	}
}
