package profile

import (
	"math"
	"testing"
)

func TestFormatBytes(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 102_400: "100 KiB", 1_048_575: "1 MiB",
		608_174_080: "580 MiB", 1 << 30: "1 GiB", math.MaxUint64: "16 EiB",
	} {
		if got := FormatBytes(n); got != want {
			t.Errorf("FormatBytes(%d) = %q, want %q", n, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 B", -4096: "-4 KiB", 12 << 20: "+12 MiB", math.MinInt64: "-8 EiB"} {
		if got := FormatByteChange(n); got != want {
			t.Errorf("FormatByteChange(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]uint64{
		"0": 0, "512": 512, "512KiB": 512 << 10, "4k": 4096, "1.5 GiB": 3 << 29, "64MB": 64 << 20, " 7 b ": 7,
		"18446744073709551615": math.MaxUint64,
	} {
		got, err := ParseBytes(in)
		if err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "KiB", "-1", "5 parsecs", "1..5", "17EiB", "1e3", "5i", "mk", "999999999999999999999"} {
		if got, err := ParseBytes(in); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", in, got)
		}
	}
}
