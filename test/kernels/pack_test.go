package kernels

import (
	"archive/tar"
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestImageUnpacksWithCpioToWhatWasPacked(t *testing.T) {
	if _, err := exec.LookPath("cpio"); err != nil {
		t.Skip("needs cpio")
	}
	image := &Image{files: map[string]file{}}
	image.Add("/a/b/c", 0o644, []byte("13 bytes long"))
	image.Add("run.sh", 0o755, nil)
	image.Add("../escape", 0o600, []byte("x"))
	var archive bytes.Buffer
	if _, err := image.WriteTo(&archive); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command("cpio", "-idm", "--quiet")
	cmd.Dir, cmd.Stdin = dir, &archive
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	for name, want := range map[string]struct {
		data string
		mode os.FileMode
	}{"a/b/c": {"13 bytes long", 0o644}, "run.sh": {"", 0o755}, "escape": {"x", 0o600}} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil || string(data) != want.data {
			t.Errorf("%s: %q, %v; want %q", name, data, err, want.data)
		}
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || st.Mode().Perm() != want.mode {
			t.Errorf("%s: mode %v, %v; want %v", name, st.Mode(), err, want.mode)
		}
	}
}

func TestDynamicProgramIsPackedWithItsLibraries(t *testing.T) {
	image := &Image{files: map[string]file{}}
	if err := image.AddBinary("/bin/cat", "/bin/cat"); err != nil {
		t.Fatal(err)
	}
	var libs []string
	for name := range image.files {
		if strings.Contains(name, "libc.so") || strings.Contains(name, "ld-linux") || strings.Contains(name, "ld-musl") {
			libs = append(libs, name)
		}
	}
	if len(libs) == 0 {
		t.Errorf("no libc packed: %v", image.files)
	}
}

func TestOnlyImageConfigurationAndNamedModulesAreKept(t *testing.T) {
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, name := range []string{
		"./boot/vmlinuz-6.1.0-56-cloud-amd64", "./boot/config-6.1.0-56-cloud-amd64", "./boot/System.map-6.1.0-56-cloud-amd64",
		"./lib/modules/6.1.0/kernel/fs/overlayfs/overlay.ko", "./lib/modules/6.1.0/kernel/fs/ext4/ext4.ko",
	} {
		if err := w.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Size: 3, Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte("abc"))
	}
	w.Close()
	dir := t.TempDir()
	if err := unpackTar(&archive, dir); err != nil {
		t.Fatal(err)
	}
	var got []string
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if diff := cmp.Diff([]string{"config", "overlay.ko", "vmlinuz"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestNewestPackageIsTheHighestNumberNotTheLastName(t *testing.T) {
	a, b := "linux-image-6.12.9+deb13-cloud-amd64", "linux-image-6.12.118+deb13-cloud-amd64"
	if compareVersions(a, b) >= 0 {
		t.Errorf("%s is taken as newer than %s", a, b)
	}
}

func TestUnknownSeriesNamesTheKnownOnes(t *testing.T) {
	_, err := Find("6.1,5.15")
	if err == nil || !strings.Contains(err.Error(), `"5.15"`) || !strings.Contains(err.Error(), "6.12-bpo12") {
		t.Errorf("got %v", err)
	}
}

func TestShellWordsSurviveQuoting(t *testing.T) {
	for _, word := range []string{"plain", "two words", "it's", "$HOME", "a\nb", `\`, ""} {
		out, err := exec.Command("sh", "-c", "printf %s "+quote(word)).Output()
		if err != nil || string(out) != word {
			t.Errorf("%q comes out as %q, %v", word, out, err)
		}
	}
}
