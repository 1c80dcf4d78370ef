package scenario

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func start(t *testing.T, o Options) *Service {
	t.Helper()
	s, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func load(t *testing.T, s *Service, l Load) Report {
	t.Helper()
	report, err := s.Run(t.Context(), l)
	if err != nil {
		t.Fatalf("%v, report %+v", err, report)
	}
	return report
}

// total adds up what all workers counted.
func total(t *testing.T, s *Service, pids []int) Stats {
	t.Helper()
	var sum Stats
	for _, pid := range pids {
		stats, err := s.Stats(pid)
		if err != nil {
			t.Fatal(err)
		}
		sum.Blocks += stats.Blocks
		sum.Bytes += stats.Bytes
		sum.MadeBlocks += stats.MadeBlocks
		sum.MadeBytes += stats.MadeBytes
	}
	return sum
}

// recordBytes is the size of the block that one session needs: the document of session.lua, a header and a zero.
func recordBytes(uid int) int64 {
	head := fmt.Sprintf(`{"uid":%d,"token":"%08x%08x","scope":"read write","payload":""}`, uid, uint32(uid*2654435761), uid)
	return int64(len(head) + 230 + uid*7919%3700 + 16 + 1)
}

func TestOldBuildKeepsEverySessionRecord(t *testing.T) {
	s := start(t, Options{Build: Old})
	workers := s.Workers()
	if len(workers) != 2 {
		t.Fatalf("workers are %v, want two", workers)
	}
	report := load(t, s, Load{Requests: 997, Concurrency: 16})
	if report.Requests != 997 || report.Errors != 0 {
		t.Errorf("report is %+v, want 997 requests", report)
	}
	if report.P50 <= 0 || report.P99 < report.P50 {
		t.Errorf("percentiles are %v and %v", report.P50, report.P99)
	}
	want := Stats{Blocks: 997, MadeBlocks: 997}
	for uid := range 997 {
		want.Bytes += recordBytes(uid)
	}
	want.MadeBytes = want.Bytes
	if got := total(t, s, workers); got != want {
		t.Errorf("the library counted %+v, want %+v", got, want)
	}
	for _, pid := range workers {
		if stats, _ := s.Stats(pid); stats.Blocks == 0 {
			t.Errorf("worker %d got no request", pid)
		}
	}
}

func TestNewBuildFreesEverySessionRecord(t *testing.T) {
	s := start(t, Options{Build: New, Workers: 1})
	load(t, s, Load{Requests: 499, Concurrency: 4})
	got := total(t, s, s.Workers())
	if got.Blocks != 0 || got.Bytes != 0 || got.MadeBlocks != 499 {
		t.Errorf("the library counted %+v, want 499 made and none left", got)
	}
}

func TestStatsOverHTTPAgreeWithTheLedgerFile(t *testing.T) {
	s := start(t, Options{Workers: 1})
	load(t, s, Load{Requests: 211, Concurrency: 2})
	web, err := s.WorkerStats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	file, err := s.Stats(s.Workers()[0])
	if err != nil {
		t.Fatal(err)
	}
	if web.PID != s.Workers()[0] || web.Blocks != file.Blocks || web.Bytes != file.Bytes || web.Blocks != 211 {
		t.Errorf("over HTTP %+v, in the file %+v", web, file)
	}
	if web.Version != "libencrypt 1.4.2" {
		t.Errorf("version is %q", web.Version)
	}
	if web.Traces == 0 {
		t.Error("LuaJIT compiled nothing: the library was never called from compiled code")
	}
}

func TestTLSAndGzip(t *testing.T) {
	s := start(t, Options{TLS: true, Gzip: true})
	if !strings.HasPrefix(s.URL, "https://") {
		t.Errorf("URL is %s", s.URL)
	}
	load(t, s, Load{Requests: 101, Concurrency: 2})
	if got := total(t, s, s.Workers()); got.Blocks != 101 {
		t.Errorf("the library counted %+v, want 101 blocks", got)
	}
	again, err := Open(s.Dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &client{addr: again.addr(), roots: again.roots}
	defer c.close()
	body, err := c.get(t.Context(), "/text")
	if err != nil {
		t.Fatal(err)
	}
	unzipped, err := gzip.NewReader(bytes.NewReader(body))
	if err != nil {
		t.Fatalf("the text is not compressed: %v", err)
	}
	text, err := io.ReadAll(unzipped)
	if err != nil {
		t.Fatal(err)
	}
	if lines := bytes.Count(text, []byte("\n")); lines != 40 {
		t.Errorf("the text has %d lines, want 40", lines)
	}
}

func TestLoadReportsFailedRequests(t *testing.T) {
	s := start(t, Options{Workers: 1})
	report, err := s.Run(t.Context(), Load{Requests: 7, Path: "/missing"})
	if err == nil || report.Errors != 7 || report.Requests != 0 {
		t.Errorf("error %v, report %+v, want 7 errors", err, report)
	}
	if _, err := s.Run(t.Context(), Load{}); err == nil {
		t.Error("a load without an end is no error")
	}
}

func TestUpgradeTakesEffectAtReload(t *testing.T) {
	s := start(t, Options{Build: Old})
	old := s.Workers()
	before := buildID(t, s.Library())
	if err := s.Install(New); err != nil {
		t.Fatal(err)
	}
	if after := buildID(t, s.Library()); after == before {
		t.Errorf("both builds have the build-id %x", after)
	}
	load(t, s, Load{Requests: 53})
	if got := total(t, s, old); got.Blocks != 53 {
		t.Errorf("before the reload the library counted %+v, want 53 blocks kept", got)
	}
	if err := s.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	workers := s.Workers()
	for _, pid := range workers {
		if slices.Contains(old, pid) {
			t.Errorf("worker %d survived the reload", pid)
		}
	}
	load(t, s, Load{Requests: 59})
	if got := total(t, s, workers); got.Blocks != 0 || got.MadeBlocks != 59 {
		t.Errorf("after the reload the library counted %+v, want 59 made and freed", got)
	}
	if got := total(t, s, old); got.Blocks != 53 {
		t.Errorf("the count of the workers that ended is %+v, want it kept", got)
	}
}

func buildID(t *testing.T, path string) string {
	t.Helper()
	file, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	note, err := file.Section(".note.gnu.build-id").Data()
	if err != nil {
		t.Fatal(err)
	}
	return string(note[16:])
}

func TestCloseLeavesNothing(t *testing.T) {
	s, err := Start(context.Background(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	pids := append(s.Workers(), s.Master)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, 0); err == nil {
			t.Errorf("process %d still runs", pid)
		}
	}
	if _, err := os.Stat(s.Dir); !os.IsNotExist(err) {
		t.Errorf("directory %s remains: %v", s.Dir, err)
	}
}

func TestStartSaysWhyNginxEnded(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // t.TempDir is for one user only
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "nginx.pid"), 0o755); err != nil { // nginx cannot write its pid file
		t.Fatal(err)
	}
	s, err := Start(t.Context(), Options{Dir: dir})
	if err == nil {
		_ = s.Close()
		t.Fatal("no error")
	}
	if !strings.Contains(err.Error(), "nginx.pid") {
		t.Errorf("error is %v", err)
	}
	closed := filepath.Join(t.TempDir(), "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		_, err := Start(t.Context(), Options{Dir: filepath.Join(closed, "service")})
		if err == nil || !strings.Contains(err.Error(), "use directory "+closed) {
			t.Errorf("error on a directory that workers cannot enter is %v", err)
		}
	}
	if _, err := Start(t.Context(), Options{Build: "newer"}); err == nil || !strings.Contains(err.Error(), `"newer"`) {
		t.Errorf("error on an unknown build is %v", err)
	}
}

func TestPercentile(t *testing.T) {
	hundred := make([]time.Duration, 100)
	for i := range hundred {
		hundred[i] = time.Duration(i + 1)
	}
	for _, tt := range []struct {
		name   string
		values []time.Duration
		p      int
		want   time.Duration
	}{
		{"none", nil, 99, 0},
		{"one", []time.Duration{7}, 50, 7},
		{"two", []time.Duration{3, 7}, 50, 3},
		{"the middle of a hundred", hundred, 50, 50},
		{"the tail of a hundred", hundred, 99, 99},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := percentile(tt.values, tt.p); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}
