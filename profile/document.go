package profile

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// The types of this file are the JSON form of a Snapshot without its stacks. The summary (--json) and the machine-readable
// comment of a profile share them; docs/json.md describes each field. Names are a contract: add, never rename.

// seconds is a duration that JSON shows as a decimal number of seconds, exact to the nanosecond.
type seconds time.Duration

func (s seconds) MarshalJSON() ([]byte, error) {
	n, sign := uint64(s), ""
	if s < 0 {
		n, sign = -n, "-"
	}
	whole, fraction := n/1e9, n%1e9
	text := sign + strconv.FormatUint(whole, 10)
	if fraction != 0 {
		text += strings.TrimRight(fmt.Sprintf(".%09d", fraction), "0")
	}
	return []byte(text), nil
}

func (s *seconds) UnmarshalJSON(data []byte) error {
	text := string(data)
	if strings.ContainsAny(text, "eE") { // no writer of ours does, but it is a JSON number
		f, err := strconv.ParseFloat(text, 64)
		if err != nil || math.Abs(f) > math.MaxInt64/1e9 {
			return fmt.Errorf("parse seconds %q: out of range", text)
		}
		*s = seconds(math.Round(f * 1e9))
		return nil
	}
	whole, fraction, _ := strings.Cut(text, ".")
	if len(fraction) > 9 {
		fraction = fraction[:9]
	}
	n, err := strconv.ParseInt(whole+fraction+strings.Repeat("0", 9-len(fraction)), 10, 64)
	if err != nil {
		return fmt.Errorf("parse seconds %q: %w", text, err)
	}
	*s = seconds(n)
	return nil
}

var (
	_ json.Marshaler   = seconds(0)
	_ json.Unmarshaler = (*seconds)(nil)
)

type documentHead struct {
	Command           string        `json:"command"`
	Started           time.Time     `json:"started,omitzero"`
	Taken             time.Time     `json:"taken,omitzero"`
	Duration          seconds       `json:"duration_seconds"`
	Mode              string        `json:"mode"`
	SampleBytes       uint64        `json:"sample_bytes"`
	Processes         []processJSON `json:"processes"`
	Losses            []Counter     `json:"losses"`
	LossLimitExceeded bool          `json:"loss_limit_exceeded"`
	Notes             []string      `json:"notes"`
	PreAttach         preAttachJSON `json:"pre_attach"`
	Unwind            []Counter     `json:"unwind"`
	Probes            []probeJSON   `json:"probes"`
	Events            []eventJSON   `json:"events"`
	Overhead          *overheadJSON `json:"overhead,omitempty"`
	Windows           *windowsJSON  `json:"windows,omitempty"`
	RSS               *rssJSON      `json:"rss,omitempty"`
}

type processJSON struct {
	PID       int           `json:"pid"`
	Comm      string        `json:"comm"`
	Exe       string        `json:"exe"`
	Container string        `json:"container,omitempty"`
	Started   time.Time     `json:"started,omitzero"`
	Exited    bool          `json:"exited"`
	Exit      string        `json:"exit,omitempty"`
	Mappings  []mappingJSON `json:"mappings"`
}

type mappingJSON struct {
	ID       uint64    `json:"id,omitempty"` // of the mapping in the pprof file; only inside one
	Start    uint64    `json:"start"`
	Limit    uint64    `json:"limit"`
	Offset   uint64    `json:"offset"`
	File     string    `json:"file"`
	BuildID  string    `json:"build_id,omitempty"`
	Replaced bool      `json:"replaced,omitempty"`
	Size     int64     `json:"size,omitempty"`
	ModTime  time.Time `json:"mod_time,omitzero"`
	Version  string    `json:"version,omitempty"`
}

type preAttachJSON struct {
	Frees        uint64 `json:"frees"`
	Reallocs     uint64 `json:"reallocs"`
	ReallocBytes uint64 `json:"realloc_bytes"`
	Inherited    uint64 `json:"inherited"`
}

type probeJSON struct {
	Function string `json:"function"`
	File     string `json:"file"`
	BuildID  string `json:"build_id,omitempty"`
	Offset   uint64 `json:"offset"`
	Hits     uint64 `json:"hits"`
	Emulated bool   `json:"emulated"`
}

type eventJSON struct {
	At   seconds `json:"at_seconds"`
	Text string  `json:"text"`
}

type overheadJSON struct {
	Hits        uint64  `json:"hits"`
	CostPerHit  seconds `json:"cost_per_hit_seconds"`
	CPUFraction float64 `json:"cpu_fraction"`
	Budget      float64 `json:"budget"`
	TargetCPU   seconds `json:"target_cpu_seconds"`
	TracerCPU   seconds `json:"tracer_cpu_seconds"`
	TracerRSS   uint64  `json:"tracer_rss_bytes"`
	MapBytes    uint64  `json:"map_bytes"`
}

