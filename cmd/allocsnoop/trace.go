package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
	"github.com/allocsnoop/allocsnoop/tracer"
	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/target"
)

// silence is how long a trace waits for the first hit of any probe before it says that none came.
const silence = 5 * time.Second

// traceFlags are the flags of a trace as they were given.
type traceFlags struct {
	targets              targetFlags
	duration, interval   time.Duration
	olderThan            time.Duration
	keep                 int
	out, readyFile       string
	checkEvery           time.Duration
	json, debug          bool
	mode                 string
	sampleBytes          string
	maxOverhead          string
	maxLive, maxStacks   uint32
	maxFrames            uint32
	maxTableMB           uint64
	untilOOM, onOOM      bool
	at                   string
	perProcess           bool
	noInlines            bool
	content, noRedact    bool
	blocks               bool
	debugDirs, debugURLs []string
	own                  ownFunctions
}

func (f *traceFlags) add(cmd *cobra.Command) {
	s := cmd.Flags()
	s.SortFlags = false
	f.targets.add(cmd)
	s.DurationVarP(&f.duration, "duration", "d", 0, "how long, as 60s (default: until Ctrl-C or the target's end)")
	s.StringVarP(&f.out, "output", "o", "", "profile to write (default allocsnoop-COMM-PID-UTCTIME.pb.gz)")
	s.BoolVar(&f.json, "json", false, "print the summary as one JSON document")
	s.StringVar(&f.mode, "mode", "", "exact: every block; sample: blocks by chance; growth: only the growth of heap and mappings, with no probe")
	s.StringVar(&f.sampleBytes, "sample-bytes", "512KiB", "mean `SIZE` between two samples, for sample")
	s.StringVar(&f.maxOverhead, "max-overhead", "5%", "share of the target's CPU time the trace may cost before it lowers its precision; no limit with --mode exact")
	s.DurationVar(&f.olderThan, "older-than", 0, "count only blocks of at least this age as in use, as 10s")
	s.DurationVar(&f.interval, "interval", 0, "also write a profile every so often: FILE.0001.pb.gz, ...")
	s.IntVar(&f.keep, "keep", 0, "keep only the newest `N` of those (default: all)")
	s.BoolVar(&f.perProcess, "per-process", false, "also write one profile for each process, FILE.PID.pb.gz")
	s.BoolVar(&f.untilOOM, "until-oom", false, "end when the OOM killer takes a process of the group")
	s.BoolVar(&f.onOOM, "on-oom", false, "also write a numbered profile at each OOM kill")
	s.StringVar(&f.at, "at", "", "also write a numbered profile when the group's memory passes these shares of its limit, as 80%,90%")
	s.Uint32Var(&f.maxLive, "max-live", 1_000_000, "blocks in use that can be followed at one time")
	s.Uint32Var(&f.maxStacks, "max-stacks", 65_536, "distinct call stacks")
	s.Uint32Var(&f.maxFrames, "max-frames", 128, "frames of one stack, up to 512")
	s.Uint64Var(&f.maxTableMB, "max-table-mb", 64, "memory of the unwind tables, in MiB")
	f.own.addFlags(cmd)
	s.StringArrayVar(&f.debugDirs, "debug-dir", nil, "`DIR` to look for debug files in, before /usr/lib/debug")
	s.StringArrayVar(&f.debugURLs, "debuginfod", nil, "`URL` of a debuginfod server (default: DEBUGINFOD_URLS)")
	s.BoolVar(&f.content, "content", false, "also say what the blocks in use hold at the end, redacted; with --until-oom also before a kill, at --at or 70 % and 90 % of the limit")
	s.BoolVar(&f.noRedact, "no-redact", false, "with --content: show the samples as they are")
	s.BoolVar(&f.blocks, "blocks", false, "keep the addresses of the blocks in use in the profile, for inspect --stack")
	s.BoolVar(&f.noInlines, "no-inlines", false, "do not name inlined calls")
	s.StringVar(&f.readyFile, "ready-file", "", "`FILE` to create once the probes are live")
	s.DurationVar(&f.checkEvery, "check-every", 10*time.Second, "how often the books are checked against the blocks in use")
	s.BoolVar(&f.debug, "debug", false, "print what only developers want to know")
}

