package profile

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
)

// DiffOptions says how a comparison looks.
type DiffOptions struct {
	OldName, NewName string // file names
	Width            int    // columns; 0 is 100
	Color            bool
	Top              int // functions shown; 0 is 10
	Frames           int // frames of each; 0 is 8
	Profile          string
}

// WriteDiff writes a comparison for a person.
func WriteDiff(w io.Writer, d *Diff, old, new *Snapshot, opt DiffOptions) error {
	p := newPrinter(w, opt.Width, opt.Color)
	p.wrap(4, text(plain, "OLD "), text(bold, "%s", Sanitize(opt.OldName)), text(plain, ", %s of %s", formatSpan(old.Duration()), whoOf(old.Processes)))
	p.wrap(4, text(plain, "NEW "), text(bold, "%s", Sanitize(opt.NewName)), text(plain, ", %s of %s", formatSpan(new.Duration()), whoOf(new.Processes)))
	p.wrap(4, text(dim, "NEW did %s times the work of OLD (by %s)", strconv.FormatFloat(d.Scale, 'g', 3, 64), perWords[d.Per.By]))
	if old.LossStated || new.LossStated {
		p.wrap(2, text(red, "One of the profiles lost more than its stated limit: differences may be losses."))
	}
	if old.PartlyFollowed() || new.PartlyFollowed() {
		p.wrap(2, text(red, "In one of the profiles the probes were in for a part of the time only: what calls hold in use cannot be compared."))
	}
	p.libraryChanges(d.Libraries)
	p.blank()
	if len(d.Rows) == 0 {
		p.line(text(green, "No difference beyond noise"), text(plain, " in %s compared.", plural(d.Compared, "function", "functions")))
	} else {
		p.diffRows(d, new, cmp.Or(opt.Top, 10), cmp.Or(opt.Frames, 8))
	}
	if r := d.Noisiest; r != nil {
		p.wrap(2, text(dim, "largest difference inside the noise: %s %s, which may be chance up to ± %s",
			Sanitize(r.Owner.String()), FormatByteChange(int64(r.Difference)), FormatBytes(uint64(r.Noise))))
	}
	if opt.Profile != "" {
		p.blank()
		p.plainLine("open it: go tool pprof -http=: " + shellQuote(opt.Profile))
	}
	return p.err
}

var perWords = map[string]string{"allocations": "allocations of the call paths both have", "seconds": "seconds", "count": "the counts given"}

func (p *printer) libraryChanges(changes []LibraryChange) {
	p.blank()
	if len(changes) == 0 {
		p.line(text(plain, "The same libraries in the same builds."))
		return
	}
	var onlyOld, onlyNew []string
	headed := false
	for _, c := range changes {
		switch {
		case c.Old == nil:
			onlyNew = append(onlyNew, libraryWords(c.New))
		case c.New == nil:
			onlyOld = append(onlyOld, libraryWords(c.Old))
		default:
			if !headed {
				p.line(text(bold, "Libraries in another build"))
				headed = true
			}
			p.libraryChange(c)
		}
	}
	for _, only := range []struct {
		where string
		names []string
	}{{"only in OLD", onlyOld}, {"only in NEW", onlyNew}} {
		if len(only.names) > 0 {
			p.wrap(4, text(bold, "%s: ", only.where), text(plain, "%s", strings.Join(only.names, ", ")))
		}
	}
}

func (p *printer) libraryChange(c LibraryChange) {
	p.line(text(yellow, "  %s", Sanitize(c.Name)), text(dim, "  %s", Sanitize(pathWords(c))))
	p.line(text(plain, "    OLD %s", libraryDetails(c.Old)))
	p.line(text(plain, "    NEW %s", libraryDetails(c.New)))
}

func pathWords(c LibraryChange) string {
	if c.Old.File == c.New.File {
		return c.Old.File
	}
	return c.Old.File + " -> " + c.New.File
}

func libraryWords(l *Library) string {
	return Sanitize(l.Name) + prefixed(" ", Sanitize(shortID(l.BuildID)))
}

// libraryDetails tells a build: the whole build-id, since it is what one looks up.
func libraryDetails(l *Library) string {
	words := []string{"build " + cmp.Or(Sanitize(l.BuildID), "id unknown")}
	if l.Version != "" {
		words = append(words, Sanitize(l.Version))
	}
	if l.Package != "" {
		words = append(words, Sanitize(l.Package))
	}
	if l.Size > 0 {
		words = append(words, FormatBytes(uint64(l.Size)))
	}
	if !l.ModTime.IsZero() {
		words = append(words, l.ModTime.UTC().Format("2006-01-02 15:04"))
	}
	if l.Replaced {
		words = append(words, "replaced on disk")
	}
	return strings.Join(words, ", ")
}

