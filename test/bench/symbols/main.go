// Command symbols measures symbolize against llvm-symbolizer and eu-addr2line: wall time and peak memory of whole processes
// that name the same addresses, in turns, and writes the section "Symbolization" of docs/benchmarks.md.
//
// The trap: eu-addr2line reads one object a run, so its time is the sum and its memory the largest of its runs, which
// flatters its memory. Its runs do not overlap; nor does anything here run beside anything else.
package main

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/symbolize"
)

// objects are Debian's; those with debug files come with the packages in test/packages.txt.
var objects = []string{
	"/lib/x86_64-linux-gnu/libc.so.6", "/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2",
	"/lib/x86_64-linux-gnu/libresolv.so.2", "/lib/x86_64-linux-gnu/libnsl.so.1", "/lib/x86_64-linux-gnu/libthread_db.so.1",
	"/usr/lib/x86_64-linux-gnu/libkrb5.so.3", "/usr/lib/x86_64-linux-gnu/libk5crypto.so.3",
	"/usr/lib/x86_64-linux-gnu/libgssapi_krb5.so.2", "/usr/lib/x86_64-linux-gnu/libkrb5support.so.0",
	"/usr/lib/x86_64-linux-gnu/debug/libstdc++.so.6", "/usr/lib/x86_64-linux-gnu/libpython3.11d.so.1.0",
}

const (
	frames    = 5000
	jvm       = "/usr/lib/jvm/java-17-openjdk-amd64/lib/server/libjvm.so"
	jvmFrames = 300
)

// object is the addresses to name in one file.
type object struct {
	File    string
	Offsets []uint64
	Addrs   []uint64
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "resolve" {
		fail(resolve(os.Args[2]))
		return
	}
	rounds := flag.Int("rounds", 7, "turns of each tool")
	doc := flag.String("doc", "docs/benchmarks.md", "file whose section is written; empty for none")
	flag.Parse()
	text, err := measure(*rounds)
	fail(err)
	fmt.Print(text)
	if *doc != "" {
		fail(writeSection(*doc, text))
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "symbols:", err)
		os.Exit(1)
	}
}

// resolve is the measured process: it names the addresses of a list as a tracer does at the end of a trace.
func resolve(list string) error {
	b, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	var all []object
	if err := json.Unmarshal(b, &all); err != nil {
		return err
	}
	stack := &profile.Stack{}
	for _, o := range all {
		m := &profile.Mapping{Start: 1 << 40, Limit: 1 << 41, File: o.File}
		for _, off := range o.Offsets {
			stack.Frames = append(stack.Frames, &profile.Location{Address: m.Start + off, Mapping: m})
		}
	}
	s := &profile.Snapshot{Stacks: []*profile.Stack{stack}}
	warn := func(w string) { fmt.Fprintln(os.Stderr, w) }
	if err := symbolize.New(symbolize.Options{Warn: warn}).Snapshot(context.Background(), s, disk{}); err != nil {
		return err
	}
	named := 0
	for _, l := range stack.Frames {
		for _, line := range l.Lines {
			fmt.Println(line.Function, line.File, line.Line)
		}
		if l.Lines[0].Line != 0 {
			named++
		}
	}
	fmt.Fprintf(os.Stderr, "%d of %d with a line\n", named, len(stack.Frames))
	return nil
}

type disk struct{}

func (disk) Open(m *profile.Mapping) (symbolize.File, error) { return os.Open(m.File) }

// cost is what one run of a tool took.
type cost struct {
	wall, cpu time.Duration
	memory    int64 // bytes, the peak
}

type tool struct {
	name string
	run  func([]object) (cost, error)
}

func measure(rounds int) (string, error) {
	var list []object
	rng := rand.New(rand.NewPCG(5, 0))
	for i, file := range objects {
		o, err := pick(file, frames*(i+1)/len(objects)-frames*i/len(objects), rng)
		if err != nil {
			return "", err
		}
		list = append(list, o)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "Whole processes, from the list of addresses to text, medians of %d rounds in which the tools take turns, on %d CPUs.\n", rounds, runtime.NumCPU())
	fmt.Fprintf(&text, "Made by `go run ./test/bench/symbols`, which `make bench` calls.\n\n")
	fmt.Fprintf(&text, "%d distinct frames over %d libraries:\n\n", frames, len(list))
	if err := compare(&text, list, rounds); err != nil {
		return "", err
	}
	o, err := pick(jvm, jvmFrames, rng)
	if err != nil {
		fmt.Fprintf(&text, "\nlibjvm.so was not measured: %v\n", err)
		return text.String(), nil
	}
	fmt.Fprintf(&text, "\n%d frames in libjvm.so, whose debug file has 156 MB (openjdk-17-dbg):\n\n", jvmFrames)
	err = compare(&text, []object{o}, min(rounds, 3)) // the others take a minute each
	return text.String(), err
}

