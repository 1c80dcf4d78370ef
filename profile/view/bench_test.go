package view

import (
	"io"
	"os"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

// The way of a large profile onto the screen, as far as it is ours. PROFILE names the file.
func BenchmarkFileToPage(b *testing.B) {
	file := os.Getenv("PROFILE")
	if file == "" {
		b.Skip("PROFILE names no file")
	}
	for b.Loop() {
		f, err := os.Open(file)
		if err != nil {
			b.Fatal(err)
		}
		s, err := profile.Read(f)
		f.Close()
		if err != nil {
			b.Fatal(err)
		}
		if err := WriteHTML(io.Discard, Input{Name: file, New: s}); err != nil {
			b.Fatal(err)
		}
	}
}
