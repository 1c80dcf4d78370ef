package profile

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"strconv"
	"strings"
	"time"

	pprof "github.com/google/pprof/profile"
)

// The order of the values in every sample.
const (
	valueAllocObjects = iota
	valueAllocBytes
	valueInUseObjects
	valueInUseBytes
)

var sampleTypes = []pprof.ValueType{
	{Type: "alloc_objects", Unit: "count"},
	{Type: "alloc_space", Unit: "bytes"},
	{Type: "inuse_objects", Unit: "count"},
	{Type: "inuse_space", Unit: "bytes"},
}

// recordPrefix opens the comment that carries what pprof cannot hold. pprof prints every comment above every report,
// except those that begin with '#'.
const recordPrefix = "#allocsnoop/1 "

// packedPrefix opens the comment after it: what the record knows of each sample, in base64. As a part of the JSON it would
// be most of the time that a large profile takes to open.
const packedPrefix = "#allocsnoop-stacks/1 "

// record is that comment's content.
type record struct {
	documentHead
	// Samples and Sum tell whether Marks, mapping ids and the packed stacks still belong to the file's tables: tools that filter or
	// merge profiles keep comments as they are.
	Samples int               `json:"samples"`
	Sum     string            `json:"sum"`
	Marks   map[uint64]string `json:"marks"` // by location id
	Labels  []string          `json:"labels"`
	// Contents are those of the samples that have any, by position. Blocks packs the blocks of all samples.
	Contents  map[int][]Content `json:"contents,omitempty"`
	HasBlocks bool              `json:"has_blocks,omitempty"`
	Blocks    []byte            `json:"blocks,omitempty"`

	stacks []byte // while it is made
	packed string // as it was read
}

// Write writes the snapshot as a gzipped pprof file.
func Write(w io.Writer, s *Snapshot) error {
	p, err := Encode(s)
	if err != nil {
		return err
	}
	if err := p.Write(w); err != nil {
		return fmt.Errorf("write profile: %w", err)
	}
	return nil
}

// Encode turns a snapshot into a pprof profile from which Decode gets all of it back. Stacks that did nothing are dropped.
func Encode(s *Snapshot) (*pprof.Profile, error) {
	e := newEncoder(s)
	for _, stack := range s.Stacks {
		if stack.AllocObjects|stack.AllocBytes|stack.FreeObjects|stack.FreeBytes != 0 {
			e.add(stack)
		}
	}
	if err := e.comment(s); err != nil {
		return nil, err
	}
	if err := e.p.CheckValid(); err != nil {
		return nil, fmt.Errorf("encode profile: %w", err)
	}
	return e.p, nil
}

type encoder struct {
	p         *pprof.Profile
	record    record
	labels    map[int]map[string][]string // by pid, without kind
	mappings  map[*Mapping]*pprof.Mapping
	locations map[*Location]*pprof.Location
	functions map[Line]*pprof.Function
}

func newEncoder(s *Snapshot) *encoder {
	e := &encoder{
		p: &pprof.Profile{
			DefaultSampleType: "inuse_space",
			PeriodType:        &pprof.ValueType{Type: "space", Unit: "bytes"},
			Period:            int64(max(s.SampleBytes, 1)),
			DurationNanos:     s.Duration().Nanoseconds(),
		},
		record: record{
			documentHead: headOf(s), Marks: map[uint64]string{}, Labels: []string{}, Contents: map[int][]Content{}, HasBlocks: s.HasBlocks,
		},
		labels:    processLabels(s.Processes),
		mappings:  map[*Mapping]*pprof.Mapping{},
		locations: map[*Location]*pprof.Location{},
		functions: map[Line]*pprof.Function{},
	}
	if !s.Started.IsZero() {
		e.p.TimeNanos = s.Started.UnixNano()
	}
	for _, t := range sampleTypes {
		e.p.SampleType = append(e.p.SampleType, &t)
	}
	// pprof takes the first mapping for the program.
	if main := mainMapping(s.Processes); main != nil {
		e.mapping(main)
	}
	return e
}

func mainMapping(processes []*Process) *Mapping {
	for _, p := range processes {
		for _, m := range p.Mappings {
			if m.File == p.Exe && m.File != "" {
				return m
			}
		}
	}
	return nil
}

// processLabels names what tells the processes apart, and nothing where there is only one.
func processLabels(processes []*Process) map[int]map[string][]string {
	pids, comms, containers := map[int]bool{}, map[string]bool{}, map[string]bool{}
	for _, p := range processes {
		pids[p.PID], comms[p.Comm], containers[p.Container] = true, true, true
	}
	labels := make(map[int]map[string][]string, len(processes))
	for _, p := range processes {
		of := map[string][]string{}
		if len(pids) > 1 {
			of["pid"] = []string{strconv.Itoa(p.PID)}
		}
		if len(comms) > 1 {
			of["comm"] = []string{valid(p.Comm)}
		}
		if len(containers) > 1 && p.Container != "" {
			of["container"] = []string{valid(p.Container)}
		}
		labels[p.PID] = of
	}
	return labels
}

