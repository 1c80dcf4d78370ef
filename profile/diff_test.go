package profile

import (
	"bytes"
	"encoding/json"
	"math"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// service is a simulated run of a server: it leaks leak blocks a request, holds a cache and has requests in flight. Its
// load and length are the caller's; everything else is chance.
func service(seed uint64, d time.Duration, requestsPerSecond float64, leak bool) (*Snapshot, int) {
	m := newMachine(seed)
	var flying, lru, connections []int
	requests := 0
	s := m.run(d, d/20, func() {
		if m.now <= 50*time.Millisecond {
			m.alloc("start", 65536)
		}
		for range m.times(requestsPerSecond) {
			requests++
			m.free("palloc", m.alloc("palloc", 4096))
			flying = append(flying, m.alloc("request", 1024+m.rng.Int64N(4096)))
			id := m.alloc("session_new", 1627)
			if !leak {
				m.free("session_new", id)
			}
			lru = append(lru, m.alloc("cache_put", 509))
			if len(lru) > 800 {
				m.free("cache_put", lru[0])
				lru = lru[1:]
			}
		}
		for len(flying) > m.rng.IntN(int(requestsPerSecond/20)+2) {
			m.free("request", flying[0])
			flying = flying[1:]
		}
		if m.times(3) > 0 { // connections come and go as they like, each with a few blocks
			for range 4 {
				connections = append(connections, m.alloc("connection", 256+m.rng.Int64N(512)))
			}
		}
		for len(connections) > 40+4*m.rng.IntN(10) {
			m.free("connection", connections[0])
			connections = connections[1:]
		}
	})
	library := func(build string) *Mapping {
		return &Mapping{Start: 0x7f2000000000, Limit: 0x7f2000100000, File: "/opt/lib/libenc.so", BuildID: build}
	}
	enc := library("0ld0ld0ld0ld0ld0")
	address := uint64(0x7f2000001111)
	if !leak {
		enc, address = library("beefbeefbeefbeef"), 0x7f2000009999 // the other build has its code elsewhere
	}
	for _, stack := range s.Stacks {
		if l := stack.Frames[1]; l.Lines[0].Function == "session_new" {
			l.Mapping, l.Address = enc, address
		}
	}
	s.Processes = []*Process{{PID: 7, Comm: "nginx", Exe: m.program.File, Mappings: []*Mapping{m.program, m.libc, enc}}}
	return s, requests
}

// sampled draws what a sampling tracer would have seen of an exact snapshot.
func sampled(s *Snapshot, rng *rand.Rand, interval float64) *Snapshot {
	out := *s
	out.SampleBytes, out.Stacks = uint64(interval), nil
	for _, stack := range s.Stacks {
		c := *stack
		if stack.AllocObjects == 0 {
			continue
		}
		size := float64(stack.AllocBytes) / float64(stack.AllocObjects)
		p := 1 - math.Exp(-size/interval)
		draw := func(n int64) int64 {
			mean := float64(n) * p
			taken := mean + math.Sqrt(mean*(1-p))*rng.NormFloat64()
			return int64(math.Round(max(0, math.Round(taken)) / p))
		}
		freed, held := draw(stack.FreeObjects), draw(stack.InUseObjects())
		c.AllocObjects, c.FreeObjects = freed+held, freed
		c.AllocBytes, c.FreeBytes = int64(float64(freed+held)*size), int64(float64(freed)*size)
		c.InUseObjectsVar = float64(held) * (1 - p) / p
		c.InUseBytesVar = c.InUseObjectsVar * size * size
		c.History = nil
		out.Stacks = append(out.Stacks, &c)
	}
	return &out
}

func mustPer(t *testing.T, s string) Per {
	t.Helper()
	p, err := ParsePer(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestTheLeakOfTheOldBuildComesFirst(t *testing.T) {
	old, requests := service(1, 20*time.Second, 500, true)
	new, _ := service(2, 20*time.Second, 500, false)
	for _, per := range []Per{{}, mustPer(t, "seconds"), {By: "count", Old: float64(requests), New: float64(requests)}} {
		d := Compare(old, new, per)
		if len(d.Rows) == 0 || d.Rows[0].Owner.Function != "session_new" || !d.Rows[0].Rebuilt {
			t.Fatalf("per %s: rows %+v", per.By, d.Rows)
		}
		want := -1627 * float64(requests)
		if got := d.Rows[0].Difference; math.Abs(got-want) > 0.05*math.Abs(want) {
			t.Errorf("per %s: difference %.0f, want about %.0f", per.By, got, want)
		}
		if len(d.Rows) > 1 {
			t.Errorf("per %s: also %+v", per.By, d.Rows[1])
		}
		if len(d.Libraries) != 1 || d.Libraries[0].Name != "libenc.so" || d.Libraries[0].Old.BuildID != "0ld0ld0ld0ld0ld0" {
			t.Errorf("libraries %+v", d.Libraries)
		}
	}
	d := Compare(new, old, Per{By: "count", Old: float64(requests), New: float64(requests)})
	if got := d.Rows[0].PerUnit(d.Units(old)); math.Abs(got-1627) > 0.5 {
		t.Errorf("%.2f bytes a request appeared, want 1627", got)
	}
}

// The new build against itself shows nothing, at other load and length too, exact or sampled.
func TestABuildAgainstItselfShowsNoDifference(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 7))
	for _, leak := range []bool{false, true} {
		for seed := range uint64(40) {
			full, _ := service(2*seed, 20*time.Second, 400, leak)
			for _, run := range []struct {
				name     string
				duration time.Duration
				load     float64
			}{{"the same load", 20 * time.Second, 400}, {"half the load", 20 * time.Second, 200}, {"half the time", 10 * time.Second, 400}, {"half of both", 10 * time.Second, 200}} {
				part, _ := service(2*seed+1, run.duration, run.load, leak)
				pairs := map[string][2]*Snapshot{"exact": {full, part}, "exact, other way": {part, full}}
				pairs["sampled"] = [2]*Snapshot{sampled(full, rng, 16384), sampled(part, rng, 16384)}
				for how, pair := range pairs {
					if d := Compare(pair[0], pair[1], Per{}); len(d.Rows) > 0 {
						r := d.Rows[0]
						t.Errorf("leak %v, seed %d, %s, %s: %s %.0f beyond ± %.0f (scale %.3f, old %d, new %d, expected %.0f)",
							leak, seed, run.name, how, r.Owner, r.Difference, r.Noise, d.Scale, r.Old, r.New, r.Expected)
					}
				}
			}
		}
	}
}

func TestASampledLeakIsSeenBeyondItsErrorBar(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 13))
	old, _ := service(1, 20*time.Second, 500, true)
	new, _ := service(2, 20*time.Second, 500, false)
	d := Compare(sampled(old, rng, 65536), sampled(new, rng, 65536), Per{})
	if len(d.Rows) != 1 || d.Rows[0].Owner.Function != "session_new" || d.Rows[0].Noise < 1e5 {
		t.Errorf("rows %+v", d.Rows)
	}
}

