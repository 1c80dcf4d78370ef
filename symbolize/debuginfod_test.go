package symbolize

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDebianServer asks Debian's debuginfod. That program listens on all interfaces, so it runs in a network namespace
// where there is nothing but loopback; the client's connections are dialled from a thread that is in there too.
func TestDebianServer(t *testing.T) {
	need(t, "debuginfod")
	base := program(t)
	files := t.TempDir()
	stripped := filepath.Join(t.TempDir(), "program")
	objcopy("--only-keep-debug")(t, base, filepath.Join(files, "program.debug"))
	objcopy("--strip-all")(t, base, stripped)
	ns := newNamespace(t)
	const port = "8002"
	server := exec.Command("debuginfod", "-F", "-p", port, "-d", ":memory:", files)
	var log bytes.Buffer
	server.Stderr, server.Stdout = &log, &log
	ns.do(t, func() error { return server.Start() })
	t.Cleanup(func() { server.Process.Kill(); server.Wait() })
	offsets, _ := randomCode(t, base, 101, 29)
	want := resolveFile(t, Options{}, base, offsets)
	s := New(Options{DebuginfodURLs: []string{"http://127.0.0.1:" + port}, CacheDir: t.TempDir(), Warn: func(w string) { t.Error(w) }})
	s.debuginfod.client.Transport.(*http.Transport).DialContext = ns.dial
	waitForIndex(t, s.debuginfod.client, "http://127.0.0.1:"+port, buildIDOf(t, base), &log)
	f, err := os.Open(stripped)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := s.Resolve(t.Context(), Object{Path: stripped, File: f}, offsets)
	if err != nil {
		t.Fatal(err)
	}
	if text(got[0]) != text(want[0]) || text(got[100]) != text(want[100]) {
		t.Errorf("got%s\nwant%s", text(got[0]), text(want[0]))
	}
}

// waitForIndex asks until the server has read its files: it answers 404 before.
func waitForIndex(t *testing.T, client *http.Client, server, id string, log *bytes.Buffer) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for time.Now().Before(deadline) {
		response, err := client.Get(server + "/buildid/" + id + "/debuginfo")
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("debuginfod does not serve build-id %s:\n%s", id, log)
}

// namespace is a thread in a network namespace of its own.
type namespace struct{ calls chan func() }

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	ns := &namespace{calls: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = loopbackUp()
		}
		ready <- err
		for f := range ns.calls {
			f()
		}
	}()
	t.Cleanup(func() { close(ns.calls) })
	if err := <-ready; err != nil {
		t.Skipf("needs root for a network namespace: %v", err)
	}
	return ns
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	ifreq, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	ifreq.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifreq)
}

func (ns *namespace) do(t *testing.T, f func() error) {
	t.Helper()
	done := make(chan error)
	ns.calls <- func() { done <- f() }
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// dial connects from within the namespace. The socket stays there, so the rest of its life may be anywhere.
func (ns *namespace) dial(_ context.Context, _, addr string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result)
	ns.calls <- func() {
		to, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			done <- result{nil, err}
			return
		}
		conn, err := net.DialTCP("tcp", nil, to)
		done <- result{conn, err}
	}
	r := <-done
	return r.conn, r.err
}

