package oom

import (
	"regexp"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/target"
)

// Parser puts the lines of reports together. The zero value is ready to use.
type Parser struct {
	report  report
	current bool
	last    report // of the last kill, for when the rest of its group follows
	lastPID int
}

// report is what is known so far about the kills that one shortage leads to.
type report struct {
	kill       Kill
	columns    []string // of the table of processes
	candidates []Candidate
	lines      int
	scorePID   int
}

// Bounds of one report, against a log that never ends one.
const (
	maxReportLines = 20000
	maxCandidates  = 16384
)

// The kernel's texts. Names are matched greedily up to the last thing that can follow one.
var (
	invoked = regexp.MustCompile(`^(.*) invoked oom-killer: gfp_mask=(0x[0-9a-f]+(?:\([^)]*\))?),(?: nodemask=.*,)? +order=(-?\d+), oom(?:_score)?_adj=(-?\d+)`)
	cpuLine = regexp.MustCompile(`^CPU: \d+ (?:UID: \d+ )?PID: (\d+) Comm: .* (\d+\.\d+\S*) #`)
	pidLine = regexp.MustCompile(`^Pid: (\d+), comm: .* (\d+\.\d+\S*) #`)
	taskIn  = regexp.MustCompile(`^Task in (.*) killed as a result of limit of (.*)$`)
	usage   = regexp.MustCompile(`^(memory|memory\+swap|swap): usage (\d+)kB, limit (\d+)kB, failcnt (\d+)`)
	stats   = regexp.MustCompile(`^Memory cgroup stats for (.*?):(?: cache:.*)?$`)
	header  = regexp.MustCompile(`^\[ *pid *\] +(uid .* name)$`)
	row     = regexp.MustCompile(`^\[ *(\d+)\] +(.+)$`)
	summary = regexp.MustCompile(`^oom-kill:constraint=(CONSTRAINT_\w+),nodemask=.*?,cpuset=(.*),mems_allowed=[\d,-]*,(.*)$`)
	victim  = regexp.MustCompile(`^(.*),pid=(\d+),uid=(\d+)$`)
	score   = regexp.MustCompile(`^(Memory cgroup out of memory|Out of memory[^:]*): Kill process (\d+) \((.*)\) score (\d+) or sacrifice child`)
	killed  = regexp.MustCompile(`^(?:(Memory cgroup out of memory|memory\.oom\.group|Out of memory[^:]*): )?Killed process (\d+)(?: \((.*)\)| (.*?))?,? (?:UID (\d+), )?total-vm:(\d+)kB, anon-rss:(\d+)kB, file-rss:(\d+)kB(.*)$`)
	shmem   = regexp.MustCompile(`shmem-rss:(\d+)kB`)
	rest    = regexp.MustCompile(`UID:(\d+) pgtables:(\d+)(kB|)`)
	adj     = regexp.MustCompile(`oom_score_adj:(-?\d+)`)
	byGroup = regexp.MustCompile(`^Tasks in (.*) are going to be killed due to memory\.oom\.group set`)
)

// Add takes the next line of the log and returns the kill that it completes, if it does.
func (p *Parser) Add(l Line) (*Kill, bool) {
	text := strings.TrimRight(l.Text, "\r\n ")
	if m := invoked.FindStringSubmatch(text); m != nil {
		p.start(m)
		return nil, false
	}
	if m := killed.FindStringSubmatch(text); m != nil {
		if m[1] == groupPrefix && m[2] == strconv.Itoa(p.lastPID) {
			return nil, false // the victim is one of its group, and is named twice
		}
		return p.kill(l, m), true
	}
	if m := score.FindStringSubmatch(text); m != nil {
		p.score(m)
		return nil, false
	}
	if m := byGroup.FindStringSubmatch(text); m != nil {
		p.report = p.last
		p.report.kill.Group = true
		return nil, false
	}
	if !p.current && !strings.HasPrefix(text, "oom-kill:") && !strings.HasPrefix(text, "Task in ") {
		return nil, false
	}
	p.current = true
	if p.report.lines++; p.report.lines > maxReportLines {
		p.reset()
		return nil, false
	}
	p.report.add(text)
	return nil, false
}