func (p *printer) diffRows(d *Diff, new *Snapshot, top, frames int) {
	shown := d.Rows[:min(top, len(d.Rows))]
	p.line(text(bold, "Differences in bytes in use"), text(dim, " (%d of %d beyond noise, %d functions compared)", len(shown), len(d.Rows), d.Compared))
	unitWord := map[string]string{"count": "per request", "seconds": "per second"}[d.Per.By]
	for i := range shown {
		r := &shown[i]
		color := green
		if r.Difference > 0 {
			color = red
		}
		perUnit := ""
		if units := d.Units(new); units > 0 {
			perUnit = fmt.Sprintf(" = %s %s", formatFine(r.PerUnit(units)), unitWord)
		}
		kind := ""
		if r.Kind != KindMalloc {
			kind = ", " + Sanitize(string(r.Kind)) + prefixed(" ", Sanitize(r.Label))
		}
		rebuilt := ""
		if r.Rebuilt {
			rebuilt = "  this library changed build"
		}
		p.wrap(5, text(color, "%3d. %s", i+1, FormatByteChange(int64(math.Round(r.Difference)))),
			text(bold, "  %s", Sanitize(r.Owner.String())),
			text(plain, "%s%s", perUnit, kind), text(yellow, "%s", rebuilt))
		p.wrap(7, text(dim, "     OLD %s in %s, NEW %s in %s; expected %s, chance explains ± %s",
			signedBytes(r.Old), blocks(r.OldBlocks), signedBytes(r.New), blocks(r.NewBlocks), signedBytes(int64(r.Expected)), FormatBytes(uint64(r.Noise))))
		if r.Stack != nil {
			p.stackFrames(r.Stack, frames)
		}
	}
}

// formatFine prints a signed size per unit of work in bytes: one compares it with a structure's size in the source.
func formatFine(v float64) string {
	switch size := math.Abs(v); {
	case size >= 1<<20:
		return FormatByteChange(int64(v))
	case size >= 100:
		return map[bool]string{true: "+"}[v > 0] + count(int64(math.Round(v))) + " B"
	}
	return fmt.Sprintf("%+.3g B", v)
}

type diffJSON struct {
	Schema     string              `json:"schema"`
	Old        string              `json:"old"`
	New        string              `json:"new"`
	Per        string              `json:"per"`
	Scale      float64             `json:"scale"`
	Units      float64             `json:"new_units"`
	Libraries  []libraryChangeJSON `json:"libraries"`
	Compared   int                 `json:"functions_compared"`
	Difference bool                `json:"difference_beyond_noise"`
	Rows       []diffRowJSON       `json:"differences"`
}

type libraryChangeJSON struct {
	Name string       `json:"name"`
	Old  *libraryJSON `json:"old,omitempty"`
	New  *libraryJSON `json:"new,omitempty"`
}

type diffRowJSON struct {
	Kind       Kind        `json:"kind"`
	Label      string      `json:"label,omitempty"`
	Owner      ownerJSON   `json:"owner"`
	Old        int64       `json:"old_inuse_bytes"`
	New        int64       `json:"new_inuse_bytes"`
	OldBlocks  int64       `json:"old_inuse_objects"`
	NewBlocks  int64       `json:"new_inuse_objects"`
	Expected   float64     `json:"expected_bytes"`
	Difference float64     `json:"difference_bytes"`
	PerUnit    *float64    `json:"difference_bytes_per_unit,omitempty"`
	Noise      float64     `json:"noise_bytes"`
	Rebuilt    bool        `json:"library_changed_build"`
	Frames     []frameJSON `json:"frames"`
}

// WriteDiffJSON writes a comparison as one JSON document.
func WriteDiffJSON(w io.Writer, d *Diff, new *Snapshot, opt DiffOptions) error {
	units := d.Units(new)
	doc := diffJSON{
		Schema: "allocsnoop/diff/1", Old: opt.OldName, New: opt.NewName, Per: d.Per.By, Scale: d.Scale, Units: units,
		Compared: d.Compared, Difference: len(d.Rows) > 0, Libraries: convert(d.Libraries, changeToJSON),
	}
	doc.Rows = convert(d.Rows, func(r DiffRow) diffRowJSON {
		out := diffRowJSON{
			r.Kind, r.Label, ownerToJSON(r.Owner), r.Old, r.New, r.OldBlocks, r.NewBlocks,
			finite(r.Expected), finite(r.Difference), nil, finite(r.Noise), r.Rebuilt, []frameJSON{},
		}
		if units > 0 {
			per := finite(r.PerUnit(units))
			out.PerUnit = &per
		}
		if r.Stack != nil {
			out.Frames = framesToJSON(r.Stack.Frames)
		}
		return out
	})
	return writeJSON(w, &doc)
}

func changeToJSON(c LibraryChange) libraryChangeJSON {
	out := libraryChangeJSON{Name: c.Name}
	if c.Old != nil {
		l := libraryToJSON(*c.Old)
		out.Old = &l
	}
	if c.New != nil {
		l := libraryToJSON(*c.New)
		out.New = &l
	}
	return out
}

func writeJSON(w io.Writer, doc any) error {
	out := json.NewEncoder(JSONWriter(w))
	out.SetEscapeHTML(false)
	out.SetIndent("", "  ")
	if err := out.Encode(doc); err != nil {
		return fmt.Errorf("write JSON: %w", err)
	}
	return nil
}
