package exact

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/google/pprof/profile"
)

func expect(t *testing.T, p *profile.Profile, site string, want live.Book) {
	t.Helper()
	if got := live.Sum(p, "malloc", "malloc", site); got != want {
		t.Errorf("%s: the profile has %+v, want %+v\n%s", site, got, want, describe(p, site))
	}
}

func startLife(t *testing.T, args ...string) *live.Process {
	t.Helper()
	return allocators[0].start(t, allocators[0].compile(t, "life.c"), args...)
}

// Parent and child have the same addresses, so this is also the test that the books are kept by process.
func TestForkKeepsParentAndChildApart(t *testing.T) {
	p := startLife(t, "fork")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
	p.Send(t, "go")
	child, err := strconv.Atoi(strings.TrimPrefix(p.Line(t), "child "))
	if err != nil {
		t.Fatal(err)
	}
	rows := ledger(t, p)
	result := tr.Stop(t)
	requireLossless(t, result)
	live.CheckText(t, child)

	parents, childs := live.OfProcess(result.Profile, p.PID), live.OfProcess(result.Profile, child)
	for _, r := range rows {
		if r.Site != "site_child" && r.Site != "site_realloc_old" {
			compareRow(t, parents, r)
		}
	}
	expect(t, parents, "site_child", live.Book{})
	expect(t, childs, "site_child", live.Book{AllocObjects: 13, AllocBytes: 13 * 1013, InUseObjects: 11, InUseBytes: 11 * 1013})
	expect(t, childs, "site_parent", live.Book{})
	if resized := live.Sum(childs, "malloc", "site_realloc_old"); resized != (live.Book{}) {
		t.Errorf("the child's realloc of its parent's blocks is booked as malloc: %+v", resized)
	}
	before := summary(t, result).PreAttach
	if before.Inherited != 5 || before.Reallocs != 3 || before.ReallocBytes != 3*5003 {
		t.Errorf("the summary says of inherited blocks: %+v, want 5 freed and 3 resized", before)
	}
}

func TestChildrenStayOutWhenToldSo(t *testing.T) {
	p := startLife(t, "fork")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json", "--no-children")
	p.Send(t, "go")
	p.Line(t)
	ledger(t, p)
	result := tr.Stop(t)
	requireLossless(t, result)
	expect(t, result.Profile, "site_child", live.Book{})
	expect(t, result.Profile, "site_parent", live.Book{AllocObjects: 17, AllocBytes: 17 * 1009, InUseObjects: 16, InUseBytes: 16 * 1009})
}

func TestLibraryLoadedLaterIsNamed(t *testing.T) {
	plugin := live.CompileC(t, "testdata/plugin.c", "-shared", "-fPIC")
	p := startLife(t, "load", plugin)
	rows, result := traceGo(t, p)
	requireLossless(t, result)
	allocators[0].compare(t, result.Profile, rows)
	expect(t, result.Profile, "plugin_keep", live.Book{AllocObjects: 23, AllocBytes: 23 * 1103, InUseObjects: 23, InUseBytes: 23 * 1103})
}

func TestTargetsEndIsANormalEnd(t *testing.T) {
	for _, how := range []string{"exit", "killed"} {
		t.Run(how, func(t *testing.T) {
			p := startLife(t, how)
			tr := live.Trace(t, p.PID, "--mode", "exact", "--json")
			p.Send(t, "go")
			result := tr.Wait(t)
			if result.ExitCode != 0 {
				t.Errorf("exit code %d, want 0\nstderr: %s", result.ExitCode, result.Stderr)
			}
			requireLossless(t, result)
			expect(t, result.Profile, "site_before", live.Book{AllocObjects: 13, AllocBytes: 13 * 1033, InUseObjects: 13, InUseBytes: 13 * 1033})
		})
	}
}

