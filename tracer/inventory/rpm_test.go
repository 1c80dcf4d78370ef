package inventory

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

const tinySpec = `Name: tiny
Version: 1.4.2
Release: 7.el9
Summary: tiny
License: Apache-2.0
BuildArch: noarch
%description
tiny
%install
mkdir -p %{buildroot}/usr/lib64 %{buildroot}/opt/app
touch %{buildroot}/usr/lib64/libtiny.so.1 "%{buildroot}/opt/app/lib other.so"
%files
/usr/lib64/libtiny.so.1
"/opt/app/lib other.so"
`

// rpmRoot is a root with one package in its rpm database.
func rpmRoot(t *testing.T, database string) string {
	t.Helper()
	work, root := t.TempDir(), t.TempDir()
	spec := filepath.Join(work, "tiny.spec")
	if err := os.WriteFile(spec, []byte(tinySpec), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(name string, args ...string) {
		cmd := exec.Command(name, args...)
		cmd.Env = append(os.Environ(), "HOME="+work)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	run("rpmbuild", "--define", "_topdir "+work, "-bb", "--quiet", spec)
	run("rpm", "--root", root, "--dbpath", database, "--nodeps", "--noscripts", "--force-debian", "-i", filepath.Join(work, "RPMS/noarch/tiny-1.4.2-7.el9.noarch.rpm"))
	return root
}

func TestPackagesOfAnRPMRoot(t *testing.T) {
	for _, database := range []string{"/var/lib/rpm", "/usr/lib/sysimage/rpm"} {
		t.Run(database, func(t *testing.T) {
			root := rpmRoot(t, database)
			list := []profile.Library{{File: "/usr/lib64/libtiny.so.1"}, {File: "/lib64/libtiny.so.1"}, {File: "/opt/app/lib other.so"}, {File: "/opt/app/libmine.so"}}
			addPackages(list, root)
			for i, want := range []string{"tiny 1.4.2-7.el9", "tiny 1.4.2-7.el9", "tiny 1.4.2-7.el9", ""} {
				if got := list[i].Package; got != want {
					t.Errorf("%s is of package %q, want %q", list[i].File, got, want)
				}
			}
		})
	}
}

func TestABrokenRPMDatabaseCostsTheNamesOnly(t *testing.T) {
	for _, name := range []string{"rpmdb.sqlite", "Packages.db", "Packages"} {
		root := t.TempDir()
		dir := filepath.Join(root, "var/lib/rpm")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte("SQLite format 3\x00 and nothing more"), 0o644); err != nil {
			t.Fatal(err)
		}
		list := []profile.Library{{File: "/usr/lib64/libtiny.so.1"}}
		addPackages(list, root)
		if list[0].Package != "" {
			t.Errorf("%s: package %q from nowhere", name, list[0].Package)
		}
	}
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "allocsnoop-rpm-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("copies of the database are left behind: %v", left)
	}
}
