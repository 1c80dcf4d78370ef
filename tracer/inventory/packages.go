package inventory

import (
	"bufio"
	"bytes"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
)

const (
	maxDatabase = 256 << 20
	maxList     = 64 << 20
	maxLists    = 50_000
)

// addPackages asks the package database inside root (dpkg, apk, rpm) who installed the files. A missing or broken database
// costs the names only.
func addPackages(list []profile.Library, root string) {
	wanted := make(map[string][]int, 2*len(list))
	for i, l := range list {
		file := l.File
		if abs, err := filepath.Abs(file); err == nil && !path.IsAbs(file) {
			file = abs
		}
		for _, name := range mergedNames(file) {
			wanted[name] = append(wanted[name], i)
		}
	}
	put := func(file, pkg string) {
		for _, i := range wanted[file] {
			list[i].Package = pkg
		}
	}
	dpkgOwners(root, wanted, put)
	apkOwners(root, put)
	rpmOwners(root, put)
}

// mergedNames are the names of a file before and after /lib and friends became links into /usr: the database has the one,
// maps the other.
func mergedNames(file string) []string {
	if rest, ok := strings.CutPrefix(file, "/usr"); ok && isTopLevel(rest) {
		return []string{file, rest}
	}
	if isTopLevel(file) {
		return []string{file, "/usr" + file}
	}
	return []string{file}
}

func isTopLevel(file string) bool {
	for _, dir := range []string{"/lib/", "/lib64/", "/lib32/", "/bin/", "/sbin/"} {
		if strings.HasPrefix(file, dir) {
			return true
		}
	}
	return false
}

// dpkgOwners reads the file lists of all packages; dpkg has no index by file.
func dpkgOwners(root string, wanted map[string][]int, put func(file, pkg string)) {
	const info = "/var/lib/dpkg/info"
	names := listDirectory(root, info)
	owners := map[string]string{} // file to package
	for _, name := range names[:min(len(names), maxLists)] {
		pkg, ok := strings.CutSuffix(name, ".list")
		if !ok {
			continue
		}
		data, err := rootfs.ReadFile(root, info+"/"+name, maxList)
		if err != nil {
			continue
		}
		for line := range bytes.Lines(data) {
			if file := strings.TrimRight(string(line), "\n"); wanted[file] != nil {
				owners[file] = pkg
			}
		}
	}
	if len(owners) == 0 {
		return
	}
	versions := dpkgVersions(root)
	for file, pkg := range owners {
		plain, _, _ := strings.Cut(pkg, ":") // libc6:amd64
		put(file, strings.TrimSpace(plain+" "+versions[plain]))
	}
}

func dpkgVersions(root string) map[string]string {
	data, err := rootfs.ReadFile(root, "/var/lib/dpkg/status", maxDatabase)
	if err != nil {
		return nil
	}
	versions := map[string]string{}
	pkg := ""
	for line := range bytes.Lines(data) {
		name, value, _ := strings.Cut(strings.TrimRight(string(line), "\n"), ": ")
		switch name {
		case "Package":
			pkg = value
		case "Version":
			versions[pkg] = value
		}
	}
	return versions
}

// apkOwners reads Alpine's database: P and V name a package, F a folder in it, R a file of that folder.
func apkOwners(root string, put func(file, pkg string)) {
	data, err := rootfs.ReadFile(root, "/lib/apk/db/installed", maxDatabase)
	if err != nil {
		return
	}
	var pkg, version, folder string
	in := bufio.NewScanner(bytes.NewReader(data))
	in.Buffer(nil, 1<<20)
	for in.Scan() {
		key, value, ok := strings.Cut(in.Text(), ":")
		if !ok {
			continue
		}
		switch key {
		case "P":
			pkg, version, folder = value, "", ""
		case "V":
			version = value
		case "F":
			folder = value
		case "R":
			put("/"+path.Join(folder, value), pkg+" "+version)
		}
	}
}

// listDirectory names the entries of a folder inside root. The folder's own path is not trusted further than that: each
// file is opened through rootfs.
func listDirectory(root, dir string) []string {
	fd, err := rootfs.OpenPath(root, dir)
	if err != nil {
		return nil
	}
	handle := os.NewFile(uintptr(fd), dir)
	defer handle.Close()
	d, err := os.Open(fdPath(handle))
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(maxLists)
	return names
}

func fdPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }
