package memory

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
)

// Usage is what a range, or a whole process, uses of physical memory, in bytes.
type Usage struct {
	RSS           uint64 // resident
	PSS           uint64 // resident, shared pages divided by the number of processes that map them
	SharedClean   uint64
	SharedDirty   uint64
	PrivateClean  uint64
	PrivateDirty  uint64
	Referenced    uint64
	Anonymous     uint64 // resident pages that belong to no file, which includes private copies of a file's pages
	LazyFree      uint64 // given back with MADV_FREE, still resident
	AnonHugePages uint64 // part of RSS
	FileHugePages uint64 // part of RSS: huge pages of files and shared memory
	Hugetlb       uint64 // hugetlbfs pages, which RSS does not count
	Swap          uint64
	SwapPSS       uint64
	Locked        uint64
}

// Dirty is what cannot be dropped without writing it somewhere.
func (u *Usage) Dirty() uint64 { return u.SharedDirty + u.PrivateDirty }

// Huge is what lies in huge pages of any sort.
func (u *Usage) Huge() uint64 { return u.AnonHugePages + u.FileHugePages + u.Hugetlb }

// Add sums up usages.
func (u *Usage) Add(v *Usage) {
	u.RSS += v.RSS
	u.PSS += v.PSS
	u.SharedClean += v.SharedClean
	u.SharedDirty += v.SharedDirty
	u.PrivateClean += v.PrivateClean
	u.PrivateDirty += v.PrivateDirty
	u.Referenced += v.Referenced
	u.Anonymous += v.Anonymous
	u.LazyFree += v.LazyFree
	u.AnonHugePages += v.AnonHugePages
	u.FileHugePages += v.FileHugePages
	u.Hugetlb += v.Hugetlb
	u.Swap += v.Swap
	u.SwapPSS += v.SwapPSS
	u.Locked += v.Locked
}

// RangeUsage is one entry of /proc/PID/smaps.
type RangeUsage struct {
	Range
	Usage
	Flags VMFlags
}

// VMFlags are the flags of a range that decide how it is read.
type VMFlags uint8

// The flags that matter here, of the thirty there are.
const (
	FlagIO       VMFlags = 1 << iota // device memory ("io", "pf"): not readable through /proc/PID/mem
	FlagDontDump                     // "dd": the program asked to be left out of dumps
	FlagHugetlb                      // "ht"
	FlagUffd                         // "um", "uw": a read may wait for the program's own fault handler
	FlagKnown                        // the kernel told the flags (3.8)
)

// ParseSmaps reads the format of /proc/PID/smaps. Keys it does not know are skipped: kernels add some.
func ParseSmaps(r io.Reader) ([]RangeUsage, error) {
	var ranges []RangeUsage
	names := map[string]string{}
	err := eachLine(r, func(line []byte) error {
		if key, rest, ok := cutKey(line); ok {
			if len(ranges) == 0 {
				return fmt.Errorf("%.40q before the first range", line)
			}
			return setUsage(&ranges[len(ranges)-1], key, rest)
		}
		parsed, err := parseMapsLine(line, names)
		if err != nil {
			return err
		}
		ranges = append(ranges, RangeUsage{Range: parsed})
		if n := len(ranges); n > 1 && parsed.Start < ranges[n-2].End {
			return fmt.Errorf("range %x overlaps the one before it", parsed.Start)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("parse smaps: %w", err)
	}
	classify(len(ranges), func(i int) *Range { return &ranges[i].Range })
	return ranges, nil
}

// ParseSmapsRollup reads the format of /proc/PID/smaps_rollup: the sum over all ranges.
func ParseSmapsRollup(r io.Reader) (Usage, error) {
	var sum RangeUsage
	seen := false
	err := eachLine(r, func(line []byte) error {
		key, rest, ok := cutKey(line)
		if !ok {
			return nil // the heading, which names the span of all ranges
		}
		seen = true
		return setUsage(&sum, key, rest)
	})
	if err == nil && !seen {
		err = errors.New("no figures in it")
	}
	if err != nil {
		return Usage{}, fmt.Errorf("parse smaps_rollup: %w", err)
	}
	return sum.Usage, nil
}

// cutKey splits "Rss:       12 kB". A range's line has a dash before any colon, which no key has before its colon.
func cutKey(line []byte) (key, rest []byte, ok bool) {
	colon := bytes.IndexByte(line, ':')
	if colon <= 0 || bytes.IndexByte(line[:colon], ' ') >= 0 || bytes.IndexByte(line[:colon], '-') >= 0 {
		return nil, nil, false
	}
	return line[:colon], bytes.TrimSpace(line[colon+1:]), true
}

func setUsage(r *RangeUsage, key, rest []byte) error {
	if string(key) == "VmFlags" {
		r.Flags = parseVMFlags(rest)
		return nil
	}
	field := usageField(&r.Usage, key)
	if field == nil {
		return nil
	}
	digits, isKB := bytes.CutSuffix(rest, []byte(" kB"))
	kb, ok := parseDecimal(digits)
	if !isKB || !ok || kb > math.MaxUint64>>10 {
		return fmt.Errorf("%s: %.40q is no number of kB", key, rest)
	}
	*field += kb << 10 // several keys may share a field
	return nil
}

func usageField(u *Usage, key []byte) *uint64 {
	switch string(key) {
	case "Rss":
		return &u.RSS
	case "Pss":
		return &u.PSS
	case "Shared_Clean":
		return &u.SharedClean
	case "Shared_Dirty":
		return &u.SharedDirty
	case "Private_Clean":
		return &u.PrivateClean
	case "Private_Dirty":
		return &u.PrivateDirty
	case "Referenced":
		return &u.Referenced
	case "Anonymous":
		return &u.Anonymous
	case "LazyFree":
		return &u.LazyFree
	case "AnonHugePages":
		return &u.AnonHugePages
	case "ShmemPmdMapped", "FilePmdMapped":
		return &u.FileHugePages
	case "Shared_Hugetlb", "Private_Hugetlb":
		return &u.Hugetlb
	case "Swap":
		return &u.Swap
	case "SwapPss":
		return &u.SwapPSS
	case "Locked":
		return &u.Locked
	}
	return nil
}

func parseVMFlags(text []byte) VMFlags {
	flags := FlagKnown
	for word := range bytes.FieldsSeq(text) {
		switch string(word) {
		case "io", "pf":
			flags |= FlagIO
		case "dd":
			flags |= FlagDontDump
		case "ht":
			flags |= FlagHugetlb
		case "um", "uw":
			flags |= FlagUffd
		}
	}
	return flags
}
