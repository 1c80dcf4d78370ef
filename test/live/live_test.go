package live

import (
	"debug/elf"
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"
)

func TestProcessSpeaksLineByLine(t *testing.T) {
	p := Start(t, CompileC(t, "testdata/echo.c"))
	p.Expect(t, "ready")
	p.Send(t, "23")
	p.Expect(t, "did 23")
	if !p.Alive() {
		t.Error("the target waits for a line, yet Alive says that it ended")
	}
	var exit *exec.ExitError
	if err := p.Wait(t); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("Wait = %v, want exit code 7", err)
	}
	if p.Alive() {
		t.Error("the target ended, yet Alive says that it runs")
	}
}

func TestCompileErrorShowsCommandAndCompilerOutput(t *testing.T) {
	_, err := compile(t.TempDir(), "gcc", "testdata/none.c")
	if err == nil || !strings.Contains(err.Error(), "gcc -O2 -g") || !strings.Contains(err.Error(), "none.c: No such file") {
		t.Errorf("error is %v", err)
	}
}

func TestAllocsnoopIsAStaticBinary(t *testing.T) {
	file, err := elf.Open(Allocsnoop(t))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, prog := range file.Progs {
		if prog.Type == elf.PT_INTERP {
			t.Error("allocsnoop asks for a dynamic loader")
		}
	}
}

// The checks for remains must see a probe that is there, or they prove nothing.
func TestRemainingProbeIsSeenUntilItIsGone(t *testing.T) {
	RequireBPF(t)
	target := CompileC(t, "testdata/echo.c")
	p := Start(t, target)
	p.Expect(t, "ready")
	CheckText(t, p.PID)

	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.Kprobe,
		License:      "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	executable, err := link.OpenExecutable(target)
	if err != nil {
		t.Fatal(err)
	}
	probe, err := executable.Uprobe("main", prog, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !Probed(t, p.PID) {
		t.Error("a probe on main is not seen in the target's memory")
	}
	info, err := probe.Info()
	if err != nil {
		t.Fatal(err)
	}
	attached := object{"link", uint32(info.ID)}
	if exists, err := attached.exists(); err != nil || !exists {
		t.Errorf("the attached link exists = %t, %v", exists, err)
	}
	if err := errors.Join(probe.Close(), prog.Close()); err != nil {
		t.Fatal(err)
	}
	CheckText(t, p.PID)
	if exists, err := attached.exists(); err != nil || exists {
		t.Errorf("the closed link exists = %t, %v", exists, err)
	}
}

func TestFdinfoNamesBPFObjects(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		want       []object
	}{
		{"a link and its program", "pos:\t0\nlink_type:\tperf\nlink_id:\t4\nprog_tag:\tab\nprog_id:\t17\n", []object{{"link", 4}, {"prog", 17}}},
		{"a map", "map_type:\t27\nmap_id:\t23\n", []object{{"map", 23}}},
		{"a plain file", "pos:\t0\nflags:\t02\nmnt_id:\t13\n", nil},
		{"no number", "map_id:\tx\n", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, parseFdinfo(tt.text), cmp.AllowUnexported(object{})); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestSumTakesOneKindAndAdjacentFrames(t *testing.T) {
	location := func(name string) *profile.Location {
		return &profile.Location{Line: []profile.Line{{Function: &profile.Function{Name: name}}}}
	}
	malloc, leak, main := location("malloc"), location("leak"), location("main")
	sample := func(kind string, n int64, stack ...*profile.Location) *profile.Sample {
		return &profile.Sample{Location: stack, Label: map[string][]string{"kind": {kind}}, Value: []int64{n, 41 * n, n - 1, 41 * (n - 1)}}
	}
	p := &profile.Profile{Sample: []*profile.Sample{
		sample("malloc", 3, malloc, leak, main),
		sample("malloc", 5, malloc, main),
		sample("mmap", 7, malloc, leak, main),
		{Location: []*profile.Location{malloc, leak}, Value: []int64{11, 11, 11, 11}},
	}}
	for _, tt := range []struct {
		name      string
		kind      string
		functions []string
		want      Book
	}{
		{"a caller", "malloc", []string{"malloc", "leak"}, Book{3, 123, 2, 82}},
		{"every stack of a kind", "malloc", nil, Book{8, 328, 6, 246}},
		{"frames that are not side by side", "malloc", []string{"malloc", "main"}, Book{5, 205, 4, 164}},
		{"frames further out", "mmap", []string{"leak", "main"}, Book{7, 287, 6, 246}},
		{"nothing", "brk", nil, Book{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Sum(p, tt.kind, tt.functions...)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