// manualOrder is what the kernel asks for when it was told to kill.
const manualOrder = -1

// groupPrefix stands before the kills of a group's other processes.
const groupPrefix = "memory.oom.group"

func (p *Parser) reset() { p.report, p.current = report{}, false }

// start begins a report with "NAME invoked oom-killer: ...".
func (p *Parser) start(m []string) {
	p.reset()
	p.current = true
	order, _ := strconv.Atoi(m[3])
	p.report.kill.Invoker = Invoker{Comm: m[1], GFP: m[2], Order: order}
	p.report.kill.Manual = order == manualOrder
}

// score is a victim announced; kernels before 5.1 then say what it held, possibly of its child.
func (p *Parser) score(m []string) {
	k := &p.report.kill
	p.current = true
	p.report.scorePID, _ = strconv.Atoi(m[2])
	k.Score = number[int](m[4])
	setScope(k, m[1])
}

func setScope(k *Kill, prefix string) {
	switch {
	case k.Scope != "" || prefix == "":
	case strings.HasPrefix(prefix, "Memory cgroup"), prefix == groupPrefix:
		k.Scope = Cgroup
	default:
		k.Scope = System
	}
}

// kill completes a kill.
func (p *Parser) kill(l Line, m []string) *Kill {
	k := p.report.kill
	setScope(&k, m[1])
	k.Asker = strings.HasSuffix(m[1], "(oom_kill_allocating_task)")
	k.Time, k.Uptime = l.Time, l.Uptime
	k.PID, _ = strconv.Atoi(m[2])
	k.Comm = m[3] + m[4]
	k.UID = number[int](m[5])
	k.TotalVM, k.Anon, k.File = kilobytes(m[6]), kilobytes(m[7]), kilobytes(m[8])
	if s := shmem.FindStringSubmatch(m[9]); s != nil {
		k.Shmem = kilobytes(s[1])
	}
	if r := rest.FindStringSubmatch(m[9]); r != nil {
		k.UID = number[int](r[1])
		if k.PageTables = kilobytes(r[2]); r[3] == "" {
			k.PageTables = number[uint64](r[2])
		}
	}
	if a := adj.FindStringSubmatch(m[9]); a != nil {
		k.ScoreAdj = number[int](a[1])
	}
	if k.PID != p.report.scorePID {
		k.Score = nil // the score was its parent's
	}
	p.addTable(&k)
	k.Container = target.ContainerOf(k.TaskCgroup)
	if k.Container == (target.Container{}) {
		k.Container = target.ContainerOf(k.LimitCgroup)
	}
	p.last, p.lastPID = p.report, k.PID
	if m[1] != groupPrefix {
		p.reset()
	}
	return &k
}

// addTable takes over what the table of processes knows.
func (p *Parser) addTable(k *Kill) {
	k.Candidates = len(p.report.candidates)
	k.Largest = largest(p.report.candidates)
	for _, c := range p.report.candidates {
		if c.PID == k.PID && k.ScoreAdj == nil {
			value := c.ScoreAdj
			k.ScoreAdj = &value
		}
	}
}

// add reads one of the lines between the first and the last.
func (r *report) add(text string) {
	k := &r.kill
	switch {
	case strings.HasPrefix(text, "oom-kill:"):
		r.addSummary(text)
	case strings.HasPrefix(text, "["):
		r.addTable(text)
	case strings.HasPrefix(text, "CPU: "), strings.HasPrefix(text, "Pid: "):
		r.addCPU(text)
	default:
		if m := taskIn.FindStringSubmatch(text); m != nil {
			k.TaskCgroup, k.LimitCgroup, k.Scope = m[1], m[2], Cgroup
		} else if m := usage.FindStringSubmatch(text); m != nil {
			r.addUsage(m)
		} else if m := stats.FindStringSubmatch(text); m != nil && k.LimitCgroup == "" {
			k.LimitCgroup, k.Scope = m[1], Cgroup
		}
	}
}

