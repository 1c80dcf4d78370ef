package ehframe

import (
	"debug/elf"
	"os"
	"testing"
)

// BenchmarkExtract reads the largest library around, a hundred megabytes.
func BenchmarkExtract(b *testing.B) {
	f, err := os.Open("/usr/lib/x86_64-linux-gnu/libLLVM-14.so.1")
	if err != nil {
		b.Skip(err)
	}
	defer f.Close()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Extract(f, elf.EM_X86_64); err != nil {
			b.Fatal(err)
		}
	}
}