func (e *encoder) add(stack *Stack) {
	sample := &pprof.Sample{
		Value: []int64{stack.AllocObjects, stack.AllocBytes, stack.InUseObjects(), stack.InUseBytes()},
		Label: map[string][]string{"kind": {valid(string(stack.Kind))}},
	}
	for name, value := range e.labels[stack.PID] {
		sample.Label[name] = value
	}
	for _, frame := range stack.Frames {
		sample.Location = append(sample.Location, e.location(frame))
	}
	if len(stack.Content) > 0 {
		sample.Label["content"] = []string{valid(stack.Content[0].Shape)}
		e.record.Contents[len(e.p.Sample)] = stack.Content
	}
	e.p.Sample = append(e.p.Sample, sample)

	e.record.pack(stack)
	if e.record.HasBlocks {
		e.record.Blocks = packBlocks(e.record.Blocks, stack.Blocks)
	}
}

func (e *encoder) location(l *Location) *pprof.Location {
	if done, ok := e.locations[l]; ok {
		return done
	}
	out := &pprof.Location{ID: uint64(len(e.p.Location) + 1), Address: l.Address, Mapping: e.mapping(l.Mapping)}
	for i, line := range l.Lines {
		out.Line = append(out.Line, pprof.Line{Function: e.function(line), Line: int64(line.Line)})
		if m := out.Mapping; m != nil {
			m.HasFunctions = m.HasFunctions || line.Function != ""
			m.HasFilenames = m.HasFilenames || line.File != ""
			m.HasLineNumbers = m.HasLineNumbers || line.Line != 0
			m.HasInlineFrames = m.HasInlineFrames || i > 0
		}
	}
	if l.Mark != "" {
		e.record.Marks[out.ID] = l.Mark
		out.Line = append(out.Line, pprof.Line{Function: e.function(Line{Function: l.Mark})})
	}
	e.p.Location = append(e.p.Location, out)
	e.locations[l] = out
	return out
}

func (e *encoder) mapping(m *Mapping) *pprof.Mapping {
	if m == nil {
		return nil
	}
	if done, ok := e.mappings[m]; ok {
		return done
	}
	out := &pprof.Mapping{
		ID: uint64(len(e.p.Mapping) + 1), Start: m.Start, Limit: m.Limit, Offset: m.Offset,
		File: valid(m.File), BuildID: valid(m.BuildID),
	}
	e.p.Mapping = append(e.p.Mapping, out)
	e.mappings[m] = out
	return out
}

func (e *encoder) function(l Line) *pprof.Function {
	l.Line = 0
	if done, ok := e.functions[l]; ok {
		return done
	}
	out := &pprof.Function{
		ID: uint64(len(e.p.Function) + 1), Name: valid(l.Function), SystemName: valid(l.SystemName),
		Filename: valid(l.File), StartLine: int64(l.StartLine),
	}
	e.p.Function = append(e.p.Function, out)
	e.functions[l] = out
	return out
}

func (e *encoder) comment(s *Snapshot) error {
	e.p.Comments = humanComments(s)
	for i, p := range s.Processes {
		for j, m := range p.Mappings {
			if used, ok := e.mappings[m]; ok {
				e.record.Processes[i].Mappings[j].ID = used.ID
			}
		}
	}
	e.record.Samples, e.record.Sum = len(e.p.Sample), sampleSum(e.p)
	text, err := json.Marshal(&e.record)
	if err != nil {
		return fmt.Errorf("encode the profile's record: %w", err)
	}
	e.p.Comments = append(e.p.Comments, recordPrefix+string(text), packedPrefix+base64.StdEncoding.EncodeToString(e.record.stacks))
	return nil
}

// humanComments are what `go tool pprof -comments` shows. What a reader of any report must know stands without a '#'.
func humanComments(s *Snapshot) []string {
	var out []string
	put := func(format string, args ...any) { out = append(out, Sanitize(fmt.Sprintf(format, args...))) }
	if s.Command != "" {
		put("Command: %s", s.Command)
	}
	if s.SampleBytes > 0 {
		put("Sampled: one block per %s on average, figures are estimates", FormatBytes(s.SampleBytes))
	}
	if s.LossStated {
		put("INCOMPLETE: losses exceed the stated limit")
	}
	for _, c := range s.Losses {
		put("Lost: %d %s%s", c.Count, c.Name, prefixed(": ", c.Meaning))
	}
	for _, note := range s.Notes {
		put("Note: %s", note)
	}
	for _, c := range s.Unwind {
		put("# stacks ending %s: %d", c.Name, c.Count)
	}
	for _, p := range s.Processes {
		put("# process %d %s %s%s", p.PID, p.Comm, p.Exe, prefixed(", ", p.Exit))
	}
	for _, p := range s.Probes {
		put("# probe %s+%#x in %s (build-id %s): %d hits", p.Function, p.Offset, p.File, p.BuildID, p.Hits)
	}
	for _, e := range s.Events {
		put("# at %s: %s", e.At.Round(time.Millisecond), e.Text)
	}
	return out
}

// prefixed is prefix and text, or nothing without a text.
func prefixed(prefix, text string) string {
	if text == "" {
		return ""
	}
	return prefix + text
}

// sampleSum is a checksum of the values and the frames of all samples.
func sampleSum(p *pprof.Profile) string {
	h := fnv.New64a()
	var word [8]byte
	put := func(v uint64) {
		binary.LittleEndian.PutUint64(word[:], v)
		h.Write(word[:])
	}
	for _, s := range p.Sample {
		for _, v := range s.Value {
			put(uint64(v))
		}
		for _, l := range s.Location {
			put(l.ID)
		}
		put(1 << 63)
	}
	return fmt.Sprintf("%016x", h.Sum64())
}

// valid replaces bytes that are no UTF-8: readers with a strict protobuf library refuse the whole file for one of them.
func valid(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
