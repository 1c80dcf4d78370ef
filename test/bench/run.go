package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/allocsnoop/allocsnoop/test/scenario"
)

// Section is one part of docs/benchmarks.md.
type Section struct {
	Name  string // of its markers
	Title string
	Text  string // markdown
}

// Benchmark is one thing to measure.
type Benchmark struct {
	Name string
	Run  func(ctx context.Context, o Options) (Section, error)
}

// Benchmarks lists all of them, in the order of the document.
func Benchmarks() []Benchmark {
	return []Benchmark{
		{"pairs", runPairs},
		{"service", runService},
		{"cheap", runCheap},
		{"axes", runAxes},
		{"tracer", runTracer},
	}
}

func withDir(f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "allocsnoop-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	return f(dir)
}

// rounds lets the contenders take turns. One that fails is noted and sits out from then on.
func (o Options) rounds(contenders []contender, measure func(c contender) (float64, error)) []series {
	all := make([]series, len(contenders))
	for i, c := range contenders {
		all[i] = series{name: c.name, baseline: c.baseline}
		if !c.available() {
			all[i].note = "not installed"
		}
	}
	for round := range o.Rounds {
		for i, c := range contenders {
			if all[i].note != "" {
				continue
			}
			value, err := measure(c)
			if err != nil {
				all[i].note, _, _ = strings.Cut(err.Error(), "\n")
				o.sayf("  %s sits out: %v", c.name, err)
				continue
			}
			all[i].values = append(all[i].values, value)
			o.sayf("  round %d of %d: %s %.4g", round+1, o.Rounds, c.name, value)
		}
	}
	return all
}

// measurePair is the CPU nanoseconds of a malloc+free pair under a contender.
func (o Options) measurePair(ctx context.Context, pairs string, c contender, s shape, fill int) (float64, error) {
	return under(ctx, pairs, c, s, func(t *target) (value float64, err error) {
		if _, err = t.order("fill %d", fill); err == nil && c.settles {
			for until := time.Now().Add(o.settling()); err == nil && time.Now().Before(until); {
				_, err = t.order("run 10000")
			}
		}
		if err == nil {
			value, err = t.perPair(o, s.threads)
		}
		return value, err
	})
}

// under measures a target to which the contender has attached.
func under(ctx context.Context, pairs string, c contender, s shape, measure func(*target) (float64, error)) (value float64, err error) {
	err = withDir(func(dir string) error {
		t, err := startTarget(c.command(dir, pairs, s.args()...))
		if err != nil {
			return err
		}
		defer t.stop()
		detach := func() error { return nil }
		if c.attach != nil {
			if detach, err = c.attach(ctx, dir, t.pid); err != nil {
				return err
			}
		}
		value, err = measure(t)
		return errors.Join(err, detach())
	})
	return value, err
}

var fiveFrames = shape{depth: 2, stacks: 1, threads: 1} // malloc, pair, left, left, work, and what starts it

func runPairs(ctx context.Context, o Options) (Section, error) {
	section := Section{Name: "pairs", Title: "A malloc+free pair"}
	err := withDir(func(dir string) error {
		pairs, err := compilePairs(dir)
		if err != nil {
			return err
		}
		all := o.rounds(append(o.contenders(), floors()...), func(c contender) (float64, error) {
			return o.measurePair(ctx, pairs, c, fiveFrames, 0)
		})
		section.Text = "CPU time of the target for one `malloc(64)` and its `free`, in a stack of 7 frames.\n\n" +
			compareTable(all, "ns a pair", bpftraceName) + "\n" + goals([]goal{
			atMost("exact, of bpftrace's price", all, "exact", bpftraceName, 1./4),
			atMost("sample, of bpftrace's price", all, "sample", bpftraceName, 1./8),
			atMost("growth, of the untraced price", all, "growth", alone, 1.01),
			atMost("the probes alone under exact, of bpftrace's price", all, exactFloor, bpftraceName, 1./4),
			atMost("the probes alone under sample, of bpftrace's price", all, sampleFloor, bpftraceName, 1./8),
		}) + model(all)
		return nil
	})
	return section, err
}

// The host of the paper model.
const (
	modelCores   = 64
	modelWorkers = 500
)

