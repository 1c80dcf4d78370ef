package profile

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	pprof "github.com/google/pprof/profile"
	"pgregory.net/rapid"
)

var sameSnapshot = cmp.Options{cmpopts.EquateEmpty()}

func roundTrip(t testing.TB, s *Snapshot) *Snapshot {
	t.Helper()
	var file bytes.Buffer
	if err := Write(&file, s); err != nil {
		t.Fatal(err)
	}
	got, err := Read(&file)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestEverythingComesBackFromAProfile(t *testing.T) {
	want := exampleSnapshot()
	got := roundTrip(t, want)
	if diff := cmp.Diff(want, got, sameSnapshot); diff != "" {
		t.Error(diff)
	}
	if got.Stacks[0].Frames[0].Mapping != got.Processes[0].Mappings[2] {
		t.Error("a frame's mapping is no longer the one of the process's inventory")
	}
	if got.Stacks[0].Frames[0] != got.Stacks[1].Frames[0] {
		t.Error("a shared location was copied")
	}
}

func TestAnySnapshotComesBackFromAProfile(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		want := drawSnapshot(r)
		var file bytes.Buffer
		if err := Write(&file, want); err != nil {
			r.Fatal(err)
		}
		got, err := Read(&file)
		if err != nil {
			r.Fatal(err)
		}
		if diff := cmp.Diff(want, got, sameSnapshot); diff != "" {
			r.Fatal(diff)
		}
	})
}