func (f *traceFlags) options(changed func(flag string) bool) (tracer.Options, error) {
	o := tracer.Options{
		Children: !f.targets.noChildren, OlderThan: f.olderThan, Guard: guardArgs(),
		MaxLive: f.maxLive, MaxStacks: f.maxStacks, MaxFrames: f.maxFrames, MaxTableMiB: f.maxTableMB,
		CheckEvery: f.checkEvery,
	}
	switch f.mode {
	case "", "exact":
		o.Mode = tracer.Exact
	case "sample":
		o.Mode = tracer.Sample
	case "growth":
		o.Mode = tracer.Growth
	default:
		return o, usageErrorf("--mode %q: it is exact, sample or growth", f.mode)
	}
	var err error
	if o.MaxOverhead, err = f.overhead(changed); err != nil {
		return o, err
	}
	if o.SampleBytes, err = profile.ParseBytes(f.sampleBytes); err != nil || o.SampleBytes == 0 {
		return o, usageErrorf("--sample-bytes %q is no size above 0, as 512KiB", f.sampleBytes)
	}
	if o.Definitions, err = f.own.definitions(); err != nil {
		return o, &exitError{exitUsage, err}
	}
	for _, limit := range []struct {
		flag         string
		value, least uint64
		most         uint64
	}{
		{"max-live", uint64(f.maxLive), 1, 1 << 28}, {"max-stacks", uint64(f.maxStacks), 1, 1 << 24},
		{"max-frames", uint64(f.maxFrames), 2, 512}, {"max-table-mb", f.maxTableMB, 1, 2048},
	} {
		if limit.value < limit.least || limit.value > limit.most {
			return o, usageErrorf("--%s %d: it is %d to %d", limit.flag, limit.value, limit.least, limit.most)
		}
	}
	return o, nil
}

// overhead reads the budget: "5%" or "0.05"; 0 is none.
func (f *traceFlags) overhead(changed func(flag string) bool) (float64, error) {
	if f.mode == "exact" && !changed("max-overhead") {
		return 0, nil
	}
	number, percent := strings.CutSuffix(strings.TrimSpace(f.maxOverhead), "%")
	share, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	if percent {
		share /= 100
	}
	if err != nil || !(share > 0 && share <= 1) {
		return 0, usageErrorf("--max-overhead %q: it is a share of CPU time above 0, as 5%%", f.maxOverhead)
	}
	return share, nil
}

func (f *traceFlags) run(cmd *cobra.Command, command []string) error {
	for name, value := range map[string]time.Duration{"duration": f.duration, "interval": f.interval, "older-than": f.olderThan} {
		if cmd.Flags().Changed(name) && value <= 0 {
			return usageErrorf("--%s %v: it is more than 0", name, value)
		}
	}
	if f.noRedact && !f.content {
		return usageErrorf("--no-redact goes with --content")
	}
	if f.keep < 0 || f.keep > 0 && f.interval == 0 {
		return usageErrorf("--keep %d: it is a number of profiles, and goes with --interval", f.keep)
	}
	if _, err := f.thresholds(); err != nil {
		return err
	}
	options, err := f.options(cmd.Flags().Changed)
	if err != nil {
		return err
	}
	selector, err := f.targets.selector(command)
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	finder, found, err := find(ctx, selector)
	if err != nil {
		return err
	}
	out, err := createOutput(f.outputName(found, command))
	if err != nil {
		return err
	}
	defer out.discard()

	run := &traceRun{flags: f, series: series{base: out.name, keep: f.keep}, stdout: cmd.OutOrStdout(), progress: newProgress(os.Stderr)}
	options.Warn = run.progress.warn
	run.command = command
	if !selector.Finite() && len(command) == 0 {
		run.service = newService()
		options.Service, options.Execed = true, run.service.execed
	}
	if run.tracer, err = tracer.New(options); err != nil {
		return explainBPF(err, f.debug)
	}
	defer run.tracer.Close()
	run.finder, run.found = finder, found
	return run.trace(ctx, out)
}

func (f *traceFlags) outputName(found []target.Process, command []string) string {
	if f.out != "" {
		return f.out
	}
	who := first(found)
	if len(command) > 0 {
		who = target.Process{Comm: filepath.Base(command[0])}
	}
	comm := strings.Map(func(r rune) rune {
		if r == '/' || r <= ' ' || r > '~' {
			return '_'
		}
		return r
	}, who.Comm)
	return fmt.Sprintf("allocsnoop-%s-%d-%s.pb.gz", comm, who.PID, time.Now().UTC().Format("20060102T150405Z"))
}

