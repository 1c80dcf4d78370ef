package profile

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// machine is a program under a simulated clock: it keeps the books that a tracer would, a point a second by default.
type machine struct {
	rng      *rand.Rand
	now      time.Duration
	snapshot *Snapshot
	paths    map[string]*path
	order    []string
	libc     *Mapping
	program  *Mapping
}

type path struct {
	stack *Stack
	live  map[int]block
	next  int
}

type block struct {
	size int64
	born time.Duration
}

func newMachine(seed uint64) *machine {
	m := &machine{
		rng: rand.New(rand.NewPCG(seed, 97)), paths: map[string]*path{},
		libc:    &Mapping{Start: 0x7f0000000000, Limit: 0x7f0000100000, File: "/lib/libc.so.6"},
		program: &Mapping{Start: 0x400000, Limit: 0x500000, File: "/srv/program"},
	}
	m.snapshot = &Snapshot{Started: time.Unix(1700000000, 0).UTC()}
	return m
}

// on is the call path of a function; names before a colon are kinds.
func (m *machine) on(name string) *path {
	p := m.paths[name]
	if p == nil {
		kind, function, found := strings.Cut(name, ":")
		if !found {
			kind, function = string(KindMalloc), name
		}
		p = &path{stack: &Stack{Kind: Kind(kind), PID: 7, Complete: true, Frames: []*Location{
			{Mapping: m.libc, Lines: []Line{{Function: "malloc"}}}, {Mapping: m.program, Lines: []Line{{Function: function}}},
		}}, live: map[int]block{}}
		m.paths[name] = p
		m.order = append(m.order, name)
	}
	return p
}

func (m *machine) alloc(name string, size int64) int {
	p := m.on(name)
	p.next++
	p.live[p.next] = block{size, m.now}
	p.stack.AllocObjects++
	p.stack.AllocBytes += size
	return p.next
}

func (m *machine) free(name string, id int) {
	p := m.on(name)
	b, ok := p.live[id]
	if !ok {
		panic("free of a block that is not there")
	}
	delete(p.live, id)
	p.stack.FreeObjects++
	p.stack.FreeBytes += b.size
}

// run lets time pass in steps of 10 ms with a tick each, and takes a point every interval.
func (m *machine) run(d, interval time.Duration, tick func()) *Snapshot {
	const step = 10 * time.Millisecond
	for m.now = step; m.now <= d; m.now += step {
		tick()
		if m.now%interval == 0 && m.now < d {
			for _, p := range m.paths {
				s := p.stack
				s.History = append(s.History, Point{m.now, s.AllocObjects, s.AllocBytes, s.FreeObjects, s.FreeBytes})
			}
		}
	}
	m.snapshot.Taken = m.snapshot.Started.Add(d)
	for _, name := range m.order {
		p := m.paths[name]
		p.stack.Ages = agesOf(p.live, d)
		m.snapshot.Stacks = append(m.snapshot.Stacks, p.stack)
	}
	return m.snapshot
}

func agesOf(live map[int]block, end time.Duration) *Ages {
	if len(live) == 0 {
		return nil
	}
	var ages []time.Duration
	a := &Ages{}
	for _, b := range live {
		ages = append(ages, end-b.born)
		if b.born < end/2 {
			a.Old++
		}
	}
	slices.Sort(ages)
	a.Min, a.Median, a.Max = ages[0], ages[len(ages)/2], ages[len(ages)-1]
	return a
}

// times is how often something happens in one tick at that rate per second, by chance.
func (m *machine) times(perSecond float64) int {
	n, mean := 0, perSecond/100
	for mean > 0 {
		if m.rng.Float64() < min(mean, 1) {
			n++
		}
		mean--
	}
	return n
}

// program is one of the labelled set. Its run returns the class each of its functions must get.
type program struct {
	name string
	tick func(m *machine) func()
	want map[string]Class
}

