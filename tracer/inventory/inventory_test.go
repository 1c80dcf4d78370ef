package inventory

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/test/live"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

func buildEnc(t *testing.T, version string) string {
	return live.CompileC(t, "testdata/enc.c", "-shared", "-fPIC", "-Wl,--build-id=sha1", "-DVERSION="+version)
}

// put copies a file to a new one, so that it has an inode of its own, and renames it to its place as package managers do.
func put(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to+".new", data, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(to+".new", to); err != nil {
		t.Fatal(err)
	}
}

func find(t *testing.T, list []profile.Library, name string) profile.Library {
	t.Helper()
	i := slices.IndexFunc(list, func(l profile.Library) bool { return l.Name == name })
	if i < 0 {
		t.Fatalf("no %s among %d libraries", name, len(list))
	}
	return list[i]
}

func TestInventoryOfALiveProcess(t *testing.T) {
	dir := t.TempDir()
	oldBuild, newBuild := buildEnc(t, "1.0.3"), buildEnc(t, "1.0.4")
	library := filepath.Join(dir, "libenc.so")
	put(t, oldBuild, library)
	p := live.Start(t, live.CompileC(t, "testdata/load.c", "-ldl"), library)
	p.Expect(t, "ready")
	inventory := func() []profile.Library {
		list, err := OfProcess(memory.FS{}, p.PID)
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	list := inventory()
	if list[0].Name != "load" {
		t.Errorf("the program is not first: %s", list[0].Name)
	}
	enc := find(t, list, "libenc.so")
	want, err := OfFile(oldBuild)
	if err != nil {
		t.Fatal(err)
	}
	if enc.BuildID != want.BuildID || len(enc.BuildID) != 40 || enc.Size != want.Size || enc.File != library || enc.Replaced {
		t.Errorf("libenc.so is %+v, want the build %s", enc, want.BuildID)
	}
	if enc.Version != "libenc 1.0.3 (test)" || !slices.Equal(enc.PIDs, []int{p.PID}) {
		t.Errorf("version %q, pids %v", enc.Version, enc.PIDs)
	}
	if libc := find(t, list, "libc.so.6"); !strings.HasPrefix(libc.Package, "libc6 2.") || !strings.Contains(libc.Version, "GNU C Library") {
		t.Errorf("libc.so.6 is of package %q, version %q", libc.Package, libc.Version)
	}

	put(t, oldBuild, library) // the same build installed again
	if enc := find(t, inventory(), "libenc.so"); enc.Replaced {
		t.Error("the same build under another inode is told as replaced")
	}
	put(t, newBuild, library)
	if enc := find(t, inventory(), "libenc.so"); !enc.Replaced || enc.BuildID != want.BuildID || enc.Version != "libenc 1.0.3 (test)" {
		t.Errorf("after the new build was installed: %+v", enc)
	}
	if err := os.Remove(library); err != nil {
		t.Fatal(err)
	}
	if enc := find(t, inventory(), "libenc.so"); !enc.Replaced || enc.BuildID != want.BuildID || enc.File != library {
		t.Errorf("after the file was deleted: %+v", enc)
	}

	on, err := OfFolder(filepath.Dir(newBuild))
	if err != nil {
		t.Fatal(err)
	}
	changes := profile.DiffLibraries([]profile.Library{find(t, inventory(), "libenc.so")}, on)
	if len(changes) != 1 || changes[0].Old.BuildID != want.BuildID || changes[0].New.Version != "libenc 1.0.4 (test)" {
		t.Errorf("the folder of the new build differs by %+v", changes)
	}
}

func TestFolderListsELFFilesOnly(t *testing.T) {
	dir := t.TempDir()
	library := buildEnc(t, "7.0.1")
	object := live.CompileC(t, "testdata/enc.c", "-c", "-DVERSION=7.0.1")
	sub := filepath.Join(dir, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	put(t, library, filepath.Join(sub, "libenc.so.7"))
	put(t, object, filepath.Join(dir, "enc.o"))
	os.WriteFile(filepath.Join(dir, "short"), []byte("\x7fELF"), 0o644)
	os.WriteFile(filepath.Join(dir, "text"), []byte("hello"), 0o644)
	os.Symlink("/", filepath.Join(dir, "everything"))
	list, err := OfFolder(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name != "libenc.so.7" || list[0].Version != "libenc 7.0.1 (test)" {
		t.Errorf("listed %+v", list)
	}
	if _, err := OfFolder(filepath.Join(dir, "missing")); err == nil {
		t.Error("a missing folder was listed")
	}
	if _, err := OfFile(filepath.Join(dir, "text")); !errors.Is(err, ErrNotELF) {
		t.Errorf("a text file: %v", err)
	}
}

func TestProcessesThatCannotBeListed(t *testing.T) {
	if _, err := OfProcess(memory.FS{}, 1<<22+1); !errors.Is(err, memory.ErrGone) {
		t.Errorf("a pid that is not there: %v", err)
	}
}

func TestPackagesOfARoot(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("var/lib/dpkg/info/libc6:amd64.list", "/.\n/lib/x86_64-linux-gnu/libc.so.6\n")
	write("var/lib/dpkg/info/nginx.list", "/usr/sbin/nginx\n/etc/nginx\n")
	write("var/lib/dpkg/status", "Package: libc6\nStatus: install ok installed\nVersion: 2.36-9\n\nPackage: nginx\nVersion: 1.22.1-9\n")
	write("lib/apk/db/installed", "P:musl\nV:1.2.5-r0\nF:lib\nR:ld-musl-x86_64.so.1\n\nP:other\nV:1\nF:opt\nR:x\n")
	list := []profile.Library{
		{File: "/usr/lib/x86_64-linux-gnu/libc.so.6"}, // the database knows it as /lib/...
		{File: "/usr/sbin/nginx"}, {File: "/lib/ld-musl-x86_64.so.1"}, {File: "/opt/lib/libenc.so"},
	}
	addPackages(list, root)
	var got []string
	for _, l := range list {
		got = append(got, l.Package)
	}
	if diff := cmp.Diff([]string{"libc6 2.36-9", "nginx 1.22.1-9", "musl 1.2.5-r0", ""}, got); diff != "" {
		t.Error(diff)
	}
}

// A target may point its database at the host's files.
func TestPackageListsOutsideOfTheRootAreNotRead(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	os.WriteFile(filepath.Join(outside, "evil.list"), []byte("/srv/app\n"), 0o644)
	os.MkdirAll(filepath.Join(root, "var/lib/dpkg"), 0o755)
	os.Symlink(outside, filepath.Join(root, "var/lib/dpkg/info"))
	list := []profile.Library{{File: "/srv/app"}}
	addPackages(list, root)
	if list[0].Package != "" {
		t.Errorf("package %q from outside of the root", list[0].Package)
	}
}

func TestVersionStrings(t *testing.T) {
	for _, c := range []struct{ name, content, want string }{
		{"libcrypto.so.3", "\x00GOST R 34.11-94 with crypto\x00OpenSSL 3.0.11 19 Sep 2023\x00TLSv1.3\x00", "OpenSSL 3.0.11 19 Sep 2023"},
		{"nginx", "\x00nginx/1.22.1\x00nginx version: nginx/1.22.1\x00", "nginx version: nginx/1.22.1"},
		{"libc.so.6", "\x00GLIBC_2.36\x00GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n\x00Compiled by GNU CC version 12.2.0.\n", "GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36."},
		{"libpcre2-8.so.0", "\x0014.0.0\x0010.42 2022-12-11\x00", "10.42 2022-12-11"},
		{"libz.so.1", "\x001.2.13\x00 deflate 1.2.13 Copyright 1995-2022 Jean-loup Gailly and Mark Adler \x00", "deflate 1.2.13 Copyright 1995-2022 Jean-loup Gailly and Mark Adler"},
		{"libenc.so", "\x00libenc v2.0\x00http://libenc.org/1.0\x00/usr/lib/libenc-1.0\x00enc %d 1.0\x00", "libenc v2.0"},
		{"libelf.so.1", "\x001.2.13\x00", ""},
		{"/opt/app/libencrypt.so", "libencrypt 1.4.2\x00", "libencrypt 1.4.2"}, // as maps name it
		{"libnothing.so", "GCC: (Debian 12.2.0) 12.2.0\x00GLIBCXX_3.4.21\x00HTTP/1.1\x00127.0.0.1\x00", ""},
		{"empty", "", ""},
	} {
		if got := Version(strings.NewReader(c.content), c.name); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func FuzzVersion(f *testing.F) {
	f.Add([]byte("\x00OpenSSL 3.0.11 19 Sep 2023\x00"), "libcrypto.so.3")
	f.Fuzz(func(t *testing.T, data []byte, name string) {
		if v := Version(strings.NewReader(string(data)), name); len(v) > maxString || profile.Sanitize(v) != v {
			t.Errorf("version %q", v)
		}
	})
}
