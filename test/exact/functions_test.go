package exact

import (
	"strconv"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

func TestEveryFunctionOfC(t *testing.T) {
	for _, a := range allocators {
		t.Run(a.name, func(t *testing.T) {
			churn := 16_000
			if a.name == "glibc" && everything() {
				churn = 1_000_000 // 30,000 of them stay
			}
			p := a.start(t, a.compile(t, "functions.c"), strconv.Itoa(churn))
			rows, result := traceGo(t, p)
			requireLossless(t, result)
			a.compare(t, result.Profile, rows)
		})
	}
}

func TestOperatorNewAndDelete(t *testing.T) {
	for _, a := range allocators {
		if a.compiler != "" {
			continue // musl-gcc has no C++ library
		}
		t.Run(a.name, func(t *testing.T) {
			var args []string
			if !a.throws() {
				args = []string{"no-throw"}
			}
			p := a.start(t, a.compile(t, "cxx.cc"), args...)
			rows, result := traceGo(t, p)
			requireLossless(t, result)
			a.compare(t, result.Profile, rows)
		})
	}
}

func TestFunctionsThatOneAllocatorHas(t *testing.T) {
	for _, a := range allocators {
		if a.preload == "" && a.libraries == nil {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			var args []string
			if a.preload == "" {
				args = []string{"linked"}
			}
			rows, result := traceGo(t, a.start(t, a.compile(t, "native.c"), args...))
			requireLossless(t, result)
			a.compare(t, result.Profile, rows)
		})
	}
}

func TestMappings(t *testing.T) {
	for _, a := range allocators {
		if a.preload != "" {
			continue // no allocator takes part
		}
		t.Run(a.name, func(t *testing.T) {
			rows, result := traceGo(t, a.start(t, a.compile(t, "mappings.c")))
			requireLossless(t, result)
			a.compare(t, result.Profile, rows)
		})
	}
}

func TestStacksByTheThousand(t *testing.T) {
	p := allocators[0].start(t, allocators[0].compile(t, "stacks.c"))
	rows, result := traceGo(t, p)
	requireLossless(t, result)
	allocators[0].compare(t, result.Profile, rows)
	distinct := 0
	for _, sample := range result.Profile.Sample {
		if live.SampleHas(sample, "site_stacks") {
			distinct++
		}
	}
	if distinct != 16384 {
		t.Errorf("the profile has %d stacks through site_stacks, want 16384", distinct)
	}
}
