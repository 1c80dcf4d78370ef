package bench

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// compareTable prints a line a contender: the median, the ratio to its own baseline, and, when reference names one, the
// share of that contender's price.
func compareTable(all []series, unit, reference string) string {
	var text strings.Builder
	head, line := "| | "+unit+" | ratio to its baseline | spread of the ratio |", "|---|---|---|---|"
	if reference != "" {
		head, line = head+" of "+reference+" |", line+"---|"
	}
	fmt.Fprintf(&text, "%s\n%s\n", head, line)
	for _, s := range all {
		if len(s.values) == 0 {
			fmt.Fprintf(&text, "| %s | %s |\n", s.name, cell(s.note))
			continue
		}
		fmt.Fprintf(&text, "| %s | %s |", s.name, figure(median(s.values)))
		if base := find(all, s.baseline); base != nil {
			r := ratios(s.values, base.values)
			fmt.Fprintf(&text, " %.3g x %s | %s |", median(r), s.baseline, spread(r, "%.3g"))
		} else {
			text.WriteString(" | |")
		}
		if ref := find(all, reference); ref != nil && reference != "" {
			fmt.Fprintf(&text, " %.3g |", median(ratios(s.values, ref.values)))
		}
		text.WriteString("\n")
	}
	return text.String()
}

// goal is a ratio that the project has set itself.
type goal struct {
	what   string
	ratios []float64
	limit  float64
	least  bool // else most
}

func atMost(what string, all []series, name, reference string, limit float64) goal {
	g := goal{what: what, limit: limit}
	if s, ref := find(all, name), find(all, reference); s != nil && ref != nil {
		g.ratios = ratios(s.values, ref.values)
	}
	return g
}

func atLeast(what string, all []series, name, reference string, limit float64) goal {
	g := atMost(what, all, name, reference, limit)
	g.least = true
	return g
}

// String says what was measured and whether that is what was wanted.
func (g goal) String() string {
	if len(g.ratios) == 0 {
		return g.what + ": not measured"
	}
	got, word := median(g.ratios), "at most"
	met := got <= g.limit
	if g.least {
		word, met = "at least", got >= g.limit
	}
	verdict := "**missed**"
	if met {
		verdict = "met"
	}
	return fmt.Sprintf("%s: %.3g (%s), goal %s %.3g: %s", g.what, got, spread(g.ratios, "%.3g"), word, g.limit, verdict)
}

// goals is a list of them in the document.
func goals(list []goal) string {
	var text strings.Builder
	for _, g := range list {
		fmt.Fprintf(&text, "- %s\n", g)
	}
	return text.String()
}

func writeAxisRow(text *strings.Builder, label string, all []series) {
	if len(all[1].values) == 0 || len(all[0].values) == 0 {
		fmt.Fprintf(text, "| %s | %s |\n", label, cell(all[0].note+all[1].note))
		return
	}
	r := ratios(all[1].values, all[0].values)
	fmt.Fprintf(text, "| %s | %s | %s | %.3g | %s |\n", label, figure(median(all[0].values)), figure(median(all[1].values)),
		median(r), spread(r, "%.3g"))
}

func find(all []series, name string) *series {
	for i := range all {
		if all[i].name == name && len(all[i].values) > 0 {
			return &all[i]
		}
	}
	return nil
}

func spread(values []float64, format string) string {
	if len(values) == 0 {
		return ""
	}
	return fmt.Sprintf(format+" to "+format, slices.Min(values), slices.Max(values))
}

// figure prints three digits, thousands in full.
func figure(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

// cell makes foreign text fit into one cell of a table.
func cell(text string) string {
	text = strings.NewReplacer("|", "/", "\n", " ").Replace(text)
	return text[:min(len(text), 120)]
}

// Machine says where and when a section was measured.
func Machine() string {
	var name unix.Utsname
	_ = unix.Uname(&name)
	cpu := "unknown CPU"
	info, _ := os.ReadFile("/proc/cpuinfo")
	count := 0
	for line := range strings.Lines(string(info)) {
		key, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(key) {
		case "model name":
			cpu = strings.TrimSpace(value)
		case "processor":
			count++
		}
	}
	return fmt.Sprintf("%s, Linux %s, %d x %s", time.Now().UTC().Format(time.DateOnly), unix.ByteSliceToString(name.Release[:]), count, cpu)
}

func markers(name string) (begin, end string) {
	return "<!-- bench " + name + " -->", "<!-- end of bench " + name + " -->"
}

// Update replaces the section in the document, between its markers, or appends it. What stands around is left alone.
func Update(path string, s Section) error {
	text, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.WriteFile(path, []byte(replaceSection(string(text), s, Machine())), 0o644)
}

func replaceSection(document string, s Section, machine string) string {
	begin, end := markers(s.Name)
	fresh := fmt.Sprintf("%s\n## %s\n\nMeasured %s.\n\n%s\n%s", begin, s.Title, machine, strings.TrimSpace(s.Text), end)
	before, rest, found := strings.Cut(document, begin)
	if !found {
		return strings.TrimRight(document, "\n") + "\n\n" + fresh + "\n"
	}
	_, after, _ := strings.Cut(rest, end)
	return before + fresh + after
}
