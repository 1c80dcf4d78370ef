package view

import (
	"bytes"
	"io"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/profile/profiletest"
)

// The way of 100,000 call stacks from the file to the page, without the browser.
func BenchmarkOpen100kStacks(b *testing.B) {
	file := encoded(b, 0)
	for b.Loop() {
		show(b, Input{Name: "big.pb.gz", New: read(b, file)})
	}
}

func BenchmarkCompare100kStacks(b *testing.B) {
	old, new := encoded(b, 0), encoded(b, 1)
	for b.Loop() {
		show(b, Input{Name: "new.pb.gz", New: read(b, new), OldName: "old.pb.gz", Old: read(b, old)})
	}
}

// Without a clock: allocations are what makes opening slow, and how many there are does not depend on the machine.
func TestOpeningAllocatesLittleForEachStack(t *testing.T) {
	const stacks = 20_011
	var file bytes.Buffer
	if err := profile.Write(&file, profiletest.Large(stacks, 0)); err != nil {
		t.Fatal(err)
	}
	whole := testing.AllocsPerRun(1, func() {
		s, err := profile.Read(bytes.NewReader(file.Bytes()))
		if err == nil {
			err = WriteHTML(io.Discard, Input{Name: "big.pb.gz", New: s})
		}
		if err != nil {
			t.Fatal(err)
		}
	})
	parse := testing.AllocsPerRun(1, func() {
		if _, err := profile.Parse(bytes.NewReader(file.Bytes())); err != nil {
			t.Fatal(err)
		}
	})
	// Most of the rest are the boxes of the flame graph before the small ones are left out.
	if per := (whole - parse) / stacks; per > 20 {
		t.Errorf("%.1f allocations a stack, without pprof's own", per)
	}
	t.Logf("%.1f allocations a stack, of which pprof's parser makes %.1f", whole/stacks, parse/stacks)
}

func encoded(b *testing.B, skew int) []byte {
	b.Helper()
	var file bytes.Buffer
	if err := profile.Write(&file, profiletest.Large(100_000, skew)); err != nil {
		b.Fatal(err)
	}
	return file.Bytes()
}

func read(b *testing.B, file []byte) *profile.Snapshot {
	b.Helper()
	s, err := profile.Read(bytes.NewReader(file))
	if err != nil {
		b.Fatal(err)
	}
	return s
}

func show(b *testing.B, in Input) {
	b.Helper()
	if err := WriteHTML(io.Discard, in); err != nil {
		b.Fatal(err)
	}
}
