package profile

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	pprof "github.com/google/pprof/profile"
)

// maxProfileBytes bounds a profile in memory, so that a hostile gzip file does not eat the machine.
const maxProfileBytes = 1 << 30

// Read reads a pprof file, gzipped or not.
func Read(r io.Reader) (*Snapshot, error) {
	p, err := Parse(r)
	if err != nil {
		return nil, err
	}
	return Decode(p)
}

// Parse reads a pprof file as such; unlike pprof's own Parse it bounds how much a file may unpack to.
func Parse(r io.Reader) (*pprof.Profile, error) { return parse(r, maxProfileBytes) }

func parse(r io.Reader, limit int64) (*pprof.Profile, error) {
	data, err := readAll(r, 0, limit)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(data, []byte{0x1f, 0x8b}) {
		unzip, err := gzip.NewReader(bytes.NewReader(data))
		if err != nil {
			return nil, fmt.Errorf("unpack profile: %w", err)
		}
		if data, err = readAll(unzip, unpackedSize(data), limit); err != nil {
			return nil, err
		}
	}
	p, err := pprof.ParseData(data)
	if err != nil {
		return nil, fmt.Errorf("parse profile: %w", err)
	}
	return p, nil
}

// readAll reads up to a limit; expected is a guess of how much comes, which saves growing and copying.
func readAll(r io.Reader, expected, limit int64) ([]byte, error) {
	var data bytes.Buffer // doubles where io.ReadAll grows by a quarter, and copies less
	data.Grow(int(min(expected, limit)) + bytes.MinRead)
	if _, err := data.ReadFrom(io.LimitReader(r, limit+1)); err != nil {
		return nil, fmt.Errorf("read profile: %w", err)
	}
	if int64(data.Len()) > limit {
		return nil, fmt.Errorf("read profile: larger than %s", FormatBytes(uint64(limit)))
	}
	return data.Bytes(), nil
}

// unpackedSize is what a gzip file says of itself in its last four bytes, as far as that can be true: deflate makes
// nothing smaller than a 1032nd.
func unpackedSize(file []byte) int64 {
	if len(file) < 18 {
		return 0
	}
	return min(int64(binary.LittleEndian.Uint32(file[len(file)-4:])), 1032*int64(len(file)))
}

// Decode turns a pprof profile into a snapshot: all of it when Encode made the profile and nobody changed it, as much as
// the samples and labels tell when another tool made, merged or filtered it.
func Decode(p *pprof.Profile) (*Snapshot, error) {
	if err := p.CheckValid(); err != nil {
		return nil, fmt.Errorf("decode profile: %w", err)
	}
	columns, err := valueColumns(p)
	if err != nil {
		return nil, err
	}
	records, err := findRecords(p)
	if err != nil {
		return nil, err
	}
	d := &decoder{p: p, columns: columns, locations: make(map[*pprof.Location]*Location, len(p.Location))}
	if len(records) == 1 {
		d.rec = records[0]
		d.intact = d.rec.Samples == len(p.Sample) && d.rec.Sum == sampleSum(p)
	}
	d.begin(records)
	if err := d.stacks(); err != nil {
		return nil, fmt.Errorf("decode the profile's record: %w", err)
	}
	return d.s, nil
}

// stacks fills what the samples tell and what the record tells at the same time: they are different fields.
func (d *decoder) stacks() error {
	stacks := make([]Stack, len(d.p.Sample))
	unpacked := make(chan error, 1)
	if d.intact {
		d.s.HasBlocks = d.rec.HasBlocks
		go func() { unpacked <- d.rec.unpack(stacks) }()
	} else {
		unpacked <- nil
	}
	frames := 0
	for _, sample := range d.p.Sample {
		frames += len(sample.Location)
	}
	room := make([]*Location, 0, frames)
	d.s.Stacks = make([]*Stack, len(stacks))
	for i, sample := range d.p.Sample {
		d.s.Stacks[i] = &stacks[i]
		from := len(room)
		for _, l := range sample.Location {
			room = append(room, d.location(l))
		}
		stacks[i].Frames = room[from:len(room):len(room)]
		d.stack(&stacks[i], sample)
	}
	return <-unpacked
}

