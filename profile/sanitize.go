package profile

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Sanitize makes a string from a target (a path, a command name, a symbol) safe to print on one line of a terminal:
// escape sequences, newlines, invisible and text-reversing characters and bytes that are no UTF-8 become visible escapes
// (\x1b, \n, \u202e). A process chooses its own name and paths, so whatever came from one passes through here.
func Sanitize(s string) string {
	if isPlain(s) {
		return s
	}
	var b strings.Builder
	b.Grow(len(s) + 16)
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		switch {
		case r == utf8.RuneError && size == 1:
			b.WriteString(`\x`)
			b.WriteString(hexByte(s[0]))
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			quoted := strconv.QuoteRuneToASCII(r)
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		s = s[size:]
	}
	return b.String()
}

// SanitizeLines is Sanitize for a text of several lines.
func SanitizeLines(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = Sanitize(strings.ReplaceAll(line, "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

// JSONWriter passes JSON on to w. JSON allows characters as they are that a terminal obeys or that turn text around
// (C1 controls, bidirectional overrides); those become \u escapes, which mean the same.
func JSONWriter(w io.Writer) io.Writer { return &jsonWriter{w: w} }

type jsonWriter struct {
	w    io.Writer
	part []byte // the begin of a character that the last Write cut
}

func (j *jsonWriter) Write(p []byte) (int, error) {
	in := append(j.part, p...)
	j.part = nil
	out := make([]byte, 0, len(in))
	for len(in) > 0 {
		if !utf8.FullRune(in) {
			j.part = in
			break
		}
		r, size := utf8.DecodeRune(in)
		if r < 0x7f || unicode.IsPrint(r) {
			out = append(out, in[:size]...)
		} else {
			out = appendEscape(out, r)
		}
		in = in[size:]
	}
	if _, err := j.w.Write(out); err != nil {
		return 0, err
	}
	return len(p), nil
}

func appendEscape(b []byte, r rune) []byte {
	if r > 0xffff {
		high, low := utf16.EncodeRune(r)
		return fmt.Appendf(b, `\u%04x\u%04x`, high, low)
	}
	return fmt.Appendf(b, `\u%04x`, r)
}

func isPlain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

func hexByte(c byte) string {
	const digits = "0123456789abcdef"
	return string([]byte{digits[c>>4], digits[c&15]})
}
