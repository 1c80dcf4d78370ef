package target

import (
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

func TestForkedChildrenJoinAtOnceAndLeaveOnce(t *testing.T) {
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{PIDs: []int{a.pid}}, Options{})
	w.Scan(t.Context())
	if got := c.next(); got.Kind != Joined || got.Process.PID != a.pid || got.Why != "--pid "+strconv.Itoa(a.pid) {
		t.Fatalf("got %+v", got)
	}
	child := a.number("spawn")
	w.Fork(a.pid, child)
	got := c.next()
	if got.Kind != Joined || got.Process.PID != child || got.Process.Start == 0 || !strings.HasPrefix(got.Why, "child of "+strconv.Itoa(a.pid)) {
		t.Errorf("got %+v", got)
	}
	w.Fork(a.pid, child) // told twice
	w.Scan(t.Context())
	c.none()
	unix.Kill(child, unix.SIGKILL)
	w.Exit(child)
	if got := c.next(); got.Kind != Left || got.Process.PID != child {
		t.Errorf("got %+v", got)
	}
	w.Exit(child)
	c.none()
	if w.Ended() {
		t.Error("ended with a member left")
	}
	w.Exit(a.pid)
	if c.next(); !w.Ended() {
		t.Error("not ended after the last member")
	}
}

func TestAChildThatIsGoneBeforeItIsReadStillJoins(t *testing.T) {
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{PIDs: []int{a.pid}}, Options{})
	w.Scan(t.Context())
	parent := c.next().Process
	const gone = 1 << 22 // beyond pid_max
	w.Fork(a.pid, gone)
	got := c.next()
	if got.Kind != Joined || got.Process.PID != gone || got.Process.Start != 0 || got.Process.Comm != parent.Comm {
		t.Errorf("got %+v", got)
	}
	if s := w.Stats(); s.Unread != 1 || s.Joined != 2 {
		t.Errorf("stats %+v", s)
	}
	w.Exit(gone)
	if got := c.next(); got.Kind != Left || got.Process.PID != gone {
		t.Errorf("got %+v", got)
	}
}

func TestWithoutChildrenOnlyTheSelectedJoin(t *testing.T) {
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{PIDs: []int{a.pid}}, Options{NoChildren: true})
	w.Scan(t.Context())
	c.next()
	child := a.number("spawn")
	w.Fork(a.pid, child)
	w.Scan(t.Context())
	c.none()
}

func TestAScanFindsWhatNobodyTold(t *testing.T) {
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{PIDs: []int{a.pid}}, Options{})
	running(t, w)
	c.next()
	child := a.number("spawn")
	if got := c.next(); got.Kind != Joined || got.Process.PID != child {
		t.Errorf("got %+v", got)
	}
	a.kill() // the child dies with it
	left := map[int]bool{}
	for range 2 {
		got := c.next()
		left[got.Process.PID] = got.Kind == Left
	}
	if !left[a.pid] || !left[child] {
		t.Errorf("left: %v", left)
	}
	if s := w.Stats(); s.Late != 1 || s.Errors != 0 {
		t.Errorf("stats %+v", s)
	}
}

func TestAProcessThatStartsOrRenamesItselfLaterIsFoundByName(t *testing.T) {
	name := "late-" + strconv.Itoa(os.Getpid()%100000)
	w, c := newWatcher(t, Selector{Names: []*regexp.Regexp{regexp.MustCompile("^" + name + "$")}}, Options{})
	running(t, w)
	a := newActor(t, nil)
	a.do("name %s", name)
	got := c.next()
	if got.Kind != Joined || got.Process.PID != a.pid {
		t.Errorf("got %+v", got)
	}
	a.do("name other") // members stay whatever they become
	b := newActor(t, nil)
	b.do("name %s", name)
	if got := c.next(); got.Kind != Joined || got.Process.PID != b.pid {
		t.Errorf("got %+v", got)
	}
	if w.Ended() {
		t.Error("a name never ends")
	}
}

func TestAnExecIsReportedAndKeepsTheIdentity(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("needs sleep")
	}
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{PIDs: []int{a.pid}}, Options{})
	running(t, w)
	before := c.next().Process
	a.do("exec %s", sleep)
	got := c.next() // found by a scan: nobody told
	if got.Kind != Execed || got.Process.ID != before.ID || got.Process.Exe == before.Exe {
		t.Errorf("got %+v after %+v", got, before)
	}
}

func TestAnExecMakesAMemberOfAStranger(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("needs sleep")
	}
	a := newActor(t, nil)
	w, c := newWatcher(t, Selector{Exes: []string{sleep}}, Options{})
	w.Scan(t.Context())
	for len(c.ch) > 0 {
		<-c.ch // other sleepers of this machine
	}
	before, err := Read(memory.FS{}, a.pid)
	if err != nil {
		t.Fatal(err)
	}
	a.do("exec %s", sleep)
	// In the middle of the exec nothing is read.
	for now := before; now.Exe == before.Exe || now.Exe == ""; now, _ = Read(memory.FS{}, a.pid) {
	}
	w.Exec(a.pid)
	if got := c.next(); got.Kind != Joined || got.Process.PID != a.pid {
		t.Errorf("got %+v", got)
	}
}

// A small pid namespace hands a pid out again after a few forks: the newcomer must not be taken for the late member.
func TestAReusedPidIsAnotherProcess(t *testing.T) {
	w, c := newWatcher(t, Selector{PIDs: []int{7}}, Options{})
	stat := func(start, comm string) {
		put(t, w.finder.fs.Root, "7/stat", "7 ("+comm+") S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 "+start+" 1 1 1")
	}
	w.finder.fs = memory.FS{Root: t.TempDir()}
	put(t, w.finder.fs.Root, "7/status", "NSpid:\t7\n")
	stat("11", "old")
	w.Scan(t.Context())
	if got := c.next(); got.Kind != Joined || got.Process.ID != (ID{7, 11}) {
		t.Fatalf("got %+v", got)
	}
	stat("13", "new")
	w.Scan(t.Context())
	if got := c.next(); got.Kind != Left || got.Process.ID != (ID{7, 11}) {
		t.Errorf("got %+v", got)
	}
	if got := c.next(); got.Kind != Joined || got.Process.ID != (ID{7, 13}) || got.Process.Comm != "new" {
		t.Errorf("got %+v", got)
	}
	os.RemoveAll(w.finder.fs.Root + "/7")
	w.Scan(t.Context())
	if got := c.next(); got.Kind != Left || got.Process.ID != (ID{7, 13}) {
		t.Errorf("got %+v", got)
	}
}

func TestAContainerThatIsReplacedUnderItsNameIsFollowed(t *testing.T) {
	first, second := testGroup(t, "docker/"+id64), testGroup(t, "docker/bb"+id64[2:])
	root := t.TempDir()
	name := func(id string) {
		put(t, root, "var/lib/containers/storage/overlay-containers/containers.json", `[{"id":"`+id+`","names":["web"]}]`)
	}
	name(id64)
	a, b := newActor(t, nil), newActor(t, nil)
	join(t, first, a.pid)
	f, err := NewFinder(t.Context(), Selector{Containers: []string{"web"}}, memory.FS{}, Names{Root: root})
	if err != nil {
		t.Fatal(err)
	}
	c := &changes{t, make(chan Change, 4096)}
	w := NewWatcher(f, Options{}, func(change Change) { c.ch <- change })
	running(t, w)
	if got := c.next(); got.Process.PID != a.pid {
		t.Fatalf("got %+v", got)
	}
	a.kill()
	if got := c.next(); got.Kind != Left {
		t.Fatalf("got %+v", got)
	}
	name("bb" + id64[2:])
	join(t, second, b.pid)
	if got := c.next(); got.Kind != Joined || got.Process.PID != b.pid {
		t.Errorf("got %+v", got)
	}
}

func BenchmarkScanOfAQuietMachine(b *testing.B) {
	f, err := NewFinder(b.Context(), Selector{Names: []*regexp.Regexp{regexp.MustCompile("^no-such-name$")}}, memory.FS{}, Names{})
	if err != nil {
		b.Fatal(err)
	}
	w := NewWatcher(f, Options{}, func(Change) {})
	w.Scan(b.Context())
	for b.Loop() {
		w.Scan(b.Context())
	}
}