func labelledPrograms() []program {
	return []program{
		{"leak", func(m *machine) func() {
			return func() {
				for range m.times(700) {
					m.alloc("session_new", 900+m.rng.Int64N(700))
				}
			}
		}, map[string]Class{"session_new": Leaking}},

		{"slow leak in a busy process", func(m *machine) func() {
			return func() {
				for range m.times(5000) {
					m.free("request", m.alloc("request", 4099))
				}
				for range m.times(3) {
					m.alloc("log_context", 211)
				}
			}
		}, map[string]Class{"request": Churn, "log_context": Leaking}},

		{"leak of one in a hundred blocks of the same call", func(m *machine) func() {
			var flying []int
			return func() {
				for range m.times(2000) {
					id := m.alloc("buffer", 1021)
					if m.rng.IntN(100) > 0 {
						flying = append(flying, id)
					}
				}
				for len(flying) > 50+m.rng.IntN(100) {
					m.free("buffer", flying[0])
					flying = flying[1:]
				}
			}
		}, map[string]Class{"buffer": Leaking}},

		{"leak under load that varies by half", func(m *machine) func() {
			return func() {
				for range m.times(200 + 100*float64(m.now/time.Second%3)) {
					m.alloc("session_new", 1627)
				}
			}
		}, map[string]Class{"session_new": Leaking}},

		{"leak after start-up data", func(m *machine) func() {
			return func() {
				if m.now < time.Second {
					for range 100 {
						m.alloc("load", 1009)
					}
				}
				for range m.times(100) {
					m.alloc("load", 1009)
				}
			}
		}, map[string]Class{"load": Leaking}},

		{"LRU cache", func(m *machine) func() {
			var lru []int
			return func() {
				for range m.times(600) {
					lru = append(lru, m.alloc("cache_put", 2039))
					if len(lru) > 1500 {
						m.free("cache_put", lru[0])
						lru = lru[1:]
					}
				}
			}
		}, map[string]Class{"cache_put": SteadyCache}},

		{"cache with random eviction", func(m *machine) func() {
			var all []int
			return func() {
				for range m.times(900) {
					all = append(all, m.alloc("cache_put", 509))
					if len(all) > 1009 {
						i := m.rng.IntN(len(all))
						m.free("cache_put", all[i])
						all[i] = all[len(all)-1]
						all = all[:len(all)-1]
					}
				}
			}
		}, map[string]Class{"cache_put": SteadyCache}},

		{"filling cache that is full at 13 s", func(m *machine) func() {
			n := 0
			return func() {
				for range m.times(300) {
					if n++; n < 13*300 {
						m.alloc("cache_fill", 4093)
					}
				}
			}
		}, map[string]Class{"cache_fill": SteadyCache}},

		{"filling cache whose hits become more", func(m *machine) func() {
			const keys = 6000
			seen := map[int]bool{}
			return func() {
				for range m.times(400) {
					if key := m.rng.IntN(keys); !seen[key] {
						seen[key] = true
						m.alloc("cache_fill", 1019)
					}
				}
			}
		}, map[string]Class{"cache_fill": Growing}},

		{"warm-up", func(m *machine) func() {
			return func() {
				if m.now < 4*time.Second {
					for range m.times(1000) {
						m.alloc("load_config", 307)
					}
				}
				for range m.times(500) {
					m.free("request", m.alloc("request", 8191))
				}
			}
		}, map[string]Class{"load_config": SteadyCache, "request": Churn}},

		{"saw-tooth batch", func(m *machine) func() {
			var batch []int
			length := 4*time.Second + time.Duration(m.rng.Int64N(int64(1500*time.Millisecond)))
			next := length
			return func() {
				for range m.times(1500) {
					batch = append(batch, m.alloc("batch_row", 701))
				}
				if m.now >= next {
					for _, id := range batch {
						m.free("batch_row", id)
					}
					batch, next = nil, m.now+length
				}
			}
		}, map[string]Class{"batch_row": Churn}},

		{"pool", func(m *machine) func() {
			return func() {
				if m.now <= 80*time.Millisecond {
					m.alloc("pool_grow", 1<<20)
				}
			}
		}, map[string]Class{"pool_grow": SteadyCache}},

		{"fragmentation", func(m *machine) func() {
			var all []int
			return func() {
				if m.now < 3*time.Second {
					for range 200 {
						all = append(all, m.alloc("chunk", 16+m.rng.Int64N(2000)))
					}
				} else if len(all) > 0 && m.now < 8*time.Second {
					for range min(len(all), 120) {
						i := m.rng.IntN(len(all))
						if i%10 > 0 {
							m.free("chunk", all[i])
						}
						all[i] = all[len(all)-1]
						all = all[:len(all)-1]
					}
				}
			}
		}, map[string]Class{"chunk": SteadyCache}},

		{"thread growth", func(m *machine) func() {
			return func() {
				for range m.times(2) {
					m.alloc("mmap:spawn", 8392704)
				}
			}
		}, map[string]Class{"spawn": Leaking}},

		{"mmap leak", func(m *machine) func() {
			return func() {
				for range m.times(4) {
					m.alloc("mmap:map_file", 1<<20)
				}
			}
		}, map[string]Class{"map_file": Leaking}},

		{"growth of one block by realloc", func(m *machine) func() {
			size, id := int64(4096), 0
			return func() {
				if m.rng.IntN(20) == 0 {
					if id > 0 {
						m.free("append_row", id)
					}
					size += 16384
					id = m.alloc("append_row", size)
				}
			}
		}, map[string]Class{"append_row": Growing}},

		{"array that doubles", func(m *machine) func() {
			size, id := int64(4096), 0
			next := 300 * time.Millisecond
			return func() {
				if m.now >= next {
					if id > 0 {
						m.free("push", id)
					}
					size, next = 2*size, 2*next
					id = m.alloc("push", size)
				}
			}
		}, map[string]Class{"push": Growing}},

		{"queue that fills faster than it is worked off", func(m *machine) func() {
			var queue []int
			return func() {
				for range m.times(500) {
					queue = append(queue, m.alloc("enqueue", 601))
				}
				for range min(m.times(330), len(queue)) {
					m.free("enqueue", queue[0])
					queue = queue[1:]
				}
			}
		}, map[string]Class{"enqueue": Growing}},

		{"freed at exit", func(m *machine) func() {
			var all []int
			return func() {
				if m.now < 19*time.Second {
					for range m.times(500) {
						all = append(all, m.alloc("table", 1013))
					}
					return
				}
				for _, id := range all {
					m.free("table", id)
				}
				all = nil
			}
		}, map[string]Class{"table": Churn}},

		{"few blocks in flight", func(m *machine) func() {
			var flying []int
			return func() {
				for range m.times(3000) {
					flying = append(flying, m.alloc("packet", 1500))
				}
				for len(flying) > m.rng.IntN(40) {
					m.free("packet", flying[0])
					flying = flying[1:]
				}
			}
		}, map[string]Class{"packet": Churn}},
	}
}