// model computes from the price of a pair what a large host pays. It is on paper: caches and locks that 64 CPUs share are
// not in a price that fewer have paid.
func model(all []series) string {
	base := find(all, alone)
	if base == nil {
		return ""
	}
	var text strings.Builder
	fmt.Fprintf(&text, "\nOn paper, from these prices: %d cores, %d workers. Cores that the trace of all workers takes, and their share of the"+
		" host, by the pairs that each worker makes a second. The default steps down where its share of the workers' CPU time"+
		" passes 5 %%; with all cores busy that is at %.1f cores.\n\n| | 100 | 1,000 | 10,000 |\n|---|---|---|---|\n",
		modelCores, modelWorkers, 0.05*modelCores)
	for _, name := range []string{"growth", "sample", "exact"} {
		s := find(all, name)
		if s == nil {
			continue
		}
		fmt.Fprintf(&text, "| %s |", name)
		for _, rate := range []float64{100, 1000, 10_000} {
			cores := max(median(s.values)-median(base.values), 0) / 1e9 * rate * modelWorkers
			fmt.Fprintf(&text, " %.2g (%.2g %%) |", cores, 100*cores/modelCores)
		}
		text.WriteString("\n")
	}
	return text.String()
}

const bpftraceName = "bpftrace, memleak's job"

// served is one measurement of the service.
type served struct{ perSecond, p99, cpu float64 }

// tables is three series for each contender: requests a second, the slowest hundredth, and the worker's CPU time a request.
type tables struct{ perSecond, p99, cpu []series }

func tablesOf(all []series, figures map[string][]served) tables {
	var t tables
	for _, one := range all {
		a, b, c := one, one, one
		a.values, b.values, c.values = nil, nil, nil
		for _, s := range figures[one.name] {
			a.values, b.values, c.values = append(a.values, s.perSecond), append(b.values, s.p99), append(c.values, s.cpu)
		}
		t.perSecond, t.p99, t.cpu = append(t.perSecond, a), append(t.p99, b), append(t.cpu, c)
	}
	return t
}

func (t tables) String() string {
	return "Requests a second:\n\n" + compareTable(t.perSecond, "requests/s", "") + "\nThe slowest hundredth, milliseconds:\n\n" +
		compareTable(t.p99, "p99 ms", "") + "\nThe worker's CPU time a request, microseconds:\n\n" + compareTable(t.cpu, "us a request", "")
}

// runService measures the whole under every contender. The library's new build is used, so that memory does not grow from
// round to round.
func runService(ctx context.Context, o Options) (Section, error) {
	section := Section{Name: "service", Title: "nginx with LuaJIT and the encryption library"}
	figures := map[string][]served{}
	all := o.rounds(o.contenders(), func(c contender) (float64, error) {
		if c.wrap != nil {
			return 0, errors.New("not measured on the service: it starts daemons of its own")
		}
		var s served
		err := o.withService(ctx, c.env, func(service *scenario.Service, dir string) (err error) {
			s, err = o.measureService(ctx, service, dir, c)
			return err
		})
		if err == nil {
			figures[c.name] = append(figures[c.name], s)
		}
		return s.cpu, err
	})
	section.Text = fmt.Sprintf("One worker at full load by 8 connections, %d requests a measurement; each makes a session record"+
		" and frees it.\n\n%s", o.Requests, tablesOf(all, figures))
	return section, nil
}

// runCheap measures the modes for production on the service. What they cost is less than what one nginx differs from the next
// in: so they take turns on one and the same, in more rounds, each beginning with another of them.
func runCheap(ctx context.Context, o Options) (Section, error) {
	section := Section{Name: "cheap", Title: "nginx under the modes for production"}
	contenders := slices.DeleteFunc(o.contenders(), func(c contender) bool {
		return c.name != alone && c.name != "growth" && c.name != budgetedName
	})
	o.Requests *= 2
	rounds := 3 * o.Rounds
	figures := map[string][]served{}
	for round := range rounds {
		err := o.withService(ctx, nil, func(service *scenario.Service, dir string) error {
			for i := range contenders {
				c := contenders[(round+i)%len(contenders)]
				s, err := o.measureService(ctx, service, dir, c)
				if err != nil {
					return fmt.Errorf("%s: %w", c.name, err)
				}
				figures[c.name] = append(figures[c.name], s)
				o.sayf("  round %d of %d: %s %.4g requests/s, %.4g us", round+1, rounds, c.name, s.perSecond, s.cpu)
			}
			return nil
		})
		if err != nil {
			return section, err
		}
	}
	var all []series
	for _, c := range contenders {
		all = append(all, series{name: c.name, baseline: c.baseline})
	}
	t := tablesOf(all, figures)
	section.Text = fmt.Sprintf("One worker at full load by 8 connections, %d requests a measurement, %d rounds, in each of which they take turns on"+
		" one nginx.\n\n%s\n%s", o.Requests, rounds, t, goals([]goal{
		atLeast("growth, of the untraced requests a second", t.perSecond, "growth", alone, 0.99),
		atMost("the default's CPU time a request, of the untraced", t.cpu, budgetedName, alone, 1.05),
	}))
	return section, nil
}

