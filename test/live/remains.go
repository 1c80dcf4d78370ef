package live

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// object is a BPF link, program or map of the kernel.
type object struct {
	kind string
	id   uint32
}

// kernelObjects lists the BPF objects that a process holds file descriptors of. Ids are never given out twice while
// the machine is up, so that an id which still resolves after the process has gone is a leak.
func kernelObjects(pid int) ([]object, error) {
	dir := fmt.Sprintf("/proc/%d/fdinfo", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var objects []object
	for _, entry := range entries {
		text, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			continue // closed since
		}
		objects = append(objects, parseFdinfo(string(text))...)
	}
	return objects, nil
}

// parseFdinfo finds the ids in one fdinfo file. A link's file names its program too.
func parseFdinfo(text string) []object {
	var objects []object
	for line := range strings.Lines(text) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), ":")
		kind, isID := strings.CutSuffix(key, "_id")
		if !ok || !isID || (kind != "link" && kind != "prog" && kind != "map") {
			continue
		}
		id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
		if err != nil || id == 0 {
			continue
		}
		objects = append(objects, object{kind, uint32(id)})
	}
	return objects
}

func (o object) exists() (bool, error) {
	var closer io.Closer
	var err error
	switch o.kind {
	case "link":
		closer, err = link.NewFromID(link.ID(o.id))
	case "prog":
		closer, err = ebpf.NewProgramFromID(ebpf.ProgramID(o.id))
	case "map":
		closer, err = ebpf.NewMapFromID(ebpf.MapID(o.id))
	}
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return true, err
	}
	return true, closer.Close()
}

// checkGone fails when a BPF object of the ended tracer is still there. The kernel frees them a little later.
func (tr *Tracer) checkGone(t testing.TB) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for _, o := range tr.objects {
		err := waitFor(ctx, func() bool {
			exists, _ := o.exists()
			return !exists
		})
		if err != nil {
			t.Errorf("%s %d of allocsnoop is still in the kernel after its end", o.kind, o.id)
		}
	}
}

// CheckText fails when code in a process's memory differs from the files it was mapped from: a uprobe that remains is a
// breakpoint written over an instruction. (The [uprobes] mapping is no sign: the kernel keeps it until exit.)
func CheckText(t testing.TB, pid int) {
	t.Helper()
	differ, err := changedText(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range differ {
		t.Errorf("a probe remains in process %d: %s", pid, d)
	}
}

// Probed reports whether any code of the process differs from its files, as it does while probes are in.
func Probed(t testing.TB, pid int) bool {
	t.Helper()
	return Breakpoints(t, pid) > 0
}

// Breakpoints is the number of places at which a process's code differs from its files. Two processes with the same files
// and the same trace have as many: a test can wait until a process that joined a trace is probed like another.
func Breakpoints(t testing.TB, pid int) int {
	t.Helper()
	differ, err := changedText(pid)
	if err != nil {
		t.Fatal(err)
	}
	return len(differ)
}

// changedText says where the executable file mappings of a process differ from their files.
func changedText(pid int) ([]string, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		return nil, err
	}
	defer mem.Close()

	var differ []string
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		if len(fields) < 6 || !strings.HasPrefix(fields[1], "r-x") || !strings.HasPrefix(fields[5], "/") {
			continue
		}
		var start, limit, offset uint64
		if _, err := fmt.Sscanf(fields[0]+" "+fields[2], "%x-%x %x", &start, &limit, &offset); err != nil {
			return nil, fmt.Errorf("parse %q: %w", line, err)
		}
		places, err := differences(mem, pid, start, limit, offset)
		if err != nil {
			return nil, err
		}
		for _, at := range places {
			differ = append(differ, fmt.Sprintf("%s at file offset %#x", fields[5], offset+uint64(at)))
		}
	}
	return differ, nil
}

// differences are the starts of stretches that differ. The file is opened through map_files, which works for deleted and
// replaced ones.
func differences(mem io.ReaderAt, pid int, start, limit, offset uint64) ([]int, error) {
	// maps pads its addresses with zeros, map_files does not.
	file, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, start, limit))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	want := make([]byte, limit-start)
	n, err := file.ReadAt(want, int64(offset))
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", file.Name(), err)
	}
	want = want[:n]
	got := make([]byte, n)
	if _, err := mem.ReadAt(got, int64(start)); err != nil {
		return nil, fmt.Errorf("read memory of process %d at %#x: %w", pid, start, err)
	}
	if bytes.Equal(got, want) {
		return nil, nil
	}
	var places []int
	for i := range got {
		if got[i] != want[i] && (i == 0 || got[i-1] == want[i-1]) {
			places = append(places, i)
		}
	}
	return places, nil
}
