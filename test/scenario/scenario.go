// Package scenario runs the service that the project is about: nginx with LuaJIT, whose Lua code calls an "encryption"
// .so through ffi. The old build of the .so keeps the JSON record of each session, the new one frees it; both count
// their own outstanding records, which is the oracle for what allocsnoop says.
//
// The traps: the workers serve each their own share of a load, so compare a worker's profile with that worker's count
// and not with the load's size; and the count starts with the worker, not with the trace, so take Stats before and after.
package scenario

import (
	"bytes"
	"context"
	"crypto/x509"
	"embed"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/template"
	"time"
)

//go:embed service
var sources embed.FS

// The two builds of the library.
const (
	Old = "old" // keeps every session record
	New = "new" // frees it
)

// Options say what to start. The zero value is the old build under two workers with plain HTTP.
type Options struct {
	Build   string // Old (the default) or New
	Workers int    // 2 when zero
	TLS     bool
	Gzip    bool
	Preload string // LD_PRELOAD of nginx, say a jemalloc
	Dir     string // of everything the service writes; a temporary one, removed by Close, when empty
	Env     []string
}

// Service is a running nginx with its workers.
type Service struct {
	URL    string // http://127.0.0.1:PORT
	Dir    string
	Master int

	options Options
	roots   *x509.CertPool // nil without TLS
	cmd     *exec.Cmd
	output  bytes.Buffer // to be read after done only
	done    chan struct{}
	ownDir  bool
	close   sync.Once
}

const (
	startTimeout = 30 * time.Second
	workerUser   = "www-data" // when started as root
)