// first is the process that a service is called after; a service that has none yet is called "service-0".
func first(found []target.Process) target.Process {
	if len(found) == 0 {
		return target.Process{Comm: "service"}
	}
	return found[0]
}

// traceRun is one trace under way.
type traceRun struct {
	flags    *traceFlags
	tracer   *tracer.Tracer
	stdout   io.Writer
	progress *progress
	notes    []string
	series   series
	finder   *target.Finder
	found    []target.Process // at the start
	service  *service         // nil when all targets are named by pid
	groups   <-chan cgroup.Event
	command  []string      // to be started; empty when targets run already
	child    *target.Child // started of it
	door     *door         // where inspect --stack asks
}

func (r *traceRun) trace(ctx context.Context, out *output) error {
	if len(r.command) > 0 {
		if err := r.launch(); err != nil {
			return err
		}
	} else if err := r.attach(); err != nil {
		return err
	}
	debug.FreeOSMemory() // looking for allocators reads whole libraries; the trace itself needs little
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := r.watch(watching); err != nil {
		return err
	}
	var err error
	if r.door, err = openDoor(); err != nil {
		r.progress.say("%v", err)
	}
	defer r.door.close()
	if err := r.ready(); err != nil {
		return err
	}
	interrupted := r.wait(ctx)
	r.door.close()
	r.warnOf(r.tracer.Stop())
	r.progress.clear()
	snapshot, err := r.finish(r.wanted())
	if err != nil {
		return err
	}
	err = r.write(snapshot, out, interrupted)
	if r.child == nil {
		return err
	}
	// The command's own exit status is what its caller asks for, unless the trace itself failed.
	status, waitErr := r.child.Wait()
	var exit *exitError
	if err != nil && !errors.As(err, &exit) || waitErr != nil {
		return errors.Join(err, waitErr)
	}
	if status != 0 {
		return &exitError{code: status}
	}
	return err
}

// attach takes in what runs and opens the gate.
func (r *traceRun) attach() error {
	if err := r.join(); err != nil {
		return err
	}
	r.progress.say("%s", r.tracer.Announcement())
	return r.tracer.Start()
}

// launch starts the command with its probes live before its first instruction: the gate is open by then, and each library
// is probed before its code can run.
func (r *traceRun) launch() error {
	if err := r.tracer.Start(); err != nil {
		return err
	}
	added := false
	child, err := target.Start(target.Command{
		Args: r.command, User: r.flags.targets.user,
		Mapped: func(pid int) error {
			if added {
				return r.tracer.Remap(pid)
			}
			added = true
			return r.tracer.Add(pid)
		},
	})
	if err != nil {
		return err
	}
	r.child = child
	r.found = []target.Process{{ID: target.ID{PID: child.PID()}, Comm: filepath.Base(r.command[0])}}
	r.progress.say("%s", r.tracer.Announcement())
	return nil
}

// join takes the targets in. One of several that ends meanwhile is no failure; the only one, or all of them, are.
func (r *traceRun) join() error {
	for _, p := range r.found {
		err := r.tracer.Add(p.PID)
		switch {
		case err == nil:
		case r.service == nil:
			return explainTarget(p.PID, err)
		case !errors.Is(err, memory.ErrGone):
			r.progress.warn(fmt.Sprintf("process %s is not traced: %v", p.String(), err))
		}
	}
	if len(r.found) == 0 {
		r.progress.warn("no process is selected yet: waiting for the first")
		return nil
	}
	return r.tracer.Probing()
}

// watch starts what runs beside the trace: looking for new members, and for what becomes of control groups.
func (r *traceRun) watch(ctx context.Context) error {
	if r.service != nil {
		go r.service.follow(ctx, r.finder, r.tracer, r.flags.targets.noChildren, r.progress.warn)
	}
	if !r.flags.untilOOM && !r.flags.onOOM && r.flags.at == "" {
		return nil
	}
	groups := r.finder.Groups()
	for _, p := range r.found {
		if len(groups) > 0 {
			break
		}
		if g, err := cgroup.Find(p.Cgroup); err == nil {
			groups = append(groups, g)
		}
	}
	if len(groups) == 0 {
		return errors.New("no control group to watch: give --cgroup or --container")
	}
	at, err := r.flags.thresholds()
	if err != nil {
		return err
	}
	if name := unlimited(groups); name != "" {
		r.note(fmt.Sprintf("control group %s has no memory limit, nor has any above it: its processes are killed only when the machine is full, "+
			"and shares of a limit are never passed", name))
	}
	r.groups, err = watchGroups(ctx, groups, at)
	return err
}

