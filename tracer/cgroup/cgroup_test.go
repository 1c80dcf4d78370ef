package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMembershipsAreReadInEveryForm(t *testing.T) {
	tests := []struct {
		name, text string
		want       []Membership
		memory     string
	}{
		{"version 2 alone", "0::/user.slice/a:b c\n", []Membership{{0, nil, "/user.slice/a:b c"}}, "/user.slice/a:b c"},
		{"version 1 with joined controllers and an unused unified hierarchy",
			"9:cpu,cpuacct:/web\n4:memory:/kubepods/pod7/c1\n1:name=systemd:/x\n0::/y\n",
			[]Membership{
				{9, []string{"cpu", "cpuacct"}, "/web"}, {4, []string{"memory"}, "/kubepods/pod7/c1"},
				{1, []string{"name=systemd"}, "/x"}, {0, nil, "/y"},
			}, "/kubepods/pod7/c1"},
		{"a group outside of the reader's namespace", "0::/../other\n", []Membership{{0, nil, "/../other"}}, "/../other"},
		{"a removed group", "0::/gone (deleted)\n", []Membership{{0, nil, "/gone"}}, "/gone"},
		{"nothing", "", nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseMemberships(strings.NewReader(tt.text))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if p := MemoryPath(got); p != tt.memory {
				t.Errorf("memory path %q, want %q", p, tt.memory)
			}
		})
	}
}