// Start builds the library, writes the configuration and returns once every worker serves requests.
func Start(ctx context.Context, o Options) (_ *Service, err error) {
	if o.Build == "" {
		o.Build = Old
	}
	if o.Workers == 0 {
		o.Workers = 2
	}
	s := &Service{options: o, Dir: o.Dir, done: make(chan struct{})}
	if s.Dir == "" {
		s.ownDir = true
		if s.Dir, err = os.MkdirTemp("", "allocsnoop-scenario-"); err != nil {
			return nil, err
		}
		defer func() {
			if err != nil {
				_ = os.RemoveAll(s.Dir)
			}
		}()
	}
	if s.Dir, err = filepath.Abs(s.Dir); err != nil {
		return nil, err
	}
	if err := s.install(); err != nil {
		return nil, err
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	state, err := json.Marshal(state{s.URL, s.Master})
	if err == nil {
		err = os.WriteFile(s.path("state.json"), state, 0o644)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// state is what Open needs to know of a running service.
type state struct {
	URL    string `json:"url"`
	Master int    `json:"master"`
}

// Open finds the service that another process started in dir: to load it and to read its counts, not to end it.
func Open(dir string) (*Service, error) {
	text, err := os.ReadFile(filepath.Join(dir, "state.json"))
	if err != nil {
		return nil, fmt.Errorf("find the running service of %s: %w", dir, err)
	}
	var st state
	if err := json.Unmarshal(text, &st); err != nil {
		return nil, fmt.Errorf("find the running service of %s: %w", dir, err)
	}
	s := &Service{URL: st.URL, Master: st.Master, Dir: dir}
	cert, err := os.ReadFile(s.path("cert.pem"))
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return nil, err
	}
	s.roots = x509.NewCertPool()
	s.roots.AppendCertsFromPEM(cert)
	return s, nil
}

// install writes all that nginx reads. Workers run as another user than root, so the directory must be open to them.
func (s *Service) install() error {
	for _, dir := range []string{s.Dir, s.path("tmp"), s.path("ledger")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Chmod(s.Dir, 0o755), os.Chmod(s.path("ledger"), 0o777)); err != nil {
		return err
	}
	if err := checkReachable(s.Dir); err != nil {
		return err
	}
	files, err := fs.Sub(sources, "service")
	if err != nil {
		return err
	}
	for _, name := range []string{"encrypt.c", "session.lua"} {
		text, err := fs.ReadFile(files, name)
		if err != nil {
			return err
		}
		if err := os.WriteFile(s.path(name), text, 0o644); err != nil {
			return err
		}
	}
	if err := s.Install(s.options.Build); err != nil {
		return err
	}
	if s.options.TLS {
		if s.roots, err = writeCertificate(s.path("cert.pem"), s.path("key.pem")); err != nil {
			return err
		}
	}
	return s.configure(files)
}

// checkReachable finds a parent directory that is closed to the workers' user.
func checkReachable(dir string) error {
	for ; dir != "/"; dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if info.Mode()&0o001 == 0 && os.Geteuid() == 0 {
			return fmt.Errorf("use directory %s: nginx's workers run as %s and cannot enter it; chmod o+x it", dir, workerUser)
		}
	}
	return nil
}

func (s *Service) configure(files fs.FS) error {
	port, err := freePort()
	if err != nil {
		return err
	}
	s.URL = fmt.Sprintf("http://127.0.0.1:%d", port)
	if s.options.TLS {
		s.URL = "https" + strings.TrimPrefix(s.URL, "http")
	}
	modules, err := moduleDir()
	if err != nil {
		return err
	}
	values := map[string]any{
		"Workers": s.options.Workers, "Modules": modules, "Dir": s.Dir, "Port": port,
		"TLS": s.options.TLS, "Gzip": s.options.Gzip, "User": "",
	}
	if os.Geteuid() == 0 {
		values["User"] = workerUser
	}
	parsed, err := template.ParseFS(files, "nginx.conf")
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if err := parsed.Execute(&text, values); err != nil {
		return err
	}
	return os.WriteFile(s.path("nginx.conf"), text.Bytes(), 0o644)
}

// Install compiles a build of the library and puts it in place of the present one, as a package upgrade does: workers
// that run keep the old file, now deleted, until Reload.
func (s *Service) Install(build string) error {
	flags := []string{"-O2", "-fPIC", "-shared", "-fomit-frame-pointer", "-Wl,--build-id=sha1"}
	switch build {
	case Old:
		flags = append(flags, "-DKEEP_SESSIONS")
	case New:
	default:
		return fmt.Errorf("build %q of the library: there are %q and %q", build, Old, New)
	}
	fresh := s.path("libencrypt.so.new")
	args := append(flags, "-o", fresh, s.path("encrypt.c"))
	if text, err := exec.Command("gcc", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("compile the %s library: %w\n%s", build, err, text)
	}
	s.options.Build = build
	return os.Rename(fresh, s.Library())
}

// Library is the path of the .so, as the workers see it too.
func (s *Service) Library() string { return s.path("libencrypt.so") }

func (s *Service) path(name string) string { return filepath.Join(s.Dir, name) }

func (s *Service) start(ctx context.Context) error {
	s.cmd = exec.Command("nginx", "-p", s.Dir, "-c", s.path("nginx.conf"), "-e", s.path("error.log"))
	s.cmd.Env = append(os.Environ(), "ENCRYPT_LEDGER_DIR="+s.path("ledger"))
	s.cmd.Env = append(s.cmd.Env, s.options.Env...)
	if s.options.Preload != "" {
		s.cmd.Env = append(s.cmd.Env, "LD_PRELOAD="+s.options.Preload)
	}
	s.cmd.Stdout, s.cmd.Stderr = &s.output, &s.output
	// If this process dies, the master takes its workers with it; on SIGKILL it could not.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := s.cmd.Start(); err != nil {
		return fmt.Errorf("start nginx: %w", err)
	}
	s.Master = s.cmd.Process.Pid
	go func() {
		_ = s.cmd.Wait()
		close(s.done)
	}()
	if err := s.await(ctx, func(pids []int) bool { return len(pids) == s.options.Workers && s.serving(ctx) }); err != nil {
		_ = s.Close()
		log, _ := os.ReadFile(s.path("error.log"))
		// The first lines say why; later ones repeat the consequences.
		return fmt.Errorf("start nginx: %w\n%s%s", err, s.output.String(), log[:min(len(log), 4096)])
	}
	return nil
}

// await polls the set of workers: nginx tells nobody when a worker is up.
func (s *Service) await(ctx context.Context, ok func(pids []int) bool) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok(s.Workers()) {
		select {
		case <-tick.C:
		case <-s.done:
			return errors.New("nginx ended")
		case <-ctx.Done():
			return fmt.Errorf("wait for workers: %w", ctx.Err())
		}
	}
	return nil
}

func (s *Service) serving(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	_, err := s.WorkerStats(ctx)
	return err == nil
}