// pick chooses random addresses in a file's code.
func pick(file string, n int, rng *rand.Rand) (object, error) {
	f, err := elf.Open(file)
	if err != nil {
		return object{}, err
	}
	defer f.Close()
	s := f.Section(".text")
	if s == nil {
		return object{}, fmt.Errorf("%s has no code", file)
	}
	o := object{File: file}
	seen := map[uint64]bool{}
	for len(o.Offsets) < n {
		k := rng.Uint64N(s.Size)
		if seen[k] {
			continue
		}
		seen[k] = true
		o.Offsets, o.Addrs = append(o.Offsets, s.Offset+k), append(o.Addrs, s.Addr+k)
	}
	return o, nil
}

func compare(text *strings.Builder, list []object, rounds int) error {
	tools := []tool{{"allocsnoop", runSelf}, {"llvm-symbolizer", runLLVM}, {"eu-addr2line -i", runElfutils}}
	costs := make([][]cost, len(tools))
	for round := range rounds {
		for i, t := range tools {
			c, err := t.run(list)
			if err != nil {
				return fmt.Errorf("%s: %w", t.name, err)
			}
			costs[i] = append(costs[i], c)
			fmt.Fprintf(os.Stderr, "round %d: %s: %v, %d MiB\n", round+1, t.name, c.wall.Round(time.Millisecond), c.memory>>20)
		}
	}
	fmt.Fprintf(text, "| | wall s | CPU s | peak memory MiB |\n|---|---|---|---|\n")
	for i, t := range tools {
		c := costs[i]
		fmt.Fprintf(text, "| %s | %.2f | %.2f | %.0f |\n", t.name,
			median(c, func(c cost) float64 { return c.wall.Seconds() }),
			median(c, func(c cost) float64 { return c.cpu.Seconds() }),
			median(c, func(c cost) float64 { return float64(c.memory) / (1 << 20) }))
	}
	return nil
}

func median(costs []cost, of func(cost) float64) float64 {
	values := make([]float64, len(costs))
	for i, c := range costs {
		values[i] = of(c)
	}
	slices.Sort(values)
	return values[len(values)/2]
}

func runSelf(list []object) (cost, error) {
	self, err := os.Executable()
	if err != nil {
		return cost{}, err
	}
	b, err := json.Marshal(list)
	if err != nil {
		return cost{}, err
	}
	f, err := os.CreateTemp("", "symbols-*.json")
	if err != nil {
		return cost{}, err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(b); err != nil {
		return cost{}, err
	}
	if err := f.Close(); err != nil {
		return cost{}, err
	}
	return timed(exec.Command(self, "resolve", f.Name()))
}

func runLLVM(list []object) (cost, error) {
	var in strings.Builder
	for _, o := range list {
		for _, a := range o.Addrs {
			fmt.Fprintf(&in, "%s %#x\n", o.File, a)
		}
	}
	cmd := exec.Command("llvm-symbolizer", "--inlines", "--demangle")
	cmd.Stdin = strings.NewReader(in.String())
	return timed(cmd)
}

func runElfutils(list []object) (cost, error) {
	var sum cost
	for _, o := range list {
		var in strings.Builder
		for _, a := range o.Addrs {
			fmt.Fprintf(&in, "%#x\n", a)
		}
		cmd := exec.Command("eu-addr2line", "-i", "-f", "-C", "-e", o.File)
		cmd.Stdin = strings.NewReader(in.String())
		c, err := timed(cmd)
		if err != nil {
			return cost{}, err
		}
		sum.wall += c.wall
		sum.cpu += c.cpu
		sum.memory = max(sum.memory, c.memory)
	}
	return sum, nil
}

func timed(cmd *exec.Cmd) (cost, error) {
	var errors bytes.Buffer
	cmd.Stderr = &errors
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return cost{}, fmt.Errorf("%w: %s", err, errors.String())
	}
	wall := time.Since(start)
	usage := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	return cost{wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), usage.Maxrss << 10}, nil
}

const heading = "## Symbolization\n"

// writeSection replaces the section or adds it at the end.
func writeSection(path, text string) error {
	old, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	if len(old) == 0 {
		old = []byte("# Benchmarks\n")
	}
	before, after, _ := strings.Cut(string(old), heading)
	if _, next, ok := strings.Cut(after, "\n## "); ok {
		after = "\n## " + next
	} else {
		after = ""
	}
	out := cmp.Or(strings.TrimRight(before, "\n"), "# Benchmarks") + "\n\n" + heading + "\n" + text + after
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(out), 0o644)
}
