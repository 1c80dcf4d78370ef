package profile

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares with testdata/name and names the first difference.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := "testdata/" + name
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs (go test -update writes it anew):\n%s", file, diff)
	}
}

func summaryOf(t *testing.T, s *Snapshot, opt SummaryOptions) string {
	t.Helper()
	var b bytes.Buffer
	if err := WriteSummary(&b, s, opt); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestSummaryLooksAsInTheGoldenFile(t *testing.T) {
	golden(t, "summary.txt", []byte(summaryOf(t, exampleSnapshot(), SummaryOptions{Profile: "allocsnoop-nginx-942-20261124T093000Z.pb.gz"})))
}

func TestSummaryNeverExceedsItsWidth(t *testing.T) {
	s := exampleSnapshot()
	long := strings.Repeat("std::very_long_name<", 30)
	s.Stacks[0].Frames[1].Lines[0].Function = long
	s.Processes[0].Comm = long
	s.Losses[0].Meaning = strings.Repeat("word ", 60) + strings.Repeat("x", 150)
	s.Processes[0].Mappings[1].File = "/opt/" + long
	for _, width := range []int{0, 60, 79, 137} {
		for _, line := range strings.Split(summaryOf(t, s, SummaryOptions{Width: width, Notes: []string{long}}), "\n") {
			if limit := max(width, 60); width != 0 && runes(line) > limit || width == 0 && runes(line) > 100 {
				t.Errorf("width %d: %d columns: %s", width, runes(line), line)
			}
		}
	}
}

func TestColourIsOnlyThereWhenAskedFor(t *testing.T) {
	s := exampleSnapshot()
	s.Processes[0].Comm = "ng\x1b[31minx" // a process chooses its own name
	grey, colored := summaryOf(t, s, SummaryOptions{}), summaryOf(t, s, SummaryOptions{Color: true})
	if strings.Contains(grey, "\x1b") {
		t.Error("an escape sequence in an uncoloured summary")
	}
	if !strings.Contains(colored, "\x1b[1;31mlost:") || strings.Contains(colored, "\x1b[31minx") {
		t.Error("no colour where asked for, or the target's own")
	}
	plainAgain := colored
	for _, s := range []style{bold, dim, red, yellow, green, cyan, "\x1b[0m"} {
		plainAgain = strings.ReplaceAll(plainAgain, string(s), "")
	}
	if diff := cmp.Diff(grey, plainAgain); diff != "" {
		t.Errorf("colour changes the text: %s", diff)
	}
}

func TestSummaryOfNothingSaysSo(t *testing.T) {
	got := summaryOf(t, &Snapshot{Probes: []Probe{{Function: "malloc", File: "/lib/libc.so.6"}}}, SummaryOptions{})
	for _, want := range []string{"Nothing was allocated.", "No probe was hit"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

func TestSmallThingsReadWell(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{count(0), "0"}, {count(999), "999"}, {count(1000), "1,000"}, {count(-1234567), "-1,234,567"},
		{percent(0, 0), "-"}, {percent(1, 100000), "<0.1 %"}, {percent(99999, 100000), ">99.9 %"}, {percent(100, 100), "100 %"}, {percent(1, 3), "33.3 %"},
		{metric(212003), "212k"}, {metric(7), "7"}, {metric(1.5), "1.5"}, {metric(2.1e6), "2.1M"}, {metric(5e12), "5000G"},
		{CompleteText(0.99999), "99.99 %"}, {CompleteText(1), "100 %"},
		{perSecond(100, 0), "-"}, {perSecond(4096, 2*time.Second), "2 KiB/s"},
		{pad("abcdef", 4), "abc…"}, {pad("ab", 4), "ab  "}, {pad("ab", 0), ""},
		{shellQuote("a-b.pb.gz"), "a-b.pb.gz"}, {shellQuote("it's"), `'it'\''s'`}, {shellQuote(""), "''"},
		{formatSpan(90 * time.Second), "1m30s"}, {formatSpan(1234 * time.Millisecond), "1.2s"}, {formatSpan(1234 * time.Microsecond), "1ms"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestWritersErrorsComeBack(t *testing.T) {
	if err := WriteSummary(brokenPipe{}, exampleSnapshot(), SummaryOptions{}); err == nil {
		t.Error("the summary went nowhere without an error")
	}
	if err := WriteJSON(brokenPipe{}, exampleSnapshot(), ""); err == nil {
		t.Error("the JSON document went nowhere without an error")
	}
	if err := Write(brokenPipe{}, exampleSnapshot()); err == nil {
		t.Error("the profile went nowhere without an error")
	}
}

func TestJSONSummaryIsAsInTheGoldenFile(t *testing.T) {
	var b bytes.Buffer
	if err := WriteJSON(&b, exampleSnapshot(), "nginx.pb.gz"); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(b.Bytes()) || bytes.Contains(b.Bytes(), []byte("null")) {
		t.Error("not valid, or a null where a list ought to be")
	}
	golden(t, "summary.json", b.Bytes())
}

func TestEveryJSONFieldIsDocumented(t *testing.T) {
	doc, err := os.ReadFile("../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	old, _ := service(1, 5*time.Second, 500, true)
	new, _ := service(2, 5*time.Second, 500, false)
	d := Compare(old, new, Per{By: "seconds"})
	b.WriteByte('[')
	check(WriteJSON(&b, exampleSnapshot(), "nginx.pb.gz"))
	b.WriteByte(',')
	check(WriteDiffJSON(&b, d, new, DiffOptions{}))
	b.WriteByte(',')
	check(WriteLibrariesJSON(&b, Libraries(old)))
	b.WriteByte(',')
	check(WriteLibraryChangesJSON(&b, d.Libraries))
	b.WriteByte(']')
	var tree any
	check(json.Unmarshal(b.Bytes(), &tree))
	var walk func(any)
	walk = func(node any) {
		switch v := node.(type) {
		case []any:
			for _, e := range v {
				walk(e)
			}
		case map[string]any:
			for name, e := range v {
				if !strings.ContainsAny(name, " ") && !bytes.Contains(doc, []byte("`"+name+"`")) {
					t.Errorf("docs/json.md says nothing about `%s`", name)
				}
				if name != strings.ToLower(name) {
					t.Errorf("field %s is not in snake case", name)
				}
				walk(e)
			}
		}
	}
	walk(tree)
}

func TestSecondsAreExact(t *testing.T) {
	for _, d := range []time.Duration{0, 1, -1, 1e9, -1500 * time.Millisecond, 1<<63 - 1, -1 << 63, 810} {
		data, err := json.Marshal(seconds(d))
		if err != nil {
			t.Fatal(err)
		}
		var back seconds
		if err := json.Unmarshal(data, &back); err != nil || back != seconds(d) {
			t.Errorf("%d came back from %s as %d (%v)", d, data, back, err)
		}
	}
	for text, want := range map[string]time.Duration{"1.5e3": 1500 * time.Second, "0.1234567891234": 123456789} {
		var got seconds
		if err := json.Unmarshal([]byte(text), &got); err != nil || got != seconds(want) {
			t.Errorf("%s is %d (%v), want %d", text, got, err, want)
		}
	}
	for _, text := range []string{`"x"`, "1e300", "99999999999999999999"} {
		if err := json.Unmarshal([]byte(text), new(seconds)); err == nil {
			t.Errorf("%s was taken", text)
		}
	}
}

func TestManyProcessesThatEndedAreSummedUp(t *testing.T) {
	s := &Snapshot{Started: time.Unix(0, 0), Taken: time.Unix(7, 0)}
	for pid := range 101 {
		end := "exited with status 0"
		if pid == 53 {
			end = "was killed by signal 9 (killed)"
		}
		s.Processes = append(s.Processes, &Process{PID: pid + 1, Comm: "worker", Exited: true, Exit: end})
		s.Events = append(s.Events, Event{Text: fmt.Sprintf("event %d", pid)})
	}
	var out strings.Builder
	if err := WriteSummary(&out, s, SummaryOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"worker (pid 54) ended: was killed by signal 9 (killed)\n", "100 processes ended: exited with status 0\n",
		"event 7\n", "... 85 more, which the profile and --json name\n", "event 93\n", "event 100\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the summary lacks %q\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "event 8\n") || strings.Contains(out.String(), "event 92\n") {
		t.Errorf("the summary names all events\n%s", out.String())
	}
}

// The interval holds the truth as often as it says with many samples and with few: counted over all outcomes of the
// sampling, each block being taken by itself.
func TestErrorBarHoldsTheTruthWithFewSamplesToo(t *testing.T) {
	for _, tt := range []struct {
		blocks int
		p      float64
	}{{100, 0.07}, {200, 0.07}, {300, 0.07}, {1009, 0.0722}, {4000, 0.07}, {20011, 0.015}, {503, 0.5}} {
		const size = 997
		covered := 0.0
		for k := range tt.blocks + 1 {
			n, x := float64(tt.blocks), float64(k)
			estimate, variance := x*size/tt.p, x*size*size*(1-tt.p)/(tt.p*tt.p)
			if math.Abs(estimate-n*size) > float64(ErrorBar(int64(estimate), variance)) {
				continue
			}
			all, _ := math.Lgamma(n + 1)
			taken, _ := math.Lgamma(x + 1)
			left, _ := math.Lgamma(n - x + 1)
			covered += math.Exp(all - taken - left + x*math.Log(tt.p) + (n-x)*math.Log1p(-tt.p))
		}
		if covered < 0.95 || covered > 0.98 {
			t.Errorf("%d blocks taken with %v: the interval holds the truth in %.2f %% of the cases, want 95 to 98", tt.blocks, tt.p, 100*covered)
		}
	}
	if got := ErrorBar(1<<40, 0); got != 0 {
		t.Errorf("an exact figure has an error of %d", got)
	}
}
