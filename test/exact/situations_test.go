package exact

import (
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ours "github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

// situations are what other tools book wrongly. Numbers are for good: sites in testdata/situations.c have them in their
// names.
var situations = &grid{
	name: "situations",
	head: []string{"", "Situation", "Wrong in other tools", "Right"},
	rows: [][]string{
		{"1", "`realloc` fails", "block lost", "it stays"},
		{"2", "`posix_memalign` fails, its variable holds a block", "block recorded again", "unchanged"},
		{"3", "`malloc` above the mmap threshold", "whole pages, no caller, or twice", "one block of the size asked for"},
		{"4", "a thread's first `malloc`", "missing, or an arena of 128 MiB", "its own size only"},
		{"5", "`aligned_alloc`, `reallocarray(NULL)`", "several blocks", "one"},
		{"6", "`calloc`, `posix_memalign` that call `malloc`", "twice", "once"},
		{"7", "`munmap` of the head", "all gone", "the rest lives"},
		{"8", "`munmap` of the tail", "all live", "the head lives"},
		{"9", "`munmap` of the middle, of several, of a hole", "missed", "split; all gone; no error"},
		{"10", "thread stacks, file mappings", "leaks of 8 MiB", "labelled; none"},
		{"11", "`mmap` fails", "a block at -1", "nothing"},
		{"12", "the program's own `sbrk`", "not seen", "kind `brk`"},
		{"13", "`mremap`", "the old size", "the new size and place"},
		{"14", "more blocks than the live map holds", "a round number, no word", "what is missing is counted, exit code 3"},
		{"15", "8,192 call stacks", "a fifth lost", "all"},
		{"16", "read while the target frees", "6 % too much", "exact"},
		{"17", "`realloc` of a block from before the attach", "a leak of the full size", "`pre-attach`"},
		{"18", "sampled", "a tenth, not scaled", "within 5 standard errors"},
		{"19", "sampled, `mmap` inside a `malloc` that was not taken", "kind `mmap` instead", "nothing"},
		{"20", "a call left by `siglongjmp`, a thread that dies in one", "the wrong size next time", "dropped, counted"},
		{"21", "the child frees inherited blocks and leaks its own", "child not seen", "both right"},
		{"22", "one address in two processes", "collision", "apart"},
		{"23", "a library loaded later", "no symbol", "named"},
		{"24", "the target is killed", "no stacks, no end", "a final profile"},
		{"25", "other PID and mount namespaces", "silent, empty", "works"},
		{"26", "C++ `new`, no frame pointers", "one frame", "the whole chain to `main`"},
		{"27", "`new` and sized `delete`", "never freed, or 0 bytes", "balanced"},
		{"28", "age limit", "wrong unit", "nothing young in use"},
		{"29", "the tool starts the target", "first blocks lost", "from the first block"},
	},
}

// absent says why a situation does not exist in an allocator's column; "" when it does.
func (a allocator) absent(number string) string {
	switch {
	case a.tableless() && number == "12":
		return "n/a (1)"
	case !a.shared() && number == "23":
		return "n/a (2)"
	case a.tableless() && (number == "26" || number == "27"):
		return "n/a (3)"
	}
	return ""
}

func TestSituations(t *testing.T) {
	for _, a := range allocators {
		t.Run(a.name, func(t *testing.T) {
			path := a.compile(t, "situations.c", a.cxx()...)
			record := func(number, cell string) {
				if reason := a.absent(number); reason != "" {
					cell = reason
				} else if cell != exact {
					t.Errorf("situation %s: %s", number, cell)
				}
				situations.set(number, a.name, cell)
			}
			defer situations.check(t)
			mostSituations(t, a, path, record)
			if a.name != "glibc" && !everything() {
				return // a trace for each of the rest takes its time
			}
			churnUntilKilled(t, a, path, record)
			startedByTheTool(t, a, path, record)
			sampled(t, a, path, record)
			moreThanTheMapHolds(t, a, path, record)
		})
	}
}

// numberOf is the situation that a site stands for.
func numberOf(r row) string {
	number := strings.TrimPrefix(r.Site, "site_s")[:2]
	return strings.TrimPrefix(number, "0")
}

func mostSituations(t *testing.T, a allocator, path string, record func(number, cell string)) {
	plugin := live.CompileC(t, "testdata/plugin.c", "-shared", "-fPIC")
	p := a.start(t, path, "all", plugin)
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
	p.Send(t, "go")
	child, err := strconv.Atoi(strings.TrimPrefix(p.Line(t), "child "))
	if err != nil {
		t.Fatal(err)
	}
	childs, parents := ledger(t, p), ledger(t, p)
	result := tr.Stop(t)
	if result.ExitCode != 130 || result.Profile == nil {
		t.Fatalf("exit code %d\nstderr: %s", result.ExitCode, result.Stderr)
	}
	live.CheckText(t, p.PID)
	doc, snapshot := summary(t, result), readSnapshot(t, result.Path)
	own, its := live.OfProcess(result.Profile, p.PID), live.OfProcess(result.Profile, child)

	for _, r := range parents {
		switch number := numberOf(r); {
		case r.Site == "site_s10_thread":
			// below, by its label
		case number == "0" || number == "14" || number == "16" || number == "18" || number == "19" || number == "29":
			// in traces of their own
		case a.tableless() && r.Kind == "mmap":
			record(number, judgeWhole(snapshot, p.PID, parents))
		case number == "23":
			got := live.Sum(own, "malloc", "plugin_keep")
			record(number, cellOf(got, live.Book{AllocObjects: 23, AllocBytes: 23 * 1103, InUseObjects: 23, InUseBytes: 23 * 1103}))
		case number == "17" && r.Site == "site_s17_realloc_old":
			record(number, unless(doc.PreAttach.Reallocs == 7 && doc.PreAttach.ReallocBytes == 7*5003 && judge(own, r) == exact,
				"%+v", doc.PreAttach))
		case a.tableless() && r.Function == "":
			// the stack ends in the C library
		default:
			record(number, judge(own, r))
		}
	}
	for _, r := range childs {
		if number := numberOf(r); number == "21" || number == "22" {
			record(number, judge(its, r))
		}
	}
	record("10", threadStacks(snapshot, p.PID))
	record("15", unless(countStacks(own, "site_s15_stacks") == 8192, "%d stacks", countStacks(own, "site_s15_stacks")))
	record("21", unless(doc.PreAttach.Inherited >= 5, "%d inherited", doc.PreAttach.Inherited))
	record("26", wholeChains(own))
	requireLossless(t, result, "pending_stale")
	left := slices.ContainsFunc(doc.Losses, func(l loss) bool { return l.Name == "pending_stale" && l.Count == 7 })
	record("20", unless(left, "not counted: %v", doc.Losses))
}

func unless(ok bool, format string, args ...any) string {
	if ok {
		return exact
	}
	return fmt.Sprintf(format, args...)
}

func cellOf(got, want live.Book) string {
	return unless(got == want, "%+d blocks %+d B", got.InUseObjects-want.InUseObjects, got.InUseBytes-want.InUseBytes)
}

// judgeWhole compares what a C library without unwind tables mapped, as one sum: those stacks end in it. What has a label
// is a thread's.
func judgeWhole(s *ours.Snapshot, pid int, rows []row) string {
	var got, want live.Book
	for _, r := range rows {
		if r.Kind == "mmap" {
			want.InUseBytes += r.AllocBytes - r.FreeBytes
		}
	}
	for _, stack := range s.Stacks {
		if stack.PID == pid && stack.Kind == ours.KindMmap && stack.Label == "" {
			got.InUseBytes += stack.InUseBytes()
		}
	}
	return cellOf(got, want)
}

func countStacks(p *profile.Profile, site string) int {
	n := 0
	for _, sample := range p.Sample {
		if live.SampleHas(sample, site) {
			n++
		}
	}
	return n
}

func readSnapshot(t *testing.T, path string) *ours.Snapshot {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err := ours.Read(file)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// threadStacks checks that the memory of a thread that still runs is no plain mapping.
func threadStacks(s *ours.Snapshot, pid int) string {
	labelled := false
	for _, stack := range s.Stacks {
		if stack.PID != pid || stack.Kind != ours.KindMmap || stack.InUseBytes() == 0 {
			continue
		}
		labelled = labelled || stack.Label != ""
		for _, frame := range stack.Frames {
			for _, line := range frame.Lines {
				if line.Function == "site_s10_thread" && stack.Label == "" {
					return fmt.Sprintf("%d B without a label", stack.InUseBytes())
				}
			}
		}
	}
	return unless(labelled, "no thread stack")
}

func wholeChains(p *profile.Profile) string {
	for _, sample := range p.Sample {
		functions := live.Functions(sample)
		i := slices.Index(functions, "site_s26_new")
		if i < 0 {
			continue
		}
		if want := []string{"site_s26_new", "chain_inner", "chain_outer", "cxx", "all", "main"}; !isSubsequence(want, functions[i:]) {
			return strings.Join(functions, " < ")
		}
	}
	return exact
}

// isSubsequence tolerates what the compiler inlined or not in between.
func isSubsequence(want, all []string) bool {
	for _, name := range all {
		if len(want) > 0 && name == want[0] {
			want = want[1:]
		}
	}
	return len(want) == 0
}

// churnUntilKilled reads the books while three threads allocate and free, from outside the target's namespaces, and
// then kills the target.
func churnUntilKilled(t *testing.T, a allocator, path string, record func(number, cell string)) {
	cmd := exec.Command("unshare", "--pid", "--mount", "--fork", "--kill-child", path, "churn")
	cmd.Env = a.environ(t)
	p := live.StartCmd(t, cmd)
	p.Expect(t, "ready")
	inner := onlyChild(t, p.PID)
	out := filepath.Join(t.TempDir(), "profile.pb.gz")
	tr := live.Trace(t, inner, "-o", out, "--mode", "exact", "--json", "--interval", "100ms")
	p.Send(t, "go")
	ledger(t, p)
	await(t, strings.TrimSuffix(out, ".pb.gz")+".0003.pb.gz")
	if err := syscall.Kill(inner, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	result := tr.Wait(t)
	result.Path, result.Profile = out, live.ReadProfile(t, out)
	requireLossless(t, result)
	kept := live.Book{AllocObjects: 31, AllocBytes: 31 * 1033, InUseObjects: 31, InUseBytes: 31 * 1033}
	series, _ := filepath.Glob(strings.TrimSuffix(result.Path, ".pb.gz") + ".0*.pb.gz")
	cell := exact
	for _, path := range append(series[1:], result.Path) {
		profile := live.ReadProfile(t, path)
		churned := live.Sum(profile, "malloc", "site_s16_churn")
		if got := live.Sum(profile, "malloc", "site_s16_kept"); got != kept {
			cell = cellOf(got, kept)
		} else if churned.InUseObjects > 3*13 || churned.InUseObjects < 0 || churned.InUseBytes != 1063*churned.InUseObjects {
			cell = fmt.Sprintf("churn %+v", churned)
		}
	}
	record("16", cell)
	record("24", cellOf(live.Sum(result.Profile, "malloc", "site_s16_kept"), kept))
	record("25", cell)
}

// await waits for a file, which no descriptor announces.
func await(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("waited 60 s for %s", path)
		}
	}
}

func startedByTheTool(t *testing.T, a allocator, path string, record func(number, cell string)) {
	out := filepath.Join(t.TempDir(), "profile.pb.gz")
	cmd := exec.Command(live.Allocsnoop(t), "--mode", "exact", "--json", "-o", out, "--older-than", "10m", "--", path, "at-once")
	cmd.Env = a.environ(t)
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	got := live.Sum(live.ReadProfile(t, out), "malloc", "site_s29_at_once")
	record("29", unless(got.AllocObjects == 29 && got.AllocBytes == 29*1021, "%+v", got))
	record("28", unless(got.InUseObjects == 0 && got.InUseBytes == 0, "%+v", got))
}

func sampled(t *testing.T, a allocator, path string, record func(number, cell string)) {
	const interval = 64 << 10
	p := a.start(t, path, "sampled")
	tr := live.Trace(t, p.PID, "--mode", "sample", "--sample-bytes", "64KiB", "--max-overhead", "100%", "--json")
	p.Send(t, "go")
	ledger(t, p)
	result := tr.Stop(t)
	requireLossless(t, result)
	estimate := func(site string, n, size float64) string {
		taken := 1 - math.Exp(-size/interval)
		deviation := size * math.Sqrt(n*(1-taken)/taken)
		off := (float64(live.Sum(result.Profile, "malloc", site).InUseBytes) - n*size) / deviation
		return unless(math.Abs(off) < 5, "%+.1f deviations", off)
	}
	record("18", estimate("site_s18_small", 20011, 1009))
	record("18", estimate("site_s19_mapped", 199, 200003))
	mapped := live.Sum(result.Profile, "mmap", "site_s19_mapped")
	record("19", cellOf(mapped, live.Book{}))
}

func moreThanTheMapHolds(t *testing.T, a allocator, path string, record func(number, cell string)) {
	p := a.start(t, path, "many")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json", "--max-live", "1000")
	p.Send(t, "go")
	result := tr.Wait(t)
	if result.Profile == nil {
		t.Fatalf("no profile\nstderr: %s", result.Stderr)
	}
	missing := uint64(0)
	for _, loss := range summary(t, result).Losses {
		if loss.Name == "live_full" {
			missing = loss.Count
		}
	}
	got := live.Sum(result.Profile, "malloc", "site_s14_many")
	record("14", unless(result.ExitCode == 3 && got.InUseObjects >= 900 && got.InUseObjects+int64(missing) == 5003,
		"exit code %d, %d blocks, %d said to be missing", result.ExitCode, got.InUseObjects, missing))
}
