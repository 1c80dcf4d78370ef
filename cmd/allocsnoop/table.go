package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/allocsnoop/allocsnoop/profile"
)

// column is one column of a table. A negative width aligns to the left, as in fmt; the last column takes what is left.
type column struct {
	title string
	width int
}

// table prints rows in columns of fixed width, so that a row can be printed before the next one is known, and never wider than
// the terminal.
type table struct {
	w       io.Writer
	columns []column
	width   int
}

func newTable(w io.Writer, columns ...column) *table {
	to := w
	if buffer, ok := w.(*sized); ok {
		to = buffer.to
	}
	width, _ := terminal(to)
	if width < 60 {
		width = plainWidth
	}
	t := &table{w, columns, width}
	titles := make([]string, len(columns))
	for i, c := range columns {
		titles[i] = c.title
	}
	t.row(titles...)
	return t
}

// row prints cells; a cell that is too long for its column moves the others, one that is too long for the line is cut.
func (t *table) row(cells ...string) {
	var line strings.Builder
	for i, cell := range cells {
		if i > 0 {
			line.WriteString(" ")
		}
		if i == len(cells)-1 && t.columns[i].width < 0 {
			line.WriteString(cutLeft(cell, t.width-utf8.RuneCountInString(line.String())))
			break
		}
		fmt.Fprintf(&line, "%*s", t.columns[i].width, cell)
	}
	fmt.Fprintln(t.w, strings.TrimRight(line.String(), " "))
}

// cutLeft shortens a text at its start: of a path it is the end that tells.
func cutLeft(text string, width int) string {
	count := utf8.RuneCountInString(text)
	if count <= width {
		return text
	}
	runes := []rune(text)
	return "…" + string(runes[count-max(width-1, 0):])
}

// bytesCell prints a size, and nothing much when there is none.
func bytesCell(n uint64) string {
	if n == 0 {
		return "-"
	}
	return profile.FormatBytes(n)
}