func TestVerdictsOfTheLabelledPrograms(t *testing.T) {
	for _, c := range labelledPrograms() {
		t.Run(c.name, func(t *testing.T) {
			for seed := range uint64(20) {
				m := newMachine(seed)
				s := m.run(20*time.Second, time.Second, c.tick(m))
				for _, wrong := range wrongVerdicts(Judge(s), c.want) {
					t.Errorf("seed %d: %s", seed, wrong)
				}
			}
		})
	}
}

// The tracer may keep fewer or more points, and runs may be longer.
func TestVerdictsHoldForOtherIntervalsAndLengths(t *testing.T) {
	for _, c := range labelledPrograms() {
		for _, interval := range []time.Duration{200 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second} {
			for seed := range uint64(3) {
				m := newMachine(seed)
				s := m.run(20*time.Second, interval, c.tick(m))
				for _, wrong := range wrongVerdicts(Judge(s), c.want) {
					t.Errorf("%s, a point every %s, seed %d: %s", c.name, interval, seed, wrong)
				}
			}
		}
	}
}

func wrongVerdicts(verdicts []Verdict, want map[string]Class) []string {
	var wrong []string
	for function, class := range want {
		i := slices.IndexFunc(verdicts, func(v Verdict) bool { return v.Owner.Function == function })
		switch {
		case i < 0:
			wrong = append(wrong, function+" has no verdict")
		case verdicts[i].Class != class:
			v := verdicts[i]
			wrong = append(wrong, fmt.Sprintf("%s is %s, want %s (%s; confidence %.2f)", function, v.Class, class, v.Evidence, v.Confidence))
		}
	}
	return wrong
}