// contentAt is where blocks are looked into before a kill if nothing else is said. The last look is the best, but the OOM
// killer may be faster than it.
var contentAt = []float64{0.7, 0.9}

// thresholds are the shares of the limit at which something is to be done.
func (f *traceFlags) thresholds() ([]float64, error) {
	if f.at == "" && f.content && (f.untilOOM || f.onOOM) {
		return contentAt, nil
	}
	if f.at == "" {
		return nil, nil
	}
	at, err := cgroup.ParseShares(f.at)
	if err != nil {
		return nil, usageErrorf("--at: %w", err)
	}
	return at, nil
}

func (r *traceRun) ready() error {
	if r.flags.readyFile == "" {
		return nil
	}
	if err := os.WriteFile(r.flags.readyFile, nil, 0o600); err != nil {
		return fmt.Errorf("create ready file: %w", err)
	}
	return nil
}

// wait returns at the end of the trace: after its duration, with its last target, or when a person ends it (true).
func (r *traceRun) wait(ctx context.Context) (interrupted bool) {
	var end, next <-chan time.Time
	if r.flags.duration > 0 {
		end = time.After(r.flags.duration)
	}
	if r.flags.interval > 0 {
		ticker := time.NewTicker(r.flags.interval)
		defer ticker.Stop()
		next = ticker.C
	}
	started := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	silent := true
	for {
		select {
		case <-ctx.Done():
			return true
		case <-r.tracer.Done():
			return false
		case <-end:
			return false
		case <-next:
			r.warnOf(r.series.write(r, r.wanted()))
		case q := <-r.door.asked():
			r.reply(q)
		case e := <-r.groups:
			if r.onGroup(e) {
				return false
			}
		case <-tick.C:
			elapsed := time.Since(started)
			if silent && elapsed >= silence {
				silent = false
				r.checkSilence()
			}
			r.progress.show(r.tracer, elapsed, r.flags.duration)
			r.warnOf(r.tracer.Note())
			r.warnOf(r.tracer.Check())
			r.warnOf(r.tracer.Control())
		}
	}
}

// settleTime is how long the events of a killed process may take to arrive.
const settleTime = 300 * time.Millisecond

// onGroup notes what became of a control group; true when the trace ends with it.
func (r *traceRun) onGroup(e cgroup.Event) (end bool) {
	text := describe(e)
	r.tracer.Log(text)
	r.note(text)
	switch e.Kind {
	case cgroup.Killed:
		if r.flags.untilOOM {
			time.Sleep(settleTime)
			return true
		}
		if r.flags.onOOM {
			r.warnOf(r.series.write(r, r.wanted()))
		}
	case cgroup.Removed:
		return r.flags.untilOOM
	case cgroup.Crossed:
		r.warnOf(r.onCrossed())
	}
	return false
}

// hastyBlocks bounds the blocks that are read of each stack while the limit is near: the OOM killer does not wait. A first
// look at a few is there in case it is faster than the second.
var hastyBlocks = []int{100, 2_000}

// onCrossed keeps what the blocks hold now, for the profile of a victim, and writes a profile if that was asked for.
func (r *traceRun) onCrossed() error {
	e := r.wanted()
	e.contentBlocks = hastyBlocks
	if r.flags.at != "" {
		return r.series.write(r, e)
	}
	_, err := r.snapshot(e)
	return err
}

// note tells a person something at once, and again at the end.
func (r *traceRun) note(text string) {
	r.notes = append(r.notes, text)
	r.progress.warn(text)
}

func (r *traceRun) warnOf(err error) {
	if err != nil {
		r.progress.warn(err.Error())
	}
}

func (r *traceRun) checkSilence() {
	if r.flags.mode == "growth" || r.tracer.Hits() > 0 {
		return
	}
	text := fmt.Sprintf("no probe was hit in %v: the target is idle, or takes its memory from functions that are not probed; "+
		"see allocsnoop doctor %d", silence, first(r.found).PID)
	r.note(text)
}

