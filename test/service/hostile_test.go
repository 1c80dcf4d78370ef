package service

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// hostileName is what a file may be called: a newline, escapes that clear a terminal and set its title, a verb that
// writes, markup, a C1 control in UTF-8 and alone, a right-to-left override.
const hostileName = "a\n\x1b[2J\x1b]0;title\x07%n%s<script>'\"\u009b\x9b\u202e\tz"

// patience bounds what a command may take on a busy machine.
const patience = 100 * time.Second

// ask runs allocsnoop with arguments and returns what it printed. Whatever it was asked about, that must be clean.
func ask(t *testing.T, want int, args ...string) (stdout string) {
	t.Helper()
	cmd := exec.Command(live.Allocsnoop(t), args...)
	cmd.Dir = t.TempDir()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait() // its state tells
	if got := cmd.ProcessState.ExitCode(); got != want {
		t.Errorf("allocsnoop %q: exit code %d (%v), want %d\n%s%s", args, got, cmd.ProcessState, want, &out, &errs)
	}
	checkClean(t, fmt.Sprintf("%q: stdout", args), out.String())
	checkClean(t, fmt.Sprintf("%q: stderr", args), errs.String())
	return out.String()
}

// checkClean fails on anything that a terminal could take for a command. JSON must parse, too.
func checkClean(t *testing.T, what, text string) {
	t.Helper()
	if !utf8.ValidString(text) {
		t.Errorf("%s is no UTF-8: %q", what, text)
	}
	if i := strings.IndexFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 {
		t.Errorf("%s holds a control character: %q", what, text[max(0, i-60):min(len(text), i+60)])
	}
	if strings.Contains(text, "title\x07") || strings.Contains(text, "panic:") || strings.Contains(text, "goroutine ") {
		t.Errorf("%s: %q", what, text)
	}
}

// askJSON is ask for a command that prints one document.
func askJSON(t *testing.T, args ...string) {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(ask(t, 0, args...)), &v); err != nil {
		t.Errorf("%q: %v", args, err)
	}
}

func hostileDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), hostileName)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// put copies a file into a directory under a name.
func put(t *testing.T, file, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestHostileNamesComeOutClean(t *testing.T) {
	live.RequireBPF(t)
	dir := hostileDir(t)
	program := put(t, live.CompileC(t, "testdata/hostile.c"), dir, "p"+hostileName)
	lib := put(t, live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC"), dir, "lib"+hostileName+".so")
	p := live.Start(t, program, "names", lib)
	p.Expect(t, "ready")
	pid := strconv.Itoa(p.PID)
	tr := live.Trace(t, p.PID, "--mode", "exact", "--content")
	p.Send(t, "go")
	p.Expect(t, "done")
	ask(t, 0, "inspect", pid)
	ask(t, 0, "inspect", pid, "--stack")
	result := tr.Stop(t)
	checkClean(t, "the summary", result.Stdout)
	checkClean(t, "the warnings", result.Stderr)
	for function, want := range map[string]live.Book{
		"keep_blocks": {AllocObjects: 23, AllocBytes: 23 * 307, InUseObjects: 23, InUseBytes: 23 * 307},
		"lib_keep":    {AllocObjects: 31, AllocBytes: 31 * 211, InUseObjects: 31, InUseBytes: 31 * 211},
	} {
		if got := live.Sum(result.Profile, "malloc", "malloc", function); got != want {
			t.Errorf("%s: got %+v, want %+v\n%s", function, got, want, result.Stdout)
		}
	}
	for _, args := range [][]string{
		{"maps", pid}, {"libs", pid}, {"libs", result.Path}, {"libs", dir}, {"doctor", pid}, {"top", "--once", "-n", "0"},
		{"dump", pid, "-o", "d.dump"}, {"view", result.Path, "--folded"}, {"diff", result.Path, result.Path},
		{"symbolize", result.Path, "-o", "s.pb.gz"}, {"--pid", pid, "--duration", "100ms"},
	} {
		ask(t, 0, args...)
	}
	for _, args := range [][]string{
		{"maps", pid, "--json"}, {"libs", pid, "--json"}, {"inspect", pid, "--json"}, {"doctor", pid, "--json"},
		{"top", "--once", "-n", "0", "--json"}, {"diff", result.Path, result.Path, "--json"}, {"--pid", pid, "--duration", "100ms", "--json"},
	} {
		askJSON(t, args...)
	}
	html := filepath.Join(t.TempDir(), "x.html")
	ask(t, 0, "view", result.Path, "--html", html)
	page, err := os.ReadFile(html)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(page, []byte("<script>'")) || bytes.ContainsRune(page, 0x1b) {
		t.Error("the page holds a name that was not escaped")
	}
	for _, args := range [][]string{{"maps", "x" + hostileName}, {"libs", hostileName}, {"--name", hostileName + "(", "--duration", "1s"}} {
		cmd := exec.Command(live.Allocsnoop(t), args...)
		text, _ := cmd.CombinedOutput()
		checkClean(t, fmt.Sprintf("%q", args), string(text))
	}
}

// 65,530 is the kernel's own limit (vm.max_map_count).
func TestAProcessOf65000MappingsIsLookedAtAndTraced(t *testing.T) {
	live.RequireBPF(t)
	p := live.Start(t, live.CompileC(t, "testdata/hostile.c"), "many", "65000")
	p.Expect(t, "ready")
	pid := strconv.Itoa(p.PID)
	tr := live.Trace(t, p.PID, "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Stop(t)
	want := live.Book{AllocObjects: 23, AllocBytes: 23 * 307, InUseObjects: 23, InUseBytes: 23 * 307}
	if got := live.Sum(result.Profile, "malloc", "malloc", "keep_blocks", "main"); got != want {
		t.Errorf("got %+v, want %+v\n%s%s", got, want, result.Stdout, result.Stderr)
	}
	if out := ask(t, 0, "maps", pid, "--json"); strings.Count(out, `"start"`) < 65000 {
		t.Errorf("maps knows of %d mappings", strings.Count(out, `"start"`))
	}
	if out := ask(t, 0, "maps", pid); strings.Count(out, "\n") > 1100 || !strings.Contains(out, "smaller ranges") {
		t.Errorf("maps prints %d lines", strings.Count(out, "\n"))
	}
	ask(t, 0, "inspect", pid)
	ask(t, 0, "doctor", pid)
	ask(t, 0, "libs", pid)
	ask(t, 0, "top", "--once", "-n", "0")
}

// libraryOn starts a target that has loaded a library of its own, and returns the library's path.
func libraryOn(t *testing.T) (*live.Process, string) {
	t.Helper()
	lib := put(t, live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC"), t.TempDir(), "libkeep.so")
	p := live.Start(t, live.CompileC(t, "testdata/hostile.c"), "lib", lib)
	p.Expect(t, "ready")
	return p, lib
}

var keptByLib = live.Book{AllocObjects: 31, AllocBytes: 31 * 211, InUseObjects: 31, InUseBytes: 31 * 211}

func TestALibraryThatIsReplacedIsStillNamed(t *testing.T) {
	live.RequireBPF(t)
	for _, tt := range []struct {
		name         string
		beforeAttach bool
	}{{"before the attach", true}, {"while it is traced", false}} {
		t.Run(tt.name, func(t *testing.T) {
			p, lib := libraryOn(t)
			replace := func() {
				other := put(t, live.CompileC(t, "testdata/maker.c"), filepath.Dir(lib), "new")
				if err := os.Rename(other, lib); err != nil {
					t.Fatal(err)
				}
			}
			if tt.beforeAttach {
				replace()
			}
			tr := live.Trace(t, p.PID, "--mode", "exact")
			replace()
			p.Send(t, "go")
			p.Expect(t, "done")
			result := tr.Stop(t)
			if got := live.Sum(result.Profile, "malloc", "malloc", "lib_keep", "main"); got != keptByLib {
				t.Errorf("got %+v, want %+v\n%s%s", got, keptByLib, result.Stdout, result.Stderr)
			}
			if out := ask(t, 0, "libs", strconv.Itoa(p.PID)); !strings.Contains(out, "replaced") {
				t.Errorf("libs does not say that the file was replaced\n%s", out)
			}
		})
	}
}

// Whoever maps a file that shrinks is killed by SIGBUS.
func TestFilesThatShrinkDoNotHarmTheTracer(t *testing.T) {
	live.RequireBPF(t)
	good := live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC")
	dir := t.TempDir()
	args := []string{"code"}
	for _, name := range []string{"0", "100", "4096"} {
		args = append(args, put(t, good, dir, name))
	}
	p := live.Start(t, live.CompileC(t, "testdata/hostile.c"), args...)
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--mode", "exact")
	for _, file := range args[1:] {
		size, err := strconv.ParseInt(filepath.Base(file), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
	}
	p.Send(t, "go")
	p.Expect(t, "done")
	lookAndTrace(t, p, tr)
}

// lookAndTrace ends a trace, which must be exact, and has the other commands look at the process, too.
func lookAndTrace(t *testing.T, p *live.Process, tr *live.Tracer) {
	t.Helper()
	result := tr.Stop(t)
	if got := live.Sum(result.Profile, "malloc", "malloc", "keep_blocks", "main").InUseBytes; got != 23*307 || result.ExitCode != 130 {
		t.Errorf("exit code %d, %d bytes in use, want 130 and %d\n%s%s", result.ExitCode, got, 23*307, result.Stdout, result.Stderr)
	}
	checkClean(t, "the summary", result.Stdout+result.Stderr)
	pid := strconv.Itoa(p.PID)
	for _, command := range []string{"maps", "libs", "inspect", "doctor"} {
		ask(t, 0, command, pid)
	}
	ask(t, 0, "--pid", pid, "--duration", "100ms")
}

// corrupted are damaged copies of a library.
func corrupted(t *testing.T) map[string][]byte {
	t.Helper()
	good, err := os.ReadFile(live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"nothing but an ELF magic": append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 65529)...), "no ELF": bytes.Repeat([]byte("A"), 65536)}
	with := func(name string, change func(b []byte)) {
		b := append(bytes.Clone(good), make([]byte, 65536)...)
		change(b)
		files[name] = b
	}
	fill := func(from, to int) func([]byte) {
		return func(b []byte) {
			for i := from; i < to; i++ {
				b[i] = 0xff
			}
		}
	}
	with("program headers far away", fill(32, 40))
	with("section headers far away", fill(40, 48))
	with("very many headers", fill(54, 64))
	with("all program headers are ones", fill(64, 64+56*9))
	with("all after the header is ones", fill(64, len(good)))
	with("section headers are ones", fill(len(good)-64*20, len(good)))
	return files
}

func TestDamagedCodeFilesDoNoHarm(t *testing.T) {
	live.RequireBPF(t)
	dir := t.TempDir()
	args := []string{"code"}
	for name, data := range corrupted(t) {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, data, 0o755); err != nil {
			t.Fatal(err)
		}
		args = append(args, file)
	}
	p := live.Start(t, live.CompileC(t, "testdata/hostile.c"), args...)
	p.Expect(t, "ready")
	tr := live.Trace(t, p.PID, "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	lookAndTrace(t, p, tr)
}

func TestAttachingToAStormOfForksIsCleanAndExact(t *testing.T) {
	live.RequireBPF(t)
	name := fmt.Sprintf("storm%d", os.Getpid())
	p := live.Start(t, copyOf(t, live.CompileC(t, "testdata/hostile.c"), name), "storm")
	p.Expect(t, "ready")
	tr := live.TraceArgs(t, "--name", "^"+name+"$", "--mode", "exact", "--max-live", "50000")
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Stop(t)
	if got := live.Sum(result.Profile, "malloc", "malloc", "keep_blocks", "main"); got.InUseBytes != 23*307 || got.AllocObjects != 23 {
		t.Errorf("got %+v", got)
	}
	if result.Stderr != "" {
		t.Errorf("warnings: %s", result.Stderr)
	}
	for range 3 {
		ask(t, 0, "top", "--once", "-n", "0")
	}
}
