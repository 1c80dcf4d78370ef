package inventory

import (
	"bufio"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
)

const (
	rpmPatience = 20 * time.Second
	nobody      = 65534
)

// rpmDatabases are the forms of rpm's database: SQLite, SUSE's own, Berkeley DB.
var rpmDatabases = []struct {
	backend string
	files   []string // the first must be there
}{
	{"sqlite", []string{"rpmdb.sqlite", "rpmdb.sqlite-wal"}},
	{"ndb", []string{"Packages.db", "Index.db"}},
	{"bdb_ro", []string{"Packages"}},
}

// rpmOwners has the rpm command of this machine read the database of root, if there are both.
//
// The trap: the database was written by the target, and rpm is C code that parses it. So it gets a copy, runs as nobody
// where this process may decide that, and never sees the target's root, macros or programs.
func rpmOwners(root string, put func(file, pkg string)) {
	command, err := exec.LookPath("rpm")
	if err != nil {
		return
	}
	dir, err := os.MkdirTemp("", "allocsnoop-rpm-")
	if err != nil {
		return
	}
	defer os.RemoveAll(dir)
	backend := copyRPMDatabase(root, dir)
	if backend == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), rpmPatience)
	defer cancel()
	cmd := exec.CommandContext(ctx, command, "--define", "_db_backend "+backend, "--dbpath", dir, "--query", "--all",
		"--queryformat", `[%{FILENAMES}\t%{=NAME} %{=VERSION}-%{=RELEASE}\n]`)
	cmd.Dir, cmd.Env = dir, []string{"LC_ALL=C", "HOME=" + dir, "PATH=/usr/bin:/bin"}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	out, err := cmd.StdoutPipe()
	if err != nil || cmd.Start() != nil {
		return
	}
	lines := bufio.NewScanner(io.LimitReader(out, maxDatabase))
	for lines.Scan() {
		if file, pkg, ok := strings.Cut(lines.Text(), "\t"); ok {
			put(file, pkg)
		}
	}
	cancel() // of a list that is longer than that the rest is not wanted
	_ = cmd.Wait()
}

// copyRPMDatabase copies what is there into dir and returns its form; empty when there is none.
func copyRPMDatabase(root, dir string) string {
	for _, where := range []string{"/usr/lib/sysimage/rpm", "/var/lib/rpm"} {
		for _, db := range rpmDatabases {
			if !copyFrom(root, where, db.files[0], dir) {
				continue
			}
			for _, more := range db.files[1:] {
				copyFrom(root, where, more, dir)
			}
			if os.Geteuid() == 0 && os.Chown(dir, nobody, nobody) != nil {
				return ""
			}
			return db.backend
		}
	}
	return ""
}

func copyFrom(root, where, name, dir string) bool {
	data, err := rootfs.ReadFile(root, where+"/"+name, maxDatabase)
	if err != nil || len(data) == 0 {
		return false
	}
	to := filepath.Join(dir, name)
	if os.WriteFile(to, data, 0o600) != nil {
		return false
	}
	return os.Geteuid() != 0 || os.Chown(to, nobody, nobody) == nil
}
