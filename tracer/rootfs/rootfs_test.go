package rootfs

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// tree is a root directory with attacks in it, beside a secret that must not be reached.
func tree(t *testing.T) (root string) {
	t.Helper()
	base := t.TempDir()
	root = filepath.Join(base, "root")
	for _, dir := range []string{"root/etc", "root/a/b", "outside"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{
		"root/etc/passwd": "inner", "root/a/b/file": "deep", "secret": "SECRET", "outside/secret": "SECRET",
		"root/new\nline": "odd name",
	} {
		if err := os.WriteFile(filepath.Join(base, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, target := range map[string]string{
		"up": "../secret", "far-up": "../../../../../../../../" + base + "/secret", "absolute": base + "/secret",
		"passwd": "/etc/passwd", "dir": base + "/outside", "dotdot": "a/b/../../../secret", "loop": "loop",
		"chain1": "chain2", "chain2": "/a/b/../b/file", "rel": "a/b", "proc": "/proc/self/root",
	} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	return root
}

// resolvers are the kernel's way and the one for kernels without it; both must do the same.
var resolvers = map[string]func(dir int, name string) (int, error){"openat2": openat2, "walk": walk}

func openWith(t *testing.T, resolve func(int, string) (int, error), root, name string) (string, error) {
	t.Helper()
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(dir)
	fd, err := resolve(dir, name)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	f, err := Reopen(fd, name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(f)
	return string(text), err
}

func TestNamesAreResolvedInsideOfTheRoot(t *testing.T) {
	root := tree(t)
	tests := []struct{ name, want string }{
		{"/etc/passwd", "inner"},
		{"etc/passwd", "inner"},
		{"/passwd", "inner"},
		{"/../../etc/passwd", "inner"},
		{"/chain1", "deep"},
		{"/rel/file", "deep"},
		{"//a/./b//file", "deep"},
		{"/new\nline", "odd name"},
	}
	for kind, resolve := range resolvers {
		for _, tt := range tests {
			got, err := openWith(t, resolve, root, tt.name)
			if err != nil || got != tt.want {
				t.Errorf("%s: %q gives %q, %v; want %q", kind, tt.name, got, err, tt.want)
			}
		}
	}
}

func TestNoNameLeavesTheRoot(t *testing.T) {
	root := tree(t)
	names := []string{
		"up", "far-up", "absolute", "dir/secret", "dotdot", "loop", "../secret", "/../secret", "a/../../secret",
		"proc/etc/passwd", "dir/../secret", filepath.Dir(root) + "/secret", "missing", "", "/",
	}
	for kind, resolve := range resolvers {
		for _, name := range names {
			got, err := openWith(t, resolve, root, name)
			if err == nil {
				t.Errorf("%s: %q gives %q", kind, name, got)
			}
		}
	}
}

func TestProcfsLinksAreNotFollowed(t *testing.T) {
	for kind, resolve := range resolvers {
		if got, err := openWith(t, resolve, "/proc/self", "exe"); !errors.Is(err, unix.ELOOP) {
			t.Errorf("%s: a magic link gives %d bytes, %v", kind, len(got), err)
		}
	}
}

func TestAPipeIsNotOpened(t *testing.T) {
	_, err := Open(tree(t), "/pipe")
	if !errors.Is(err, ErrNotRegular) {
		t.Errorf("got %v", err)
	}
	_, err = Open("/", "/dev/null")
	if !errors.Is(err, ErrNotRegular) {
		t.Errorf("a device: %v", err)
	}
}

func TestALinkOfProcfsIsOpenedIfItLeadsToAFile(t *testing.T) {
	f, err := OpenLink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, name := range []string{tree(t) + "/pipe", "/dev/null", "/proc/self/cwd"} {
		if _, err := OpenLink(name); !errors.Is(err, ErrNotRegular) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestAMissingFileIsSaidToBeMissing(t *testing.T) {
	if _, err := Open(tree(t), "/missing"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/missing") {
		t.Errorf("got %v", err)
	}
	if _, err := Open("/nowhere", "/x"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestLongFilesAreRefused(t *testing.T) {
	root := tree(t)
	if _, err := ReadFile(root, "/etc/passwd", 4); err == nil {
		t.Error("5 bytes pass a limit of 4")
	}
	if b, err := ReadFile(root, "/etc/passwd", 5); err != nil || string(b) != "inner" {
		t.Errorf("got %q, %v", b, err)
	}
}

// A target that exchanges a directory for a link while its tracer resolves a name must not win.
func TestAnExchangedDirectoryDoesNotLeadOut(t *testing.T) {
	root := tree(t)
	file := filepath.Join(root, "swap", "secret")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("inner"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Dir(root)+"/outside", filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				unix.Renameat2(unix.AT_FDCWD, filepath.Join(root, "swap"), unix.AT_FDCWD, filepath.Join(root, "link"), unix.RENAME_EXCHANGE)
			}
		}
	})
	defer swapper.Wait()
	defer close(stop)
	for kind, resolve := range resolvers {
		for range 3000 {
			if got, _ := openWith(t, resolve, root, "/swap/secret"); got != "" && got != "inner" {
				t.Fatalf("%s: read %q", kind, got)
			}
		}
	}
}

func TestTheWalkLeavesNoHandlesOpen(t *testing.T) {
	root := tree(t)
	count := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := count()
	for _, name := range []string{"/a/b/file", "/loop", "/missing/x", "/a/b/../../passwd", "/pipe", "/dir/x"} {
		openWith(t, walk, root, name)
	}
	if after := count(); after != before {
		t.Errorf("%d handles before, %d after", before, after)
	}
}

func FuzzBothResolversAgree(f *testing.F) {
	for _, name := range []string{"/etc/passwd", "up", "a/b/../../chain1", "rel/../b/file", "dir/x", "a/b/file/.", "passwd/"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.Contains(name, "\x00") || len(name) > 300 {
			t.Skip()
		}
		root := tree(t)
		a, errA := openWith(t, openat2, root, name)
		b, errB := openWith(t, walk, root, name)
		if strings.Contains(a+b, "SECRET") {
			t.Fatalf("%q left the root: %q, %q", name, a, b)
		}
		// A trailing slash or dot asks for a directory, which the walk does not check: it still stays inside.
		if a != "" && (a != b || errA != nil || errB != nil) {
			t.Errorf("%q: openat2 gives %q, %v; walk gives %q, %v", name, a, errA, b, errB)
		}
	})
}