func TestBadServersAreAWarningAndTheNextBestName(t *testing.T) {
	base := program(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "program")
	objcopy("--strip-debug")(t, base, file)
	id := buildIDOf(t, base)
	good, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(dir, "other")
	objcopy("--update-section=.note.gnu.build-id="+otherNote(t, dir))(t, base, other)
	lying, err := os.ReadFile(other)
	if err != nil {
		t.Fatal(err)
	}
	offsets, addrs := randomCode(t, base, 31, 31)
	symbols := symbolsOf(t, base, addrs)
	stop := make(chan struct{})
	for _, tt := range []struct {
		name, warning string
		handler       http.HandlerFunc
	}{
		{"404", "does not have it", http.NotFound},
		{"500", "answers 500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		{"a body cut off", "unexpected EOF", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)))
			w.Write(good[:len(good)/2])
		}},
		{"a body cut off without its length stated", "no ELF file", func(w http.ResponseWriter, _ *http.Request) { w.Write(good[:40]) }},
		{"a page instead of a file", "no ELF file", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "<html>please log in</html>") }},
		{"another build", "what came has build-id 0011", func(w http.ResponseWriter, _ *http.Request) { w.Write(lying) }},
		{"a server that never answers", "timeout", func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		}},
		{"a server that stops in the middle", "canceled", func(w http.ResponseWriter, r *http.Request) {
			w.Write(good[:1000])
			w.(http.Flusher).Flush()
			select {
			case <-stop:
			case <-r.Context().Done():
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var requests atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				requests.Add(1)
				if r.URL.Path != "/buildid/"+id+"/debuginfo" {
					t.Errorf("request for %s", r.URL.Path)
				}
				tt.handler(w, r)
			}))
			defer server.Close()
			var warnings []string
			cache := t.TempDir()
			s := New(Options{DebuginfodURLs: []string{server.URL + "/"}, CacheDir: cache, Warn: func(w string) { warnings = append(warnings, w) }})
			s.debuginfod.silence = 300 * time.Millisecond
			s.debuginfod.client.Transport.(*http.Transport).ResponseHeaderTimeout = 300 * time.Millisecond
			f, err := os.Open(file)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			for range 2 { // the second time it is not asked again
				got, err := s.Resolve(t.Context(), Object{Path: file, File: f}, offsets)
				if err != nil {
					t.Fatal(err)
				}
				for i, l := range got {
					if sym, ok := best(symbols[i]); ok && l[0].SystemName != sym.name {
						t.Errorf("got %s, want the symbol's name %s", l[0].SystemName, sym.name)
					}
				}
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0], tt.warning) {
				t.Errorf("warnings %q, want one with %q", warnings, tt.warning)
			}
			if n := requests.Load(); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
			left, _ := filepath.Glob(filepath.Join(cache, "*", "*"))
			for _, l := range left {
				if info, err := os.Stat(l); err != nil || info.Size() != 0 {
					t.Errorf("%s is left in the cache", l)
				}
			}
		})
	}
	close(stop)
	t.Run("no server", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
		var warnings []string
		o := Options{DebuginfodURLs: []string{"http://" + l.Addr().String()}, CacheDir: t.TempDir(), Warn: func(w string) { warnings = append(warnings, w) }}
		resolveFile(t, o, file, offsets)
		if len(warnings) != 1 || !strings.Contains(warnings[0], "connection refused") {
			t.Errorf("warnings %q", warnings)
		}
	})
}

// otherNote writes a build-id note that is nobody's.
func otherNote(t *testing.T, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "note")
	note := append([]byte{4, 0, 0, 0, 20, 0, 0, 0, 3, 0, 0, 0, 'G', 'N', 'U', 0, 0, 0x11}, make([]byte, 18)...)
	if err := os.WriteFile(path, note, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDownloadsAreSharedWithElfutilsCache(t *testing.T) {
	base := program(t)
	id := buildIDOf(t, base)
	content, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	var requests atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		w.Write(content)
	}))
	defer server.Close()
	t.Setenv("DEBUGINFOD_CACHE_PATH", "")
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	s := New(Options{DebuginfodURLs: []string{server.URL}})
	var wait sync.WaitGroup
	for range 7 {
		wait.Go(func() {
			if o := s.debuginfod.debugInfo(t.Context(), id); o == nil {
				t.Error("no debug file")
			} else {
				o.Close()
			}
		})
	}
	wait.Wait()
	if n := requests.Load(); n != 1 {
		t.Errorf("%d requests for one build-id, want 1", n)
	}
	if _, err := os.Stat(filepath.Join(cache, "debuginfod_client", id, "debuginfo")); err != nil {
		t.Error(err)
	}
	if o := New(Options{}).debuginfod.debugInfo(t.Context(), id); o == nil {
		t.Error("what is in the cache is not used without a server")
	} else {
		o.Close()
	}
}
