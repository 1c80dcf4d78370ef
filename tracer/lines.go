package tracer

import (
	"bufio"
	"io"
	"iter"
)

// lines yields the lines of a small file of the kernel's.
func lines(r io.Reader) iter.Seq[string] {
	return func(yield func(string) bool) {
		s := bufio.NewScanner(r)
		for s.Scan() {
			if !yield(s.Text()) {
				return
			}
		}
	}
}
