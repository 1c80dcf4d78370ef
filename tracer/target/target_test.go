package target

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

func TestAProcessIsFoundByEachSelector(t *testing.T) {
	a := newActor(t, nil)
	a.do("name needle-%d", os.Getpid()%1000)
	name := "needle-" + strconv.Itoa(os.Getpid()%1000)
	lib := filepath.Join(t.TempDir(), "libneedle.so.1.2")
	if out, err := exec.Command("gcc", "-shared", "-Wl,--build-id=0xabcdef0123456789", "-o", lib, "-x", "c", "/dev/null").CombinedOutput(); err != nil {
		t.Skipf("needs gcc: %v: %s", err, out)
	}
	if answer := a.do("map %s", lib); answer != "ok" {
		t.Fatal(answer)
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(exe, link); err != nil {
		t.Fatal(err)
	}
	re := regexp.MustCompile
	tests := []struct {
		name  string
		s     Selector
		found bool
	}{
		{"its pid", Selector{PIDs: []int{a.pid}}, true},
		{"one of two pids", Selector{PIDs: []int{1, a.pid}}, true},
		{"another pid", Selector{PIDs: []int{1}}, false},
		{"its command name", Selector{Names: []*regexp.Regexp{re("^" + name + "$")}}, true},
		{"its program's file name", Selector{Names: []*regexp.Regexp{re("^" + filepath.Base(exe) + "$")}}, true},
		{"another name", Selector{Names: []*regexp.Regexp{re("^eedle")}}, false},
		{"its program", Selector{Exes: []string{exe}}, true},
		{"a link to its program", Selector{Exes: []string{link}}, true},
		{"another program", Selector{Exes: []string{"/bin/sh"}}, false},
		{"a library's full name", Selector{Libs: []Lib{{lib, ""}}}, true},
		{"a library without version", Selector{Libs: []Lib{{"libneedle.so", ""}}}, true},
		{"a library with its build", Selector{Libs: []Lib{{"libneedle.so.1.2", "abcdef01"}}}, true},
		{"a library of another build", Selector{Libs: []Lib{{"libneedle.so", "abcdef02"}}}, false},
		{"a part of a library's name", Selector{Libs: []Lib{{"libneedle", ""}}}, false},
		{"name and pid that agree", Selector{PIDs: []int{a.pid}, Names: []*regexp.Regexp{re(name)}}, true},
		{"name and pid that do not agree", Selector{PIDs: []int{1}, Names: []*regexp.Regexp{re(name)}}, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			list, err := finder(t, tt.s).Scan()
			if err != nil {
				t.Fatal(err)
			}
			if found := slices.Contains(pidsOf(list), a.pid); found != tt.found {
				t.Errorf("found: %v, want %v (%v)", found, tt.found, pidsOf(list))
			}
			if slices.Contains(pidsOf(list), os.Getpid()) {
				t.Error("the tracer finds itself")
			}
		})
	}
}

func TestAnEmptySelectorIsAnError(t *testing.T) {
	if _, err := NewFinder(t.Context(), Selector{}, memory.FS{}, Names{}); err == nil {
		t.Error("nobody is somebody")
	}
}

func TestUnknownGroupsAndContainersAreErrors(t *testing.T) {
	for _, s := range []Selector{{Cgroups: []string{"/no/such/group"}}, {Containers: []string{"no-such-name"}}, {Containers: []string{"0123456789ab"}}} {
		_, err := NewFinder(t.Context(), s, memory.FS{}, Names{Root: t.TempDir()})
		if err == nil || !strings.Contains(err.Error(), "--c") {
			t.Errorf("%s: %v", s.String(), err)
		}
	}
}

func TestAShortIdentifierOfTwoContainersIsAnError(t *testing.T) {
	root := t.TempDir()
	put(t, root, "var/lib/containers/storage/overlay-containers/containers.json",
		`[{"id":"abcdef0123456789","names":["one"]},{"id":"abcdef0199999999","names":["two"]}]`)
	_, err := NewFinder(t.Context(), Selector{Containers: []string{"abcdef01"}}, memory.FS{}, Names{Root: root})
	if err == nil || !strings.Contains(err.Error(), "2 containers") {
		t.Errorf("got %v", err)
	}
	if _, err := NewFinder(t.Context(), Selector{Containers: []string{"two"}}, memory.FS{}, Names{Root: root}); err != nil {
		t.Errorf("a name: %v", err)
	}
}