func leakOf(seed uint64, d time.Duration, perSecond float64) *Snapshot {
	m := newMachine(seed)
	return m.run(d, time.Second, func() {
		for range m.times(perSecond) {
			m.alloc("session_new", 1627)
		}
	})
}

func TestVerdictGivesItsEvidence(t *testing.T) {
	v := Judge(leakOf(1, 20*time.Second, 700))[0]
	if v.Class != Leaking || v.ConfidenceWord() != "high" || v.Advice != "" {
		t.Errorf("%s, confidence %.2f, advice %q", v.Class, v.Confidence, v.Advice)
	}
	if want := 700 * 1627 * 60.0; v.BytesPerMinute < 0.97*want || v.BytesPerMinute > 1.03*want {
		t.Errorf("%.0f bytes a minute, want about %.0f", v.BytesPerMinute, want)
	}
	for _, want := range []string{"blocks", "none freed in 20s", "older than 10s"} {
		if !strings.Contains(v.Evidence, want) {
			t.Errorf("no %q in %q", want, v.Evidence)
		}
	}
}

// A full LRU cache that turns over slower than the trace: all its new blocks stay, blocks from before go.
func TestACacheThatReplacesBlocksFromBeforeTheTraceIsNoLeak(t *testing.T) {
	s := leakOf(1, 20*time.Second, 100)
	s.PreAttach.Frees = 1900
	v := Judge(s)[0]
	if v.Class != Growing || !strings.Contains(v.Advice, "from before the trace") {
		t.Errorf("%s, advice %q", v.Class, v.Advice)
	}
	grown := uint64(s.Stacks[0].InUseBytes())
	s.RSS = &RSSChange{Before: map[string]uint64{"heap": 1 << 20}, After: map[string]uint64{"heap": 1<<20 + grown}}
	if v := Judge(s)[0]; v.Class != Leaking {
		t.Errorf("%s although the resident memory grew along", v.Class)
	}
	s.RSS.After["heap"] = 1 << 20
	if v := Judge(s)[0]; v.Class != Growing {
		t.Errorf("%s although the resident memory stood still", v.Class)
	}
}

func TestVerdictsAreLessSureWithLess(t *testing.T) {
	full := Judge(leakOf(1, 20*time.Second, 700))[0].Confidence
	for name, change := range map[string]func(*Snapshot){
		"no history": func(s *Snapshot) { s.Stacks[0].History = nil },
		"few points": func(s *Snapshot) { s.Stacks[0].History = s.Stacks[0].History[3:8] },
		"losses":     func(s *Snapshot) { s.LossStated = true },
		"wide error": func(s *Snapshot) { s.Stacks[0].InUseObjectsVar = 4e7 },
	} {
		s := leakOf(1, 20*time.Second, 700)
		change(s)
		if v := Judge(s)[0]; v.Confidence >= full || v.Advice == "" {
			t.Errorf("%s: %s with confidence %.2f (full: %.2f), advice %q", name, v.Class, v.Confidence, full, v.Advice)
		}
	}
	if v := Judge(leakOf(1, 4*time.Second, 700))[0]; v.Confidence >= full {
		t.Errorf("4 s of trace: confidence %.2f", v.Confidence)
	}
}