// withService runs a warm service: LuaJIT has compiled, pools have grown.
func (o Options) withService(ctx context.Context, env []string, f func(s *scenario.Service, dir string) error) error {
	return withDir(func(dir string) error {
		if err := os.Chmod(dir, 0o777); err != nil { // profilers within the worker write there
			return err
		}
		options := scenario.Options{Build: scenario.New, Workers: 1}
		for _, v := range env {
			options.Env = append(options.Env, strings.ReplaceAll(v, "DIR", dir))
		}
		s, err := scenario.Start(ctx, options)
		if err != nil {
			return err
		}
		defer s.Close()
		if _, err := s.Run(ctx, scenario.Load{Requests: max(o.Requests/4, 1), Concurrency: connections}); err != nil {
			return crash(s, s.Workers()[0], err)
		}
		return f(s, dir)
	})
}

const connections = 8

func (o Options) measureService(ctx context.Context, s *scenario.Service, dir string, c contender) (result served, err error) {
	pid := s.Workers()[0]
	detach := func() error { return nil }
	if c.attach != nil {
		if detach, err = c.attach(ctx, dir, pid); err != nil {
			return result, err
		}
	}
	defer func() { err = errors.Join(err, detach()) }()
	if c.settles {
		if _, err := s.Run(ctx, scenario.Load{Duration: o.settling(), Concurrency: connections}); err != nil {
			return result, crash(s, pid, err)
		}
	}
	before, err := cpuTime(pid)
	if err != nil {
		return result, err
	}
	report, err := s.Run(ctx, scenario.Load{Requests: o.Requests, Concurrency: connections})
	if err != nil {
		return result, crash(s, pid, err)
	}
	after, err := cpuTime(pid)
	return served{
		perSecond: report.PerSecond(),
		p99:       report.P99.Seconds() * 1e3,
		cpu:       float64((after - before).Microseconds()) / float64(report.Requests),
	}, err
}

// crash says so when a request failed because the worker died.
func crash(s *scenario.Service, pid int, err error) error {
	if slices.Contains(s.Workers(), pid) {
		return err
	}
	return fmt.Errorf("nginx's worker crashed under it (%w)", err)
}

// cpuTime is what the threads of a process have used, to the nanosecond.
func cpuTime(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("read the CPU time of process %d: it has gone", pid)
	}
	var sum time.Duration
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // the thread ended
		}
		if err != nil {
			return 0, err
		}
		field, _, _ := strings.Cut(string(text), " ")
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read the CPU time of process %d: %w", pid, err)
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// runAxes shows what the price of exact mode depends on.
func runAxes(ctx context.Context, o Options) (Section, error) {
	section := Section{Name: "axes", Title: "What the price depends on"}
	axes := []struct {
		name   string
		shapes []shape
		fills  []int
		labels []string
	}{
		{"threads", []shape{{2, 1, 1}, {2, 1, 2}, {2, 1, 8}}, nil, []string{"1", "2", "8"}},
		{"frames of the stack", []shape{{0, 1, 1}, {15, 1, 1}, {55, 1, 1}}, nil, []string{"5", "20", "60"}},
		{"distinct stacks", []shape{{17, 10, 1}, {17, 10_000, 1}, {17, 100_000, 1}}, nil, []string{"10", "10,000", "100,000"}},
		{"live blocks", []shape{fiveFrames, fiveFrames}, []int{1000, 900_000}, []string{"1,000", "900,000"}},
	}
	var text strings.Builder
	text.WriteString("CPU nanoseconds of a pair in exact mode. The ratio is to the same pair alone.\n")
	err := withDir(func(dir string) error {
		pairs, err := compilePairs(dir)
		if err != nil {
			return err
		}
		short := o
		short.Rounds = max(o.Rounds/2, 1)
		both := []contender{{name: alone}, o.exact()}
		for _, axis := range axes {
			fmt.Fprintf(&text, "\n| %s | alone, ns | exact, ns | ratio | spread |\n|---|---|---|---|---|\n", axis.name)
			for i, s := range axis.shapes {
				if o.smoke() && i > 0 {
					break // one point of each axis shows that it runs
				}
				fill := 0
				if axis.fills != nil {
					fill = axis.fills[i]
				}
				o.sayf(" %s %s", axis.labels[i], axis.name)
				all := short.rounds(both, func(c contender) (float64, error) {
					return short.measurePair(ctx, pairs, c, s, fill)
				})
				writeAxisRow(&text, axis.labels[i], all)
			}
		}
		fmt.Fprintf(&text, "\n| processes | alone, ns | exact, ns | ratio | spread |\n|---|---|---|---|---|\n")
		for _, children := range []int{1, 50} {
			o.sayf(" %d processes", children)
			all := short.rounds(both, func(c contender) (float64, error) {
				return short.measureChildren(ctx, pairs, c, children)
			})
			writeAxisRow(&text, strconv.Itoa(children), all)
		}
		return nil
	})
	section.Text = text.String()
	return section, err
}

