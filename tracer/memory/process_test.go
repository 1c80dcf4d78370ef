package memory

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// bothWays runs a test with process_vm_readv and with /proc/PID/mem alone.
func bothWays(t *testing.T, f func(*testing.T, *target, *Process)) {
	t.Helper()
	for _, noVM := range []bool{false, true} {
		t.Run(map[bool]string{false: "process_vm_readv", true: "mem file"}[noVM], func(t *testing.T) {
			tgt := startTarget(t)
			p, err := OpenProcess(tgt.pid)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			p.noVM.Store(noVM)
			f(t, tgt, p)
		})
	}
}

func TestReadProcess(t *testing.T) {
	bothWays(t, func(t *testing.T, tgt *target, p *Process) {
		mapped := tgt.addr["mapped"]
		got := make([]byte, 3*PageSize)
		if n, err := p.ReadAt(got, int64(mapped)); n != len(got) || err != nil {
			t.Fatalf("read %d, %v", n, err)
		}
		if want := append(append(pageOf(7, 0), pageOf(7, 1)...), pageOf(7, 2)...); !bytes.Equal(got, want) {
			t.Error("three pages of mapped memory differ from what the target wrote")
		}
		got = make([]byte, PageSize)
		if _, err := p.ReadAt(got, int64(tgt.addr["hidden"])+PageSize); err != nil || !bytes.Equal(got, pageOf(13, 1)) {
			t.Errorf("memory without read permission: error %v, equal %v", err, bytes.Equal(got, pageOf(13, 1)))
		}
		var absent *AbsentError
		if n, err := p.ReadAt(got, 0x1000); n != 0 || !errors.As(err, &absent) || absent.Addr != 0x1000 {
			t.Errorf("unmapped memory: %d, %v", n, err)
		}
		if p.Info().PID != tgt.pid || p.Info().Comm != "target" || len(p.Info().Threads) != 3 || len(p.Info().Auxv) == 0 {
			t.Errorf("info %+v", p.Info())
		}
	})
}

func TestReadSparseFillsGapsWithZeros(t *testing.T) {
	bothWays(t, func(t *testing.T, tgt *target, p *Process) {
		// The last bytes of the range that holds the data segment's neighbour, and the hole beyond the stack's end.
		stack := stackRange(t, p.Ranges())
		got := bytes.Repeat([]byte{0xaa}, 3*PageSize-100)
		absent, err := ReadSparse(p, got, stack.End-100)
		if err != nil {
			t.Fatal(err)
		}
		if want := uint64(len(got) - 100); absent != want {
			t.Errorf("%d bytes absent, want %d", absent, want)
		}
		if !bytes.Equal(got[100:], zeros(len(got)-100)) {
			t.Error("the gap is not zeros")
		}
	})
}

func stackRange(t *testing.T, ranges []Range) *Range {
	t.Helper()
	for i := range ranges {
		if ranges[i].Kind == KindStack {
			if i+1 < len(ranges) && ranges[i+1].Start < ranges[i].End+4*PageSize {
				t.Skip("needs an unmapped gap above the stack")
			}
			return &ranges[i]
		}
	}
	t.Fatal("no stack")
	return nil
}

