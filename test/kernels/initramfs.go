package kernels

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Image is the file tree that a kernel boots with: an initramfs, built up in memory.
type Image struct {
	files map[string]file
}

type file struct {
	mode fs.FileMode
	data []byte
}

// NewImage is an image that holds busybox (with the libraries it needs, if any) and the mount points init wants.
func NewImage() (*Image, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, fmt.Errorf("find busybox (Debian: busybox-static): %w", err)
	}
	im := &Image{files: map[string]file{}}
	for _, dir := range []string{"proc", "sys", "dev", "tmp", "run", "root", "var/tmp", "usr/bin", "sbin"} {
		im.mkdir(dir)
	}
	im.Add("/etc/passwd", 0o644, []byte("root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"))
	im.Add("/etc/group", 0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	return im, im.AddBinary("/bin/busybox", busybox)
}

// Add puts a file into the image.
func (im *Image) Add(name string, mode fs.FileMode, data []byte) {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	im.mkdir(path.Dir(name))
	im.files[name] = file{mode, data}
}

// AddFile puts a copy of the host's file into the image.
func (im *Image) AddFile(name, host string) error {
	data, err := os.ReadFile(host)
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	st, err := os.Stat(host)
	if err != nil {
		return fmt.Errorf("pack %s: %w", name, err)
	}
	im.Add(name, st.Mode().Perm(), data)
	return nil
}

var lddPath = regexp.MustCompile(`(?m)(?:=> |^\s+)(/\S+) \(0x`)

// AddBinary puts a program and every library the host's loader would give it into the image.
func (im *Image) AddBinary(name, host string) error {
	if err := im.AddFile(name, host); err != nil {
		return err
	}
	// A static program makes ldd fail; that is the answer "no libraries".
	out, _ := exec.Command("ldd", host).Output()
	for _, m := range lddPath.FindAllSubmatch(out, -1) {
		lib := string(m[1])
		if err := im.AddFile(lib, lib); err != nil {
			return err
		}
	}
	return nil
}

// AddTree puts a directory of the host into the image.
func (im *Image) AddTree(name, host string) error {
	return filepath.WalkDir(host, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(host, p)
		if err != nil {
			return err
		}
		return im.AddFile(path.Join(name, filepath.ToSlash(rel)), p)
	})
}

func (im *Image) mkdir(name string) {
	for ; name != "." && name != "/" && name != ""; name = path.Dir(name) {
		if _, ok := im.files[name]; !ok {
			im.files[name] = file{mode: fs.ModeDir | 0o755}
		}
	}
}

// WriteTo writes the image as a cpio archive in the "newc" form, the only one that kernels unpack.
func (im *Image) WriteTo(w io.Writer) (int64, error) {
	var buf bytes.Buffer
	names := make([]string, 0, len(im.files))
	for name := range im.files {
		names = append(names, name)
	}
	slices.Sort(names) // a directory stands before what is in it
	for i, name := range names {
		writeEntry(&buf, i+1, name, im.files[name])
	}
	writeEntry(&buf, 0, "TRAILER!!!", file{})
	n, err := w.Write(buf.Bytes())
	return int64(n), err
}

func writeEntry(buf *bytes.Buffer, inode int, name string, f file) {
	mode := uint32(f.mode.Perm()) | 0o100000
	if f.mode.IsDir() {
		mode = uint32(f.mode.Perm()) | 0o040000
	}
	fmt.Fprintf(buf, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		inode, mode, 0, 0, 1, 0, len(f.data), 0, 0, 0, 0, len(name)+1, 0)
	buf.WriteString(name + "\x00")
	pad(buf)
	buf.Write(f.data)
	pad(buf)
}

func pad(buf *bytes.Buffer) {
	for buf.Len()%4 != 0 {
		buf.WriteByte(0)
	}
}
