package scenario

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// traceLoad traces one worker while 5,000 requests come, and returns what that worker's library counted meanwhile.
func traceLoad(t *testing.T, s *Service, l Load) (Stats, *live.Result) {
	t.Helper()
	pid := s.Workers()[0]
	// A first load lets LuaJIT compile, so that the traced one runs compiled code from its start.
	load(t, s, Load{Requests: 500, Concurrency: 8})
	tr := live.Trace(t, pid, "--mode", "exact", "--json")
	before, err := s.Stats(pid)
	if err != nil {
		t.Fatal(err)
	}
	load(t, s, l)
	after, err := s.Stats(pid)
	if err != nil {
		t.Fatal(err)
	}
	result := tr.Stop(t)
	live.CheckText(t, pid)
	if result.Profile == nil {
		t.Fatalf("no profile, exit code %d\nstderr: %s", result.ExitCode, result.Stderr)
	}
	var doc struct {
		Losses []any `json:"losses"`
	}
	if err := json.Unmarshal([]byte(result.Stdout), &doc); err != nil {
		t.Fatalf("read the JSON summary: %v", err)
	}
	if len(doc.Losses) != 0 {
		t.Errorf("events were lost: %v", doc.Losses)
	}
	return after.Sub(before), result
}

func compareLeak(t *testing.T, result *live.Result, want Stats) {
	t.Helper()
	if want.MadeBlocks == 0 {
		t.Error("the traced worker got no request")
	}
	got := live.Sum(result.Profile, "malloc", "malloc", "session_new", "encrypt_seal")
	if (Stats{got.InUseObjects, got.InUseBytes, got.AllocObjects, got.AllocBytes}) != want {
		t.Errorf("session_new holds %+v by the profile, %+v by the library's own count", got, want)
	}
	scratch := live.Sum(result.Profile, "malloc", "calloc", "encrypt_seal")
	if scratch.InUseObjects != 0 || scratch.InUseBytes != 0 || scratch.AllocObjects != want.MadeBlocks {
		t.Errorf("encrypt_seal's scratch buffers are %+v, want %d made and all freed", scratch, want.MadeBlocks)
	}
}

func TestProfileEqualsTheLibrarysCount(t *testing.T) {
	live.RequireBPF(t)
	for _, tt := range []struct {
		name    string
		options Options
	}{
		{"the old build keeps its records", Options{Build: Old}},
		{"the new build keeps none", Options{Build: New}},
		{"the old build behind TLS", Options{Build: Old, TLS: true, Gzip: true}},
		{"the old build under jemalloc", Options{Build: Old, Preload: preload(t, "libjemalloc.so.2")}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t, tt.options)
			counted, result := traceLoad(t, s, Load{Requests: 5000, Concurrency: 8, FirstUID: 1000})
			if kept := counted.Blocks > 0; kept != (tt.options.Build == Old) {
				t.Errorf("the library counted %+v", counted)
			}
			compareLeak(t, result, counted)
		})
	}
}

func preload(t *testing.T, name string) string {
	t.Helper()
	found, err := filepath.Glob("/usr/lib/*/" + name)
	if err != nil || len(found) == 0 {
		t.Fatalf("find %s in /usr/lib: none; test/setup.sh installs it", name)
	}
	return found[0]
}

func TestServiceRunsOnWhenTheTracerIsKilled(t *testing.T) {
	s := start(t, Options{Workers: 1})
	pid := s.Workers()[0]
	tr := live.Trace(t, pid, "--mode", "exact")
	served := make(chan error, 1)
	go func() {
		_, err := s.Run(t.Context(), Load{Duration: time.Second, Concurrency: 4})
		served <- err
	}()
	before, err := s.Stats(pid)
	for err == nil && before.MadeBlocks < 100 { // in the middle of the load
		before, err = s.Stats(pid)
	}
	if err != nil {
		t.Fatal(err)
	}
	tr.Kill(t)
	if err := <-served; err != nil {
		t.Errorf("a request failed: %v", err)
	}
	live.CheckText(t, pid)
	if err := syscall.Kill(pid, 0); err != nil || s.Workers()[0] != pid {
		t.Errorf("worker %d did not survive: %v", pid, err)
	}
	load(t, s, Load{Requests: 101})
}

// Everything that reads the profile does so from a directory without the service, as on another machine.
func TestGoToolPprofReadsTheProfile(t *testing.T) {
	s := start(t, Options{Workers: 1})
	_, result := traceLoad(t, s, Load{Requests: 1000, Concurrency: 4})
	file, err := os.ReadFile(result.Path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "profile.pb.gz"), file, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args string
		want []string
	}{
		{"-top", []string{"Type: inuse_space", "session_new"}},
		{"-top -sample_index=alloc_space", []string{"Type: alloc_space", "session_new"}},
		{"-peek session_new", []string{"encrypt_seal", "malloc"}},
		{"-raw", []string{"inuse_space/bytes", "libencrypt.so"}},
	} {
		t.Run(tt.args, func(t *testing.T) {
			out, err := pprof(t, dir, strings.Fields(tt.args)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for _, want := range tt.want {
				if !strings.Contains(string(out), want) {
					t.Errorf("output has no %q:\n%s", want, out)
				}
			}
		})
	}
	t.Run("-http", func(t *testing.T) { testPprofPages(t, dir) })
}

// pprof runs go tool pprof with no file of this machine to help it.
func pprof(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("go", append(append([]string{"tool", "pprof"}, args...), "profile.pb.gz")...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PPROF_BINARY_PATH="+dir, "PPROF_TMPDIR="+dir, "XDG_CONFIG_HOME="+dir)
	return cmd
}

func testPprofPages(t *testing.T, dir string) {
	port, err := freePort()
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	cmd := pprof(t, dir, "-http="+addr, "-no_browser")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // go tool starts another process
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	}()
	waitListening(t, addr)
	for _, page := range []string{"/top", "/flamegraph", "/peek?f=session_new", "/top?si=alloc_objects"} {
		response, err := http.Get("http://" + addr + "/ui" + page)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		_ = response.Body.Close()
		if err != nil || response.StatusCode != http.StatusOK || !strings.Contains(string(body), "session_new") {
			t.Errorf("%s: %s, %v, without session_new", page, response.Status, err)
		}
	}
}

func waitListening(t *testing.T, addr string) {
	t.Helper()
	end := time.Now().Add(startTimeout)
	for {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			_ = conn.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nothing listens on %s: %v", addr, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