func TestALeakThatBecameWorseIsSeenAtHalfTheLoad(t *testing.T) {
	old, requests := service(1, 20*time.Second, 500, true)
	new, fewer := service(3, 20*time.Second, 250, true)
	for _, stack := range new.Stacks {
		if OwnerOf(stack.Frames).Function == "session_new" { // each block is now twice as large
			stack.AllocBytes *= 2
		}
	}
	for _, per := range []Per{{}, {By: "count", Old: float64(requests), New: float64(fewer)}} {
		d := Compare(old, new, per)
		if len(d.Rows) != 1 || math.Abs(d.Rows[0].Difference-1627*float64(fewer)) > 0.1*1627*float64(fewer) {
			t.Errorf("per %s: rows %+v", per.By, d.Rows)
		}
	}
}

func TestPerIsParsedOrRefused(t *testing.T) {
	for text, want := range map[string]Per{
		"": {By: "allocations"}, "allocations": {By: "allocations"}, "seconds": {By: "seconds"}, "5003": {"count", 5003, 5003}, "5003, 2503": {"count", 5003, 2503},
	} {
		if got, err := ParsePer(text); err != nil || got != want {
			t.Errorf("%q is %+v (%v), want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"requests", "0", "-1", "5,", "1,0", "NaN", "Inf", "1,2,3"} {
		if _, err := ParsePer(text); err == nil {
			t.Errorf("%q was taken", text)
		}
	}
}

func TestDiffTextAndJSONAreAsInTheGoldenFiles(t *testing.T) {
	old, _ := service(1, 20*time.Second, 500, true)
	new, _ := service(2, 20*time.Second, 250, false)
	d := Compare(old, new, Per{By: "count", Old: 10007, New: 5003})
	opt := DiffOptions{OldName: "old.pb.gz", NewName: "new.pb.gz", Profile: "diff.pb.gz"}
	var out bytes.Buffer
	if err := WriteDiff(&out, d, old, new, opt); err != nil {
		t.Fatal(err)
	}
	golden(t, "diff.txt", out.Bytes())
	for _, line := range strings.Split(out.String(), "\n") {
		if runes(line) > 100 {
			t.Errorf("%d columns: %s", runes(line), line)
		}
	}
	out.Reset()
	if err := WriteDiffJSON(&out, d, new, opt); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(out.Bytes()) {
		t.Error("not valid JSON")
	}
	golden(t, "diff.json", out.Bytes())

	out.Reset()
	again, _ := service(4, 10*time.Second, 500, false)
	WriteDiff(&out, Compare(new, again, Per{}), new, again, opt)
	for _, want := range []string{"The same libraries in the same builds.", "No difference beyond noise"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

// Our comparison, its profile, and pprof's own -diff_base agree in sign and size.
func TestGoToolPprofSeesTheSameDifference(t *testing.T) {
	dir := t.TempDir()
	old, _ := service(1, 5*time.Second, 500, true)
	new, _ := service(2, 5*time.Second, 500, false)
	write := func(name string, to func(f *os.File) error) string {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := to(f); err != nil {
			t.Fatal(err)
		}
		return f.Name()
	}
	oldFile := write("old.pb.gz", func(f *os.File) error { return Write(f, old) })
	newFile := write("new.pb.gz", func(f *os.File) error { return Write(f, new) })
	diffFile := write("diff.pb.gz", func(f *os.File) error {
		p, err := EncodeDiff(old, new, 1)
		if err != nil {
			return err
		}
		return p.Write(f)
	})
	leakLine := func(args ...string) string {
		cmd := exec.Command("go", append([]string{"tool", "pprof", "-top", "-cum", "-unit=B"}, args...)...)
		cmd.Env = append(os.Environ(), "PPROF_TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for _, line := range strings.Split(string(out), "\n") {
			if strings.HasSuffix(line, " session_new") {
				return strings.Fields(line)[3]
			}
		}
		t.Fatalf("no session_new in\n%s", out)
		return ""
	}
	ours, theirs := leakLine(diffFile), leakLine("-diff_base", oldFile, newFile)
	if ours != theirs || !strings.HasPrefix(ours, "-") {
		t.Errorf("diff.pb.gz says %s, -diff_base %s", ours, theirs)
	}
	if d := Compare(old, new, Per{By: "seconds"}); d.Rows[0].Difference >= 0 {
		t.Errorf("our text says %+.0f", d.Rows[0].Difference)
	}
}

func TestLibrariesAreMatchedByName(t *testing.T) {
	lib := func(file, build string) Library {
		return Library{File: file, Name: file[strings.LastIndex(file, "/")+1:], BuildID: build}
	}
	old := []Library{lib("/lib/libc.so.6", "c1"), lib("/app/libenc.so", "e1"), lib("/app/libz.so.1.2.11", "z1"), lib("/app/liba.so", "a1"), lib("/usr/lib/libssl.so.3", "s1")}
	new := []Library{lib("/lib64/libc.so.6", "c1"), lib("/srv/libenc.so", "e2"), lib("/app/libz.so.1.3", "z2"), lib("/app/libb.so", "b1"), lib("/usr/lib/libssl.so.3", "s1"), lib("/copy/libssl.so.3", "s1")}
	var got []string
	for _, c := range DiffLibraries(old, new) {
		switch {
		case c.Old == nil:
			got = append(got, "only new "+c.New.Name)
		case c.New == nil:
			got = append(got, "only old "+c.Old.Name)
		default:
			got = append(got, c.Old.Name+" "+c.Old.BuildID+"->"+c.New.BuildID)
		}
	}
	if want := "libenc.so e1->e2; libz.so.1.2.11 z1->z2; only old liba.so; only new libb.so"; strings.Join(got, "; ") != want {
		t.Errorf("got %s, want %s", strings.Join(got, "; "), want)
	}
	if changes := DiffLibraries(old, old); len(changes) > 0 {
		t.Errorf("an inventory differs from itself: %+v", changes)
	}
}

func TestInventoryHasEachBuildOnce(t *testing.T) {
	libs := Libraries(exampleSnapshot())
	var names []string
	for _, l := range libs {
		names = append(names, l.Name)
	}
	if got := strings.Join(names, " "); got != "nginx libc.so.6 libenc.so" {
		t.Errorf("inventory %s", got)
	}
	if l := libs[2]; !l.Replaced || l.BuildID != "8f3a2b1c9d" || len(l.PIDs) != 2 || l.Version != "libenc 1.0.3" {
		t.Errorf("libenc.so is %+v", l)
	}
	var out bytes.Buffer
	if err := WriteLibraries(&out, libs, 0, false); err != nil {
		t.Fatal(err)
	}
	golden(t, "libs.txt", out.Bytes())
}