func drawSnapshot(r *rapid.T) *Snapshot {
	text := rapid.StringN(0, 12, -1)
	count := rapid.Int64Range(0, 1<<40)
	moment := rapid.Custom(func(r *rapid.T) time.Time {
		return time.Unix(rapid.Int64Range(0, 1<<33).Draw(r, "s"), rapid.Int64Range(0, 1e9-1).Draw(r, "ns")).UTC()
	})
	span := rapid.Custom(func(r *rapid.T) time.Duration { return time.Duration(rapid.Int64().Draw(r, "span")) })
	mapping := rapid.Custom(func(r *rapid.T) *Mapping {
		return &Mapping{
			rapid.Uint64().Draw(r, "start"), rapid.Uint64().Draw(r, "limit"), rapid.Uint64().Draw(r, "offset"), text.Draw(r, "file"),
			text.Draw(r, "build"), rapid.Bool().Draw(r, "replaced"), count.Draw(r, "size"), moment.Draw(r, "mtime"), text.Draw(r, "version"),
		}
	})
	line := rapid.Custom(func(r *rapid.T) Line {
		return Line{text.Draw(r, "f"), text.Draw(r, "sys"), text.Draw(r, "file"), rapid.IntRange(0, 99999).Draw(r, "line"), rapid.IntRange(0, 99999).Draw(r, "start")}
	})
	point := rapid.Custom(func(r *rapid.T) Point {
		return Point{span.Draw(r, "at"), count.Draw(r, "ao"), count.Draw(r, "ab"), count.Draw(r, "fo"), count.Draw(r, "fb")}
	})
	block := rapid.Custom(func(r *rapid.T) Block {
		weight := rapid.OneOf(rapid.Just(1.0), rapid.Float64Range(1, 1e6)).Draw(r, "weight")
		return Block{rapid.Uint64().Draw(r, "at"), rapid.Uint64Max(1<<62).Draw(r, "block size"), weight}
	})
	counter := rapid.SliceOfN(rapid.Custom(func(r *rapid.T) Counter {
		return Counter{text.Draw(r, "name"), rapid.Uint64().Draw(r, "count"), text.Draw(r, "meaning")}
	}), 0, 3)

	s := &Snapshot{Command: text.Draw(r, "command"), SampleBytes: uint64(count.Draw(r, "R")), LossStated: rapid.Bool().Draw(r, "stated")}
	s.HasBlocks = rapid.Bool().Draw(r, "with blocks")
	s.Started = moment.Draw(r, "started")
	s.Taken = s.Started.Add(time.Duration(count.Draw(r, "duration")))
	s.Losses, s.Unwind = counter.Draw(r, "losses"), counter.Draw(r, "unwind")
	s.Notes = rapid.SliceOfN(rapid.String(), 0, 3).Draw(r, "notes")
	mappings := []*Mapping{{Start: 4096, File: "in no inventory", BuildID: text.Draw(r, "build")}}
	for range rapid.IntRange(0, 3).Draw(r, "processes") {
		s.Processes = append(s.Processes, &Process{
			rapid.IntRange(0, 4).Draw(r, "pid"), text.Draw(r, "comm"), text.Draw(r, "exe"), text.Draw(r, "container"),
			moment.Draw(r, "born"), rapid.Bool().Draw(r, "exited"), text.Draw(r, "exit"), rapid.SliceOfN(mapping, 0, 3).Draw(r, "its mappings"),
		})
	}
	for _, p := range s.Processes {
		mappings = append(mappings, p.Mappings...)
	}
	var locations []*Location
	for range rapid.IntRange(1, 5).Draw(r, "locations") {
		l := &Location{Address: rapid.Uint64().Draw(r, "address"), Lines: rapid.SliceOfN(line, 0, 3).Draw(r, "lines"), Mark: text.Draw(r, "mark")}
		if rapid.Bool().Draw(r, "mapped") {
			l.Mapping = rapid.SampledFrom(mappings).Draw(r, "mapping")
		}
		locations = append(locations, l)
	}
	for range rapid.IntRange(0, 5).Draw(r, "stacks") {
		stack := &Stack{
			Kind: Kind(text.Draw(r, "kind")), PID: rapid.IntRange(0, 4).Draw(r, "pid"), Label: text.Draw(r, "label"),
			Frames: rapid.SliceOfN(rapid.SampledFrom(locations), 0, 4).Draw(r, "frames"), Complete: rapid.Bool().Draw(r, "complete"),
			AllocObjects: 1 + count.Draw(r, "ao"), AllocBytes: count.Draw(r, "ab"), FreeObjects: count.Draw(r, "fo"), FreeBytes: count.Draw(r, "fb"),
			InUseObjectsVar: rapid.Float64Range(0, 1e30).Draw(r, "vo"), InUseBytesVar: rapid.Float64Range(0, 1e30).Draw(r, "vb"),
			History: rapid.SliceOfN(point, 0, 4).Draw(r, "history"),
		}
		if rapid.Bool().Draw(r, "aged") {
			stack.Ages = &Ages{span.Draw(r, "min"), span.Draw(r, "median"), span.Draw(r, "max"), count.Draw(r, "old")}
		}
		if rapid.Bool().Draw(r, "looked into") {
			stack.Content = []Content{{text.Draw(r, "shape"), count.Draw(r, "blocks"), count.Draw(r, "bytes"), []string{text.Draw(r, "sample")}}}
		}
		if s.HasBlocks {
			stack.Blocks = rapid.SliceOfN(block, 0, 4).Draw(r, "blocks")
		}
		s.Stacks = append(s.Stacks, stack)
	}
	if rapid.Bool().Draw(r, "rss") {
		s.RSS = &RSSChange{Before: map[string]uint64{text.Draw(r, "range"): rapid.Uint64().Draw(r, "before")}}
		if rapid.Bool().Draw(r, "free known") {
			free := rapid.Int64().Draw(r, "free")
			s.RSS.AllocatorFree = &free
		}
	}
	if rapid.Bool().Draw(r, "measured") {
		s.Overhead = &Overhead{Hits: rapid.Uint64().Draw(r, "hits"), CostPerHit: span.Draw(r, "cost"), CPUFraction: rapid.Float64Range(0, 9).Draw(r, "cpu"), TargetCPU: span.Draw(r, "tcpu")}
	}
	return s
}