// Workers is the pids of the workers that take requests, ascending.
func (s *Service) Workers() []int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.Master, s.Master))
	if err != nil {
		return nil
	}
	var pids []int
	for _, field := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(field)
		if err != nil {
			continue
		}
		title, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		// A worker that ends says "is shutting down".
		if err == nil && strings.TrimRight(string(title), "\x00 ") == "nginx: worker process" {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	return pids
}

// Stats is what the library counted in one process.
type Stats struct {
	Blocks, Bytes         int64 // session records it holds
	MadeBlocks, MadeBytes int64 // ever made
}

// Sub is the change since an earlier count.
func (s Stats) Sub(earlier Stats) Stats {
	return Stats{
		s.Blocks - earlier.Blocks, s.Bytes - earlier.Bytes,
		s.MadeBlocks - earlier.MadeBlocks, s.MadeBytes - earlier.MadeBytes,
	}
}

// Stats reads the count of one worker, which may have ended since. Before its first session it is zero.
func (s *Service) Stats(pid int) (Stats, error) {
	data, err := os.ReadFile(filepath.Join(s.path("ledger"), strconv.Itoa(pid)))
	if errors.Is(err, os.ErrNotExist) {
		return Stats{}, nil
	}
	if err != nil {
		return Stats{}, err
	}
	var file struct {
		PID uint64
		Stats
	}
	if err := binary.Read(bytes.NewReader(data), binary.NativeEndian, &file); err != nil {
		return Stats{}, fmt.Errorf("read the ledger of process %d: %w", pid, err)
	}
	if file.PID != uint64(pid) {
		return Stats{}, fmt.Errorf("read the ledger of process %d: it is of process %d", pid, file.PID)
	}
	return file.Stats, nil
}

// WorkerStats is one worker's answer on /stats.
type WorkerStats struct {
	PID     int    `json:"pid"`
	Version string `json:"version"`
	Blocks  int64  `json:"blocks"`
	Bytes   int64  `json:"bytes"`
	Traces  int    `json:"traces"` // compiled by LuaJIT
}

// WorkerStats asks over HTTP; which worker answers is the kernel's choice.
func (s *Service) WorkerStats(ctx context.Context) (WorkerStats, error) {
	var stats WorkerStats
	c := &client{addr: s.addr(), roots: s.roots}
	defer c.close()
	body, err := c.get(ctx, "/stats")
	if err != nil {
		return stats, err
	}
	return stats, json.Unmarshal(body, &stats)
}

func (s *Service) addr() string {
	_, addr, _ := strings.Cut(s.URL, "://")
	return addr
}

// Reload replaces the workers, as nginx -s reload does, and returns when the old ones have gone.
func (s *Service) Reload(ctx context.Context) error {
	old := s.children()
	if err := syscall.Kill(s.Master, syscall.SIGHUP); err != nil {
		return fmt.Errorf("reload nginx: %w", err)
	}
	err := s.await(ctx, func(pids []int) bool {
		for _, pid := range s.children() {
			if slices.Contains(old, pid) {
				return false
			}
		}
		return len(pids) == s.options.Workers && s.serving(ctx)
	})
	if err != nil {
		return fmt.Errorf("reload nginx: %w", err)
	}
	return nil
}

func (s *Service) children() []int {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", s.Master, s.Master))
	var pids []int
	for _, field := range strings.Fields(string(text)) {
		if pid, err := strconv.Atoi(field); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Close ends nginx and its workers, and removes the directory if Start made it.
func (s *Service) Close() error {
	var err error
	s.close.Do(func() {
		workers := s.children()
		_ = syscall.Kill(s.Master, syscall.SIGTERM)
		select {
		case <-s.done:
		case <-time.After(startTimeout):
			// A master that is killed leaves its workers behind.
			for _, pid := range append(workers, s.Master) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
			<-s.done
			err = errors.New("end nginx: it did not end by itself")
		}
		if s.ownDir {
			err = errors.Join(err, os.RemoveAll(s.Dir))
		}
	})
	return err
}

func freePort() (int, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer listener.Close()
	return listener.Addr().(*net.TCPAddr).Port, nil
}

// moduleDir is where the distribution keeps nginx's loadable modules.
func moduleDir() (string, error) {
	for _, dir := range []string{"/usr/lib/nginx/modules", "/usr/lib64/nginx/modules"} {
		if _, err := os.Stat(filepath.Join(dir, "ngx_http_lua_module.so")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("find ngx_http_lua_module.so: install libnginx-mod-http-lua (test/setup.sh does)")
}
