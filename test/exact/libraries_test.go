package exact

import (
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// The definitions that are shipped fit the libraries that are installed. What lies below them in malloc is not compared: it
// is another view of the same bytes.
func TestShippedDefinitionsFitTheLibraries(t *testing.T) {
	path := live.CompileC(t, "testdata/libraries.c", library(t, "libapr-1.so.0"), library(t, "libcrypto.so.3"))
	p := live.Start(t, path)
	p.Expect(t, "ready")
	rows, result := traceGo(t, p, "--functions", "apr", "--functions", "openssl")
	requireLossless(t, result)
	for _, r := range rows {
		want := r.book()
		if got := live.Sum(result.Profile, r.Kind, r.Site); got != want || want.AllocObjects == 0 {
			t.Errorf("%s has\n  %+v by the profile, %+v by the program\n%s", r.Site, got, want, describe(result.Profile, r.Site))
		}
		if r.Function == "" {
			continue
		}
		if got := live.Sum(result.Profile, r.Kind, r.Function, r.Site); got != want {
			t.Errorf("%s called by %s has\n  %+v by the profile, %+v by the program", r.Function, r.Site, got, want)
		}
	}
}