func TestWithoutAHistoryNothingIsCalledALeak(t *testing.T) {
	for _, c := range labelledPrograms() {
		m := newMachine(1)
		for _, v := range Judge(m.run(20*time.Second, time.Hour, c.tick(m))) {
			if v.Class == Leaking {
				t.Errorf("%s: %s is a leak on the evidence of one moment", c.name, v.Owner.Function)
			}
		}
	}
}

func TestALeakSpreadOverManyPathsIsOneVerdict(t *testing.T) {
	m := newMachine(3)
	s := m.run(20*time.Second, time.Second, func() {
		for range m.times(40) {
			m.alloc(fmt.Sprintf("parse_%d", m.rng.IntN(400)), 1009)
		}
	})
	for i, stack := range s.Stacks {
		stack.Frames = slices.Insert(stack.Frames, 1, &Location{Mapping: m.program, Address: uint64(0x400000 + i), Lines: []Line{{Function: "node_new"}}})
	}
	verdicts := Judge(s)
	if len(verdicts) != 1 || verdicts[0].Class != Leaking || verdicts[0].Owner.Function != "node_new" || len(verdicts[0].Stacks) < 300 {
		t.Errorf("%d verdicts, the first: %+v", len(verdicts), verdicts[0].Class)
	}
}

func TestVerdictOfTwoProcessesIsOne(t *testing.T) {
	s := leakOf(1, 20*time.Second, 100)
	other := leakOf(2, 20*time.Second, 100).Stacks[0]
	other.PID = 8
	for i := range other.History { // its tracer looked at other moments
		other.History[i].At += 300 * time.Millisecond
	}
	s.Stacks = append(s.Stacks, other)
	verdicts := Judge(s)
	if len(verdicts) != 1 || verdicts[0].Class != Leaking || verdicts[0].InUseObjects < 3600 {
		t.Errorf("%d verdicts: %+v", len(verdicts), verdicts[0])
	}
}

func TestOddSnapshotsGetVerdictsWithoutHarm(t *testing.T) {
	for name, s := range map[string]*Snapshot{
		"empty":             {},
		"no duration":       {Stacks: []*Stack{{Kind: KindMalloc, AllocObjects: 23, AllocBytes: 4096, History: []Point{{At: 1}, {At: 1}, {At: 0}}}}},
		"more freed":        {Taken: time.Unix(9, 0), Stacks: []*Stack{{AllocObjects: 1, FreeObjects: 7, FreeBytes: 7}}},
		"history backwards": {Started: time.Unix(1, 0), Taken: time.Unix(9, 0), Stacks: []*Stack{{AllocObjects: 97, AllocBytes: 97, History: []Point{{At: 5e9}, {At: 4e9}, {At: 6e9}, {At: 7e9}}}}},
	} {
		t.Run(name, func(t *testing.T) { Judge(s) })
	}
}

// A full cache may be seen between the free of its oldest block and the malloc of the next one, at any of the points.
func TestACacheThatMissesABlockForAMomentIsNoChurn(t *testing.T) {
	const slots, perSecond = 1009, 600
	for missing := range 20 {
		stack := &Stack{Kind: KindMalloc, Complete: true, Frames: []*Location{{Lines: []Line{{Function: "lru_put"}}}}, Ages: &Ages{Min: 0, Median: 840 * time.Millisecond, Max: 1680 * time.Millisecond}}
		for i := range 20 {
			made := int64(perSecond * (i + 1))
			inUse := min(made, slots)
			if i == missing && inUse == slots {
				inUse--
			}
			stack.History = append(stack.History, Point{time.Duration(i+1) * time.Second, made, made * 2039, made - inUse, (made - inUse) * 2039})
		}
		last := stack.History[19]
		stack.AllocObjects, stack.AllocBytes, stack.FreeObjects, stack.FreeBytes = last.AllocObjects, last.AllocBytes, last.FreeObjects, last.FreeBytes
		s := &Snapshot{Started: time.Unix(1e9, 0), Taken: time.Unix(1e9+20, 0), Stacks: []*Stack{stack}}
		if v := Judge(s)[0]; v.Class != SteadyCache {
			t.Errorf("one block is missing at second %d: %s (%s)", missing+1, v.Class, v.Evidence)
		}
	}
}