func (r *report) addCPU(text string) {
	m := cpuLine.FindStringSubmatch(text)
	if m == nil {
		m = pidLine.FindStringSubmatch(text)
	}
	if m != nil && r.kill.Invoker.PID == 0 {
		r.kill.Invoker.PID, _ = strconv.Atoi(m[1])
		r.kill.Kernel = m[2]
	}
}

func (r *report) addUsage(m []string) {
	k := &r.kill
	if m[1] == "memory" {
		k.Usage, k.Limit, k.Failures = kilobytes(m[2]), limit(m[3]), number[uint64](m[4])
		return
	}
	k.SwapUsage, k.SwapLimit, k.SwapWithRAM = kilobytes(m[2]), limit(m[3]), m[1] == "memory+swap"
}

// addSummary reads the line "oom-kill:constraint=..." of kernels since 5.0. A group's path may hold commas.
func (r *report) addSummary(text string) {
	m := summary.FindStringSubmatch(text)
	if m == nil {
		return
	}
	k := &r.kill
	switch m[1] {
	case "CONSTRAINT_MEMCG":
		k.Scope = Cgroup
	case "CONSTRAINT_NONE":
		k.Scope = System
	default: // CONSTRAINT_CPUSET, CONSTRAINT_MEMORY_POLICY
		k.Scope = Nodes
	}
	v := victim.FindStringSubmatch(m[3])
	if v == nil {
		return
	}
	k.UID = number[int](v[3])
	groups, _, ok := cutLast(v[1], ",task=")
	if !ok {
		return
	}
	limiting, own, _ := strings.Cut(groups, "task_memcg=")
	k.TaskCgroup = own
	if path, ok := strings.CutPrefix(limiting, "oom_memcg="); ok {
		k.LimitCgroup = strings.TrimSuffix(path, ",")
	}
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// addTable reads the header of the table of processes, which names its columns, or a row.
func (r *report) addTable(text string) {
	if m := header.FindStringSubmatch(text); m != nil {
		r.columns = strings.Fields(m[1])
		return
	}
	m := row.FindStringSubmatch(text)
	if m == nil || len(r.columns) == 0 || len(r.candidates) >= maxCandidates {
		return
	}
	values := strings.SplitN(strings.Join(strings.Fields(m[2]), " "), " ", len(r.columns))
	if len(values) < len(r.columns)-1 {
		return
	}
	var c Candidate
	c.PID, _ = strconv.Atoi(m[1])
	for i, value := range values {
		switch r.columns[i] {
		case "tgid":
			r.addThread(&c, value)
		case "rss":
			pages, _ := strconv.ParseUint(value, 10, 40)
			c.RSS = pages * memory.PageSize
		case "oom_score_adj":
			c.ScoreAdj, _ = strconv.Atoi(value)
		case "name":
			c.Comm = value
		}
	}
	r.candidates = append(r.candidates, c)
}

// addThread makes the process of a row that stands for one of its threads. The thread may be the one that asked.
func (r *report) addThread(c *Candidate, tgid string) {
	process, err := strconv.Atoi(tgid)
	if err != nil {
		return
	}
	if r.kill.Invoker.PID == c.PID {
		r.kill.Invoker.PID = process
	}
	c.PID = process
}

func kilobytes(text string) *uint64 {
	v, err := strconv.ParseUint(text, 10, 53)
	if err != nil {
		return nil
	}
	v *= 1024
	return &v
}

// limit is a limit of a group; nil for the kernel's largest number, which means that there is none.
func limit(text string) *uint64 {
	v := kilobytes(text)
	if v == nil || *v >= 1<<62 {
		return nil
	}
	return v
}

func number[T int | uint64](text string) *T {
	v, err := strconv.ParseInt(text, 10, 63)
	if err != nil {
		return nil
	}
	n := T(v)
	return &n
}
