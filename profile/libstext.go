package profile

import (
	"io"
	"strconv"
	"strings"
	"time"
)

type libraryJSON struct {
	File     string    `json:"file"`
	Name     string    `json:"name"`
	BuildID  string    `json:"build_id,omitempty"`
	Version  string    `json:"version,omitempty"`
	Package  string    `json:"package,omitempty"`
	Size     int64     `json:"size,omitempty"`
	ModTime  time.Time `json:"mod_time,omitzero"`
	Replaced bool      `json:"replaced,omitempty"`
	PIDs     []int     `json:"pids"`
}

func libraryToJSON(l Library) libraryJSON {
	return libraryJSON{l.File, l.Name, l.BuildID, l.Version, l.Package, l.Size, l.ModTime.UTC(), l.Replaced, orEmpty(l.PIDs)}
}

// WriteLibraries writes an inventory as a table; what was replaced on disk stands out.
func WriteLibraries(w io.Writer, list []Library, width int, color bool) error {
	p := newPrinter(w, width, color)
	processes := map[int]bool{}
	nameWidth := 4
	for _, l := range list {
		nameWidth = max(nameWidth, min(runes(Sanitize(l.Name)), 30))
		for _, pid := range l.PIDs {
			processes[pid] = true
		}
	}
	p.line(text(bold, "%s  %-40s  %9s  %s", pad("NAME", nameWidth), "BUILD-ID", "SIZE", "CHANGED"))
	replaced := 0
	for _, l := range list {
		style := plain
		if l.Replaced {
			style = red
			replaced++
		}
		size, changed := "", ""
		if l.Size > 0 {
			size = FormatBytes(uint64(l.Size))
		}
		if !l.ModTime.IsZero() {
			changed = l.ModTime.UTC().Format("2006-01-02 15:04")
		}
		p.line(text(style, "%s", pad(Sanitize(l.Name), nameWidth)), text(plain, "  %s  %9s  %s", pad(orDash(Sanitize(l.BuildID)), 40), size, changed))
		p.line(text(dim, "  %s", libraryNotes(l, len(processes))))
		if l.Replaced {
			p.line(text(red, "  replaced or deleted on disk: the process runs another build than the file at that path"))
		}
	}
	p.blank()
	p.line(text(plain, "%s", plural(len(list), "file", "files")))
	if replaced > 0 {
		p.line(text(red, "%d of them replaced or deleted on disk", replaced))
	}
	return p.err
}

func libraryNotes(l Library, processes int) string {
	words := []string{Sanitize(l.File)}
	if l.Package != "" {
		words = append(words, "package "+Sanitize(l.Package))
	}
	if l.Version != "" {
		words = append(words, Sanitize(l.Version))
	}
	if processes > 1 && len(l.PIDs) < processes {
		pids := make([]string, 0, len(l.PIDs))
		for _, pid := range l.PIDs {
			pids = append(pids, strconv.Itoa(pid))
		}
		words = append(words, "in pid "+strings.Join(pids, ", ")+" only")
	}
	return strings.Join(words, "; ")
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// WriteLibrariesJSON writes an inventory as one JSON document.
func WriteLibrariesJSON(w io.Writer, list []Library) error {
	return writeJSON(w, struct {
		Schema    string        `json:"schema"`
		Libraries []libraryJSON `json:"libraries"`
	}{"allocsnoop/libs/1", convert(list, libraryToJSON)})
}

// WriteLibraryChanges writes what two inventories do not have alike.
func WriteLibraryChanges(w io.Writer, changes []LibraryChange, width int, color bool) error {
	p := newPrinter(w, width, color)
	p.libraryChanges(changes)
	return p.err
}

// WriteLibraryChangesJSON writes the same as one JSON document.
func WriteLibraryChangesJSON(w io.Writer, changes []LibraryChange) error {
	return writeJSON(w, struct {
		Schema    string              `json:"schema"`
		Libraries []libraryChangeJSON `json:"libraries"`
	}{"allocsnoop/libs-diff/1", convert(changes, changeToJSON)})
}
