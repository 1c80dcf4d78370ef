package view

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/profile"
)

func location(library, function string) *profile.Location {
	return &profile.Location{Mapping: &profile.Mapping{File: "/lib/" + library, BuildID: "0123"}, Lines: []profile.Line{{Function: function, File: "a.c", Line: 7}}}
}

// snapshot has a function that leaks, with n bytes in use, and one that churns.
func snapshot(leak int64, name string) *profile.Snapshot {
	malloc, run := location("libc.so.6", "malloc"), location("nginx", "run")
	s := &profile.Snapshot{Started: time.Unix(1700000000, 0).UTC(), Taken: time.Unix(1700000020, 0).UTC()}
	stack := &profile.Stack{Kind: profile.KindMalloc, PID: 7, Complete: true, Frames: []*profile.Location{malloc, location("libenc.so", name), run}, AllocObjects: leak, AllocBytes: leak * 1024}
	for i := range int64(10) {
		stack.History = append(stack.History, profile.Point{At: time.Duration(i+1) * 2 * time.Second, AllocObjects: leak * (i + 1) / 10, AllocBytes: leak * (i + 1) / 10 * 1024})
	}
	s.Stacks = []*profile.Stack{
		stack,
		{Kind: profile.KindMalloc, PID: 7, Complete: true, Frames: []*profile.Location{malloc, location("nginx", "ngx_palloc"), run}, AllocObjects: 5003, AllocBytes: 5003 * 64, FreeObjects: 5001, FreeBytes: 5001 * 64},
	}
	s.Processes = []*profile.Process{{PID: 7, Comm: "nginx", Exe: "/lib/nginx", Mappings: []*profile.Mapping{run.Mapping, stack.Frames[1].Mapping}}}
	return s
}

func TestPageIsSafeFromWhatTheTargetIsCalled(t *testing.T) {
	const evil = `</script><script>alert(1)</script><img src=x onerror=alert(1)>`
	s := snapshot(97, evil)
	s.Processes[0].Comm = evil
	var out bytes.Buffer
	if err := WriteHTML(&out, Input{Name: evil, New: s}); err != nil {
		t.Fatal(err)
	}
	page := out.String()
	if strings.Contains(page, "<img") || strings.Count(page, "<script") != 2 || strings.Count(page, "</script>") != 2 {
		t.Error("a name of the target became markup")
	}
	if strings.Contains(page, "{{.") {
		t.Error("a place of the template was left empty")
	}
	for _, outside := range []string{"http://", "https://"} {
		if rest := strings.ReplaceAll(page, "http://www.w3.org/", ""); strings.Contains(rest, outside) {
			t.Errorf("the page names %s", outside)
		}
	}
}

