package symbolize

import (
	"fmt"
	"strings"

	"github.com/ianlancetaylor/demangle"

	"github.com/allocsnoop/allocsnoop/profile"
)

const maxDemangled = 14 // power of two: a hostile name of 1 KB can stand for gigabytes

// demangled returns the name as the source has it, or the name itself.
func demangled(name string) string {
	if strings.HasPrefix(name, "_D") {
		if d, ok := demangleD(name); ok {
			return d
		}
		return name
	}
	if !strings.HasPrefix(name, "_Z") && !strings.HasPrefix(name, "_R") && !strings.HasPrefix(name, "__Z") {
		return name
	}
	d, err := demangle.ToString(name, demangle.MaxLength(maxDemangled))
	if err != nil {
		return name
	}
	return d
}

// line is the line of a symbol without DWARF.
func (s *symbol) line() profile.Line {
	l := profile.Line{Function: demangled(s.name), SystemName: s.name, File: s.file}
	if s.size == 0 {
		l.Function = fmt.Sprintf("%s+%#x [symbol without a size]", l.Function, s.offset)
	}
	return l
}
