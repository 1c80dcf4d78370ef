package memory

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"time"
)

// Snapshot is what the ranges of a process used at one moment: the document of `allocsnoop maps --json`.
type Snapshot struct {
	PID    int             `json:"pid"`
	Comm   string          `json:"comm"`
	Taken  time.Time       `json:"taken"`
	Ranges []SnapshotRange `json:"ranges"`
}

// SnapshotRange is a range in JSON. Sizes are bytes.
type SnapshotRange struct {
	rangeEntry
	Size      uint64 `json:"size"`
	RSS       uint64 `json:"rss"`
	PSS       uint64 `json:"pss"`
	Dirty     uint64 `json:"dirty"`
	Anonymous uint64 `json:"anonymous"`
	Swap      uint64 `json:"swap"`
	Huge      uint64 `json:"huge"`
	LazyFree  uint64 `json:"lazy_free"`
	Locked    uint64 `json:"locked"`
	BuildID   string `json:"build_id,omitempty"`
	// Growth is in resident bytes since the first snapshot of a series; absent in that one.
	Growth *int64 `json:"growth,omitempty"`
}

// NewSnapshot makes the document of ranges read at a time.
func NewSnapshot(pid int, comm string, taken time.Time, ranges []RangeUsage) *Snapshot {
	s := &Snapshot{PID: pid, Comm: comm, Taken: taken.UTC(), Ranges: make([]SnapshotRange, 0, len(ranges))}
	for i := range ranges {
		r := &ranges[i]
		s.Ranges = append(s.Ranges, SnapshotRange{rangeEntry: newRangeEntry(&r.Range), Size: r.Size(), RSS: r.RSS, PSS: r.PSS,
			Dirty: r.Dirty(), Anonymous: r.Anonymous, Swap: r.Swap, Huge: r.Huge(), LazyFree: r.LazyFree, Locked: r.Locked})
	}
	return s
}

// maxSnapshot bounds a document that is read: 65,530 ranges with long names are 40 MiB.
const maxSnapshot = 512 << 20

// ReadSnapshot reads the document of `allocsnoop maps --json`. Of the usage only RSS, PSS, Swap and Anonymous come back.
func ReadSnapshot(r io.Reader) (*Snapshot, []RangeUsage, error) {
	var s Snapshot
	if err := json.NewDecoder(io.LimitReader(r, maxSnapshot)).Decode(&s); err != nil {
		return nil, nil, fmt.Errorf("parse snapshot: %w", err)
	}
	if len(s.Ranges) == 0 {
		return nil, nil, fmt.Errorf("parse snapshot: no ranges in it; it is made by allocsnoop maps PID --json")
	}
	slices.SortStableFunc(s.Ranges, func(a, b SnapshotRange) int { return cmp.Compare(a.Start, b.Start) })
	var ranges []Range
	usages := make([]RangeUsage, 0, len(s.Ranges))
	for i := range s.Ranges {
		e := &s.Ranges[i]
		r, err := e.decode()
		if err == nil {
			ranges = append(ranges, r)
			err = checkOrder(ranges)
		}
		if err != nil {
			return nil, nil, fmt.Errorf("parse snapshot: %w", err)
		}
		usages = append(usages, RangeUsage{Range: r, Usage: Usage{RSS: e.RSS, PSS: e.PSS, Swap: e.Swap, Anonymous: e.Anonymous}})
	}
	return &s, usages, nil
}