func TestExtentsOfProcess(t *testing.T) {
	tgt := startTarget(t)
	p, err := OpenProcess(tgt.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	at := tgt.addr["mapped"]
	got, err := p.Extents(at, at+64*PageSize)
	if err != nil {
		t.Fatal(err)
	}
	want := []Extent{{at, at + 11*PageSize, Data}, {at + 11*PageSize, at + 64*PageSize, Zero}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	if got, err := p.Extents(0x1000, 0x5000); err != nil || len(got) != 0 {
		t.Errorf("extents of unmapped addresses: %v, %v", got, err)
	}
}

func TestProcessThatEnds(t *testing.T) {
	bothWays(t, func(t *testing.T, tgt *target, p *Process) {
		tgt.stop()
		buf := make([]byte, PageSize)
		if _, err := p.ReadAt(buf, int64(tgt.addr["mapped"])); !errors.Is(err, ErrGone) {
			t.Errorf("read after the end: %v", err)
		}
		if _, err := p.Extents(tgt.addr["mapped"], tgt.addr["mapped"]+PageSize); !errors.Is(err, ErrGone) {
			t.Errorf("extents after the end: %v", err)
		}
		if _, err := ReadSparse(p, buf, tgt.addr["mapped"]); !errors.Is(err, ErrGone) {
			t.Errorf("sparse read after the end: %v", err)
		}
		p.Close()
		if _, err := OpenProcess(tgt.pid); !errors.Is(err, ErrGone) {
			t.Errorf("open after the end: %v", err)
		}
	})
}

// fakeProc writes files of a made-up procfs.
func fakeProc(t *testing.T, files map[string]string) FS {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return FS{root}
}

const statTail = " S 1 942 942 0 -1 %FLAGS% 0 0 0 0 1 2 0 0 20 0 3 0 77777 0 0\n"

func statLine(comm string, flags uint64) string {
	return "942 (" + comm + ")" + strings.Replace(statTail, "%FLAGS%", strconv.FormatUint(flags, 10), 1)
}

func TestState(t *testing.T) {
	fs := fakeProc(t, map[string]string{"942/stat": statLine("a) R (b", 0x400000)})
	want := State{Comm: "a) R (b", Letter: 'S', PPID: 1, Threads: 3, StartTicks: 77777}
	if diff := cmp.Diff(want, fs.State(942)); diff != "" {
		t.Errorf("want -, got +:\n%s", diff)
	}
	for name, text := range map[string]string{
		"nothing": "", "no command": "942 S 1", "cut off": "942 (x) S 1 2", "only a parenthesis": ")(",
	} {
		if got := parseStat([]byte(text)); !got.Gone() {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if !fs.State(7).Gone() {
		t.Error("a process that does not exist is not gone")
	}
}

func TestKernelThread(t *testing.T) {
	fs := fakeProc(t, map[string]string{"942/stat": statLine("kworker/0:1", 0x00200000), "942/maps": "", "942/smaps": ""})
	if _, err := fs.OpenProcess(942); !errors.Is(err, ErrKernelThread) || !strings.Contains(err.Error(), "kworker/0:1") {
		t.Errorf("open: %v", err)
	}
	if _, err := fs.Maps(942); !errors.Is(err, ErrKernelThread) {
		t.Errorf("maps: %v", err)
	}
	if _, err := fs.Smaps(942); !errors.Is(err, ErrKernelThread) {
		t.Errorf("smaps: %v", err)
	}
}

func TestPermissionErrorSaysWhatToDo(t *testing.T) {
	fs := fakeProc(t, map[string]string{
		"942/stat": statLine("nginx", 0), "942/status": "Name:\tnginx\nUid:\t33\t33\t33\t33\n",
		"self/status": "CapEff:\t0000000000000000\n", "sys/kernel/yama/ptrace_scope": "2\n",
	})
	err := fs.Explain(942, "open memory", &os.PathError{Op: "open", Path: "/proc/942/mem", Err: os.ErrPermission})
	if !errors.Is(err, ErrNoPermission) {
		t.Fatalf("%v is no ErrNoPermission", err)
	}
	for _, want := range []string{"pid 942 (nginx)", "CAP_SYS_PTRACE", "--cap-add SYS_PTRACE", "ptrace_scope is 2"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
}

func TestParseSyscallSP(t *testing.T) {
	for text, want := range map[string]uint64{
		"34 0x1 0x2 0x3 0x4 0x5 0x6 0x7ffd10 0x7f0001\n": 0x7ffd10, "-1 0x7ffd18 0x7f0001\n": 0x7ffd18, "running\n": 0, "": 0,
	} {
		if got := parseSyscallSP([]byte(text)); got != want {
			t.Errorf("%q: %#x, want %#x", text, got, want)
		}
	}
}