func TestSamplesFollowTheGoHeapConvention(t *testing.T) {
	p, err := Encode(exampleSnapshot())
	if err != nil {
		t.Fatal(err)
	}
	var types []string
	for _, v := range p.SampleType {
		types = append(types, v.Type+"/"+v.Unit)
	}
	if got, want := strings.Join(types, " "), "alloc_objects/count alloc_space/bytes inuse_objects/count inuse_space/bytes"; got != want {
		t.Errorf("sample types %s, want %s", got, want)
	}
	if p.DefaultSampleType != "inuse_space" || p.PeriodType.Type != "space" || p.PeriodType.Unit != "bytes" || p.Period != 524288 {
		t.Errorf("default %s, period %d %+v", p.DefaultSampleType, p.Period, p.PeriodType)
	}
	if diff := cmp.Diff([]int64{50021, 50021 * 4099, 17, 17 * 4099}, p.Sample[1].Value); diff != "" {
		t.Error(diff)
	}
	if p.Mapping[0].File != "/usr/sbin/nginx" || p.Mapping[0].BuildID != "aa11bb22cc33" {
		t.Errorf("the program is not the first mapping: %+v", p.Mapping[0])
	}
	var libenc *pprof.Mapping
	for _, m := range p.Mapping {
		if m.BuildID == "8f3a2b1c9d" {
			libenc = m
			break
		}
	}
	if !libenc.HasFunctions || !libenc.HasFilenames || !libenc.HasLineNumbers || !libenc.HasInlineFrames {
		t.Errorf("symbol flags of %+v are not all set", libenc)
	}
	if m := p.Mapping[0]; !m.HasFunctions || m.HasFilenames || m.HasLineNumbers || m.HasInlineFrames {
		t.Errorf("symbol flags of %+v promise more than names", m)
	}
}

func TestLabelsTellOnlyWhatDiffers(t *testing.T) {
	several := exampleSnapshot()
	labels := func(s *Snapshot) map[string][]string {
		p, err := Encode(s)
		if err != nil {
			t.Fatal(err)
		}
		return p.Sample[0].Label
	}
	if diff := cmp.Diff(map[string][]string{"kind": {"malloc"}, "pid": {"942"}}, labels(several)); diff != "" {
		t.Errorf("two processes of one container: %s", diff)
	}
	several.Processes[1].Comm, several.Processes[1].Container = "worker", "77c0de"
	if diff := cmp.Diff(map[string][]string{"kind": {"malloc"}, "pid": {"942"}, "comm": {"nginx"}, "container": {"3f2a77"}}, labels(several)); diff != "" {
		t.Errorf("two programs in two containers: %s", diff)
	}
	several.Processes = several.Processes[:1]
	if diff := cmp.Diff(map[string][]string{"kind": {"malloc"}}, labels(several)); diff != "" {
		t.Errorf("one process: %s", diff)
	}
}

func TestStacksThatDidNothingAreDropped(t *testing.T) {
	s := exampleSnapshot()
	s.Stacks = append(s.Stacks, &Stack{Kind: KindMalloc, PID: 942, Frames: s.Stacks[0].Frames})
	if got := len(roundTrip(t, s).Stacks); got != 4 {
		t.Errorf("%d stacks came back, want 4", got)
	}
}

func TestWindowsComeBack(t *testing.T) {
	s := exampleSnapshot()
	if roundTrip(t, s).PartlyFollowed() {
		t.Error("a trace with its probes in all the time is said to have seen a part")
	}
	s.Windows = &Windows{17, 2300 * time.Millisecond, 59 * time.Second}
	got := roundTrip(t, s)
	if got.Windows == nil || *got.Windows != *s.Windows {
		t.Errorf("%+v came back, want %+v", got.Windows, s.Windows)
	}
}

func TestABrokenFigureDoesNotCostTheProfile(t *testing.T) {
	s := exampleSnapshot()
	s.Stacks[0].InUseBytesVar, s.Overhead.CPUFraction = math.NaN(), math.Inf(1)
	s.Processes[0].Comm = "ng\xffinx"
	got := roundTrip(t, s)
	if got.Stacks[0].InUseBytesVar != 0 || got.Processes[0].Comm != "ng\uFFFDinx" {
		t.Errorf("variance %v, comm %q", got.Stacks[0].InUseBytesVar, got.Processes[0].Comm)
	}
}

