package memory

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
)

// TopRow is a process as Top sees it. Sizes are bytes.
type TopRow struct {
	PID       int    `json:"pid"`
	Comm      string `json:"comm"`
	RSS       uint64 `json:"rss"`
	Anonymous uint64 `json:"anonymous"` // resident memory that no file and no shared memory backs
	// GrowthPerMinute is the growth of RSS since Top first saw the process; nil as long as it has seen it once.
	GrowthPerMinute *float64 `json:"growth_per_minute"`
	// Detail is what costs a walk over the process's page tables; nil when it was not read.
	*TopDetail
	*TopLimit

	key processKey
}

// TopDetail is read for the processes that are shown.
type TopDetail struct {
	PSS  uint64 `json:"pss"`
	Heap uint64 `json:"heap"` // resident in heap and arenas
	Swap uint64 `json:"swap"`

	taken time.Time
	cost  time.Duration
}

// TopLimit is the memory limit that a process will meet first, of its cgroup or one above it.
type TopLimit struct {
	Cgroup string `json:"cgroup"`
	Limit  uint64 `json:"cgroup_limit"`
	Used   uint64 `json:"cgroup_used"` // without page cache that the kernel drops first
	// MinutesLeft is when the cgroup meets the limit if all processes in it go on growing as they have; nil when they do not grow.
	MinutesLeft *float64 `json:"minutes_left"`
}

// processKey names a process for good: a pid alone is used again.
type processKey struct {
	pid   int
	ticks uint64
}

// Top watches the memory of all processes. It reads two short files of each and more of those alone that are shown.
type Top struct {
	fs      FS
	seen    map[processKey]*seenProcess
	groups  map[string]cgroup.Group // by path
	page    uint64
	scratch []byte
}

type seenProcess struct {
	rss    uint64 // when it was first seen
	at     time.Time
	group  cgroup.Group
	detail *TopDetail
}

// NewTop starts watching; growth counts from the first Sample on.
func (fs FS) NewTop() *Top {
	return &Top{fs: fs, seen: map[processKey]*seenProcess{}, groups: map[string]cgroup.Group{}, page: uint64(os.Getpagesize()),
		scratch: make([]byte, 4096)}
}

// Sample looks at every process that has memory, but not at the calling one, which would be the first in every list for a
// while. A process that ends meanwhile is left out.
func (t *Top) Sample() ([]TopRow, error) {
	entries, err := os.ReadDir(t.fs.Path(0))
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var rows []TopRow
	alive := make(map[processKey]*seenProcess, len(t.seen))
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		row, ok := t.look(pid)
		if !ok {
			continue
		}
		now := time.Now()
		known := t.seen[row.key]
		if known == nil {
			known = &seenProcess{rss: row.RSS, at: now}
		}
		alive[row.key] = known
		if elapsed := now.Sub(known.at); elapsed > 0 {
			growth := (float64(row.RSS) - float64(known.rss)) / elapsed.Minutes()
			row.GrowthPerMinute = &growth
		}
		rows = append(rows, row)
	}
	t.seen = alive
	return rows, nil
}

// look reads what is cheap: 20 microseconds.
func (t *Top) look(pid int) (TopRow, bool) {
	statm, err := t.readShort(pid, "statm")
	if err != nil {
		return TopRow{}, false
	}
	fields := bytes.Fields(statm)
	if len(fields) < 3 {
		return TopRow{}, false
	}
	size, _ := parseDecimal(fields[0])
	resident, _ := parseDecimal(fields[1])
	shared, _ := parseDecimal(fields[2])
	if size == 0 {
		return TopRow{}, false // a kernel thread or a zombie
	}
	stat, err := t.readShort(pid, "stat")
	if err != nil {
		return TopRow{}, false
	}
	state := parseStat(stat)
	if state.Gone() {
		return TopRow{}, false
	}
	return TopRow{PID: pid, Comm: state.Comm, RSS: resident * t.page, Anonymous: (resident - min(shared, resident)) * t.page,
		key: processKey{pid, state.StartTicks}}, true
}