// A program that fragments late leaves few blocks older than half of the trace; that it has come to rest tells as much.
func TestWhatIsLeftOfALateBatchIsHeld(t *testing.T) {
	for _, c := range []struct {
		name            string
		from, freeFrom  int // seconds
		keep, most, now int64
		want            Class
	}{
		{"nine of ten freed, then at rest", 9, 13, 1000, 10000, 1000, SteadyCache},
		{"freed until the end", 9, 16, 1000, 10000, 1000, Churn},
		{"a batch that waits before it frees", 15, 30, 10000, 10000, 10000, Growing},
	} {
		stack := &Stack{Kind: KindMalloc, Complete: true, Frames: []*Location{{Lines: []Line{{Function: "chunk"}}}}, Ages: &Ages{Min: 9 * time.Second, Median: 9 * time.Second, Max: 11 * time.Second, Old: c.keep / 3}}
		var made, freed int64
		for second := 1; second <= 20; second++ {
			if second >= c.from {
				made = min(made+c.most/3, c.most)
			}
			if second >= c.freeFrom {
				freed = min(freed+(c.most-c.keep)/4, c.most-c.keep)
			}
			stack.History = append(stack.History, Point{time.Duration(second) * time.Second, made, made * 1009, freed, freed * 1009})
		}
		last := stack.History[19]
		stack.AllocObjects, stack.AllocBytes, stack.FreeObjects, stack.FreeBytes = last.AllocObjects, last.AllocBytes, last.FreeObjects, last.FreeBytes
		s := &Snapshot{Started: time.Unix(1e9, 0), Taken: time.Unix(1e9+20, 0), Stacks: []*Stack{stack}}
		if v := Judge(s)[0]; v.Class != c.want {
			t.Errorf("%s: %s, want %s (%s)", c.name, v.Class, c.want, v.Evidence)
		}
	}
}

func TestCallsThatWereSeenForPartOfTheTimeHaveNoVerdict(t *testing.T) {
	s := &Snapshot{Taken: time.Unix(60, 0), Started: time.Unix(0, 0), Windows: &Windows{17, 2 * time.Second, 59 * time.Second}}
	for _, k := range []Kind{KindMalloc, KindUnfollowed, KindMmap} {
		st := &Stack{Kind: k, AllocObjects: 1009, AllocBytes: 1009 << 10, Frames: []*Location{{Lines: []Line{{Function: "leak"}}}}}
		for at := range 60 {
			st.History = append(st.History, Point{At: time.Duration(at) * time.Second, AllocObjects: int64(17 * at), AllocBytes: int64(17 * at << 10)})
		}
		s.Stacks = append(s.Stacks, st)
	}
	for _, v := range Judge(s) {
		if v.Kind != KindMmap {
			t.Errorf("%s is judged: %+v", v.Kind, v)
		}
	}
	var out strings.Builder
	if err := WriteSummary(&out, s, SummaryOptions{}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out.String(), "none on allocator calls") || strings.Contains(out.String(), "no leak") {
		t.Errorf("the summary does not say that calls have no verdict:\n%s", out.String())
	}
	s.Stacks, s.Windows = s.Stacks[:1], nil
	if got := Judge(s); len(got) != 1 || got[0].Class != Leaking {
		t.Errorf("followed all the time, the same is %+v", got)
	}
}
