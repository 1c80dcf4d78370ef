package service

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// outside is a directory that a hostile root points to. It tells when anybody opens something in it.
type outside struct {
	dir string
	fd  int
}

func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{dir: t.TempDir()}
	var err error
	if o.fd, err = unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(o.fd) })
	return o
}

func (o *outside) watch(t *testing.T, dir string) {
	t.Helper()
	if _, err := unix.InotifyAddWatch(o.fd, dir, unix.IN_OPEN|unix.IN_ACCESS); err != nil {
		t.Fatal(err)
	}
}

// opened names what was opened since the last call.
func (o *outside) opened(t *testing.T) []string {
	t.Helper()
	buf := make([]byte, 64<<10)
	n, err := unix.Read(o.fd, buf)
	if err == unix.EAGAIN {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
		length := int(uint32(b[12]) | uint32(b[13])<<8)
		names = append(names, strings.TrimRight(string(b[16:16+length]), "\x00"))
		b = b[16+length:]
	}
	return names
}

// hostileRoot is a root directory with a program, its libraries, and traps. start runs the program in it.
func hostileRoot(t *testing.T) (root string, start func() *live.Process) {
	t.Helper()
	root = t.TempDir()
	program := live.CompileC(t, "testdata/hostile.c")
	lib := live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC")
	for _, dir := range []string{"app", "real", "var/lib", "proc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put(t, program, root, "app/hostile")
	put(t, lib, root, "real/libkeep.so")
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		t.Fatal(err)
	}
	for field := range strings.FieldsSeq(string(out)) {
		if !strings.HasPrefix(field, "/") {
			continue
		}
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(field)), 0o755); err != nil {
			t.Fatal(err)
		}
		put(t, field, root, field)
	}
	return root, func() *live.Process {
		cmd := exec.Command("/app/hostile", "lib", "/real/libkeep.so")
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		p := live.StartCmd(t, cmd)
		p.Expect(t, "ready")
		return p
	}
}

func mustLink(t *testing.T, target, name string) {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func TestNoLinkInATargetsRootLeadsOutOfIt(t *testing.T) {
	live.RequireBPF(t)
	o := newOutside(t)
	root, start := hostileRoot(t)
	p := start()
	// The libraries that are mapped are now, by name, files of the host that nobody has to read.
	put(t, live.CompileC(t, "testdata/maker.c"), o.dir, "libkeep.so")
	for name, text := range map[string]string{"x.list": "/real/libkeep.so\n", "status": "Package: secret\nVersion: 1\n", "keep.debug": "x"} {
		if err := os.WriteFile(filepath.Join(o.dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(filepath.Join(root, "real"), filepath.Join(root, "gone")); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 40)
	mustLink(t, up+o.dir, filepath.Join(root, "real"))
	mustLink(t, o.dir, filepath.Join(root, "var/lib/dpkg"))
	mustLink(t, "/proc/self/root"+o.dir, filepath.Join(root, "var/lib/apk"))
	o.watch(t, o.dir)
	pid := strconv.Itoa(p.PID)
	tr := live.Trace(t, p.PID, "--mode", "exact")
	p.Send(t, "go")
	p.Expect(t, "done")
	result := tr.Stop(t)
	if got := live.Sum(result.Profile, "malloc", "malloc", "lib_keep", "main"); got != keptByLib {
		t.Errorf("got %+v, want %+v\n%s%s", got, keptByLib, result.Stdout, result.Stderr)
	}
	for _, command := range []string{"maps", "libs", "inspect", "doctor"} {
		ask(t, 0, command, pid)
	}
	ask(t, 0, "libs", result.Path)
	if names := o.opened(t); len(names) > 0 {
		t.Errorf("files outside of the target's root were opened: %q", names)
	}
}

// Whoever opens a pipe waits for a writer.
func TestPipesAndDevicesInATargetsRootAreNotOpened(t *testing.T) {
	live.RequireBPF(t)
	root, start := hostileRoot(t)
	p := start() // its own loader would wait at the pipes, too
	for _, name := range []string{"var/lib/dpkg/status", "var/lib/dpkg/info/x.list", "lib/apk/db/installed", "var/lib/rpm/Packages", "etc/passwd", "etc/os-release", "etc/ld.so.cache"} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mkfifo(path, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	lib := filepath.Join(root, "real/libkeep.so")
	pid := strconv.Itoa(p.PID)
	for what, replace := range map[string]func() error{
		"a pipe":   func() error { return unix.Mkfifo(lib, 0o755) },
		"a device": func() error { return unix.Mknod(lib, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) },
		"a folder": func() error { return os.Mkdir(lib, 0o755) },
	} {
		t.Run(what, func(t *testing.T) {
			if err := os.RemoveAll(lib); err != nil {
				t.Fatal(err)
			}
			if err := replace(); err != nil {
				t.Fatal(err)
			}
			for _, command := range []string{"maps", "libs", "inspect", "doctor"} {
				ask(t, 0, command, pid)
			}
		})
	}
	ask(t, 0, "--pid", pid, "--duration", "100ms")
}

func TestADebugFileThatIsAPipeIsNotOpened(t *testing.T) {
	live.RequireBPF(t)
	for _, kind := range []string{"a pipe", "a link to a device"} {
		t.Run(kind, func(t *testing.T) {
			dir := t.TempDir()
			lib := put(t, live.CompileC(t, "testdata/keep.c", "-shared", "-fPIC", "-Wl,--build-id=none"), dir, "libkeep.so")
			for _, args := range [][]string{
				{"objcopy", "--only-keep-debug", lib, dir + "/keep.debug"},
				{"strip", lib},
				{"objcopy", "--add-gnu-debuglink=" + dir + "/keep.debug", lib},
				{"rm", dir + "/keep.debug"},
			} {
				if text, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
					t.Fatalf("%v: %v\n%s", args, err, text)
				}
			}
			for _, place := range []string{dir + "/keep.debug", dir + "/.debug/keep.debug"} {
				if err := os.MkdirAll(filepath.Dir(place), 0o755); err != nil {
					t.Fatal(err)
				}
				if kind == "a pipe" {
					if err := unix.Mkfifo(place, 0o644); err != nil {
						t.Fatal(err)
					}
					continue
				}
				mustLink(t, "/dev/zero", place)
			}
			p := live.Start(t, live.CompileC(t, "testdata/hostile.c"), "lib", lib)
			p.Expect(t, "ready")
			tr := live.Trace(t, p.PID, "--mode", "exact")
			p.Send(t, "go")
			p.Expect(t, "done")
			result := tr.Stop(t)
			if got := live.Sum(result.Profile, "malloc", "malloc", "lib_keep"); got != keptByLib {
				t.Errorf("got %+v, want %+v\n%s%s", got, keptByLib, result.Stdout, result.Stderr)
			}
			ask(t, 0, "symbolize", result.Path, "-o", "s.pb.gz")
			ask(t, 0, "libs", fmt.Sprint(p.PID))
		})
	}
}
