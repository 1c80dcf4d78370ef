package memory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func dumpTarget(t *testing.T, tgt *target, opts DumpOptions) (*DumpResult, *FileImage) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "out.dump")
	result, err := FS{}.Dump(context.Background(), tgt.pid, path, opts)
	if err != nil {
		t.Fatal(err)
	}
	return result, openImage(t, path)
}

func openImage(t *testing.T, path string) *FileImage {
	t.Helper()
	img, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

// gdbMemory is what gdb's `dump binary memory` writes of a stopped process.
func gdbMemory(t *testing.T, pid int, start, end uint64) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "gdb.bin")
	out, err := exec.Command("gdb", "-nx", "-batch", "-p", fmt.Sprint(pid), "-ex",
		fmt.Sprintf("dump binary memory %s %#x %#x", file, start, end)).CombinedOutput()
	if err != nil {
		t.Fatalf("gdb: %v: %s", err, out)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("gdb wrote nothing: %v: %s", err, out)
	}
	return got
}

func rangeOf(t *testing.T, img Image, addr uint64) *Range {
	t.Helper()
	r := FindRange(img.Ranges(), addr)
	if r == nil {
		t.Fatalf("no range at %#x", addr)
	}
	return r
}

func TestHeapDumpEqualsGDB(t *testing.T) {
	tgt := startTarget(t, "7000003")
	for _, core := range []bool{false, true} {
		result, img := dumpTarget(t, tgt, DumpOptions{Selection: Selection{Heap: true}, Core: core})
		if result.Partial != "" || result.Lost != 0 || img.Info().Partial != "" {
			t.Errorf("core %v: %+v", core, result)
		}
		heap := rangeOf(t, img, tgt.addr["heap"])
		want := gdbMemory(t, tgt.pid, heap.Start, heap.End)
		got := make([]byte, heap.Size())
		if n, err := img.ReadAt(got, int64(heap.Start)); n != len(got) || err != nil {
			t.Fatalf("core %v: read %d, %v", core, n, err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("core %v: the heap of %d bytes differs from what gdb reads", core, len(got))
		}
		if core {
			continue
		}
		raw := make([]byte, heap.Size()) // the first thing in a raw dump, for hex viewers
		if _, err := img.file.ReadAt(raw, 0); err != nil || !bytes.Equal(raw, want) {
			t.Errorf("the file does not start with the heap's bytes (%v)", err)
		}
	}
}

// checkPages compares a region of pages with expectations.
func checkPages(t *testing.T, img Image, addr uint64, want ...[]byte) {
	t.Helper()
	for i, page := range want {
		got := make([]byte, PageSize)
		if _, err := img.ReadAt(got, int64(addr)+int64(i)*PageSize); err != nil || !bytes.Equal(got, page) {
			t.Errorf("page %d of %#x: error %v, equal %v", i, addr, err, bytes.Equal(got, page))
		}
	}
}

func TestDumpOfAll(t *testing.T) {
	tgt := startTarget(t)
	first := allOf(t, tgt.pid)
	zero := zeros(PageSize)
	for _, core := range []bool{false, true} {
		t.Run(fmt.Sprintf("core %v", core), func(t *testing.T) {
			result, img := dumpTarget(t, tgt, DumpOptions{Selection: Selection{All: true}, Core: core})
			checkPages(t, img, tgt.addr["mapped"], pageOf(7, 0), pageOf(7, 1), pageOf(7, 2), zero, zero, zero, zero, zero, zero, zero,
				pageOf(11, 0), zero)
			checkPages(t, img, tgt.addr["hidden"], pageOf(13, 0), pageOf(13, 1))
			checkPages(t, img, tgt.addr["secret"], pageOf(17, 0), pageOf(17, 1), pageOf(17, 2))
			checkPages(t, img, tgt.addr["shared"], zero, pageOf(19, 0), pageOf(19, 1), zero, zero)
			if result.Lost != 0 {
				t.Errorf("%d bytes lost", result.Lost)
			}
			if r := rangeOf(t, img, tgt.addr["heap"]); r.Kind != KindHeap || r.Path != "[heap]" {
				t.Errorf("heap is %+v", r)
			}
			info := img.Info()
			if info.PID != tgt.pid || info.Comm != "target" || info.Exe != tgt.cmd.Path || len(info.Auxv) == 0 {
				t.Errorf("info %+v", info)
			}
			exe, err := os.ReadFile(tgt.cmd.Path)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range img.Ranges() {
				if r.Path != tgt.cmd.Path || r.Perms&Write != 0 || r.Offset+r.Size() > uint64(len(exe)) || r.Perms&Exec == 0 {
					continue
				}
				got := make([]byte, r.Size())
				if _, err := img.ReadAt(got, int64(r.Start)); err != nil || !bytes.Equal(got, exe[r.Offset:r.Offset+r.Size()]) {
					t.Errorf("code of the program differs from its file (%v)", err)
				}
			}
		})
	}
	for i, r := range allOf(t, tgt.pid) {
		// The kernel's own pages, [vdso], cost the target nothing. PSS depends on other processes.
		got, want := []uint64{r.RSS, r.Anonymous, r.Swap}, []uint64{first[i].RSS, first[i].Anonymous, first[i].Swap}
		if !slices.Equal(got, want) && r.Kind != KindKernel {
			t.Errorf("range %x %s %s: resident, anonymous, swap are %v, were %v", r.Start, r.Kind, r.Path, got, want)
		}
	}
}

func TestDefaultDumpLeavesOutWhatAskedForIt(t *testing.T) {
	tgt := startTarget(t)
	_, img := dumpTarget(t, tgt, DumpOptions{})
	checkPages(t, img, tgt.addr["mapped"], pageOf(7, 0))
	if _, err := img.ReadAt(make([]byte, 8), int64(tgt.addr["secret"])); !errors.Is(err, ErrAbsent) {
		t.Errorf("MADV_DONTDUMP memory: %v, want %v", err, ErrAbsent)
	}
	if r := rangeOf(t, img, tgt.addr["secret"]); r.Kind != KindAnonymous {
		t.Errorf("the range itself is %+v", r)
	}
	for _, r := range img.Ranges() {
		if r.Path != tgt.cmd.Path || r.Offset != 0 {
			continue
		}
		magic := make([]byte, 4)
		if _, err := img.ReadAt(magic, int64(r.Start)); err != nil || string(magic) != "\x7fELF" {
			t.Errorf("the program's first page: %q, %v", magic, err)
		}
	}
}

func TestDumpHolesTakeNoDisk(t *testing.T) {
	tgt := startTarget(t)
	at := tgt.addr["mapped"]
	result, img := dumpTarget(t, tgt, DumpOptions{Selection: Selection{Spans: []Span{{at, at + 64*PageSize}}}})
	if result.Data != 4*PageSize || result.Zero != 60*PageSize || result.Span != 64*PageSize || result.Ranges != 1 {
		t.Errorf("%+v", result)
	}
	got, err := img.Extents(at-PageSize, at+65*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	var data, zero uint64
	for _, e := range got {
		switch e.Kind {
		case Data:
			data += e.Size()
		case Zero:
			zero += e.Size()
		}
	}
	if data+zero != 64*PageSize || data < 4*PageSize || zero == 0 {
		t.Errorf("%d bytes of data and %d of zeros in %v", data, zero, got)
	}
	if mode := fileMode(t, result.Path); mode != 0o600 {
		t.Errorf("mode of the file is %v", mode)
	}
}

func fileMode(t *testing.T, path string) os.FileMode {
	t.Helper()
	stat, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return stat.Mode().Perm()
}

func TestInterruptedDumpSaysSo(t *testing.T) {
	tgt := startTarget(t, "67000000")
	for _, core := range []bool{false, true} {
		ctx, cancel := context.WithCancel(context.Background())
		path := filepath.Join(t.TempDir(), "cut.dump")
		result, err := FS{}.Dump(ctx, tgt.pid, path, DumpOptions{Core: core, Selection: Selection{Heap: true},
			Progress: func(done, _ uint64) { cancel() }})
		if err != nil {
			t.Fatal(err)
		}
		img := openImage(t, path)
		if result.Partial != "interrupted" || img.Info().Partial != "interrupted" {
			t.Errorf("core %v: result %q, file %q", core, result.Partial, img.Info().Partial)
		}
		heap := rangeOf(t, img, tgt.addr["heap"])
		first, err := img.Extents(heap.Start, heap.End)
		if err != nil || len(first) == 0 {
			t.Fatalf("core %v: nothing of the heap is there: %v, %v", core, first, err)
		}
		have := first[len(first)-1].End - heap.Start
		if have == 0 || have >= heap.Size() {
			t.Errorf("core %v: %d of %d bytes are there", core, have, heap.Size())
		}
		got := make([]byte, have)
		if _, err := img.ReadAt(got, int64(heap.Start)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, gdbMemory(t, tgt.pid, heap.Start, heap.Start+have)) {
			t.Errorf("core %v: what is there differs from the target", core)
		}
		if _, err := img.ReadAt(got[:8], int64(heap.End)-8); !errors.Is(err, ErrAbsent) {
			t.Errorf("core %v: what is not there reads as %v", core, err)
		}
		if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
			t.Errorf("temporary files stay: %v", left)
		}
	}
}

func TestDumpOfProcessThatEnds(t *testing.T) {
	tgt := startTarget(t, "67000000")
	path := filepath.Join(t.TempDir(), "cut.dump")
	ended := false
	result, err := FS{}.Dump(context.Background(), tgt.pid, path, DumpOptions{Progress: func(done, _ uint64) {
		if !ended {
			ended = true
			tgt.stop()
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	img := openImage(t, path)
	if !strings.Contains(result.Partial, "ended") || img.Info().Partial != result.Partial || result.Data == 0 {
		t.Errorf("result %+v, file says %q", result, img.Info().Partial)
	}
}

func TestDumpRefuses(t *testing.T) {
	tgt := startTarget(t)
	dir := t.TempDir()
	fifo := filepath.Join(dir, "device")
	if err := os.Mkdir(fifo, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, path string
		opts       DumpOptions
		want       string
	}{
		{"addresses that are not mapped", dir + "/x", DumpOptions{Selection: Selection{Spans: []Span{{0x1000, 0x2000}}}}, "nothing is mapped"},
		{"a directory that is not there", dir + "/no/x", DumpOptions{}, "no such file"},
		{"a target that is no file", fifo, DumpOptions{}, "no regular file"},
		{"a selection that fits nothing", dir + "/x", DumpOptions{Selection: Selection{Grown: allOf(t, tgt.pid)}}, "none of the"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := FS{}.Dump(context.Background(), tgt.pid, tt.path, tt.opts)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("files stay: %v", left)
	}
}

func allOf(t *testing.T, pid int) []RangeUsage {
	t.Helper()
	ranges, err := FS{}.Smaps(pid)
	if err != nil {
		t.Fatal(err)
	}
	return ranges
}

func TestCoreInDebuggers(t *testing.T) {
	tgt := startTarget(t)
	path := filepath.Join(t.TempDir(), "target.core")
	result, err := FS{}.Dump(context.Background(), tgt.pid, path, DumpOptions{Core: true, Registers: true})
	if err != nil {
		t.Fatal(err)
	}
	if result.Threads != 3 || result.Skipped != 0 || result.Stop <= 0 {
		t.Errorf("%+v", result)
	}
	if state := (FS{}).State(tgt.pid); state.Letter != 'S' {
		t.Errorf("the target is in state %c after the dump", state.Letter)
	}
	out, err := exec.Command("gdb", "-nx", "-batch", "-ex", "info threads", "-ex", "thread apply all bt", "-ex",
		fmt.Sprintf("x/s %#x", tgt.addr["data"]), "-ex", fmt.Sprintf("x/s %#x", tgt.addr["thread2"]), "-ex", "info registers xmm0",
		"-ex", fmt.Sprintf("x/gx %#x", tgt.addr["mapped"]+8), tgt.cmd.Path, path).CombinedOutput()
	if err != nil {
		t.Fatalf("gdb: %v: %s", err, out)
	}
	for want, times := range map[string]int{
		"LWP ": 3, "wait_in_worker (text=": 2, `"thread1"`: 1, "in worker (": 2, "in main (argc=": 1, `"variable with a value"`: 1,
		`"stack of thread2"`: 1, "v4_float": 1, fmt.Sprintf("0x%016x", uint64(7*2654435761*2)): 1,
	} {
		if got := strings.Count(string(out), want); got < times {
			t.Errorf("gdb says %q %d times, want %d or more", want, got, times)
		}
	}
	stack, err := exec.Command("eu-stack", "--core", path, "--executable", tgt.cmd.Path).CombinedOutput()
	if err != nil {
		t.Errorf("eu-stack: %v: %s", err, stack)
	}
	for want, times := range map[string]int{"TID ": 3, "wait_in_worker": 2, "main": 1} {
		if got := strings.Count(string(stack), want); got < times {
			t.Errorf("eu-stack says %q %d times, want %d", want, got, times)
		}
	}
	if t.Failed() {
		t.Logf("gdb: %s\neu-stack: %s", out, stack)
	}
	img := openImage(t, path)
	if threads := img.Info().Threads; len(threads) != 3 || threads[0].TID != tgt.pid || threads[0].sp("amd64") == 0 && threads[0].sp("arm64") == 0 {
		t.Errorf("threads %+v", threads)
	}
}

func TestCoreWithoutRegisters(t *testing.T) {
	tgt := startTarget(t)
	path := filepath.Join(t.TempDir(), "target.core")
	if _, err := (FS{}).Dump(context.Background(), tgt.pid, path, DumpOptions{Core: true}); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("gdb", "-nx", "-batch", "-ex", "info threads", "-ex", "p initialised", tgt.cmd.Path, path).CombinedOutput()
	if err != nil {
		t.Fatalf("gdb: %v: %s", err, out)
	}
	if !strings.Contains(string(out), "LWP ") || !strings.Contains(string(out), `"variable with a value"`) {
		t.Errorf("gdb says %s", out)
	}
}

func TestCoreOfKernel(t *testing.T) {
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil || strings.ContainsAny(string(pattern), "|/%") {
		t.Skipf("needs kernel.core_pattern to be a plain name, not %q", pattern)
	}
	dir := t.TempDir()
	t.Chdir(dir)
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	tgt := startTarget(t)
	if err := unix.Prlimit(tgt.pid, unix.RLIMIT_CORE, &unlimited, nil); err != nil {
		t.Skipf("needs permission to raise a limit: %v", err)
	}
	live, err := OpenProcess(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	if err := tgt.cmd.Process.Signal(unix.SIGABRT); err != nil {
		t.Fatal(err)
	}
	tgt.cmd.Wait()
	cores, _ := filepath.Glob(filepath.Join(dir, strings.TrimSpace(string(pattern))+"*"))
	if len(cores) != 1 {
		t.Fatalf("cores: %v", cores)
	}
	checkForeign(t, tgt, live, cores[0])
}

func TestCoreOfGDB(t *testing.T) {
	tgt := startTarget(t)
	base := filepath.Join(t.TempDir(), "core")
	if out, err := exec.Command("gcore", "-o", base, fmt.Sprint(tgt.pid)).CombinedOutput(); err != nil {
		t.Fatalf("gcore: %v: %s", err, out)
	}
	live, err := OpenProcess(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	checkForeign(t, tgt, live, fmt.Sprintf("%s.%d", base, tgt.pid))
	t.Run("cut off", func(t *testing.T) {
		path := fmt.Sprintf("%s.%d", base, tgt.pid)
		if err := os.Truncate(path, 5<<20); err != nil {
			t.Fatal(err)
		}
		img := openImage(t, path)
		if !strings.Contains(img.Info().Partial, "cut off") {
			t.Errorf("partial is %q", img.Info().Partial)
		}
	})
}

func checkForeign(t *testing.T, tgt *target, live *Process, path string) {
	t.Helper()
	img := openImage(t, path)
	for _, name := range []string{"heap", "arena", "thread1", "thread2", "data", "bss", "mapped"} {
		want, got := rangeOf(t, live, tgt.addr[name]), rangeOf(t, img, tgt.addr[name])
		if got.Kind != want.Kind {
			t.Errorf("%s is %q in the core, %q in the process", name, got.Kind, want.Kind)
		}
	}
	checkPages(t, img, tgt.addr["mapped"], pageOf(7, 0), pageOf(7, 1), pageOf(7, 2), zeros(PageSize))
	info := img.Info()
	if info.PID != tgt.pid || info.Comm != "target" || info.Exe != tgt.cmd.Path || len(info.Threads) != 3 {
		t.Errorf("info: pid %d comm %q exe %q, %d threads", info.PID, info.Comm, info.Exe, len(info.Threads))
	}
}
