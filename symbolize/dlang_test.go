package symbolize

import (
	"os/exec"
	"strings"
	"testing"
)

var dNames = []string{
	"_Dmain",
	"_D6object6Object8toStringMFZAya",
	"_D4core6memory2GC6mallocFNaNbmkxC8TypeInfoZPv",
	"_D4core6memory2GC4freeFNaNbPvZv",
	"_D3std5stdio__T7writelnTAyaZQnFNfQjZv",
	"_D3std5stdio4File5closeMFNeZv",
	"_D8demangle4testFAaaZv",
	"_D8demangle4testFHAbaZv",
	"_D8demangle4testFG42aZv",
	"_D8demangle4testFPiKiJlZv",
	"_D8demangle4testFDFiZvZv",
	"_D8demangle4testFPFNaZiZv",
	"_D8demangle4testFAyaYv",
	"_D8demangle4testFAiXv",
	"_D8demangle__T4testTaTdZQlFZv",
	"_D8demangle11__T4testTaZ4testFZv",
	"_D8demangle__T4testVi5ZQjFZv",
	"_D8demangle__T4testVb1ZQjFZv",
	"_D8demangle3FooC6__ctorMFiZCQzQx",
	"_D8demangle3Foo6__dtorMFZv",
	"_D8demangle5outerFiZ5innerMFdZv",
}

func TestDNamesAgreeWithCxxfilt(t *testing.T) {
	need(t, "c++filt")
	for _, name := range dNames {
		out, err := exec.Command("c++filt", "-s", "dlang", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		if got, want := demangled(name), strings.TrimSpace(string(out)); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

func FuzzD(f *testing.F) {
	for _, n := range dNames {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if out, ok := demangleD(name); ok && len(out) > 64*maxDOut {
			t.Errorf("%d bytes", len(out))
		}
	})
}
