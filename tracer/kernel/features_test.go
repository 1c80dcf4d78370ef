package kernel

import (
	"errors"
	"os"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("loading BPF programs needs root")
	}
}

// Each answer is checked against a floor that holds for mainline kernels, in one direction: older must not claim more.
func TestFeaturesAnswerYesOrNotSupported(t *testing.T) {
	needRoot(t)
	for name, have := range map[string]func() error{
		"ring buffer": HaveRingBuffer, "task storage": HaveTaskStorage, "task_pt_regs": HaveTaskPtRegs,
		"cookie": HaveCookie, "uprobe_multi": HaveUprobeMulti, "session": HaveUprobeSession, "loops": HaveBoundedLoops,
		"uprobes": HaveUprobes,
	} {
		err := have()
		if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			t.Errorf("%s: %v", name, err)
		}
		t.Logf("%s: %v", name, err)
		if again := have(); (again == nil) != (err == nil) {
			t.Errorf("%s: the second answer differs: %v", name, again)
		}
	}
}

func TestSessionAttributeHasTheKernelsLayout(t *testing.T) {
	if got := unsafe.Sizeof(linkCreateUprobeMulti{}); got != 64 {
		t.Errorf("attribute is %d bytes, want 64", got)
	}
}

func TestSessionRefusesWhatCannotBeAttached(t *testing.T) {
	needRoot(t)
	if err := HaveUprobeSession(); err != nil {
		t.Skipf("needs uprobe sessions (6.13): %v", err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.Kprobe, AttachType: AttachTraceUprobeSession, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	for _, tt := range []struct {
		name, path string
		options    SessionOptions
		want       error
	}{
		{"no offsets", "/bin/true", SessionOptions{}, nil},
		{"fewer cookies than offsets", "/bin/true", SessionOptions{Offsets: []uint64{1, 2}, Cookies: []uint64{3}}, nil},
		{"a file that is not there", "/no/such/file", SessionOptions{Offsets: []uint64{1}}, unix.ENOENT},
		{"a path with a null byte", "/bin\x00", SessionOptions{Offsets: []uint64{1}}, unix.EINVAL},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := UprobeSession(prog, tt.path, tt.options)
			if err == nil {
				l.Close()
				t.Fatal("attached")
			}
			if tt.want != nil && !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}
