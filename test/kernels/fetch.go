package kernels

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/ulikunitz/xz"
)

const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Kernel is one kernel on disk.
type Kernel struct {
	Series  Series
	Package string
	dir     string
}

// Image is the path of the bootable image.
func (k *Kernel) Image() string { return filepath.Join(k.dir, "vmlinuz") }

// HasModule says whether the kernel's package came with the module as a file; a test that needs it asks first.
func (k *Kernel) HasModule(name string) bool {
	_, err := os.Stat(filepath.Join(k.dir, name+".ko"))
	return err == nil
}

// Store keeps unpacked kernels in a directory of its own, with an apt state of its own: the host's apt is only read.
type Store struct{ Dir string }

// DefaultStore is below the user's cache directory, or $ALLOCSNOOP_KERNELS.
func DefaultStore() (*Store, error) {
	if dir := os.Getenv("ALLOCSNOOP_KERNELS"); dir != "" {
		return &Store{dir}, nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("find cache directory (ALLOCSNOOP_KERNELS names another): %w", err)
	}
	return &Store{filepath.Join(cache, "allocsnoop-kernels")}, nil
}

// Get returns the series' kernel, from disk when it was fetched before, else from Debian.
func (s *Store) Get(ctx context.Context, series Series) (*Kernel, error) {
	if k, err := s.onDisk(series); err == nil {
		return k, nil
	}
	pkg, err := s.newest(ctx, series)
	if err != nil {
		return nil, err
	}
	dir := s.path("kernels", series.Name, pkg)
	if err := s.fetch(ctx, pkg, dir); err != nil {
		return nil, fmt.Errorf("fetch %s: %w", pkg, err)
	}
	return &Kernel{series, pkg, dir}, nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.Dir}, elem...)...)
}

func (s *Store) onDisk(series Series) (*Kernel, error) {
	found, _ := filepath.Glob(s.path("kernels", series.Name, "*", "vmlinuz"))
	if len(found) == 0 {
		return nil, os.ErrNotExist
	}
	dir := filepath.Dir(found[len(found)-1])
	return &Kernel{series, filepath.Base(dir), dir}, nil
}

// newest is the package of the series with the highest version.
func (s *Store) newest(ctx context.Context, series Series) (string, error) {
	if err := s.update(ctx); err != nil {
		return "", err
	}
	names, err := s.packages(ctx)
	if err != nil {
		return "", err
	}
	re := regexp.MustCompile(series.Pattern)
	names = slices.DeleteFunc(names, func(n string) bool { return !re.MatchString(n) })
	if len(names) == 0 {
		return "", fmt.Errorf("no package matches %s in Debian's lists (stale lists? remove %s)", series.Pattern, s.path("apt"))
	}
	return slices.MaxFunc(names, compareVersions), nil
}

// packages are the names in Debian's lists that can be downloaded.
func (s *Store) packages(ctx context.Context) ([]string, error) {
	out, err := s.apt(ctx, "apt-cache", "pkgnames", "linux-")
	if err != nil {
		return nil, fmt.Errorf("list kernel packages: %w", err)
	}
	return strings.Fields(string(out)), nil
}

var digits = regexp.MustCompile(`\d+`)

// compareVersions compares the numbers in two package names of one series.
func compareVersions(a, b string) int {
	numbers := func(s string) (n []int) {
		for _, d := range digits.FindAllString(s, -1) {
			v, _ := strconv.Atoi(d)
			n = append(n, v)
		}
		return n
	}
	return slices.Compare(numbers(a), numbers(b))
}

// update reads Debian's package lists unless it did before.
func (s *Store) update(ctx context.Context) error {
	done := s.path("apt", "updated")
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	for _, dir := range []string{"lists/partial", "cache/archives/partial", "none"} {
		if err := os.MkdirAll(s.path("apt", dir), 0o755); err != nil {
			return err
		}
	}
	var sources strings.Builder
	mirrors := mirrors(ctx)
	for _, suite := range suites {
		fmt.Fprintf(&sources, "deb [signed-by=%s] %s %s main\n", debianKeyring, mirrors[suite.mirror], suite.name)
	}
	if err := os.WriteFile(s.path("apt", "sources.list"), []byte(sources.String()), 0o644); err != nil {
		return err
	}
	if _, err := s.apt(ctx, "apt-get", "-q", "update"); err != nil {
		return fmt.Errorf("read Debian's package lists: %w", err)
	}
	return os.WriteFile(done, nil, 0o644)
}