type windowsJSON struct {
	Count int     `json:"count"`
	In    seconds `json:"in_seconds"`
	Of    seconds `json:"of_seconds"`
}

type rssJSON struct {
	Before        map[string]uint64 `json:"before"`
	After         map[string]uint64 `json:"after"`
	AllocatorFree *int64            `json:"allocator_free_change_bytes,omitempty"`
}

func headOf(s *Snapshot) documentHead {
	head := documentHead{
		Command:           s.Command,
		Started:           s.Started.UTC(),
		Taken:             s.Taken.UTC(),
		Duration:          seconds(s.Duration()),
		Mode:              s.Mode,
		SampleBytes:       s.SampleBytes,
		Losses:            orEmpty(s.Losses),
		LossLimitExceeded: s.LossStated,
		Notes:             orEmpty(s.Notes),
		PreAttach:         preAttachJSON(s.PreAttach),
		Unwind:            orEmpty(s.Unwind),
		Processes:         convert(s.Processes, processToJSON),
		Probes:            convert(s.Probes, func(p Probe) probeJSON { return probeJSON(p) }),
		Events:            convert(s.Events, func(e Event) eventJSON { return eventJSON{seconds(e.At), e.Text} }),
	}
	if o := s.Overhead; o != nil {
		head.Overhead = &overheadJSON{
			o.Hits, seconds(o.CostPerHit), finite(o.CPUFraction), finite(o.Budget),
			seconds(o.TargetCPU), seconds(o.TracerCPU), o.TracerRSS, o.MapBytes,
		}
	}
	if w := s.Windows; w != nil {
		head.Windows = &windowsJSON{w.Count, seconds(w.In), seconds(w.Of)}
	}
	if r := s.RSS; r != nil {
		head.RSS = (*rssJSON)(r)
	}
	return head
}

// snapshot is the way back; stacks are left to the caller.
func (h *documentHead) snapshot() *Snapshot {
	s := &Snapshot{
		Command: h.Command,
		Started: h.Started,
		Taken:   h.Taken,
		Mode:    h.Mode, SampleBytes: h.SampleBytes,
		Losses:     h.Losses,
		LossStated: h.LossLimitExceeded,
		Notes:      h.Notes,
		PreAttach:  PreAttach(h.PreAttach),
		Unwind:     h.Unwind,
		Processes:  convert(h.Processes, processFromJSON),
		Probes:     convert(h.Probes, func(p probeJSON) Probe { return Probe(p) }),
		Events:     convert(h.Events, func(e eventJSON) Event { return Event{time.Duration(e.At), e.Text} }),
		RSS:        (*RSSChange)(h.RSS),
	}
	if o := h.Overhead; o != nil {
		s.Overhead = &Overhead{
			o.Hits, time.Duration(o.CostPerHit), o.CPUFraction, o.Budget,
			time.Duration(o.TargetCPU), time.Duration(o.TracerCPU), o.TracerRSS, o.MapBytes,
		}
	}
	if w := h.Windows; w != nil {
		s.Windows = &Windows{w.Count, time.Duration(w.In), time.Duration(w.Of)}
	}
	return s
}

func processToJSON(p *Process) processJSON {
	return processJSON{
		p.PID, p.Comm, p.Exe, p.Container, p.Started.UTC(), p.Exited, p.Exit,
		convert(p.Mappings, func(m *Mapping) mappingJSON {
			return mappingJSON{0, m.Start, m.Limit, m.Offset, m.File, m.BuildID, m.Replaced, m.Size, m.ModTime.UTC(), m.Version}
		}),
	}
}

func processFromJSON(p processJSON) *Process {
	return &Process{
		p.PID, p.Comm, p.Exe, p.Container, p.Started, p.Exited, p.Exit,
		convert(p.Mappings, func(m mappingJSON) *Mapping {
			return &Mapping{m.Start, m.Limit, m.Offset, m.File, m.BuildID, m.Replaced, m.Size, m.ModTime, m.Version}
		}),
	}
}

// convert never returns nil, so that JSON shows [] and not null.
func convert[From, To any](list []From, one func(From) To) []To {
	out := make([]To, 0, len(list))
	for _, v := range list {
		out = append(out, one(v))
	}
	return out
}

func orEmpty[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}

// finite keeps a broken figure from costing the whole document: JSON knows neither NaN nor infinity.
func finite(v float64) float64 {
	switch {
	case math.IsNaN(v):
		return 0
	case math.IsInf(v, 0):
		return math.Copysign(math.MaxFloat64, v)
	}
	return v
}