func TestAFilteredProfileKeepsWhatIsStillTrue(t *testing.T) {
	p, err := Encode(exampleSnapshot())
	if err != nil {
		t.Fatal(err)
	}
	p.Sample = p.Sample[1:]
	got, err := Decode(p.Compact())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Processes) != 2 || len(got.Processes[0].Mappings) != 3 || got.SampleBytes != 524288 {
		t.Errorf("inventory or interval lost: %d processes, R %d", len(got.Processes), got.SampleBytes)
	}
	first := got.Stacks[0]
	if first.History != nil || first.Ages != nil {
		t.Error("a stack got the history of another one")
	}
	if first.PID != 942 || first.InUseObjects() != 17 || got.Stacks[1].PID != 947 {
		t.Errorf("pids %d, %d; %d blocks in use", first.PID, got.Stacks[1].PID, first.InUseObjects())
	}
	if cut := got.Stacks[1]; cut.Complete || cut.Frames[2].Mark != "[truncated: no unwind table for libenc.so]" {
		t.Errorf("a cut stack is complete: %v, %+v", cut.Complete, cut.Frames[2])
	}
}

func TestMergedProfilesKeepBothInventories(t *testing.T) {
	one, other := exampleSnapshot(), exampleSnapshot()
	other.Processes[0].Mappings[1].BuildID = "0123456789"
	a, _ := Encode(one)
	b, _ := Encode(other)
	merged, err := pprof.Merge([]*pprof.Profile{a, b})
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(merged)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Processes) != 4 || !got.LossStated {
		t.Errorf("%d processes in the merged inventory, loss stated %v", len(got.Processes), got.LossStated)
	}
}

func TestProfilesOfOtherToolsAreRead(t *testing.T) {
	f := &pprof.Function{ID: 1, Name: "main.leak", SystemName: "main.leak", Filename: "main.go"}
	m := &pprof.Mapping{ID: 1, Start: 0x1000, Limit: 0x2000, File: "/srv/app", BuildID: "c0ffee"}
	l := &pprof.Location{ID: 1, Address: 0x1234, Mapping: m, Line: []pprof.Line{{Function: f, Line: 7}}}
	jemalloc := &pprof.Profile{
		SampleType: []*pprof.ValueType{{Type: "objects", Unit: "count"}, {Type: "space", Unit: "bytes"}},
		Sample:     []*pprof.Sample{{Value: []int64{3, 4097}, Location: []*pprof.Location{l}}},
		Location:   []*pprof.Location{l}, Function: []*pprof.Function{f}, Mapping: []*pprof.Mapping{m},
	}
	got, err := Decode(jemalloc)
	if err != nil {
		t.Fatal(err)
	}
	s := got.Stacks[0]
	if s.Kind != KindMalloc || s.InUseBytes() != 4097 || s.AllocObjects != 3 || !s.Complete {
		t.Errorf("decoded as %+v", s)
	}
	if p := got.Processes[0]; p.Comm != "app" || p.Mappings[0].BuildID != "c0ffee" || p.Mappings[0] != s.Frames[0].Mapping {
		t.Errorf("process %+v", p)
	}

	cpu := &pprof.Profile{SampleType: []*pprof.ValueType{{Type: "cpu", Unit: "nanoseconds"}}}
	if _, err := Decode(cpu); err == nil || !strings.Contains(err.Error(), "cpu/nanoseconds") {
		t.Errorf("a CPU profile was taken: %v", err)
	}
}

func TestWhatIsNoProfileIsRefused(t *testing.T) {
	var bomb bytes.Buffer
	zip := gzip.NewWriter(&bomb)
	zip.Write(make([]byte, 1<<20))
	zip.Close()
	p, _ := Encode(exampleSnapshot())
	p.Comments[len(p.Comments)-1] = recordPrefix + "{"
	var broken bytes.Buffer
	p.Write(&broken)
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"text":            {[]byte("no profile at all"), "parse profile"},
		"nothing":         {nil, "parse profile"},
		"a cut gzip file": {[]byte{0x1f, 0x8b, 8}, "unpack profile"},
		"a broken record": {broken.Bytes(), "record"},
	} {
		if _, err := Read(bytes.NewReader(c.data)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want %q in it", name, err, c.want)
		}
	}
	if _, err := parse(&bomb, 1<<16); err == nil || !strings.Contains(err.Error(), "larger than 64 KiB") {
		t.Errorf("a file that unpacks to more than the limit: %v", err)
	}
}

