package bench

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"

	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
)

// A floor is what the probes alone cost: programs that do nothing, at the very places of allocsnoop's or another tool's.
// What a tool costs above its floor is its own doing; what lies below nobody saves without fewer probes.

// place is one probed instruction.
type place struct {
	path   string
	offset uint64 // in the file
	ret    bool   // the return is seen as well
}

// attachEmpty puts an empty program onto places in a process.
type attachEmpty func(pid int, p place) (io.Closer, error)

// floor is a contender of empty programs on malloc and free.
func floor(name string, places func(malloc, free allocator.Probe) []place, attach attachEmpty) contender {
	return contender{name: name, baseline: alone, attach: func(_ context.Context, _ string, pid int) (func() error, error) {
		malloc, free, err := probesOf(pid)
		if err != nil {
			return nil, err
		}
		var open []io.Closer
		detach := func() error {
			var errs []error
			for _, c := range open {
				errs = append(errs, c.Close())
			}
			return errors.Join(errs...)
		}
		for _, p := range places(malloc, free) {
			c, err := attach(pid, p)
			if err != nil {
				return nil, errors.Join(err, detach())
			}
			open = append(open, c)
		}
		return detach, nil
	}}
}

const (
	sampleFloor = "empty programs at sample's probes"
	exactFloor  = "empty programs at exact's probes"
)

// floors are what no tool can go below that probes at these places of this kernel.
func floors() []contender {
	return []contender{
		floor(sampleFloor, entriesOnly, attachMulti),
		floor(exactFloor, withReturn, attachMulti),
		floor("empty programs at bpftrace's probes", atStarts, attachPerf),
	}
}

// probesOf are the places where allocsnoop probes a process's malloc and free.
func probesOf(pid int) (malloc, free allocator.Probe, err error) {
	scanner := allocator.Scanner{Rules: allocator.Rules{LongNops: kernel.EmulatesLongNops(), RAX: true}}
	plan, err := scanner.Plan(pid)
	if err != nil {
		return malloc, free, err
	}
	for _, p := range plan.Probes {
		switch p.Name {
		case "malloc":
			malloc = p
		case "free":
			free = p
		}
	}
	if malloc.Path == "" || free.Path == "" {
		return malloc, free, fmt.Errorf("find malloc and free of process %d: not among %d probes", pid, len(plan.Probes))
	}
	return malloc, free, nil
}

func where(p allocator.Probe) place { return place{path: p.OpenPath, offset: p.ProbeOffset()} }

// entriesOnly is what a sampled trace cannot go below while it sees each call.
func entriesOnly(malloc, free allocator.Probe) []place { return []place{where(malloc), where(free)} }

// withReturn is what a trace of every block cannot go below: the address is known when malloc returns.
func withReturn(malloc, free allocator.Probe) []place {
	m := where(malloc)
	m.ret = true
	return []place{m, where(free)}
}

// atStarts is where a tool that does not look at the code probes.
func atStarts(malloc, free allocator.Probe) []place {
	return []place{{malloc.OpenPath, malloc.Offset, true}, {free.OpenPath, free.Offset, false}}
}

func emptyProgram(attach ebpf.AttachType) (*ebpf.Program, error) {
	return ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "empty", Type: ebpf.Kprobe, AttachType: attach, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
}

// attachMulti uses the cheapest way in that the kernel has: a session where a return is wanted (6.13), else uprobe_multi.
func attachMulti(pid int, p place) (io.Closer, error) {
	kind := ebpf.AttachTraceUprobeMulti
	if p.ret {
		kind = kernel.AttachTraceUprobeSession
	}
	prog, err := emptyProgram(kind)
	if err != nil {
		return nil, err
	}
	defer prog.Close() // the link keeps it
	if p.ret {
		return kernel.UprobeSession(prog, p.path, kernel.SessionOptions{Offsets: []uint64{p.offset}, PID: pid})
	}
	file, err := link.OpenExecutable(p.path)
	if err != nil {
		return nil, err
	}
	return file.UprobeMulti(nil, prog, &link.UprobeMultiOptions{Addresses: []uint64{p.offset}, PID: uint32(pid)})
}

// attachPerf uses perf events, as tools do that run on any kernel.
func attachPerf(pid int, p place) (io.Closer, error) {
	prog, err := emptyProgram(ebpf.AttachNone)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	file, err := link.OpenExecutable(p.path)
	if err != nil {
		return nil, err
	}
	options := &link.UprobeOptions{Address: p.offset, PID: pid}
	entry, err := file.Uprobe("entry", prog, options)
	if err != nil || !p.ret {
		return entry, err
	}
	ret, err := file.Uretprobe("return", prog, options)
	if err != nil {
		return nil, errors.Join(err, entry.Close())
	}
	return both{entry, ret}, nil
}

type both [2]io.Closer

func (b both) Close() error { return errors.Join(b[0].Close(), b[1].Close()) }