func TestLibrariesAreReadWithAndWithoutBuild(t *testing.T) {
	got, err := ParseLib("libx.so@ABCDEF12")
	if err != nil || got != (Lib{"libx.so", "abcdef12"}) {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, text := range []string{"", "@abcdef", "libx@", "libx@xyz1", "libx@abc"} {
		if got, err := ParseLib(text); err == nil {
			t.Errorf("%q is taken as %+v", text, got)
		}
	}
}

// A control group with the name that a runtime would give it stands for a container.
func TestAContainerIsFoundByIdentifierPrefixPodAndName(t *testing.T) {
	dir := testGroup(t, "docker/"+id64)
	a := newActor(t, nil)
	join(t, dir, a.pid)
	root := t.TempDir()
	put(t, root, "var/lib/docker/containers/"+id64+"/config.v2.json", `{"ID":"`+id64+`","Name":"/web of this test"}`)
	for _, wanted := range []string{id64, id64[:12], "web of this test"} {
		f, err := NewFinder(t.Context(), Selector{Containers: []string{wanted}}, memory.FS{}, Names{Root: root})
		if err != nil {
			t.Fatal(err)
		}
		list, err := f.Scan()
		if err != nil || !slices.Equal(pidsOf(list), []int{a.pid}) {
			t.Errorf("%s: found %v, %v; want %d", wanted, pidsOf(list), err, a.pid)
		}
		if len(list) == 1 && list[0].Container.ID != id64 {
			t.Errorf("container %+v", list[0].Container)
		}
	}
}

func TestACgroupIsFoundWithItsDescendants(t *testing.T) {
	dir := testGroup(t, "web")
	below := testGroup(t, "web/worker")
	testGroup(t, "website")
	a, b, c := newActor(t, nil), newActor(t, nil), newActor(t, nil)
	join(t, dir, a.pid)
	join(t, below, b.pid)
	join(t, filepath.Join(filepath.Dir(dir), "website"), c.pid)
	list, err := finder(t, Selector{Cgroups: []string{dir}}).Scan()
	got := pidsOf(list)
	slices.Sort(got)
	want := []int{a.pid, b.pid}
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("found %v, %v; want %v", got, err, want)
	}
}

// testGroup makes a control group below one for this test, and removes it.
func testGroup(t *testing.T, name string) string {
	t.Helper()
	mount := "/sys/fs/cgroup/memory"
	if _, err := os.Stat(mount); err != nil {
		mount = "/sys/fs/cgroup"
	}
	top := filepath.Join(mount, "allocsnoop-test-"+strconv.Itoa(os.Getpid()))
	dir := filepath.Join(top, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Skipf("needs root and control groups: %v", err)
	}
	t.Cleanup(func() {
		// Deepest first, and only those that are empty: others are cleaned up by those who made them.
		for d := dir; strings.HasPrefix(d, top); d = filepath.Dir(d) {
			os.Remove(d)
		}
	})
	return dir
}

func join(t *testing.T, dir string, pid int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

func TestWhatCannotBeTracedIsSaidInWords(t *testing.T) {
	a := newActor(t, nil)
	zombie := a.number("zombie")
	gone := newActor(t, nil)
	gone.kill()
	tests := []struct {
		name  string
		pid   int
		is    error
		words string
	}{
		{"a live process", a.pid, nil, ""},
		{"a process that is gone", gone.pid, memory.ErrGone, "no process " + strconv.Itoa(gone.pid)},
		{"a kernel thread", 2, memory.ErrKernelThread, "kthreadd"},
		{"a zombie", zombie, ErrZombie, "waits for its parent " + strconv.Itoa(a.pid)},
		{"the tracer itself", os.Getpid(), ErrSelf, "itself"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := Check(memory.FS{}, tt.pid)
			if !errors.Is(err, tt.is) || err != nil && !strings.Contains(err.Error(), tt.words) {
				t.Errorf("got %v, want %v with %q", err, tt.is, tt.words)
			}
		})
	}
}

func TestAThreadIsNotAProcess(t *testing.T) {
	a := newActor(t, nil)
	tasks, err := os.ReadDir("/proc/" + strconv.Itoa(a.pid) + "/task")
	if err != nil || len(tasks) < 2 {
		t.Fatalf("threads of the actor: %v, %v", tasks, err)
	}
	for _, task := range tasks {
		tid, _ := strconv.Atoi(task.Name())
		if tid == a.pid {
			continue
		}
		err := Check(memory.FS{}, tid)
		if !errors.Is(err, ErrThread) || !strings.Contains(err.Error(), "--pid "+strconv.Itoa(a.pid)) {
			t.Errorf("got %v", err)
		}
		return
	}
}

func TestA32BitProgramIsRefused(t *testing.T) {
	fs := fakeProc(t, map[string]string{
		"7/stat":   "7 (old) S 1 7 7 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 11 1 1 1",
		"7/status": "Name:\told\nTgid:\t7\n",
		"7/exe":    "\x7fELF\x01\x01\x01" + strings.Repeat("\x00", 9) + "\x02\x00\x03\x00",
		"9/stat":   "9 (far) S 1 9 9 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 13 1 1 1",
		"9/status": "Name:\tfar\nTgid:\t9\n",
		"9/exe":    "\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9) + "\x02\x00\xf3\x00",
	})
	if err := Check(fs, 7); !errors.Is(err, ErrArchitecture) || !strings.Contains(err.Error(), "32 bits (386)") {
		t.Errorf("got %v", err)
	}
	if err := Check(fs, 9); !errors.Is(err, ErrArchitecture) || !strings.Contains(err.Error(), "RISCV") {
		t.Errorf("got %v", err)
	}
}