func TestDamagedMembershipsAreRefused(t *testing.T) {
	for _, text := range []string{"nonsense\n", "x::/a\n", "1:memory\n", "1:memory:relative\n", "-1::/a\n"} {
		if _, err := ParseMemberships(strings.NewReader(text)); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

func TestMountsKeepSpacesInPaths(t *testing.T) {
	text := `22 1 254:0 / / rw shared:1 - ext4 /dev/vda rw
34 30 0:31 / /sys/fs/cgroup/memory rw,relatime shared:15 - cgroup cgroup rw,memory
40 30 0:37 /docker/abc /mnt/a\040b rw,relatime - cgroup2 cgroup2 rw,nsdelegate
41 30 0:38 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
broken line
`
	got, err := ParseMounts(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mount{
		{"/sys/fs/cgroup/memory", "/", false, []string{"rw", "memory"}},
		{"/mnt/a b", "/docker/abc", true, nil},
		{"/sys/fs/cgroup/cpu,cpuacct", "/", false, []string{"rw", "cpu", "cpuacct"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// fakeHierarchy is a directory tree that looks like a mounted hierarchy.
func fakeHierarchy(t *testing.T, v2 bool, groups map[string]map[string]string) Mount {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for group, files := range groups {
		p := filepath.Join(dir, group)
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
		if files["cgroup.procs"] == "" {
			writeFile(t, filepath.Join(p, "cgroup.procs"), "")
		}
		for name, text := range files {
			writeFile(t, filepath.Join(p, name), text)
		}
	}
	m := Mount{Dir: dir, Root: "/", V2: v2}
	if !v2 {
		m.Controllers = []string{"rw", "memory"}
	}
	return m
}

func writeFile(t *testing.T, name, text string) {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestAGroupIsFoundByDirectoryPathAndName(t *testing.T) {
	m := fakeHierarchy(t, true, map[string]map[string]string{"/": nil, "/a": nil, "/a/b": {"cgroup.procs": "7\n11\n"}})
	for _, name := range []string{"/a/b", "a/b", m.Dir + "/a/b", "/a//b/"} {
		g, err := FindIn([]Mount{m}, name)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if g.Path != "/a/b" || g.Dir != m.Dir+"/a/b" {
			t.Errorf("%s: found %+v", name, g)
		}
	}
	g, err := FindIn([]Mount{m}, "/a")
	if err != nil {
		t.Fatal(err)
	}
	pids, err := g.PIDs()
	if err != nil || !cmp.Equal(pids, []int{7, 11}) {
		t.Errorf("processes of descendants: %v, %v", pids, err)
	}
}

func TestNoGroupOutsideOfTheHierarchyIsFound(t *testing.T) {
	m := fakeHierarchy(t, true, map[string]map[string]string{"/in": nil, "/out": nil})
	inner := Mount{Dir: m.Dir + "/in", Root: "/in", V2: true}
	for _, name := range []string{"/../out", "../out", "/out", "/in/../out", m.Dir + "/out", "/missing", ""} {
		g, err := FindIn([]Mount{inner}, name)
		if err == nil && strings.Contains(g.Dir, "out") {
			t.Errorf("%q gives %+v", name, g)
		}
		if err != nil && !errors.Is(err, ErrNotFound) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if g, err := FindIn([]Mount{inner}, "/in"); err != nil || g.Dir != inner.Dir {
		t.Errorf("the mounted group itself: %+v, %v", g, err)
	}
}

func TestTheHierarchyWithMemoryLimitsWins(t *testing.T) {
	memory := fakeHierarchy(t, false, map[string]map[string]string{"/web": nil})
	cpu := fakeHierarchy(t, false, map[string]map[string]string{"/web": nil, "/only-cpu": nil})
	cpu.Controllers = []string{"rw", "cpu"}
	unified := fakeHierarchy(t, true, map[string]map[string]string{"/web": nil})
	mounts := []Mount{cpu, unified, memory}
	if g, err := FindIn(mounts, "/web"); err != nil || g.Dir != memory.Dir+"/web" {
		t.Errorf("found %+v, %v; want the memory hierarchy's", g, err)
	}
	if g, err := FindIn(mounts, "/only-cpu"); err != nil || g.Dir != cpu.Dir+"/only-cpu" {
		t.Errorf("found %+v, %v; want the cpu hierarchy's", g, err)
	}
}

func TestMembersOfGroupsBelowAreContainedNamesakesAreNot(t *testing.T) {
	web := Group{Path: "/web", controllers: []string{"rw", "memory"}}
	unified := Group{Path: "/web", V2: true}
	root := Group{Path: "/", V2: true}
	tests := []struct {
		text               string
		web, unified, root bool
	}{
		{"4:memory:/web\n0::/\n", true, false, true},
		{"4:memory:/web/a\n", true, false, false},
		{"4:memory:/website\n0::/website\n", false, false, true},
		{"3:cpu:/web\n4:memory:/\n", false, false, false},
		{"0::/web/x\n", false, true, true},
	}
	for _, tt := range tests {
		list, err := ParseMemberships(strings.NewReader(tt.text))
		if err != nil {
			t.Fatal(err)
		}
		for g, want := range map[*Group]bool{&web: tt.web, &unified: tt.unified, &root: tt.root} {
			if got := g.Contains(list); got != want {
				t.Errorf("%q in %+v: %v, want %v", tt.text, *g, got, want)
			}
		}
	}
}

func TestUsageOfBothVersions(t *testing.T) {
	v2 := fakeHierarchy(t, true, map[string]map[string]string{
		"/": nil,
		"/pod": {
			"memory.current": "1009\n", "memory.max": "2003\n", "memory.stat": "anon 13\ninactive_file 17\n",
		},
		"/pod/c": {
			"memory.current": "509\n", "memory.max": "max\n", "memory.stat": "anon 7\ninactive_file 9\n",
			"memory.events": "low 0\nhigh 0\nmax 5\noom 3\noom_kill 2\n",
		},
	})
	g, err := FindIn([]Mount{v2}, "/pod/c")
	if err != nil {
		t.Fatal(err)
	}
	u, err := g.Usage()
	if want := (Usage{509, NoLimit, 9, 7}); err != nil || u != want {
		t.Errorf("usage %+v, %v; want %+v", u, err, want)
	}
	if u.Share() != 0 {
		t.Errorf("share %v of no limit, want 0", u.Share())
	}
	limited, u, err := g.Tightest()
	if err != nil || limited.Path != "/pod" || u.WorkingSet() != 992 {
		t.Errorf("tightest is %+v with %+v, %v; want the pod with a working set of 992", limited, u, err)
	}
	if kills, ok, err := g.Kills(); kills != 2 || !ok || err != nil {
		t.Errorf("kills %d, %v, %v; want 2", kills, ok, err)
	}

	v1 := fakeHierarchy(t, false, map[string]map[string]string{
		"/web": {
			"memory.usage_in_bytes": "4001\n", "memory.limit_in_bytes": "9223372036854771712\n",
			"memory.stat":        "inactive_file 1\ntotal_inactive_file 19\ntotal_rss 23\n",
			"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
		},
		"/web/worker": {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4\n"},
		"/old":        {"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},
	})
	g, _ = FindIn([]Mount{v1}, "/web")
	u, err = g.Usage()
	if want := (Usage{4001, NoLimit, 19, 23}); err != nil || u != want {
		t.Errorf("usage %+v, %v; want %+v", u, err, want)
	}
	if kills, ok, err := g.Kills(); kills != 7 || !ok || err != nil {
		t.Errorf("kills %d, %v, %v; want 7 with those below", kills, ok, err)
	}
	old, _ := FindIn([]Mount{v1}, "/old")
	if _, ok, err := old.Kills(); ok || err != nil {
		t.Errorf("a kernel that does not count kills is said to count: %v, %v", ok, err)
	}
}

func TestSharesAreReadAsPercentOrFraction(t *testing.T) {
	got, err := ParseShares("90%, 0.8,80%,100%")
	if err != nil || !cmp.Equal(got, []float64{0.8, 0.9, 1}) {
		t.Errorf("got %v, %v", got, err)
	}
	for _, text := range []string{"", "0", "-5%", "101%", "90", "NaN", "ninety", "90%,"} {
		if got, err := ParseShares(text); err == nil {
			t.Errorf("%q is taken as %v", text, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("4:memory:/a\n0::/b\n")
	f.Add("34 30 0:31 / /sys/fs/cgroup/m\\040x rw shared:15 - cgroup cgroup rw,memory\n")
	f.Fuzz(func(t *testing.T, text string) {
		if list, err := ParseMemberships(strings.NewReader(text)); err == nil {
			MemoryPath(list)
		}
		mounts, _ := ParseMounts(strings.NewReader(text))
		for _, m := range mounts {
			if dir, ok := m.dir(text); ok && hasDotDot(strings.TrimPrefix(dir, m.Dir)) {
				t.Errorf("%q leads out of %q: %q", text, m.Dir, dir)
			}
		}
		flatValue([]byte(text), "oom_kill")
	})
}
