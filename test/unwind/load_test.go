package unwindtest

import (
	"errors"
	"testing"

	"github.com/cilium/ebpf"
)

// The verifier gives up at a million instructions; the walk must stay far below, on old kernels too.
const maxVerified = 200_000

func TestBothObjectsPassTheVerifier(t *testing.T) {
	for name, load := range map[string]func() (*ebpf.CollectionSpec, error){"task storage": LoadProbe, "per CPU": LoadLegacy} {
		t.Run(name, func(t *testing.T) {
			spec, err := load()
			if err != nil {
				t.Fatal(err)
			}
			coll, err := ebpf.NewCollection(spec)
			var ve *ebpf.VerifierError
			if errors.As(err, &ve) {
				t.Fatalf("%+v", ve)
			}
			if err != nil {
				t.Fatal(err)
			}
			defer coll.Close()
			for name, prog := range coll.Programs {
				info, err := prog.Info()
				if err != nil {
					t.Fatal(err)
				}
				n, ok := info.VerifiedInstructions()
				if !ok {
					continue // kernels before 5.16 do not tell
				}
				t.Logf("%s: %d instructions verified", name, n)
				if n > maxVerified {
					t.Errorf("%s: %d instructions verified, more than %d", name, n, maxVerified)
				}
			}
		})
	}
}
