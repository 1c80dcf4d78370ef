package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/allocator"
	"github.com/allocsnoop/allocsnoop/tracer/kernel"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// doctorReport is the document of doctor --json.
type doctorReport struct {
	Schema  string         `json:"schema"` // allocsnoop/doctor/1
	Able    bool           `json:"able"`   // tracing is possible
	Machine []kernel.Check `json:"machine"`
	Process *doctorProcess `json:"process,omitempty"`
}

type doctorProcess struct {
	PID     int                      `json:"pid"`
	Comm    string                   `json:"comm"`
	InForce string                   `json:"in_force"` // the allocator that malloc reaches
	Probes  []doctorProbe            `json:"probes"`
	Skipped []allocator.SkippedProbe `json:"skipped"`
	// NoUnwind are the mapped files that do not say how to unwind their stacks.
	NoUnwind []string `json:"no_unwind"`
	Notes    []string `json:"notes"`
}

type doctorProbe struct {
	File        string   `json:"file"`
	BuildID     string   `json:"build_id"`
	Family      string   `json:"family"`
	Functions   []string `json:"functions"`
	Kind        string   `json:"kind"`
	Operation   string   `json:"operation"`
	EntryOffset uint64   `json:"entry_offset"` // in the file
	allocator.Placement
}

func newDoctorCommand() *cobra.Command {
	var asJSON bool
	var own ownFunctions
	cmd := &cobra.Command{
		Use:   "doctor [PID]",
		Short: "Say what this machine offers for tracing, and what would be probed in a process",
		Long: `Without PID: what the kernel, the rights and the mounts offer, with a way out where something is
missing. With PID: the allocators in the process's files, each function's probe (its offset from the
entry, the instruction there, whether the kernel emulates or single-steps it, and why there), what
needs no probe and what cannot be seen. Nothing is attached.

The exit code is 1 when something essential for tracing is missing.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErrorf("doctor takes one PID, not %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			report := doctorReport{Schema: "allocsnoop/doctor/1", Machine: kernel.Machine{}.Checks()}
			report.Able = kernel.Able(report.Machine)
			if len(args) == 1 {
				definitions, err := own.definitions()
				if err != nil {
					return &exitError{exitUsage, err}
				}
				if report.Process, err = examine(args[0], definitions); err != nil {
					return err
				}
			}
			if err := printDoctor(cmd.OutOrStdout(), &report, asJSON); err != nil {
				return err
			}
			if !report.Able {
				return &exitError{code: exitFailed}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	own.addFlags(cmd)
	return cmd
}

func examine(arg string, definitions []allocator.Definition) (*doctorProcess, error) {
	pid, err := strconv.Atoi(arg)
	if err != nil || pid <= 0 {
		return nil, usageErrorf("%q is not a process id", arg)
	}
	// The rules of a trace, so that doctor tells where its probes would be.
	scanner := &allocator.Scanner{
		Rules: allocator.Rules{LongNops: kernel.EmulatesLongNops(), RAX: true}, Definitions: definitions,
	}
	files, err := scanner.Files(pid)
	if err != nil {
		return nil, err
	}
	plan := allocator.Select(files)
	p := &doctorProcess{
		PID: pid, Comm: memory.FS{}.State(pid).Comm, InForce: plan.InForce,
		Probes: []doctorProbe{}, NoUnwind: []string{},
		Skipped: append([]allocator.SkippedProbe{}, plan.Skipped...), Notes: append([]string{}, plan.Notes...), // never null
	}
	for _, probe := range plan.Probes {
		p.Probes = append(p.Probes, doctorProbe{
			File: probe.Path, BuildID: probe.BuildID, Family: string(probe.Family), Functions: probe.Names(),
			Kind: string(probe.Kind), Operation: probe.Op.String(), EntryOffset: probe.Offset, Placement: probe.Place,
		})
	}
	for _, f := range files {
		if f.File != nil && !f.File.Unwind {
			p.NoUnwind = append(p.NoUnwind, f.Path)
		}
	}
	return p, nil
}

func printDoctor(w io.Writer, report *doctorReport, asJSON bool) error {
	if asJSON {
		out := json.NewEncoder(profile.JSONWriter(w))
		out.SetIndent("", "  ")
		return out.Encode(report)
	}
	if report.Process == nil || !report.Able {
		printMachine(w, report)
	}
	if report.Process != nil {
		printExamined(w, report.Process)
	}
	return nil
}

func printMachine(w io.Writer, report *doctorReport) {
	for _, c := range report.Machine {
		printWrapped(w, fmt.Sprintf("%-8s %-16s ", c.State, c.Name), []string{profile.Sanitize(c.Detail)})
		if c.Fix != "" {
			printWrapped(w, strings.Repeat(" ", 25)+"-> ", []string{c.Fix})
		}
	}
	if report.Able {
		fmt.Fprintln(w, "\ntracing works on this machine; doctor PID tells about a process")
		return
	}
	fmt.Fprintln(w, "\ntracing does not work on this machine: see what is missing above")
}

func printExamined(w io.Writer, p *doctorProcess) {
	inForce := p.InForce
	if inForce == "" {
		inForce = "no known allocator"
	}
	fmt.Fprintf(w, "pid %d (%s): %s in force\n", p.PID, profile.Sanitize(p.Comm), profile.Sanitize(inForce))
	for start := 0; start < len(p.Probes); {
		end := start
		for end < len(p.Probes) && p.Probes[end].File == p.Probes[start].File {
			end++
		}
		printFileProbes(w, p.Probes[start:end])
		start = end
	}
	printSkipped(w, p.Skipped)
	if len(p.NoUnwind) > 0 {
		fmt.Fprintln(w, "\nno unwind table, stacks end there:")
		for _, file := range p.NoUnwind {
			fmt.Fprintf(w, "  %s\n", profile.Sanitize(file))
		}
	}
	if len(p.Notes) > 0 {
		fmt.Fprintln(w, "\nnote:")
		for _, note := range p.Notes {
			printWrapped(w, "  ", []string{profile.Sanitize(note)})
		}
	}
}

// printFileProbes prints the probes of one file, and below the table why those that are not at a cheap place are where
// they are.
func printFileProbes(w io.Writer, probes []doctorProbe) {
	id := cmp.Or(probes[0].BuildID, "none")
	fmt.Fprintf(w, "\n%s\n  %s, build-id %s\n", profile.Sanitize(probes[0].File), probes[0].Family, id)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "  FUNCTION\tPROBE AT\tINSTRUCTION\tKERNEL\tKIND")
	reasons := map[string][]string{}
	moved := false
	for _, p := range probes {
		moved = moved || p.Offset > 0
		how := "steps it"
		if p.Emulated {
			how = "emulates"
		}
		fmt.Fprintf(table, "  %s\t+%d\t%s\t%s\t%s\n", shorten(names(p.Functions), 44), p.Offset,
			shorten(p.Instruction, 26), how, profile.Sanitize(p.Kind))
		if !p.Emulated {
			reasons[p.Why] = append(reasons[p.Why], p.Functions[0])
		}
	}
	table.Flush()
	if moved {
		fmt.Fprintln(w, "  (+N: the first instruction that is emulated and that every call passes with its arguments)")
	}
	for _, why := range sortedKeys(reasons) {
		printWrapped(w, "  ", []string{profile.Sanitize(strings.Join(reasons[why], ", ") + ": " + why)})
	}
}

func names(functions []string) string {
	if len(functions) <= 2 {
		return profile.Sanitize(strings.Join(functions, ", "))
	}
	return profile.Sanitize(fmt.Sprintf("%s, %s and %d more", functions[0], functions[1], len(functions)-2))
}

func shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	return s[:limit-3] + "..."
}

// printSkipped groups what needs no probe by file and reason.
func printSkipped(w io.Writer, skipped []allocator.SkippedProbe) {
	if len(skipped) == 0 {
		return
	}
	fmt.Fprintln(w, "\nno probe needed:")
	for start := 0; start < len(skipped); {
		reasons := map[string][]string{}
		file := skipped[start].Path
		for ; start < len(skipped) && skipped[start].Path == file; start++ {
			s := skipped[start]
			reasons[s.Why] = append(reasons[s.Why], s.Name)
		}
		fmt.Fprintf(w, "  %s\n", profile.Sanitize(file))
		for _, why := range sortedKeys(reasons) {
			printWrapped(w, "    ", []string{profile.Sanitize(why) + ": " + strings.Join(reasons[why], ", ")})
		}
	}
}

// printWrapped prints words behind an indent, in lines of at most 100 columns. Items are kept apart by commas.
func printWrapped(w io.Writer, indent string, items []string) {
	const width = 100
	line := indent
	blank := strings.Repeat(" ", len(indent))
	for _, word := range strings.Fields(strings.Join(items, ", ")) {
		if len(line) > len(indent) && len(line)+1+len(word) > width {
			fmt.Fprintln(w, line)
			line = blank
		}
		if len(line) > len(indent) {
			line += " "
		}
		line += profile.Sanitize(word)
	}
	fmt.Fprintln(w, line)
}

func sortedKeys(m map[string][]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
