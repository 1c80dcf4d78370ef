package target

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer/cgroup"
	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// Selector says whom to trace. Values of one field are alternatives, different fields narrow each other down: two names
// and a cgroup take the processes of that cgroup with one of the names. The zero value selects nobody.
type Selector struct {
	// PIDs are as /proc numbers them. Together with Cgroups or Containers, a process's own number counts too.
	PIDs []int
	// Names are searched in the command name (15 bytes at most) and in the program's file name.
	Names []*regexp.Regexp
	// Exes are programs' paths as the processes see them.
	Exes []string
	// Cgroups are directories or paths of control groups, of any hierarchy; groups below are included.
	Cgroups []string
	// Containers are identifiers, their beginnings (of 8 digits or more), names, or uids of Kubernetes pods.
	Containers []string
	// Libs are libraries that a process has mapped.
	Libs []Lib
}

// Lib is a library by file name, with or without directory and trailing version (libfoo.so finds libfoo.so.1.2).
type Lib struct {
	Name    string
	BuildID string // lower-case hex, or its beginning; empty takes any build
}

// ParseLib reads NAME[@BUILDID].
func ParseLib(text string) (Lib, error) {
	name, id, at := strings.Cut(text, "@")
	id = strings.ToLower(id)
	if name == "" {
		return Lib{}, fmt.Errorf("library %q: write NAME or NAME@BUILDID", text)
	}
	if at && !hexPrefix.MatchString(id) {
		return Lib{}, fmt.Errorf("library %q: %q is no build-id; write at least 4 hex digits, as readelf -n prints them", text, id)
	}
	return Lib{name, id}, nil
}

var (
	hexPrefix  = regexp.MustCompile(`^[0-9a-f]{4,}$`)
	shortHexID = regexp.MustCompile(`^[0-9a-f]{8,64}$`)
)

// Empty says that the selector selects nobody.
func (s *Selector) Empty() bool {
	return len(s.PIDs)+len(s.Names)+len(s.Exes)+len(s.Cgroups)+len(s.Containers)+len(s.Libs) == 0
}

// Finite says that no process can come to be selected later: all are named by pid.
func (s *Selector) Finite() bool {
	return len(s.PIDs) > 0 && len(s.Names)+len(s.Exes)+len(s.Cgroups)+len(s.Containers)+len(s.Libs) == 0
}

// String is the selector as a person would write it.
func (s *Selector) String() string {
	var parts []string
	for _, pid := range s.PIDs {
		parts = append(parts, "--pid "+strconv.Itoa(pid))
	}
	for _, re := range s.Names {
		parts = append(parts, "--name "+re.String())
	}
	add := func(flag string, values []string) {
		for _, v := range values {
			parts = append(parts, flag+" "+v)
		}
	}
	add("--exe", s.Exes)
	add("--cgroup", s.Cgroups)
	add("--container", s.Containers)
	for _, lib := range s.Libs {
		parts = append(parts, "--lib "+lib.String())
	}
	return safe(strings.Join(parts, " "))
}

// String is the library as a person would write it.
func (l Lib) String() string {
	if l.BuildID == "" {
		return l.Name
	}
	return l.Name + "@" + l.BuildID
}

// Finder matches processes against a selector whose groups and containers it has looked up. It is safe for concurrent use.
type Finder struct {
	fs       memory.FS
	names    Names
	selector Selector
	self     int

	mu         sync.Mutex
	groups     []cgroup.Group
	containers map[string]string // ids that the selector's names stand for, and the name
	paths      map[string]string // control groups of such containers whose paths tell no id
}

// NewFinder looks up what the selector names. A group that does not exist and a name that no runtime knows are errors: a
// person mistyped them more often than they will exist later.
func NewFinder(ctx context.Context, s Selector, fs memory.FS, names Names) (*Finder, error) {
	f := &Finder{fs: fs, names: names, selector: s, self: os.Getpid()}
	if s.Empty() {
		return nil, errors.New("nobody is selected: give --pid, --name, --exe, --cgroup, --container, --lib or a command")
	}
	for _, name := range s.Cgroups {
		g, err := cgroup.Find(name)
		if err != nil {
			return nil, fmt.Errorf("--cgroup: %w", err)
		}
		f.groups = append(f.groups, g)
	}
	if err := f.lookUp(ctx, true); err != nil {
		return nil, err
	}
	return f, nil
}