func TestTreeHoldsWhatTheStacksHold(t *testing.T) {
	p := newPage(Input{Name: "new", New: snapshot(97, "session_new")}, false)
	name := func(i int) string { return p.Frames[p.Tree.Frame[i]][0] }
	var got []string
	for i := range p.Tree.Frame {
		parent := "-"
		if p.Tree.Parent[i] >= 0 {
			parent = name(p.Tree.Parent[i])
		}
		got = append(got, name(i)+"<"+parent+" "+itoa(p.Tree.Values[i][3]))
	}
	want := []string{
		"all<- 99456", "malloc<all 99456", "run<malloc 99456", "session_new<run 99328", "ngx_palloc<run 128", "malloc<session_new 99328", "malloc<ngx_palloc 128",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if p.Verdicts[0].Function != "session_new" || p.Verdicts[0].Class != "leaking" || len(p.Verdicts[0].Course) < 10 {
		t.Errorf("verdicts %+v", p.Verdicts)
	}
}

func TestComparisonShowsWhatIsGone(t *testing.T) {
	p := newPage(Input{Name: "new", New: snapshot(1, "session_new"), OldName: "old", Old: snapshot(4099, "session_new"), Per: profile.Per{By: "seconds"}}, false)
	if len(p.Changes) != 1 || p.Changes[0].Function != "session_new" || p.Changes[0].Difference > -4e6 {
		t.Errorf("differences %+v", p.Changes)
	}
	for i, f := range p.Tree.Frame {
		if p.Frames[f][0] == "session_new" && (p.Tree.Old[i][2] != 4099 || p.Tree.Values[i][2] != 1) {
			t.Errorf("session_new had %d blocks and has %d", p.Tree.Old[i][2], p.Tree.Values[i][2])
		}
	}
}

func TestFoldedStacks(t *testing.T) {
	s := snapshot(97, "se;ssion")
	want := []string{"malloc;run;se:ssion;malloc 99328", "malloc;run;ngx_palloc;malloc 128"}
	if diff := cmp.Diff(want, Folded(s, (*profile.Group).InUseBytes)); diff != "" {
		t.Error(diff)
	}
}

func TestOnlyThisMachinesBrowserGetsIn(t *testing.T) {
	s := snapshot(97, "session_new")
	p, err := profile.Encode(s)
	if err != nil {
		t.Fatal(err)
	}
	h := NewHandler(Input{Name: "x", New: s}, p, "4711")
	get := func(path, host, from string) *http.Response {
		r := httptest.NewRequest("GET", path, nil)
		r.Host, r.RemoteAddr = host, from
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w.Result()
	}
	for _, c := range []struct {
		name, path, host, from string
		want                   int
	}{
		{"the browser", h.Path, "127.0.0.1:4711", "127.0.0.1:50000", 200},
		{"by name", h.Path, "localhost:4711", "127.0.0.1:50000", 200},
		{"DNS rebinding", h.Path, "evil.example:4711", "127.0.0.1:50000", 403},
		{"another port", h.Path, "127.0.0.1:80", "127.0.0.1:50000", 403},
		{"an address that is written as a name", h.Path, "127.0.0.1.evil.example:4711", "127.0.0.1:50000", 403},
		{"an empty host", h.Path, "", "127.0.0.1:50000", 403},
		{"pprof's views by DNS rebinding", h.Path + "pprof/top", "evil.example:4711", "127.0.0.1:50000", 403},
		{"no port", h.Path, "127.0.0.1", "127.0.0.1:50000", 403},
		{"from outside", h.Path, "127.0.0.1:4711", "192.0.2.7:50000", 403},
		{"without the secret", "/", "127.0.0.1:4711", "127.0.0.1:50000", 404},
		{"with a wrong secret", "/AAAA/", "127.0.0.1:4711", "127.0.0.1:50000", 404},
		{"pprof's settings", h.Path + "pprof/saveconfig?config=x", "127.0.0.1:4711", "127.0.0.1:50000", 403},
		{"no such view", h.Path + "pprof/nothing", "127.0.0.1:4711", "127.0.0.1:50000", 404},
	} {
		if got := get(c.path, c.host, c.from).StatusCode; got != c.want {
			t.Errorf("%s: status %d, want %d", c.name, got, c.want)
		}
	}
	for _, view := range []string{"flamegraph", "top", "peek?f=.", "source?f=.", "top?si=alloc_objects"} {
		res := get(h.Path+"pprof/"+view, "127.0.0.1:4711", "127.0.0.1:50000")
		body, _ := io.ReadAll(res.Body)
		if res.StatusCode != 200 || !bytes.Contains(body, []byte("session_new")) && view != "source?f=." {
			t.Errorf("pprof's %s: status %d, %d bytes", view, res.StatusCode, len(body))
		}
	}
	r := httptest.NewRequest("GET", h.Path, nil)
	r.Host, r.RemoteAddr = "127.0.0.1:4711", "127.0.0.1:50000"
	r.Header.Set("Accept-Encoding", "gzip")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	unzip, err := gzip.NewReader(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	if page, err := io.ReadAll(unzip); err != nil || !bytes.Contains(page, []byte(`"served":true`)) {
		t.Errorf("packed page: %v, %d bytes", err, len(page))
	}
}

func TestPageOfNothing(t *testing.T) {
	data, err := json.Marshal(newPage(Input{New: &profile.Snapshot{}}, false))
	if err != nil || !json.Valid(data) {
		t.Errorf("%v: %s", err, data)
	}
}
