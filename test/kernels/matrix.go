// Package kernels runs programs of this repository on kernels other than the host's: it takes Debian's kernel packages
// (downloaded, never installed), packs the program into an initramfs and boots it under qemu.
//
// The traps: everything is emulated (TCG), so a figure of time measured inside means nothing; and Debian's mirrors keep
// only the newest packages, so the matrix names series of kernels, not versions.
package kernels

import (
	"fmt"
	"strings"
)

// Series is one line of kernels, of which the newest package is taken.
type Series struct {
	Name string // as a person names it, "6.12"
	// Pattern finds the packages that hold the kernel image. Cloud kernels are the small ones.
	Pattern string
	Why     string // what this kernel stands for in the matrix
}

// Matrix is every series that Debian has and that differs in what BPF programs see. 5.15 and 6.6, the other long-term
// kernels, are in no Debian release; docs/kernels.md says what stands in for them.
var Matrix = []Series{
	{"5.10", `^linux-image-5\.10\.0-\d+-cloud-amd64$`, "Debian 11, the floor: no task storage for tracing programs, no pointer arguments in global functions"},
	{"6.1", `^linux-image-6\.1\.0-\d+-cloud-amd64$`, "Debian 12"},
	{"6.12", `^linux-image-6\.12\.\d+\+deb13-cloud-amd64$`, "Debian 13"},
	{"6.12-bpo12", `^linux-image-6\.12\.\d+\+deb12-cloud-amd64$`, "Debian 12's newer kernel"},
	{"6.16", `^linux-image-6\.16\.\d+\+deb13-cloud-amd64$`, "between the long-term kernels"},
	{"6.18", `^linux-image-6\.18\.\d+\+deb13-cloud-amd64$`, "long-term kernel"},
	{"7.0", `^linux-binary-7\.0\.\d+\+deb13-cloud-amd64$`, "first of the 7 series"},
	{"7.3", `^linux-binary-7\.3\.\d+\+deb13-cloud-amd64$`, "the newest that Debian has"},
}

// suites are the parts of Debian that the matrix's packages live in.
var suites = []struct{ mirror, name string }{
	{"debian", "bullseye"},
	{"debian", "bookworm"},
	{"debian", "bookworm-backports"},
	{"debian", "trixie"},
	{"debian", "trixie-backports"},
	{"debian-security", "bullseye-security"},
	{"debian-security", "bookworm-security"},
	{"debian-security", "trixie-security"},
}

// Find returns the series that a comma- or space-separated list names; "all" is the whole matrix.
func Find(list string) ([]Series, error) {
	if strings.TrimSpace(list) == "all" {
		return Matrix, nil
	}
	var found []Series
	for _, name := range strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' }) {
		s, err := findOne(name)
		if err != nil {
			return nil, err
		}
		found = append(found, s)
	}
	return found, nil
}

func findOne(name string) (Series, error) {
	var known []string
	for _, s := range Matrix {
		if s.Name == name {
			return s, nil
		}
		known = append(known, s.Name)
	}
	return Series{}, fmt.Errorf("no kernel series %q in the matrix (known: %s, or all)", name, strings.Join(known, ", "))
}
