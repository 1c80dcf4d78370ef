// Package containers tests traces of processes in containers: ones made of plain namespaces with foreign roots, and ones
// that real runtimes made.
//
// The trap: a container that was made from the host's own files proves nothing, as a tracer that looked up a path on the
// host would find the right file. So the roots here hold another C library than the host's, and the leaking library is
// found nowhere but in them.
package containers

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// rootKind is a way to make a container's root.
type rootKind struct {
	name string
	make func(t *testing.T) string
	libc string // the file that has malloc, as the container sees it
}

var rootKinds = []rootKind{
	{"musl and busybox", muslRoot, "/lib/ld-musl-x86_64.so.1"},
	{"another release's glibc", glibcRoot, "/lib64/libc.so.6"},
}

// muslRoot has busybox, musl and the leaking program, linked with musl dynamically.
func muslRoot(t *testing.T) string {
	t.Helper()
	root := emptyRoot(t)
	const loader = "/lib/ld-musl-x86_64.so.1"
	install(t, loader, root+loader)
	buildLeaker(t, "musl-gcc", root)
	return root
}

// glibcRoot has the C library of a later Debian release: its program was built on the host, and runs with later ones only.
func glibcRoot(t *testing.T) string {
	t.Helper()
	files := unpackLater(t)
	root := emptyRoot(t)
	for _, name := range []string{"libc.so.6", "ld-linux-x86-64.so.2"} {
		found, err := filepath.Glob(filepath.Join(files, "usr/lib/x86_64-linux-gnu", name))
		if err != nil || len(found) != 1 {
			t.Fatalf("find %s in the package libc6: %v %v", name, found, err)
		}
		install(t, found[0], filepath.Join(root, "lib64", name))
	}
	buildLeaker(t, "gcc", root)
	return root
}

// emptyRoot has busybox, which is static, and places to mount on.
func emptyRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	// Programs in a user namespace have no rights of root on the way here.
	for dir := root; dir != os.TempDir() && dir != "/"; dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{"bin", "lib", "lib64", "usr/lib", "proc", "sys", "dev", "tmp", "io", "old"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("this test needs busybox-static of test/packages.txt (make setup): %v", err)
	}
	install(t, busybox, filepath.Join(root, "bin/busybox"))
	if err := os.Symlink("busybox", filepath.Join(root, "bin/sh")); err != nil {
		t.Fatal(err)
	}
	return root
}

// buildLeaker puts /bin/leaker and /usr/lib/libleak.so into a root.
func buildLeaker(t *testing.T, compiler, root string) {
	t.Helper()
	lib := live.CompileWith(t, compiler, "testdata/leak.c", "-shared", "-fPIC", "-Wl,-soname,libleak.so")
	program := live.CompileWith(t, compiler, "testdata/leaker.c", lib, "-Wl,-rpath,/usr/lib:/lib64")
	install(t, lib, filepath.Join(root, "usr/lib/libleak.so"))
	install(t, program, filepath.Join(root, "bin/leaker"))
}

func install(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o755); err != nil {
		t.Fatal(err)
	}
}

// laterRelease is where the foreign C library comes from.
const laterRelease = "trixie"

// unpackLater fetches the later release's C library once for this user and unpacks it.
func unpackLater(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "allocsnoop-roots", laterRelease)
	debs, _ := filepath.Glob(filepath.Join(dir, "libc6_*.deb"))
	if len(debs) == 0 {
		if err := download(t.Context(), dir, "libc6"); err != nil {
			t.Skipf("no C library of another release: this machine cannot fetch Debian's package libc6 of %s: %v", laterRelease, err)
		}
		debs, _ = filepath.Glob(filepath.Join(dir, "libc6_*.deb"))
	}
	files := t.TempDir()
	if text, err := exec.Command("dpkg-deb", "-x", debs[len(debs)-1], files).CombinedOutput(); err != nil {
		t.Fatalf("unpack %s: %v\n%s", debs[len(debs)-1], err, text)
	}
	return files
}

// download fetches a package with an apt state of its own, which goes away again: the host's is only read.
func download(ctx context.Context, dir, name string) error {
	state, err := os.MkdirTemp("", "allocsnoop-apt-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	for _, d := range []string{dir, state + "/lists/partial", state + "/cache/archives/partial", state + "/none"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	source := fmt.Sprintf("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n", mirror(ctx), laterRelease)
	if err := os.WriteFile(state+"/sources.list", []byte(source), 0o644); err != nil {
		return err
	}
	options := []string{
		"-q", "-o", "Dir::Etc::sourcelist=" + state + "/sources.list", "-o", "Dir::Etc::sourceparts=" + state + "/none",
		"-o", "Dir::Etc::preferencesparts=" + state + "/none", "-o", "Dir::State::lists=" + state + "/lists",
		"-o", "Dir::Cache=" + state + "/cache", "-o", "Acquire::Languages=none", "-o", "APT::Sandbox::User=",
		"-o", "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "-o", "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false",
	}
	for _, command := range [][]string{{"update"}, {"download", name}} {
		cmd := exec.CommandContext(ctx, "apt-get", append(options, command...)...)
		cmd.Dir = dir
		if text, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", strings.Join(command, " "), err, text)
		}
	}
	return nil
}

// mirror is the server of Debian that the host's apt uses.
func mirror(ctx context.Context) string {
	out, _ := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)").Output()
	for _, uri := range strings.Fields(string(out)) {
		if filepath.Base(uri) == "debian" {
			return uri
		}
	}
	return "http://deb.debian.org/debian/"
}