func fakeProc(t *testing.T, files map[string]string) memory.FS {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		put(t, root, name, text)
	}
	return memory.FS{Root: root}
}

func TestMissingCapabilitiesAreNamed(t *testing.T) {
	tests := []struct {
		name, caps, uids string
		want             []string
	}{
		{"root", "000001ffffffffff", "0 0 4294967295", nil},
		{"an ordinary user", "0000000000000000", "0 0 4294967295",
			[]string{"CAP_BPF or CAP_SYS_ADMIN to load BPF programs", "CAP_PERFMON or CAP_SYS_ADMIN to place probes", "CAP_SYS_PTRACE to read other users' processes"}},
		{"all but ptrace", "000000c000000000", "0 0 4294967295", []string{"CAP_SYS_PTRACE to read other users' processes"}},
		{"admin and ptrace", "0000000000280000", "0 0 4294967295", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			fs := fakeProc(t, map[string]string{"self/status": "CapEff:\t" + tt.caps + "\n", "self/uid_map": "   " + tt.uids + "\n"})
			if diff := cmp.Diff(tt.want, MissingCapabilities(fs)); diff != "" {
				t.Error(diff)
			}
		})
	}
	fs := fakeProc(t, map[string]string{"self/status": "CapEff:\t000001ffffffffff\n", "self/uid_map": "0 1000 1\n"})
	if got := MissingCapabilities(fs); len(got) != 1 || !strings.Contains(got[0], "user namespace") {
		t.Errorf("root of a user namespace: %q", got)
	}
}

func TestAHostileNameIsPrintedEscaped(t *testing.T) {
	a := newActor(t, nil)
	a.do(`name "\x1b[31mr\ned\""`)
	p, err := Read(memory.FS{}, a.pid)
	if err != nil {
		t.Fatal(err)
	}
	if p.Comm != "\x1b[31mr\ned\"" {
		t.Fatalf("comm is %q", p.Comm)
	}
	for _, text := range []string{p.String(), (&Selector{Exes: []string{p.Comm}}).String()} {
		if strings.ContainsAny(text, "\x1b\n") {
			t.Errorf("printed as %q", text)
		}
	}
}

func TestAProcessInOtherNamespacesIsKnownByBothPids(t *testing.T) {
	a := newActor(t, func(cmd *exec.Cmd) {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	})
	p, err := Read(memory.FS{}, a.pid)
	if err != nil {
		t.Fatal(err)
	}
	if want := []int{a.pid, 1}; !slices.Equal(p.NSPIDs, want) {
		t.Errorf("pids %v, want %v", p.NSPIDs, want)
	}
	if text := p.String(); !strings.Contains(text, "1 in its namespace") {
		t.Errorf("printed as %q", text)
	}
	list, err := finder(t, Selector{PIDs: []int{1}}).Scan()
	if err != nil || slices.Contains(pidsOf(list), a.pid) {
		t.Errorf("--pid 1 alone means the first process of the host, found %v, %v", pidsOf(list), err)
	}
}

func TestTheInnerPidCountsTogetherWithAGroup(t *testing.T) {
	dir := testGroup(t, "inner")
	a := newActor(t, func(cmd *exec.Cmd) { cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWPID })
	join(t, dir, a.pid)
	list, err := finder(t, Selector{PIDs: []int{1}, Cgroups: []string{dir}}).Scan()
	if err != nil || !slices.Equal(pidsOf(list), []int{a.pid}) {
		t.Errorf("found %v, %v; want %d", pidsOf(list), err, a.pid)
	}
}

func TestTheProgramsPathIsAsAChrootedProcessSeesIt(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: chroot")
	}
	root, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox-static")
	}
	data, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	put(t, root, "bin/busybox", string(data))
	os.Chmod(filepath.Join(root, "bin/busybox"), 0o755)
	cmd := exec.Command("/bin/busybox", "cat")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	p, err := Read(memory.FS{}, cmd.Process.Pid)
	if err != nil || p.Exe != "/bin/busybox" {
		t.Errorf("program %q, %v", p.Exe, err)
	}
}

func FuzzBuildID(f *testing.F) {
	exe, err := os.ReadFile("/bin/true")
	if err == nil && len(exe) < 200<<10 {
		f.Add(string(exe))
	}
	f.Add("\x7fELF\x02\x01\x01")
	f.Fuzz(func(t *testing.T, text string) { buildID(strings.NewReader(text)) })
}