// 5 of 31 old blocks are freed, 7 resized, 3 of those freed.
func TestBlocksFromBeforeTheAttachAreApart(t *testing.T) {
	p := startLife(t, "old")
	rows, result := traceGo(t, p)
	requireLossless(t, result)
	if resized := live.Sum(result.Profile, "malloc", "site_realloc_old"); resized != (live.Book{}) {
		t.Errorf("the realloc of old blocks is booked as malloc: %+v", resized)
	}
	for _, r := range rows {
		if r.Site == "site_before" {
			compareRow(t, result.Profile, r)
		}
	}
	before := summary(t, result).PreAttach
	if before.Reallocs != 7 || before.ReallocBytes != 7*5003 || before.Frees < 5 {
		t.Errorf("the summary says of blocks from before the attach: %+v, want 7 resized and at least 5 freed", before)
	}
}

func TestFullLiveMapIsSaid(t *testing.T) {
	p := startLife(t, "many")
	tr := live.Trace(t, p.PID, "--mode", "exact", "--json", "--max-live", "1000")
	p.Send(t, "go")
	result := tr.Wait(t)
	if result.ExitCode != 3 {
		t.Errorf("exit code %d, want 3\nstderr: %s", result.ExitCode, result.Stderr)
	}
	if result.Profile == nil {
		t.Fatal("no profile was written")
	}
	if losses := summary(t, result).Losses; len(losses) == 0 {
		t.Error("5,016 blocks in a map of 1,000, and the summary names no loss")
	}
	got := live.Sum(result.Profile, "malloc", "malloc", "site_after")
	if got.InUseObjects < 0 || got.InUseObjects > 5003 || got.AllocObjects > 5003 {
		t.Errorf("site_after made 5003 blocks, the profile has %+v", got)
	}
}

// The probes must come before the program's first block.
func TestCommandIsTracedFromItsStart(t *testing.T) {
	path := allocators[0].compile(t, "life.c")
	out := t.TempDir() + "/profile.pb.gz"
	cmd := exec.Command(live.Allocsnoop(t), "--mode", "exact", "--json", "-o", out, "--", path, "at-once")
	live.RequireBPF(t)
	text, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	p := live.ReadProfile(t, out)
	expect(t, p, "site_after", live.Book{AllocObjects: 29, AllocBytes: 29 * 1021, InUseObjects: 29, InUseBytes: 29 * 1021})
}

func TestTargetIsUnharmedWhenTheTracerIsKilled(t *testing.T) {
	path := allocators[0].compileRandom(t)
	p := allocators[0].start(t, path, "7", "8")
	tr := live.Trace(t, p.PID, "--mode", "exact")
	if !live.Probed(t, p.PID) {
		t.Error("no probe is seen in the target's memory: the check below would prove nothing")
	}
	p.Send(t, "run 400000")
	tr.Kill(t)
	p.Expect(t, "did")
	live.CheckText(t, p.PID)
	p.Send(t, "run 100000")
	p.Expect(t, "did")
	if !p.Alive() {
		t.Error("the target ended")
	}
}

func TestTargetInNamespacesOfItsOwn(t *testing.T) {
	path := allocators[0].compile(t, "life.c")
	cmd := exec.Command("unshare", "--pid", "--mount", "--fork", "--kill-child", path, "old")
	p := live.StartCmd(t, cmd)
	p.Expect(t, "ready")
	inner := onlyChild(t, p.PID)
	tr := live.Trace(t, inner, "--mode", "exact", "--json")
	p.Send(t, "go")
	rows := ledger(t, p)
	result := tr.Stop(t)
	requireLossless(t, result)
	for _, r := range rows {
		if r.Site == "site_before" {
			compareRow(t, result.Profile, r)
		}
	}
}

func onlyChild(t *testing.T, pid int) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatalf("children of %d: %q", pid, text)
	}
	t.Cleanup(func() { _ = syscall.Kill(child, syscall.SIGKILL) })
	return child
}
func TestExecEndsEveryBlock(t *testing.T) {
	p := startLife(t, "exec")
	_, result := traceGo(t, p)
	requireLossless(t, result)
	expect(t, result.Profile, "site_after", live.Book{AllocObjects: 19, AllocBytes: 19 * 1031, InUseObjects: 19, InUseBytes: 19 * 1031})
	if before := live.Sum(result.Profile, "malloc", "malloc", "site_before"); before.InUseObjects != 0 || before.InUseBytes != 0 {
		t.Errorf("blocks of the program before exec are in use: %+v", before)
	}
}