// readShort reads a file of a process of less than a page, until the next call.
func (t *Top) readShort(pid int, name string) ([]byte, error) {
	f, err := os.Open(t.fs.Path(pid, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	n, err := f.Read(t.scratch)
	return t.scratch[:n], err
}

// SortByGrowth puts the processes that grow most first, and the largest first among those that do not.
func SortByGrowth(rows []TopRow) {
	growth := func(r *TopRow) float64 {
		if r.GrowthPerMinute == nil {
			return 0
		}
		return max(*r.GrowthPerMinute, 0)
	}
	slices.SortStableFunc(rows, func(a, b TopRow) int {
		return cmp.Or(cmp.Compare(growth(&b), growth(&a)), cmp.Compare(b.RSS, a.RSS), cmp.Compare(a.PID, b.PID))
	})
}

// detailShare bounds what is spent on a process's page tables: the detail is kept for this many times what it cost.
const detailShare = 20

// Detail fills in detail and limits of rows, which may be some of those that Sample returned; all are all of them, since a
// limit holds for processes that are not shown as well. It stops reading detail once budget is spent and takes what it has
// from earlier, if anything. A budget of 0 is none.
func (t *Top) Detail(rows, all []TopRow, budget time.Duration) {
	began := time.Now()
	for i := range rows {
		known := t.seen[rows[i].key]
		if known == nil {
			continue
		}
		old := known.detail
		fresh := old != nil && time.Since(old.taken) < detailShare*old.cost
		if !fresh && (budget == 0 || time.Since(began) < budget) {
			known.detail = t.readDetail(rows[i].PID)
		}
		rows[i].TopDetail = known.detail
	}
	t.fillLimits(rows, all)
}

func (t *Top) readDetail(pid int) *TopDetail {
	began := time.Now()
	ranges, err := t.fs.readSmaps(pid)
	if err != nil {
		return nil
	}
	d := &TopDetail{}
	for i := range ranges {
		r := &ranges[i]
		d.PSS += r.PSS
		d.Swap += r.Swap
		if r.Kind == KindHeap || r.Kind == KindArena {
			d.Heap += r.RSS
		}
	}
	d.taken = time.Now()
	d.cost = d.taken.Sub(began)
	return d
}

// fillLimits finds the limit of each row and how fast its cgroup fills up.
func (t *Top) fillLimits(rows, all []TopRow) {
	growth := map[string]float64{} // of a cgroup's processes and those below it, by directory
	for i := range all {
		if all[i].GrowthPerMinute == nil || *all[i].GrowthPerMinute == 0 {
			continue
		}
		for _, group := range t.group(&all[i]).Ancestors() {
			growth[group.Dir] += *all[i].GrowthPerMinute
		}
	}
	limits := map[string]*TopLimit{}
	for i := range rows {
		group := t.group(&rows[i])
		if group.Dir == "" {
			continue
		}
		limit, known := limits[group.Dir]
		if !known {
			limit = readLimit(group, growth)
			limits[group.Dir] = limit
		}
		rows[i].TopLimit = limit
	}
}

func readLimit(group cgroup.Group, growth map[string]float64) *TopLimit {
	limited, usage, err := group.Tightest()
	if err != nil || usage.Limit == cgroup.NoLimit {
		return nil
	}
	limit := &TopLimit{Cgroup: limited.Path, Limit: usage.Limit, Used: usage.WorkingSet()}
	if rate := growth[limited.Dir]; rate > 0 {
		minutes := float64(limit.Limit-min(limit.Used, limit.Limit)) / rate
		limit.MinutesLeft = &minutes
	}
	return limit
}

// group is the memory cgroup of a process; the zero Group when it has none.
func (t *Top) group(row *TopRow) cgroup.Group {
	known := t.seen[row.key]
	if known == nil {
		return cgroup.Group{}
	}
	if known.group.Dir != "" {
		return known.group
	}
	f, err := os.Open(t.fs.Path(row.PID, "cgroup"))
	if err != nil {
		return cgroup.Group{}
	}
	defer f.Close()
	memberships, err := cgroup.ParseMemberships(f)
	if err != nil {
		return cgroup.Group{}
	}
	path := cgroup.MemoryPath(memberships)
	group, found := t.groups[path]
	if !found {
		group, _ = cgroup.Of(memberships) // looks through the mounts; once for each path, also if there is nothing
		t.groups[path] = group
	}
	known.group = group
	return group
}