func (o Options) exact() contender {
	for _, c := range o.contenders() {
		if c.name == "exact" {
			return c
		}
	}
	panic("no contender is called exact")
}

// measureChildren is the CPU nanoseconds of a pair in children born under the trace.
func (o Options) measureChildren(ctx context.Context, pairs string, c contender, children int) (float64, error) {
	return under(ctx, pairs, c, fiveFrames, func(t *target) (float64, error) {
		// Enough that the births cost nothing beside them.
		each := max(int64(o.Slice)/50, 1000)
		took, err := t.order("fork %d %d", children, each)
		return float64(took) / float64(each) / float64(children), err
	})
}

// runTracer measures the tracer itself: how long it takes to come and go, and what it uses at 100,000 events a second.
func runTracer(ctx context.Context, o Options) (Section, error) {
	section := Section{Name: "tracer", Title: "allocsnoop's own cost"}
	var attach, detach series
	attach.name, detach.name = "command to live probes", "Ctrl-C to the end, profile written"
	err := withDir(func(dir string) error {
		s, err := scenario.Start(ctx, scenario.Options{Build: scenario.New, Workers: 1})
		if err != nil {
			return err
		}
		defer s.Close()
		for range max(o.Rounds, 1) {
			started := time.Now()
			t, err := o.startAllocsnoop(ctx, dir, s.Workers()[0], "--mode", "exact")
			if err != nil {
				return err
			}
			attach.values = append(attach.values, time.Since(started).Seconds()*1e3)
			if _, err := s.Run(ctx, scenario.Load{Requests: max(o.Requests/20, 1), Concurrency: 4}); err != nil {
				return errors.Join(err, t.stop())
			}
			started = time.Now()
			if err := t.stop(); err != nil {
				return err
			}
			detach.values = append(detach.values, time.Since(started).Seconds()*1e3)
			o.sayf("  attach %.0f ms, detach %.0f ms", attach.values[len(attach.values)-1], detach.values[len(detach.values)-1])
		}
		return nil
	})
	if err != nil {
		return section, err
	}
	usage, err := o.measureUsage(ctx)
	if err != nil {
		return section, err
	}
	section.Text = fmt.Sprintf("On the nginx service, exact mode, milliseconds:\n\n| | median | spread |\n|---|---|---|\n"+
		"| %s | %.0f | %s |\n| %s | %.0f | %s |\n\n"+
		"At %d events a second for %d s: %.1f %% of one core, %.0f MiB resident at most (idle: %.1f %%, %.0f MiB).\n",
		attach.name, median(attach.values), spread(attach.values, "%.0f"),
		detach.name, median(detach.values), spread(detach.values, "%.0f"),
		usage.events, usage.seconds, usage.busy.share*100, usage.busy.mib, usage.idle.share*100, usage.idle.mib)
	return section, nil
}

type usage struct{ share, mib float64 }

type usages struct {
	events, seconds int
	busy, idle      usage
}

func (o Options) measureUsage(ctx context.Context) (usages, error) {
	result := usages{events: 100_000, seconds: 5}
	if o.smoke() {
		result.seconds = 1
	}
	err := withDir(func(dir string) error {
		pairs, err := compilePairs(dir)
		if err != nil {
			return err
		}
		for _, m := range []struct {
			rate int
			into *usage
		}{{0, &result.idle}, {result.events / 2, &result.busy}} {
			if *m.into, err = o.measureUsageAt(ctx, dir, pairs, m.rate, result.seconds); err != nil {
				return err
			}
		}
		return nil
	})
	return result, err
}

func (o Options) measureUsageAt(ctx context.Context, dir, pairs string, rate, seconds int) (usage, error) {
	target, err := startTarget(contender{}.command(filepath.Clean(dir), pairs, fiveFrames.args()...))
	if err != nil {
		return usage{}, err
	}
	defer target.stop()
	t, err := o.startAllocsnoop(ctx, dir, target.pid, "--mode", "exact")
	if err != nil {
		return usage{}, err
	}
	before, err := cpuTime(t.cmd.Process.Pid)
	if err != nil {
		return usage{}, errors.Join(err, t.kill())
	}
	started := time.Now()
	if _, err := target.order("pace %d %d", rate, seconds); err != nil {
		return usage{}, errors.Join(err, t.kill())
	}
	after, err := cpuTime(t.cmd.Process.Pid)
	elapsed := time.Since(started)
	if err := errors.Join(err, t.stop()); err != nil {
		return usage{}, err
	}
	rusage, _ := t.cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return usage{share: (after - before).Seconds() / elapsed.Seconds(), mib: float64(rusage.Maxrss) / 1024}, nil
}
