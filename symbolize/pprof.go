package symbolize

import (
	"context"
	"strings"
	"sync"

	pprof "github.com/google/pprof/profile"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Counts says what Profile did.
type Counts struct {
	Locations int // with a mapping
	Named     int // by this call
	Unknown   int // without a name still
}

// Profile completes the locations of any pprof profile, whoever wrote it, that have no source lines yet and whose mapping
// has a build-id. Everything else stays as it is. The only errors are those of ctx.
func (s *Symbolizer) Profile(ctx context.Context, p *pprof.Profile, files FileSource) (Counts, error) {
	var counts Counts
	type key struct{ file, buildID string }
	groups := map[key][]*pprof.Location{}
	for _, l := range p.Location {
		if l.Mapping == nil {
			continue
		}
		counts.Locations++
		if l.Mapping.BuildID == "" {
			if unnamed(l) {
				s.warn("%s has no build-id in this profile: its frames cannot be named", orNone(l.Mapping.File))
			}
			continue
		}
		if wantsNames(l) {
			k := key{l.Mapping.File, strings.ToLower(l.Mapping.BuildID)}
			groups[k] = append(groups[k], l)
		}
	}
	writer := profileWriter{p: p, functions: map[pprof.Function]*pprof.Function{}}
	for _, f := range p.Function {
		writer.lastID = max(writer.lastID, f.ID)
	}
	var wait sync.WaitGroup
	for k, locations := range groups {
		wait.Go(func() {
			m := mappingOf(locations[0].Mapping, k.buildID)
			g := &group{mappings: []*profile.Mapping{m}}
			for _, l := range locations {
				own := mappingOf(l.Mapping, k.buildID)
				g.locations = append(g.locations, &profile.Location{Address: l.Address, Mapping: own})
			}
			s.resolveGroup(ctx, g, files)
			writer.apply(locations, g.locations)
		})
	}
	wait.Wait()
	if err := ctx.Err(); err != nil {
		return counts, err
	}
	counts.Named = writer.named
	for _, l := range p.Location {
		if l.Mapping != nil && unnamed(l) {
			counts.Unknown++
		}
	}
	return counts, nil
}

func mappingOf(m *pprof.Mapping, buildID string) *profile.Mapping {
	return &profile.Mapping{Start: m.Start, Limit: m.Limit, Offset: m.Offset, File: m.File, BuildID: buildID}
}

// unnamed tells locations without a function, or with a name that only says where they are.
func unnamed(l *pprof.Location) bool {
	for _, line := range l.Line {
		if line.Function != nil && line.Function.Name != "" && !isPlace(line.Function.Name) {
			return false
		}
	}
	return true
}

// isPlace tells names like libenc.so+0x1234 and 0x55d0c0de from functions.
func isPlace(name string) bool {
	_, hex, ok := strings.Cut(name, "+0x")
	if !ok {
		hex, ok = strings.CutPrefix(name, "0x")
	}
	return ok && hex != "" && strings.Trim(hex, "0123456789abcdef") == ""
}

// wantsNames tells locations without a source line. Names in brackets are marks of frames that are no functions.
func wantsNames(l *pprof.Location) bool {
	for _, line := range l.Line {
		if line.Line != 0 || line.Function != nil && (line.Function.Filename != "" || strings.HasPrefix(line.Function.Name, "[")) {
			return false
		}
	}
	return true
}

// profileWriter puts lines into a profile.
type profileWriter struct {
	mu        sync.Mutex
	p         *pprof.Profile
	functions map[pprof.Function]*pprof.Function // of this call, by content; ID is 0 in the keys
	lastID    uint64
	named     int
}

func (w *profileWriter) apply(to []*pprof.Location, from []*profile.Location) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, l := range to {
		lines := from[i].Lines
		if len(lines) == 0 {
			continue
		}
		place := isPlace(lines[0].Function)
		if place && len(l.Line) > 0 && lines[0].File == "" {
			continue // nothing new
		}
		if !place {
			w.named++
		}
		l.Line = l.Line[:0]
		for _, line := range lines {
			l.Line = append(l.Line, pprof.Line{Function: w.function(line), Line: int64(line.Line)})
			l.Mapping.HasFilenames = l.Mapping.HasFilenames || line.File != ""
			l.Mapping.HasLineNumbers = l.Mapping.HasLineNumbers || line.Line != 0
		}
		l.Mapping.HasFunctions = true
		l.Mapping.HasInlineFrames = l.Mapping.HasInlineFrames || len(lines) > 1
	}
}

func (w *profileWriter) function(line profile.Line) *pprof.Function {
	key := pprof.Function{Name: line.Function, SystemName: line.SystemName, Filename: line.File, StartLine: int64(line.StartLine)}
	if f := w.functions[key]; f != nil {
		return f
	}
	f := key
	w.lastID++
	f.ID = w.lastID
	w.functions[key] = &f
	w.p.Function = append(w.p.Function, &f)
	return &f
}
