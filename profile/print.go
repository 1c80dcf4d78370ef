package profile

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

type style string

const (
	plain  style = ""
	bold   style = "\x1b[1m"
	dim    style = "\x1b[2m"
	red    style = "\x1b[1;31m"
	yellow style = "\x1b[33m"
	green  style = "\x1b[32m"
	cyan   style = "\x1b[36m"
)

// span is a piece of text in one style.
type span struct {
	style style
	text  string
}

func text(s style, format string, args ...any) span { return span{s, fmt.Sprintf(format, args...)} }

// printer writes lines that are never wider than its width. The first error sticks.
type printer struct {
	w     io.Writer
	width int
	color bool
	err   error
}

func newPrinter(w io.Writer, width int, color bool) *printer {
	if width <= 0 {
		width = 100
	}
	return &printer{w: w, width: max(width, 60), color: color}
}

func (p *printer) write(s string) {
	if p.err == nil {
		_, p.err = io.WriteString(p.w, s)
	}
}

func (p *printer) blank() { p.write("\n") }

// plainLine is a line to be copied: it is never cut, whatever its width.
func (p *printer) plainLine(s string) { p.write(s + "\n") }

// line writes spans on one line, cut at the width.
func (p *printer) line(spans ...span) {
	var b strings.Builder
	left := p.width
	for i, s := range spans {
		if i == len(spans)-1 {
			s.text = strings.TrimRight(s.text, " ")
		}
		cut := pad(s.text, min(runes(s.text), left))
		left -= runes(cut)
		b.WriteString(p.paint(s.style, cut))
	}
	p.write(strings.TrimRight(b.String(), " ") + "\n")
}

func (p *printer) paint(s style, text string) string {
	if !p.color || s == plain || text == "" {
		return text
	}
	return string(s) + text + "\x1b[0m"
}

// nbsp is a space that wrap breaks no line at.
const nbsp = "\u00a0"

// wrap writes spans as one paragraph; lines after the first are indented.
func (p *printer) wrap(indent int, spans ...span) {
	var b strings.Builder
	used := 0
	for _, s := range spans {
		for _, word := range strings.SplitAfter(s.text, " ") {
			visible := strings.TrimRight(word, " ")
			if used > indent && used+runes(visible) > p.width {
				b.WriteString("\n" + strings.Repeat(" ", indent))
				used = indent
				if visible == "" {
					continue
				}
			}
			if room := p.width - used; runes(visible) > room {
				visible = pad(visible, room)
				word = visible
			}
			width := runes(word)
			if visible != "" {
				word = p.paint(s.style, visible) + strings.Repeat(" ", len(word)-len(visible))
			}
			b.WriteString(word)
			used += width
		}
	}
	lines := strings.Split(b.String(), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimRight(l, " ")
	}
	p.write(strings.ReplaceAll(strings.Join(lines, "\n"), nbsp, " ") + "\n")
}

func runes(s string) int { return utf8.RuneCountInString(s) }

// pad fills or cuts a text to exactly width characters; a cut is shown as "…".
func pad(s string, width int) string {
	n := runes(s)
	switch {
	case n <= width:
		return s + strings.Repeat(" ", width-n)
	case width <= 0:
		return ""
	}
	return string([]rune(s)[:width-1]) + "…"
}

// count prints a number with thousands apart: "41,213".
func count(n int64) string {
	digits := strconv.FormatUint(magnitude(n), 10)
	var b strings.Builder
	if n < 0 {
		b.WriteByte('-')
	}
	for i, c := range digits {
		if i > 0 && (len(digits)-i)%3 == 0 {
			b.WriteByte(',')
		}
		b.WriteRune(c)
	}
	return b.String()
}

func blocks(n int64) string { return plural(int(n), "block", "blocks") }

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(int64(n)) + " " + many
}

func magnitude(n int64) uint64 {
	if n < 0 {
		return -uint64(n)
	}
	return uint64(n)
}

// signedBytes prints a size that ought to be positive, and shows it when it is not.
func signedBytes(n int64) string {
	if n < 0 {
		return FormatByteChange(n)
	}
	return FormatBytes(uint64(n))
}

func perSecond(bytes int64, d time.Duration) string {
	if d <= 0 {
		return "-"
	}
	return FormatBytes(uint64(max(0, float64(bytes)/d.Seconds()))) + "/s"
}

func percent(part, whole int64) string {
	if whole == 0 {
		return "-"
	}
	share := 100 * float64(part) / float64(whole)
	switch {
	case part != 0 && math.Abs(share) < 0.1:
		return "<0.1 %"
	case part < whole && share > 99.9:
		return ">99.9 %"
	}
	return strings.TrimSuffix(strconv.FormatFloat(share, 'f', 1, 64), ".0") + " %"
}

// metric prints a count per second in three digits: "212k".
func metric(v float64) string {
	for _, unit := range []string{"", "k", "M"} {
		if v < 999.5 {
			digits := 0
			if v < 9.95 && v != math.Trunc(v) {
				digits = 1
			}
			return strconv.FormatFloat(v, 'f', digits, 64) + unit
		}
		v /= 1000
	}
	return strconv.FormatFloat(v, 'f', 0, 64) + "G"
}

// formatSpan prints a duration in the unit a person would choose: "1m0s", "2.3s", "12ms".
func formatSpan(d time.Duration) string {
	switch {
	case d >= time.Minute:
		return d.Round(time.Second).String()
	case d >= time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d >= time.Millisecond:
		return d.Round(time.Millisecond).String()
	}
	return d.Round(time.Microsecond).String()
}
