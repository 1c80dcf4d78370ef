package tracer

import (
	"testing"

	"github.com/cilium/ebpf"

	"github.com/allocsnoop/allocsnoop/bpf"
	"github.com/allocsnoop/allocsnoop/test/live"
)

// The limit of the verifier is a million instructions; a program that comes near it here will not load on 5.10.
const farBelowTheLimit = 400_000

func TestBothBuildsLoadFarBelowTheVerifiersLimit(t *testing.T) {
	live.RequireBPF(t)
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"current": bpf.LoadCurrent, "legacy": bpf.LoadLegacy} {
		t.Run(name, func(t *testing.T) {
			spec, err := load()
			if err != nil {
				t.Fatal(err)
			}
			spec.Maps["live"].MaxEntries = 1009 // preallocated: as many as the test needs
			collection, err := ebpf.NewCollection(spec)
			if err != nil {
				t.Fatalf("%+v", err)
			}
			defer collection.Close()
			for name, p := range collection.Programs {
				info, err := p.Info()
				if err != nil {
					t.Fatal(err)
				}
				if n, ok := info.VerifiedInstructions(); ok && n > farBelowTheLimit {
					t.Errorf("%s: the verifier looked at %d instructions, more than %d", name, n, farBelowTheLimit)
				} else {
					t.Logf("%s: %d instructions verified", name, n)
				}
			}
		})
	}
}
