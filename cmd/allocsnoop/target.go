package main

import (
	"debug/elf"
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// checkTarget says early, and in words, why a process cannot be traced.
func checkTarget(pid int) error {
	if pid <= 0 {
		return usageErrorf("--pid %d: it is a number above 0", pid)
	}
	state := memory.FS{}.State(pid)
	switch {
	case state.Letter == 0:
		return fmt.Errorf("no process %d: it has ended, or lives in another pid namespace", pid)
	case state.KernelThread:
		return fmt.Errorf("process %d is a kernel thread: it has no memory of its own", pid)
	case state.Letter == 'Z':
		return fmt.Errorf("process %d has ended (zombie): its memory is gone", pid)
	}
	if err := checkRights(); err != nil {
		return err
	}
	f, err := elf.Open(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil {
		return memory.FS{}.Explain(pid, "read program", err)
	}
	defer f.Close()
	if f.Class != elf.ELFCLASS64 {
		return fmt.Errorf("process %d is a 32-bit program: only 64-bit programs can be traced; allocsnoop maps and inspect work on it", pid)
	}
	return nil
}

// checkRights asks for what tracing needs: root, or the capabilities that stand for it.
func checkRights() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	has := func(c int) bool { return data[c/32].Effective&(1<<(c%32)) != 0 }
	if has(unix.CAP_SYS_ADMIN) && has(unix.CAP_SYS_PTRACE) {
		return nil
	}
	return errors.New("permission denied: tracing needs root, or CAP_SYS_ADMIN (BPF, perf events, tracefs) and CAP_SYS_PTRACE " +
		"(the target's memory map); try sudo")
}

// explainTarget adds what a person can do to an error about one target.
func explainTarget(pid int, err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, memory.ErrGone) {
		return fmt.Errorf("process %d ended before it could be traced: %w", pid, err)
	}
	return err
}

// explainBPF shortens what the verifier says, unless the reader wants it.
func explainBPF(err error, debug bool) error {
	var verifier *ebpf.VerifierError
	if debug && errors.As(err, &verifier) {
		return fmt.Errorf("%w\n%+v", err, verifier)
	}
	if errors.Is(err, tracer.ErrNoBPF) {
		return fmt.Errorf("%w; see allocsnoop doctor", err)
	}
	return err
}