// findRecords returns the record of each profile that went into this one.
func findRecords(p *pprof.Profile) ([]*record, error) {
	var out []*record
	for _, c := range p.Comments {
		if packed, ok := strings.CutPrefix(c, packedPrefix); ok && len(out) > 0 {
			out[len(out)-1].packed = packed
		}
		text, ok := strings.CutPrefix(c, recordPrefix)
		if !ok {
			continue
		}
		r := new(record)
		if err := json.Unmarshal([]byte(text), r); err != nil {
			return nil, fmt.Errorf("decode the profile's record: %w", err)
		}
		out = append(out, r)
	}
	return out, nil
}

// valueColumns finds the four figures by name. Heap profiles of jemalloc and tcmalloc have "objects" and "space" (or
// "inuse_..." alone), and nothing about what was freed: then allocated is taken to be what is in use.
func valueColumns(p *pprof.Profile) ([4]int, error) {
	columns := [4]int{-1, -1, -1, -1}
	names := make([]string, 0, len(p.SampleType))
	for i, t := range p.SampleType {
		names = append(names, t.Type+"/"+t.Unit)
		switch t.Type {
		case "alloc_objects":
			columns[valueAllocObjects] = i
		case "alloc_space":
			columns[valueAllocBytes] = i
		case "inuse_objects", "objects":
			columns[valueInUseObjects] = i
		case "inuse_space", "space":
			columns[valueInUseBytes] = i
		}
	}
	if columns[valueAllocBytes] < 0 && columns[valueInUseBytes] < 0 {
		return columns, fmt.Errorf("decode profile: no memory figures in it, only %s", strings.Join(names, ", "))
	}
	return columns, nil
}

type decoder struct {
	p         *pprof.Profile
	s         *Snapshot
	rec       *record // nil when there is none, or several
	intact    bool    // rec's positions and ids belong to this file's tables
	columns   [4]int
	mappings  map[*pprof.Mapping]*Mapping
	locations map[*pprof.Location]*Location
	processes map[int]*Process
}

func (d *decoder) begin(records []*record) {
	switch {
	case d.rec != nil:
		d.s = d.rec.snapshot()
	default:
		d.s = d.foreign()
		for _, r := range records {
			d.s.Processes = append(d.s.Processes, r.snapshot().Processes...)
			d.s.SampleBytes = max(d.s.SampleBytes, r.SampleBytes)
			d.s.LossStated = d.s.LossStated || r.LossLimitExceeded
			d.s.Losses = append(d.s.Losses, r.Losses...)
			d.s.Notes = append(d.s.Notes, r.Notes...)
			if d.s.Windows == nil {
				d.s.Windows = r.snapshot().Windows
			}
		}
	}
	d.processes = map[int]*Process{}
	for _, p := range d.s.Processes {
		d.processes[p.PID] = p
	}
	d.mappings = make(map[*pprof.Mapping]*Mapping, len(d.p.Mapping))
	d.joinMappings()
	if len(d.s.Processes) == 0 && len(d.p.Mapping) > 0 && d.rec == nil {
		d.s.Processes = []*Process{d.foreignProcess()}
		d.processes[0] = d.s.Processes[0]
	}
}

// joinMappings finds the inventory's entry of each mapping: by id while the file is as written, else by what it says.
func (d *decoder) joinMappings() {
	type key struct {
		start, limit, offset uint64
		file, buildID        string
	}
	byID, byKey := map[uint64]*Mapping{}, map[key]*Mapping{}
	for i, p := range d.s.Processes {
		for j, m := range p.Mappings {
			byKey[key{m.Start, m.Limit, m.Offset, m.File, m.BuildID}] = m
			if d.intact {
				byID[d.rec.Processes[i].Mappings[j].ID] = m
			}
		}
	}
	for _, m := range d.p.Mapping {
		k := key{m.Start, m.Limit, m.Offset, m.File, m.BuildID}
		switch {
		case d.intact && byID[m.ID] != nil:
			d.mappings[m] = byID[m.ID]
		case byKey[k] != nil && !d.intact:
			d.mappings[m] = byKey[k]
		default:
			d.mappings[m] = &Mapping{Start: m.Start, Limit: m.Limit, Offset: m.Offset, File: m.File, BuildID: m.BuildID}
		}
	}
}

