package target

import (
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// daemons are the programs of runtimes, as the kernel has their names.
var daemons = []string{"dockerd", "containerd", "crio", "podman"}

// maxRoots bounds the roots that are looked at, against processes that only call themselves so.
const maxRoots = 8

// roots are the root directories in which runtimes may have their sockets and files. For a tracer that runs in a container
// itself, with the machine's processes before it (--pid=host), that is the first process's root too, or that of the
// runtimes where the first process lets nobody look.
func roots(fs memory.FS) []string {
	list := []string{"/"}
	known, err := statRoot("/")
	if err != nil {
		return list
	}
	seen := []os.FileInfo{known}
	add := func(pid int) error {
		root := fs.Path(pid, "root") + "/"
		info, err := statRoot(root)
		if err != nil || slices.ContainsFunc(seen, func(s os.FileInfo) bool { return os.SameFile(s, info) }) {
			return err
		}
		seen = append(seen, info)
		list = append(list, root)
		return nil
	}
	if add(1) == nil {
		return list
	}
	pids, _ := listPIDs(fs)
	for _, pid := range pids {
		if len(list) < maxRoots && isDaemon(fs, pid) {
			_ = add(pid)
		}
	}
	return list
}

func statRoot(path string) (os.FileInfo, error) { return os.Stat(path + ".") }

// isDaemon picks processes out that have a runtime's name and are in no container, where anybody can have it.
func isDaemon(fs memory.FS, pid int) bool {
	comm, err := os.ReadFile(fs.Path(0, strconv.Itoa(pid), "comm"))
	if err != nil || !slices.Contains(daemons, strings.TrimSpace(string(comm))) {
		return false
	}
	p := Process{ID: ID{PID: pid}}
	p.readCgroup(fs)
	return p.Container.ID == ""
}
