package target

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"golang.org/x/sys/unix"
)

// actorVariable makes the test program a process that does what its standard input says, line by line, and answers each.
const actorVariable = "ALLOCSNOOP_TEST_ACTOR"

func TestMain(m *testing.M) {
	if os.Getenv(actorVariable) != "" {
		act()
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func act() {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		verb, arg, _ := strings.Cut(in.Text(), " ")
		switch verb {
		case "name":
			os.WriteFile("/proc/self/comm", []byte(unquote(arg)), 0)
		case "spawn": // a child that waits until it is killed
			cmd := exec.Command("/proc/self/exe")
			cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
			cmd.StdinPipe()
			if err := cmd.Start(); err != nil {
				fmt.Println(err)
				continue
			}
			fmt.Println(cmd.Process.Pid)
			continue
		case "zombie": // a child that ended and is not waited for
			cmd := exec.Command("/bin/true")
			if err := cmd.Start(); err != nil {
				fmt.Println(err)
				continue
			}
			unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
			fmt.Println(cmd.Process.Pid)
			continue
		case "thread":
			fmt.Println(unix.Gettid())
			continue
		case "exec":
			fmt.Println("ok")
			unix.Exec(arg, []string{arg, "1000"}, nil)
		case "map":
			f, err := os.Open(arg)
			if err == nil {
				_, err = unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ, unix.MAP_PRIVATE)
			}
			if err != nil {
				fmt.Println(err)
				continue
			}
		}
		fmt.Println("ok")
	}
}

func unquote(s string) string {
	u, err := strconv.Unquote(s)
	if err != nil {
		return s
	}
	return u
}

// actor is such a process.
type actor struct {
	t     *testing.T
	cmd   *exec.Cmd
	stdin io.Writer
	out   *bufio.Scanner
	pid   int // as this test sees it
}

// newActor starts one; change may alter how.
func newActor(t *testing.T, change func(*exec.Cmd)) *actor {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), actorVariable+"=1")
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if change != nil {
		change(cmd)
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	a := &actor{t, cmd, stdin, bufio.NewScanner(out), cmd.Process.Pid}
	a.do("hello") // it runs when it answers
	return a
}

// do has the actor do something and returns its answer.
func (a *actor) do(format string, args ...any) string {
	a.t.Helper()
	fmt.Fprintf(a.stdin, format+"\n", args...)
	if !a.out.Scan() {
		a.t.Fatalf("actor %d gives no answer to %q", a.pid, format)
	}
	return a.out.Text()
}

func (a *actor) number(verb string) int {
	a.t.Helper()
	answer := a.do(verb)
	n, err := strconv.Atoi(answer)
	if err != nil {
		a.t.Fatalf("actor %d answers %q to %q", a.pid, answer, verb)
	}
	return n
}

func (a *actor) kill() {
	a.t.Helper()
	a.cmd.Process.Kill()
	a.cmd.Wait()
}

func finder(t *testing.T, s Selector) *Finder {
	t.Helper()
	f, err := NewFinder(t.Context(), s, memory.FS{}, Names{Root: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func pidsOf(list []Process) []int {
	var pids []int
	for _, p := range list {
		pids = append(pids, p.PID)
	}
	return pids
}

// changes collects what a watcher reports.
type changes struct {
	t  *testing.T
	ch chan Change
}

func newWatcher(t *testing.T, s Selector, opts Options) (*Watcher, *changes) {
	t.Helper()
	c := &changes{t, make(chan Change, 4096)}
	return NewWatcher(finder(t, s), opts, func(change Change) { c.ch <- change }), c
}

func (c *changes) next() Change {
	c.t.Helper()
	select {
	case change := <-c.ch:
		return change
	case <-time.After(20 * time.Second):
		c.t.Fatal("no change is reported")
	}
	return Change{}
}

func (c *changes) none() {
	c.t.Helper()
	select {
	case change := <-c.ch:
		c.t.Errorf("reported: %v of %s, %s", change.Kind, change.Process.String(), change.Why)
	default:
	}
}

// running scans until the test ends.
func running(t *testing.T, w *Watcher) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { w.Run(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
}
