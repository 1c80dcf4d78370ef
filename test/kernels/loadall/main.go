// Command loadall loads every program of the BPF objects it is given, one object after the other, and says which the
// running kernel's verifier takes. It exits with 1 when an object that must load does not.
//
//	loadall bpf/trace_x86_bpfel.o bpf/legacy_x86_bpfel.o
package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/allocsnoop/allocsnoop/tracer/kernel"
)

func main() { os.Exit(run(os.Args[1:])) }

func run(paths []string) int {
	// Before 5.11 maps count against RLIMIT_MEMLOCK.
	if err := rlimit.RemoveMemlock(); err != nil {
		fmt.Printf("FAIL %v\n", err)
		return 1
	}
	failed := 0
	for _, path := range paths {
		for _, err := range loadObject(path) {
			fmt.Printf("FAIL %s: %v\n", filepath.Base(path), err)
			failed++
		}
	}
	if failed > 0 {
		return 1
	}
	return 0
}

// loadObject loads the object's programs one by one, so that one refused program does not hide the next.
func loadObject(path string) []error {
	spec, err := ebpf.LoadCollectionSpec(path)
	if err != nil {
		return []error{err}
	}
	// As the tracer does: the helper is called where the kernel has it (5.15).
	if v := spec.Variables["have_cookie"]; v != nil {
		cookie := uint32(0)
		if kernel.HaveCookie() == nil {
			cookie = 1
		}
		if err := v.Set(cookie); err != nil {
			return []error{err}
		}
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(spec.Programs)) {
		// The tracer does without these where the kernel has none.
		if spec.Programs[name].AttachType == kernel.AttachTraceUprobeSession && errors.Is(kernel.HaveUprobeSession(), ebpf.ErrNotSupported) {
			fmt.Printf("skip %s: %s: no uprobe sessions here\n", filepath.Base(path), name)
			continue
		}
		if err := loadProgram(spec, name); err != nil {
			errs = append(errs, fmt.Errorf("program %s: %w", name, err))
			continue
		}
		fmt.Printf("ok   %s: %s\n", filepath.Base(path), name)
	}
	return errs
}

func loadProgram(spec *ebpf.CollectionSpec, name string) error {
	one := spec.Copy()
	for other := range one.Programs {
		if other != name {
			delete(one.Programs, other)
		}
	}
	coll, err := ebpf.NewCollection(one)
	if err != nil {
		return shorten(err)
	}
	coll.Close()
	return nil
}

// shorten keeps the end of a verifier log, where the reason stands.
func shorten(err error) error {
	var verifier *ebpf.VerifierError
	if !errors.As(err, &verifier) {
		return err
	}
	log := verifier.Log[max(0, len(verifier.Log)-20):]
	return fmt.Errorf("%w\n\t%s", verifier.Cause, strings.Join(log, "\n\t"))
}
