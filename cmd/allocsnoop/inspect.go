package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/memory/heap"
)

// inspectFlags are what a person asks of inspect.
type inspectFlags struct {
	reachable, json, noRedact bool
	diff, grep, hex, stack    string
	top                       int
}

// askRunning is the value of --stack without one.
const askRunning = "running"

func newInspectCommand() *cobra.Command {
	var f inspectFlags
	cmd := &cobra.Command{
		Use:   "inspect PID|FILE",
		Short: "Say what is in the memory of a process or a dump: blocks by shape, free memory, leaks",
		Long: `Walks the heap's own books (glibc 2.17 to 2.41 or jemalloc 5.3, no symbols needed) of a live
process, which is not stopped, or of a file made by allocsnoop dump or gcore. It tells the blocks
in use from free memory that the allocator keeps, and groups the blocks in use by what they hold:
JSON by its set of keys, HTTP, text, certificates, compressed data, C++ objects by class, and so
on. Anonymous memory outside of the heap (other allocators, LuaJIT, pools) is grouped by pages of
4 KiB.

Samples are redacted: letters become x, digits 9; keys, tags and punctuation stay. In samples of
binary data each word is p (a pointer), 0, 9 (a number), x (text) or ? (anything else).`,
		Example: `  allocsnoop inspect 942
  allocsnoop inspect 942 --reachable          # blocks that nothing points to
  allocsnoop inspect 942 --stack              # which stack made what, by the trace that runs
  allocsnoop inspect 942 --stack p.pb.gz      # the same by a trace with --blocks that has ended
  allocsnoop inspect new.dump --diff old.dump # what came between two dumps
  allocsnoop inspect 942 --json > old.json; sleep 600; allocsnoop inspect 942 --diff old.json
  allocsnoop inspect 942 --grep '"uid":\d+' --no-redact
  allocsnoop inspect 942 --hex 0x55d0c8a012a0`,
		Args: func(_ *cobra.Command, args []string) error {
			if f.stack != "" && len(args) == 2 {
				return nil
			}
			if len(args) != 1 {
				return usageErrorf("inspect takes one PID or FILE, not %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.takeProfile(&args); err != nil {
				return err
			}
			return runInspect(cmd, args[0], &f)
		},
	}
	flags := cmd.Flags()
	flags.BoolVar(&f.reachable, "reachable", false, "look for blocks in use that no variable, stack or other block points to")
	flags.StringVar(&f.stack, "stack", "", "name the call stacks behind the blocks, by the running trace or by a `PROFILE`")
	flags.Lookup("stack").NoOptDefVal = askRunning
	flags.StringVar(&f.diff, "diff", "", "show what is new since `OLD`, a dump or a saved inspect --json")
	flags.StringVar(&f.grep, "grep", "", "list where the regular expression `RE` matches, and in which block")
	flags.StringVar(&f.hex, "hex", "", "show the bytes of the block that holds `ADDR`")
	flags.IntVar(&f.top, "top", 12, "how many groups, or matches of --grep, to list")
	flags.BoolVar(&f.json, "json", false, "print one JSON document, with all groups")
	flags.BoolVar(&f.noRedact, "no-redact", false, "show content as it is; it may hold secrets")
	return cmd
}

func runInspect(cmd *cobra.Command, target string, f *inspectFlags) error {
	re, addr, err := f.check()
	if err != nil {
		return err
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer cancel()
	out := cmd.OutOrStdout()
	if f.stack != "" && isProfile(target) {
		return inspectProfile(out, target, f)
	}
	img, live, err := openImage(target)
	if err != nil {
		return err
	}
	defer img.Close()
	switch {
	case re != nil:
		err = inspectGrep(ctx, out, img, re, f)
	case f.hex != "":
		err = inspectHex(ctx, out, img, addr, f)
	default:
		err = inspectAll(ctx, out, img, live, f)
	}
	if ctx.Err() != nil {
		return &exitError{exitInterrupted, nil}
	}
	return err
}

// check reads the flags that have a form of their own.
func (f *inspectFlags) check() (re *regexp.Regexp, addr uint64, err error) {
	asked := 0
	for _, set := range []bool{f.grep != "", f.hex != "", f.stack != "", f.diff != "" || f.reachable} {
		if set {
			asked++
		}
	}
	if asked > 1 {
		return nil, 0, usageErrorf("--grep, --hex and --stack stand alone: each is another question than --diff and --reachable")
	}
	if f.top < 1 {
		return nil, 0, usageErrorf("--top %d: it is a number above 0", f.top)
	}
	if f.grep != "" {
		if re, err = regexp.Compile(f.grep); err != nil {
			return nil, 0, usageErrorf("--grep: %v", err)
		}
	}
	if f.hex != "" {
		digits := strings.TrimPrefix(strings.ToLower(f.hex), "0x")
		if addr, err = strconv.ParseUint(digits, 16, 64); err != nil {
			return nil, 0, usageErrorf("--hex %q: it is an address in hexadecimal digits", f.hex)
		}
	}
	return re, addr, nil
}

// openImage opens a live process when target is a number, a file otherwise.
func openImage(target string) (img memory.Image, live bool, err error) {
	pid, err := strconv.Atoi(target)
	if err != nil {
		file, err := memory.Open(target)
		if err != nil {
			return nil, false, err
		}
		return file, false, nil
	}
	if pid <= 0 {
		return nil, false, usageErrorf("pid %d: it is a number above 0", pid)
	}
	p, err := memory.OpenProcess(pid)
	if err != nil {
		return nil, false, err
	}
	return p, true, nil
}

func inspectAll(ctx context.Context, out io.Writer, img memory.Image, live bool, f *inspectFlags) error {
	opt := heap.InspectOptions{NoRedact: f.noRedact, Reachable: f.reachable, Live: live}
	if live && f.reachable {
		opt.Threads = heap.LiveThreads(img.Info().PID)
	}
	old, err := openOld(ctx, f.diff, &opt)
	if err != nil {
		return err
	}
	trace, err := f.openTrace(ctx, img.Info(), live)
	if err != nil {
		return err
	}
	if trace != nil {
		opt.Stacks = trace.Stacks
	}
	report, err := heap.Inspect(ctx, img, opt)
	if err != nil {
		return err
	}
	if f.json {
		return writeJSON(out, inspectDocument{report, stackDocuments(trace)})
	}
	p := newInspectPrinter(out, f)
	p.report(report, old, trace)
	return p.flush()
}

// openOld reads what --diff names: a report, or a dump, whose heap is walked as well.
func openOld(ctx context.Context, path string, opt *heap.InspectOptions) (*heap.Report, error) {
	if path == "" {
		return nil, nil
	}
	head := make([]byte, 1)
	if file, err := os.Open(path); err == nil {
		n, _ := file.Read(head)
		file.Close()
		if n == 1 && head[0] == '{' {
			return readReport(path)
		}
	}
	img, err := memory.Open(path)
	if err != nil {
		return nil, err
	}
	defer img.Close()
	report, err := heap.Inspect(ctx, img, heap.InspectOptions{NoRedact: opt.NoRedact})
	if err != nil {
		return nil, err
	}
	opt.Since = report.Heap
	return report, nil
}

// maxReport bounds a saved report that is read back.
const maxReport = 64 << 20

func readReport(path string) (*heap.Report, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxReport+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	report := new(heap.Report)
	if len(text) > maxReport {
		err = errors.New("too large")
	} else {
		err = json.Unmarshal(text, report)
	}
	if err == nil && report.Groups == nil && report.Outside == nil {
		err = errors.New("it has no groups")
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: not a document of inspect --json: %w", path, err)
	}
	return report, nil
}

func writeJSON(out io.Writer, v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encode report: %w", err)
	}
	_, err := profile.JSONWriter(out).Write(b.Bytes())
	return err
}

// walkQuietly walks the heap for commands that can do without.
func walkQuietly(ctx context.Context, img memory.Image) (*heap.Heap, error) {
	h, err := heap.Walk(ctx, heap.NewSpace(img))
	if errors.Is(err, heap.ErrNoAllocator) {
		return nil, nil
	}
	return h, err
}

// grepMatch is one match in JSON.
type grepMatch struct {
	Address   uint64 `json:"address"`
	Length    int    `json:"length"`
	Range     string `json:"range"`
	Block     uint64 `json:"block,omitempty"` // 0 when it lies in no block in use
	BlockSize uint64 `json:"block_size,omitempty"`
	Text      string `json:"text"`
}

func inspectGrep(ctx context.Context, out io.Writer, img memory.Image, re *regexp.Regexp, f *inspectFlags) error {
	h, err := walkQuietly(ctx, img)
	if err != nil {
		return err
	}
	var matches []grepMatch
	total, inBlocks := 0, 0
	err = heap.Search(ctx, img, h, re, func(m heap.Match) bool {
		total++
		if m.InBlock {
			inBlocks++
		}
		if total <= f.top {
			matches = append(matches, newGrepMatch(&m, f.noRedact))
		}
		return true
	})
	if err != nil {
		return err
	}
	if f.json {
		return writeJSON(out, struct {
			Total    int         `json:"total"`
			InBlocks int         `json:"in_blocks"`
			Matches  []grepMatch `json:"matches"`
		}{total, inBlocks, matches})
	}
	p := newInspectPrinter(out, f)
	p.matches(matches, total, inBlocks)
	return p.flush()
}

func newGrepMatch(m *heap.Match, noRedact bool) grepMatch {
	g := grepMatch{Address: m.Addr, Length: m.Length, Range: rangeName(m.Range), Text: showText(m.Around, noRedact)}
	if m.InBlock {
		g.Block, g.BlockSize = m.Block.Addr, m.Block.Size
	}
	return g
}

func rangeName(r heap.Range) string {
	if r.Path != "" {
		return r.Path
	}
	return string(r.Kind)
}

const maxHex = 4096

func inspectHex(ctx context.Context, out io.Writer, img memory.Image, addr uint64, f *inspectFlags) error {
	h, err := walkQuietly(ctx, img)
	if err != nil {
		return err
	}
	r := memory.FindRange(img.Ranges(), addr)
	if r == nil {
		return fmt.Errorf("address %#x is not mapped", addr)
	}
	start, size := addr&^15, uint64(256)
	block, inUse := heap.Block{}, false
	if h != nil {
		if block, inUse = h.Find(addr); inUse {
			start, size = block.Addr, block.Size
		}
	}
	data := make([]byte, min(size, maxHex, r.End-start))
	n, err := img.ReadAt(data, int64(start))
	if n == 0 {
		return fmt.Errorf("read memory at %#x: %w", start, err)
	}
	space := heap.NewSpace(img)
	d := newHexDump(space, block, inUse, r, start, data[:n], f.noRedact)
	if f.json {
		return writeJSON(out, d)
	}
	p := newInspectPrinter(out, f)
	p.hex(d)
	return p.flush()
}