// Groups are the control groups that the selector names.
func (f *Finder) Groups() []cgroup.Group { return slices.Clone(f.groups) }

// Refresh asks the container runtimes again which identifiers the selector's names have now. The error names those that
// stand for nothing; the others are in force all the same.
func (f *Finder) Refresh(ctx context.Context) error { return f.lookUp(ctx, false) }

// lookUp is Refresh; strict looks at all processes before it calls a name unknown.
func (f *Finder) lookUp(ctx context.Context, strict bool) error {
	if !strict && !slices.ContainsFunc(f.selector.Containers, isName) {
		return nil // identifiers stand for themselves
	}
	if len(f.selector.Containers) == 0 {
		return nil
	}
	list, errs := f.names.List(ctx)
	ids, paths := map[string]string{}, map[string]string{}
	var unknown []error
	for _, wanted := range f.selector.Containers {
		found := meant(wanted, list)
		if len(found) > 1 && shortHexID.MatchString(wanted) {
			unknown = append(unknown, fmt.Errorf("--container %s: %d containers begin so; write more digits", safe(wanted), len(found)))
			continue
		}
		for _, c := range found {
			ids[c.ID] = wanted
			if group := f.groupOf(c); group != "" {
				paths[group] = wanted
			}
		}
		if len(found) == 0 && !(strict && f.lives(wanted)) {
			unknown = append(unknown, fmt.Errorf("--container %s: %s", safe(wanted), unknownContainer(list, errs)))
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.containers, f.paths = ids, paths
	return errors.Join(unknown...)
}

// isName says that a person wrote no identifier.
func isName(wanted string) bool { return !shortHexID.MatchString(wanted) }

// groupOf is the control group of a container that cannot be told by its path: those of plain runc, and of containerd's
// namespaces other than the usual. The path must have the id in it all the same, as the pid may be another's by now.
func (f *Finder) groupOf(c Named) string {
	if c.PID <= 0 || c.ID == "" {
		return ""
	}
	p := Process{ID: ID{PID: c.PID}}
	p.readCgroup(f.fs)
	if p.Container.ID != "" || !strings.Contains(path.Base(p.Cgroup), c.ID) {
		return ""
	}
	return p.Cgroup
}

// lives says whether some process is in the container: runtimes that nobody can ask have containers too.
func (f *Finder) lives(wanted string) bool {
	pids, _ := listPIDs(f.fs)
	for _, pid := range pids {
		p := Process{ID: ID{PID: pid}}
		p.readCgroup(f.fs)
		if inContainer(p.Container, wanted) {
			return true
		}
	}
	return false
}

func unknownContainer(list []Named, errs []error) string {
	text := "no process is in a container of this identifier, and no container runtime knows the name"
	if len(list) == 0 {
		text = "no process is in a container of this identifier, and no container runtime was found to ask for names"
	}
	if err := errors.Join(errs...); err != nil {
		text += " (" + strings.ReplaceAll(err.Error(), "\n", "; ") + ")"
	}
	return text
}

// meant are the containers that a person may mean.
func meant(wanted string, list []Named) []Named {
	var found []Named
	for _, c := range list {
		prefix := shortHexID.MatchString(wanted) && strings.HasPrefix(c.ID, wanted)
		if prefix || c.ID == wanted || slices.Contains(c.Names, wanted) {
			found = append(found, c)
		}
	}
	return found
}

// inContainer says whether a container has the identifier, without asking a runtime.
func inContainer(c Container, wanted string) bool {
	if c.ID == "" && c.Pod == "" || wanted == "" {
		return false
	}
	return c.ID == wanted || c.Pod == strings.ReplaceAll(wanted, "_", "-") || shortHexID.MatchString(wanted) && strings.HasPrefix(c.ID, wanted)
}

// Match says whether a process is selected, and by what.
func (f *Finder) Match(p *Process) (why string, ok bool) {
	if p.PID == f.self {
		return "", false
	}
	s := &f.selector
	// The cheap tests first: files are read only for what passed them.
	tests := []struct {
		wanted bool
		test   func(*Process) string
	}{
		{len(s.PIDs) > 0, f.matchPID},
		{len(s.Names) > 0, f.matchName},
		{len(s.Exes) > 0, f.matchExe},
		{len(s.Containers) > 0, f.matchContainer},
		{len(s.Cgroups) > 0, f.matchCgroup},
		{len(s.Libs) > 0, f.matchLib},
	}
	var reasons []string
	for _, t := range tests {
		if !t.wanted {
			continue
		}
		reason := t.test(p)
		if reason == "" {
			return "", false
		}
		reasons = append(reasons, reason)
	}
	return safe(strings.Join(reasons, ", ")), len(reasons) > 0
}

func (f *Finder) matchPID(p *Process) string {
	inner := len(f.selector.Cgroups)+len(f.selector.Containers) > 0
	for _, pid := range f.selector.PIDs {
		if pid == p.PID || inner && pid == p.InnerPID() {
			return "--pid " + strconv.Itoa(pid)
		}
	}
	return ""
}

func (f *Finder) matchName(p *Process) string {
	for _, re := range f.selector.Names {
		if re.MatchString(p.Comm) || p.Exe != "" && re.MatchString(path.Base(p.Exe)) {
			return "--name " + re.String()
		}
	}
	return ""
}

func (f *Finder) matchExe(p *Process) string {
	if slices.Contains(f.selector.Exes, p.Exe) {
		return "--exe " + p.Exe
	}
	// A link (/usr/bin/python3) is not what the kernel prints: compare the files.
	program, err := os.Stat(f.fs.Path(p.PID, "exe"))
	if err != nil {
		return ""
	}
	for _, exe := range f.selector.Exes {
		if wanted, err := os.Stat(exe); err == nil && os.SameFile(wanted, program) {
			return "--exe " + exe
		}
	}
	return ""
}

func (f *Finder) matchContainer(p *Process) string {
	if wanted := f.named(p); wanted != "" {
		return "--container " + wanted
	}
	for _, wanted := range f.selector.Containers {
		if inContainer(p.Container, wanted) {
			return "--container " + wanted
		}
	}
	return ""
}

// named is the name that a runtime has for the process's container, among those that are wanted.
func (f *Finder) named(p *Process) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	if wanted := f.containers[p.Container.ID]; wanted != "" {
		return wanted
	}
	if len(f.paths) == 0 {
		return ""
	}
	for group := p.Cgroup; len(group) > 1; group = path.Dir(group) {
		if wanted := f.paths[group]; wanted != "" {
			return wanted
		}
	}
	return ""
}

func (f *Finder) matchCgroup(p *Process) string {
	file, err := os.Open(f.fs.Path(p.PID, "cgroup"))
	if err != nil {
		return ""
	}
	defer file.Close()
	list, err := cgroup.ParseMemberships(file)
	if err != nil {
		return ""
	}
	for _, g := range f.groups {
		if g.Contains(list) {
			return "--cgroup " + g.Path
		}
	}
	return ""
}

func (f *Finder) matchLib(p *Process) string {
	ranges, err := f.fs.Maps(p.PID)
	if err != nil {
		return ""
	}
	for i := range ranges {
		r := &ranges[i]
		if !r.IsFile() || i > 0 && ranges[i-1].Path == r.Path {
			continue
		}
		for _, lib := range f.selector.Libs {
			if lib.named(r.Path) && f.hasBuild(p.PID, r, lib.BuildID) {
				return "--lib " + lib.String()
			}
		}
	}
	return ""
}

// named says whether a mapped file's path is the library's.
func (l Lib) named(mapped string) bool {
	if strings.HasPrefix(l.Name, "/") {
		return mapped == l.Name
	}
	base := path.Base(mapped)
	rest, ok := strings.CutPrefix(base, l.Name)
	return ok && (rest == "" || libVersion.MatchString(rest))
}

var libVersion = regexp.MustCompile(`^(\.\d+)+$`)

// Scan reads /proc once and returns the selected processes. Those that vanish meanwhile are not in it.
func (f *Finder) Scan() ([]Process, error) {
	pids, err := listPIDs(f.fs)
	if err != nil {
		return nil, err
	}
	var found []Process
	for _, pid := range pids {
		p, err := Read(f.fs, pid)
		if err != nil {
			continue
		}
		if _, ok := f.Match(&p); ok {
			found = append(found, p)
		}
	}
	return found, nil
}

// safe makes what a target or a person wrote fit to be printed.
func safe(s string) string { return profile.Sanitize(s) }
