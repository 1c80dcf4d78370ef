package profile

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

var byteUnits = []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

// FormatBytes prints a size in binary units with three to four digits: "512 B", "1.5 KiB", "580 MiB".
func FormatBytes(n uint64) string {
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	unit, name := unitOf(n)
	v, digits := float64(n)/unit, 1
	if v >= 99.95 {
		digits = 0
	}
	return strings.TrimSuffix(strconv.FormatFloat(v, 'f', digits, 64), ".0") + " " + name
}

// unitOf is the unit that FormatBytes prints a size in.
func unitOf(n uint64) (bytes float64, name string) {
	unit := 0
	for bytes = 1; float64(n)/bytes >= 1023.95 && unit < len(byteUnits)-1; bytes *= 1024 {
		unit++
	}
	return bytes, byteUnits[unit]
}

// FormatByteChange prints a difference of sizes with its sign: "+12 MiB", "-4 KiB", "0 B".
func FormatByteChange(n int64) string {
	switch {
	case n < 0:
		return "-" + FormatBytes(-uint64(n))
	case n > 0:
		return "+" + FormatBytes(uint64(n))
	}
	return "0 B"
}

// ParseBytes reads a size such as "512", "512KiB", "1.5 GiB", "4k" or "64MB". All units are powers of 1024.
func ParseBytes(s string) (uint64, error) {
	text := strings.TrimSpace(s)
	cut := strings.IndexFunc(text, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	number, unit := text, ""
	if cut >= 0 {
		number, unit = text[:cut], strings.ToLower(strings.TrimSpace(text[cut:]))
	}
	shift, ok := byteShift(unit)
	if !ok {
		return 0, fmt.Errorf("parse size %q: unknown unit %q (B, KiB, MiB, GiB, TiB)", s, unit)
	}
	if n, err := strconv.ParseUint(number, 10, 64); err == nil {
		if n > math.MaxUint64>>shift {
			return 0, fmt.Errorf("parse size %q: too large", s)
		}
		return n << shift, nil
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, fmt.Errorf("parse size %q: not a number with a unit such as 512KiB", s)
	}
	v *= float64(uint64(1) << shift)
	if v >= math.MaxUint64 {
		return 0, fmt.Errorf("parse size %q: too large", s)
	}
	return uint64(v), nil
}

// byteShift knows "k", "kb" and "kib" in lower case, and so on.
func byteShift(unit string) (uint, bool) {
	if unit == "" || unit == "b" {
		return 0, true
	}
	at := strings.IndexByte("kmgtpe", unit[0])
	rest := unit[1:]
	if at < 0 || rest != "" && rest != "b" && rest != "ib" {
		return 0, false
	}
	return uint(at+1) * 10, true
}