// extras are what a snapshot has beside its books.
type extras struct {
	blocks, content bool
	contentBlocks   []int // read of each stack, one look after the other; nil is one at all
}

// wanted is what the person asked for.
func (r *traceRun) wanted() extras { return extras{blocks: r.flags.blocks, content: r.flags.content} }

// snapshot makes one without names. What the blocks hold is read at once: a target may be about to die.
func (r *traceRun) snapshot(e extras) (*profile.Snapshot, error) {
	s, err := r.tracer.Snapshot()
	if err != nil || !e.blocks && !e.content {
		return s, err
	}
	if err := r.tracer.AddBlocks(s); err != nil {
		return nil, err
	}
	if !e.content {
		return s, nil
	}
	if len(e.contentBlocks) == 0 {
		e.contentBlocks = []int{0}
	}
	for _, most := range e.contentBlocks {
		o := tracer.ContentOptions{NoRedact: r.flags.noRedact, Blocks: most}
		r.warnOf(r.tracer.AddContent(context.Background(), s, o))
	}
	s.HasBlocks = e.blocks
	return s, nil
}

// finish makes a snapshot with names.
func (r *traceRun) finish(e extras) (*profile.Snapshot, error) {
	snapshot, err := r.snapshot(e)
	if err != nil {
		return nil, err
	}
	err = r.tracer.Symbolize(context.Background(), snapshot, symbolize.Options{
		DebugDirs: r.flags.debugDirs, DebuginfodURLs: debuginfodURLs(r.flags.debugURLs), NoInlines: r.flags.noInlines,
		Warn: r.progress.warn, Progress: func(text string) { r.progress.say("%s", text) },
	})
	if err != nil {
		return nil, fmt.Errorf("name the frames: %w", err)
	}
	if r.flags.mode != "growth" && r.tracer.Hits() == 0 && len(r.notes) == 0 {
		r.notes = append(r.notes, "no probe was hit: the target made no allocation through a probed function")
	}
	return snapshot, nil
}

func (r *traceRun) write(s *profile.Snapshot, out *output, interrupted bool) error {
	if err := profile.Write(out, s); err != nil {
		return fmt.Errorf("write profile: %w", err)
	}
	if err := out.commit(); err != nil {
		return err
	}
	if r.flags.perProcess {
		if err := writePerProcess(s, out.name); err != nil {
			return err
		}
	}
	var err error
	if r.flags.json {
		err = profile.WriteJSON(r.stdout, s, out.name)
	} else {
		width, color := terminal(r.stdout)
		err = profile.WriteSummary(r.stdout, s, profile.SummaryOptions{Width: width, Color: color, Profile: out.name, Notes: r.notes})
	}
	switch {
	case err != nil:
		return fmt.Errorf("print summary: %w", err)
	case interrupted:
		return &exitError{code: exitInterrupted}
	case s.LossStated:
		return &exitError{code: exitLosses}
	}
	return nil
}

func debuginfodURLs(flags []string) []string {
	if len(flags) > 0 {
		return flags
	}
	return strings.Fields(os.Getenv("DEBUGINFOD_URLS"))
}

// output is a file that appears under its name whole or not at all.
type output struct {
	*os.File
	name string
	done bool
}

func createOutput(name string) (*output, error) {
	if info, err := os.Stat(name); err == nil && info.IsDir() {
		return nil, fmt.Errorf("write profile to %s: it is a directory", name)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".allocsnoop-*")
	if err != nil {
		return nil, fmt.Errorf("write profile to %s: %w", name, errors.Unwrap(err))
	}
	return &output{File: f, name: name}, nil
}

func (o *output) commit() error {
	if err := errors.Join(o.Sync(), o.Close()); err != nil {
		return fmt.Errorf("write profile to %s: %w", o.name, err)
	}
	if err := os.Rename(o.File.Name(), o.name); err != nil {
		return fmt.Errorf("write profile to %s: %w", o.name, errors.Unwrap(err))
	}
	o.done = true
	return nil
}

// discard removes what was not committed.
func (o *output) discard() {
	if o.done {
		return
	}
	_ = o.Close()
	_ = os.Remove(o.File.Name())
}