// The checks of `go tool pprof` on a machine that has neither the process nor its files.
func TestGoToolPprofOpensTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "nginx.pb.gz")
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := Write(out, exampleSnapshot()); err != nil {
		t.Fatal(err)
	}
	out.Close()
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"-top"}, []string{"File: nginx", "Build ID: aa11bb22cc33", "Type: inuse_space", "Lost: 23 live_map_full", "malloc"}},
		{[]string{"-top", "-sample_index=alloc_space"}, []string{"Type: alloc_space", "ngx_palloc_large"}},
		{[]string{"-peek", "session_new"}, []string{"session_new", "[LuaJIT]"}},
		{[]string{"-raw"}, []string{"[truncated: no unwind table for libenc.so]", "8f3a2b1c9d", "kind:[malloc]", "[FN][FL][LN][IN]"}},
		{[]string{"-comments"}, []string{"Command: allocsnoop --pid 942", "# probe malloc+0x4"}},
		{[]string{"-traces", "-tagfocus=pid=^947$"}, []string{"[truncated: no unwind table", "pid:  947"}},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			cmd := exec.Command("go", append(append([]string{"tool", "pprof"}, c.args...), file)...)
			cmd.Env = append(os.Environ(), "PPROF_TMPDIR="+t.TempDir())
			text, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, text)
			}
			for _, want := range c.want {
				if !strings.Contains(string(text), want) {
					t.Errorf("no %q in\n%.3000s", want, text)
				}
			}
			if c.args[0] != "-comments" && c.args[0] != "-raw" && strings.Contains(string(text), recordPrefix) {
				t.Error("the machine-readable record stands above the report")
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	var file bytes.Buffer
	p, _ := Encode(exampleSnapshot())
	p.WriteUncompressed(&file)
	f.Add(file.Bytes())
	f.Add([]byte("heap profile:   1:  2 [  3:  4] @ heap/8\n 1: 2 [3: 4] @ 0x1\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parse(bytes.NewReader(data), 1<<20)
		if err != nil {
			return
		}
		s, err := Decode(p)
		if err != nil {
			return
		}
		if _, err := Encode(s); err != nil {
			t.Errorf("decoded but does not encode: %v", err)
		}
	})
}

func BenchmarkWriteAndRead100kStacks(b *testing.B) {
	s := bigSnapshot(100_000, 12)
	for b.Loop() {
		roundTrip(b, s)
	}
}

// bigSnapshot has n different stacks of 20 frames over 5,000 functions, each with a history.
func bigSnapshot(n, points int) *Snapshot {
	s := exampleSnapshot()
	s.Stacks = nil
	mappings := s.Processes[0].Mappings
	var locations []*Location
	for i := range 5000 {
		name := fmt.Sprintf("function_%d", i)
		locations = append(locations, &Location{Address: uint64(0x400000 + 64*i), Mapping: mappings[i%3], Lines: []Line{{name, name, "big.c", i, i}}})
	}
	for i := range n {
		stack := &Stack{Kind: KindMalloc, PID: 942, Complete: true, AllocObjects: int64(10 + i%97), Ages: &Ages{1, 2, 3, 4}}
		stack.AllocBytes = stack.AllocObjects * int64(16+i%4093)
		stack.FreeObjects = stack.AllocObjects * int64(i%11) / 11
		stack.FreeBytes = stack.FreeObjects * int64(16+i%4093)
		for depth := range 20 {
			stack.Frames = append(stack.Frames, locations[(i>>(20-depth)*31+depth*257+i*depth/19)%5000])
		}
		for k := range int64(points) {
			part := func(v int64) int64 { return v * (k + 1) / int64(points) }
			stack.History = append(stack.History, Point{
				time.Duration(k+1) * time.Minute / time.Duration(points),
				part(stack.AllocObjects), part(stack.AllocBytes), part(stack.FreeObjects), part(stack.FreeBytes),
			})
		}
		s.Stacks = append(s.Stacks, stack)
	}
	return s
}