// mirrors are the servers that the host's apt uses, so that a machine with a private mirror works too.
func mirrors(ctx context.Context) map[string]string {
	found := map[string]string{
		"debian":          "http://deb.debian.org/debian/",
		"debian-security": "http://security.debian.org/debian-security/",
	}
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI)").Output()
	if err != nil {
		return found
	}
	for _, uri := range strings.Fields(string(out)) {
		if name := filepath.Base(uri); found[name] != "" {
			found[name] = uri
		}
	}
	return found
}

func (s *Store) apt(ctx context.Context, command string, args ...string) ([]byte, error) {
	return s.aptIn(ctx, "", command, args...)
}

func (s *Store) aptIn(ctx context.Context, dir, command string, args ...string) ([]byte, error) {
	options := []string{
		"-o", "Dir::Etc::sourcelist=" + s.path("apt", "sources.list"),
		"-o", "Dir::Etc::sourceparts=" + s.path("apt", "none"),
		"-o", "Dir::Etc::preferencesparts=" + s.path("apt", "none"),
		"-o", "Dir::State::lists=" + s.path("apt", "lists"),
		"-o", "Dir::Cache=" + s.path("apt", "cache"),
		"-o", "Acquire::Languages=none",
		"-o", "APT::Sandbox::User=", // the cache directory may be closed to the _apt user
	}
	cmd := exec.CommandContext(ctx, command, append(options, args...)...)
	cmd.Dir = dir
	return output(cmd)
}

func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, bytes.TrimSpace(exit.Stderr))
	}
	return out, err
}

// fetch downloads a kernel's packages and puts its image and modules into dir, which appears whole or not at all.
func (s *Store) fetch(ctx context.Context, pkg, dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".fetch-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	packages, err := s.packagesOf(ctx, pkg)
	if err != nil {
		return err
	}
	for _, p := range packages {
		if err := s.download(ctx, p, tmp); err != nil {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(tmp, "vmlinuz")); err != nil {
		return fmt.Errorf("no vmlinuz in the package: %w", err)
	}
	return os.Rename(tmp, dir)
}

// packagesOf adds the modules' package, which Debian splits off since 6.19 and which its mirrors sometimes drop first.
func (s *Store) packagesOf(ctx context.Context, pkg string) ([]string, error) {
	version, split := strings.CutPrefix(pkg, "linux-binary-")
	if !split {
		return []string{pkg}, nil
	}
	names, err := s.packages(ctx)
	modules := "linux-modules-" + version
	if err != nil || !slices.Contains(names, modules) {
		return []string{pkg}, err
	}
	return []string{pkg, modules}, nil
}

func (s *Store) download(ctx context.Context, pkg, dir string) error {
	work, err := os.MkdirTemp(dir, "deb-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	if _, err := s.aptIn(ctx, work, "apt-get", "-q", "download", pkg); err != nil {
		return fmt.Errorf("download %s: %w", pkg, err)
	}
	debs, _ := filepath.Glob(filepath.Join(work, "*.deb"))
	if len(debs) != 1 {
		return fmt.Errorf("download %s: %d files arrived, want 1", pkg, len(debs))
	}
	return unpackDeb(ctx, debs[0], dir)
}

// unpackDeb takes the image, its configuration and the modules a test may want out of a kernel package.
func unpackDeb(ctx context.Context, deb, dir string) error {
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	cmd.Stderr = os.Stderr
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	unpackErr := unpackTar(pipe, dir)
	io.Copy(io.Discard, pipe)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("unpack %s: %w", deb, err)
	}
	return unpackErr
}

func unpackTar(r io.Reader, dir string) error {
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := wanted(h.Name)
		if name == "" || h.Typeflag != tar.TypeReg {
			continue
		}
		if err := writeFile(filepath.Join(dir, name), tr, strings.HasSuffix(h.Name, ".xz")); err != nil {
			return err
		}
	}
}

// modules are what a test may load: the cloud kernels have nearly everything else built in.
var modules = []string{"overlay"}

// wanted is the name under which a packaged file is kept; "" drops it.
func wanted(path string) string {
	base := strings.TrimSuffix(filepath.Base(path), ".xz")
	if base == "vmlinuz" || strings.HasPrefix(base, "vmlinuz-") {
		return "vmlinuz"
	}
	if strings.HasPrefix(base, "config-") {
		return "config"
	}
	if slices.Contains(modules, strings.TrimSuffix(base, ".ko")) && strings.HasSuffix(base, ".ko") {
		return base
	}
	return ""
}

func writeFile(path string, r io.Reader, compressed bool) error {
	if compressed {
		x, err := xz.NewReader(r)
		if err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Base(path), err)
		}
		r = x
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
