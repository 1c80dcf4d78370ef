package tracer

import (
	"testing"
	"time"
)

func TestAWindowIsPaidOffBeforeTheNext(t *testing.T) {
	const ms = time.Millisecond
	for _, tt := range []struct {
		name        string
		spent, last spent
		want        time.Duration // of the targets' CPU time, at windows of 5 %
	}{
		{"after a window that cost all of a tick", spent{}, spent{100 * ms, 100 * ms}, 1900 * ms},
		{"half of that later", spent{0, 950 * ms}, spent{100 * ms, 100 * ms}, 950 * ms},
		{"what a cheap window left over is not lost", spent{10 * ms, 400 * ms}, spent{13 * ms, 100 * ms}, -40 * ms},
		{"a dear one is paid off after", spent{200 * ms, 300 * ms}, spent{100 * ms, 100 * ms}, 5600 * ms},
	} {
		w := windows{spent: tt.spent, last: tt.last}
		if got := w.gap(0.05 / windowShare); got != tt.want {
			t.Errorf("%s: a gap of %v, want %v", tt.name, got, tt.want)
		}
	}
}
