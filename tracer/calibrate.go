package tracer

import (
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// trapCosts is what the kernel's part of a probe hit costs on this machine.
type trapCosts struct {
	emulated, stepped, returned time.Duration
}

const (
	calibrationCalls = 1000
	calibrationTurns = 5
)

// calibrate measures the traps on allocsnoop itself: it probes two small functions of its own and calls them. Its process
// is not traced, so that the programs return at once.
func (s *probes) calibrate(later func([]io.Closer)) (trapCosts, error) {
	var c trapCosts
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var hooks []io.Closer
	defer func() { later(hooks) }()
	measure := func(name string, address uintptr, prog *ebpf.Program, ret bool, f func()) (time.Duration, error) {
		before := fastest(f)
		h, err := s.probeSelf(name, address, prog, ret)
		if err != nil {
			return 0, err
		}
		hooks = append(hooks, h)
		return max(fastest(f)-before, 0), nil
	}
	var errs [3]error
	c.emulated, errs[0] = measure("cal_emulated", emulatedAddress, s.programs.CallEntered, false, emulated)
	c.stepped, errs[1] = measure("cal_stepped", steppedAddress, s.programs.CallEntered, false, stepped)
	// The return probe comes on top of the entry probe of the same function, as it does in a target.
	c.returned, errs[2] = measure("cal_returned", emulatedAddress, s.programs.CallReturned, true, emulated)
	if err := errors.Join(errs[:]...); err != nil {
		return trapCosts{}, fmt.Errorf("calibrate probes: %w", err)
	}
	return c, nil
}

// fastest is the time of one call in the fastest of a few turns: the machine's noise only ever adds.
func fastest(f func()) time.Duration {
	best := time.Duration(1<<63 - 1)
	for range calibrationTurns {
		start := time.Now()
		for range calibrationCalls {
			f()
		}
		best = min(best, time.Since(start))
	}
	return best / calibrationCalls
}

// probeSelf puts a program on a function of this very program.
func (s *probes) probeSelf(name string, address uintptr, prog *ebpf.Program, ret bool) (io.Closer, error) {
	ranges, err := memory.FS{}.Maps(os.Getpid())
	if err != nil {
		return nil, err
	}
	r := memory.FindRange(ranges, uint64(address))
	if r == nil {
		return nil, fmt.Errorf("find %#x in the own program: not mapped", address)
	}
	name = s.group + "/" + name
	id, err := s.tracefs.defineUprobe(name, "/proc/self/exe", uint64(address)-r.Start+r.Offset, ret)
	if err != nil {
		return nil, err
	}
	perf, err := openTracepoint(id, os.Getpid(), false)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open uprobe event: %w", err), s.tracefs.removeUprobe(name))
	}
	h, err := setProgram(perf, prog, maxFuncs, s.programs.haveCookie) // a number that no function has
	if err != nil {
		return nil, errors.Join(err, s.tracefs.removeUprobe(name))
	}
	return &calibration{h, s.tracefs, name}, nil
}

// calibration is one probe of the own program.
type calibration struct {
	*hook
	tracefs *tracefs
	name    string
}

func (c *calibration) Close() error {
	return errors.Join(c.hook.Close(), c.tracefs.removeUprobe(c.name))
}