func (d *decoder) foreign() *Snapshot {
	s := &Snapshot{}
	if d.p.TimeNanos != 0 {
		s.Started = time.Unix(0, d.p.TimeNanos).UTC()
		s.Taken = s.Started.Add(time.Duration(d.p.DurationNanos))
	}
	if t := d.p.PeriodType; t != nil && t.Type == "space" && d.p.Period > 1 {
		s.SampleBytes = uint64(d.p.Period)
	}
	return s
}

// foreignProcess is the one process that a profile without an inventory is about. Its first mapping is the program.
func (d *decoder) foreignProcess() *Process {
	p := &Process{Exe: d.p.Mapping[0].File}
	p.Comm = p.Exe[strings.LastIndexByte(p.Exe, '/')+1:]
	for _, m := range d.p.Mapping {
		p.Mappings = append(p.Mappings, d.mappings[m])
	}
	return p
}

func (d *decoder) stack(stack *Stack, sample *pprof.Sample) {
	value := func(column int) int64 {
		if d.columns[column] < 0 {
			return 0
		}
		return sample.Value[d.columns[column]]
	}
	inUseObjects, inUseBytes := value(valueInUseObjects), value(valueInUseBytes)
	stack.Kind, stack.AllocObjects, stack.AllocBytes = KindMalloc, value(valueAllocObjects), value(valueAllocBytes)
	if d.columns[valueAllocBytes] < 0 {
		stack.AllocObjects, stack.AllocBytes = inUseObjects, inUseBytes
	}
	stack.FreeObjects, stack.FreeBytes = stack.AllocObjects-inUseObjects, stack.AllocBytes-inUseBytes
	if d.intact || len(sample.Label["kind"]) > 0 {
		stack.Kind = Kind(firstOf(sample.Label["kind"]))
	}
	if d.intact {
		return // the record tells the rest
	}
	stack.Complete = !endsCut(stack.Frames)
	stack.PID = d.processOf(sample)
}

func endsCut(frames []*Location) bool {
	return len(frames) > 0 && strings.HasPrefix(frames[len(frames)-1].Mark, "[truncated")
}

// processOf reads the labels, and adds the process when the inventory does not know it.
func (d *decoder) processOf(sample *pprof.Sample) int {
	pid, err := strconv.Atoi(firstOf(sample.Label["pid"]))
	if err != nil {
		if len(d.s.Processes) > 0 {
			return d.s.Processes[0].PID
		}
		return 0
	}
	if d.processes[pid] == nil {
		p := &Process{PID: pid, Comm: firstOf(sample.Label["comm"]), Container: firstOf(sample.Label["container"])}
		d.processes[pid] = p
		d.s.Processes = append(d.s.Processes, p)
	}
	return pid
}

func (d *decoder) location(l *pprof.Location) *Location {
	if done, ok := d.locations[l]; ok {
		return done
	}
	out := &Location{Address: l.Address, Mapping: d.mappings[l.Mapping]}
	lines := l.Line
	if mark, ok := d.mark(l); ok {
		out.Mark, lines = mark, lines[:len(lines)-1]
	}
	for _, line := range lines {
		out.Lines = append(out.Lines, Line{
			line.Function.Name, line.Function.SystemName, line.Function.Filename, int(line.Line), int(line.Function.StartLine),
		})
	}
	d.locations[l] = out
	return out
}

// mark tells whether the location's last line is a mark; in a changed file only its looks tell.
func (d *decoder) mark(l *pprof.Location) (string, bool) {
	if len(l.Line) == 0 {
		return "", false
	}
	if d.intact {
		mark, ok := d.rec.Marks[l.ID]
		return mark, ok
	}
	f := l.Line[len(l.Line)-1].Function
	plain := f.Filename == "" && f.SystemName == ""
	return f.Name, plain && strings.HasPrefix(f.Name, "[") && strings.HasSuffix(f.Name, "]")
}

func firstOf(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}
