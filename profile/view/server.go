package view

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/pprof/driver"
	pprof "github.com/google/pprof/profile"
)

// Handler serves the page at Path, and pprof's views of p below it. It answers loopback connections that name it by a
// loopback address and its secret path: other web sites in the same browser (by DNS rebinding) and other users of the
// machine do not get in.
type Handler struct {
	Path string // "/SECRET/"
	mux  *http.ServeMux
	port string
	page func() (pageText, error)
}

type pageText struct{ plain, packed []byte }

// NewHandler returns at once; the page is made meanwhile, and a browser that comes too early waits for it. port is the one
// that will be listened on. pprof's driver keeps its state in global variables, so there is one Handler in a process.
func NewHandler(in Input, p *pprof.Profile, port string) *Handler {
	h := &Handler{Path: "/" + rand.Text() + "/", mux: http.NewServeMux(), port: port}
	h.page = sync.OnceValues(func() (pageText, error) { return makePage(in, p != nil) })
	go h.page()
	h.mux.HandleFunc("GET "+h.Path+"{$}", h.servePage)
	// pprof's pages name no icon, so the browser asks for this one.
	h.mux.HandleFunc("GET /favicon.ico", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	if p != nil {
		h.mux.Handle("GET "+h.Path+"pprof/", http.StripPrefix(h.Path+"pprof", &pprofViews{profile: p}))
	}
	return h
}

func makePage(in Input, served bool) (pageText, error) {
	var plain, packed bytes.Buffer
	if err := writePage(&plain, in, served); err != nil {
		return pageText{}, err
	}
	zip, _ := gzip.NewWriterLevel(&packed, gzip.BestSpeed)
	if _, err := zip.Write(plain.Bytes()); err != nil {
		return pageText{}, err
	}
	if err := zip.Close(); err != nil {
		return pageText{}, err
	}
	return pageText{plain.Bytes(), packed.Bytes()}, nil
}

func (h *Handler) servePage(w http.ResponseWriter, r *http.Request) {
	page, err := h.page()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Vary", "Accept-Encoding")
	if !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Write(page.plain)
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	w.Write(page.packed)
}

func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if !fromLoopback(r.RemoteAddr) || !h.namesUs(r.Host) {
		http.Error(w, "this page is for the browser of this machine only", http.StatusForbidden)
		return
	}
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("X-Frame-Options", "DENY")
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Cache-Control", "no-store")
	h.mux.ServeHTTP(w, r)
}

func fromLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return err == nil && ip != nil && ip.IsLoopback()
}

// namesUs refuses a name that some web site has pointed at 127.0.0.1.
func (h *Handler) namesUs(hostport string) bool {
	host, port, err := net.SplitHostPort(hostport)
	return err == nil && port == h.port && (host == "127.0.0.1" || host == "localhost")
}

// pprofViews runs pprof's driver at the first request, for its handlers only: it neither listens nor opens a browser.
type pprofViews struct {
	profile  *pprof.Profile
	once     sync.Once
	handlers map[string]http.Handler
	err      error
}

func (v *pprofViews) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	v.once.Do(v.start)
	handler := v.handlers[r.URL.Path]
	switch {
	case v.err != nil:
		http.Error(w, v.err.Error(), http.StatusInternalServerError)
	case r.URL.Path == "/saveconfig" || r.URL.Path == "/deleteconfig":
		http.Error(w, "settings are not kept", http.StatusForbidden) // they would go into the user's home
	case handler == nil:
		http.NotFound(w, r)
	default:
		handler.ServeHTTP(w, r)
	}
}

func (v *pprofViews) start() {
	err := driver.PProf(&driver.Options{
		Flagset: newFlags("-http=127.0.0.1:0", "-no_browser", "-symbolize=none", "profile"),
		Fetch:   memoryFetcher{v.profile},
		UI:      silentUI{},
		Writer:  discardWriter{},
		HTTPServer: func(args *driver.HTTPServerArgs) error {
			v.handlers = args.Handlers
			return nil
		},
	})
	if err != nil {
		v.err = fmt.Errorf("start pprof's views: %w", err)
	}
}

type memoryFetcher struct{ profile *pprof.Profile }

func (f memoryFetcher) Fetch(string, time.Duration, time.Duration) (*pprof.Profile, string, error) {
	return f.profile, "", nil
}

type silentUI struct{}

func (silentUI) ReadLine(string) (string, error)     { return "", io.EOF }
func (silentUI) Print(...any)                        {}
func (silentUI) PrintErr(...any)                     {}
func (silentUI) IsTerminal() bool                    { return false }
func (silentUI) WantBrowser() bool                   { return false }
func (silentUI) SetAutoComplete(func(string) string) {}

// discardWriter refuses the files that pprof's driver would write.
type discardWriter struct{}

func (discardWriter) Open(string) (io.WriteCloser, error) {
	return nil, errors.New("files are not written from here")
}

// flags lets pprof's driver parse arguments that are given here instead of the command line.
type flags struct {
	*flag.FlagSet
	args  []string
	extra string
}

func newFlags(args ...string) *flags {
	set := flag.NewFlagSet("pprof", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	return &flags{FlagSet: set, args: args}
}

func (f *flags) StringList(name, def, usage string) *[]*string {
	return &[]*string{f.String(name, def, usage)}
}

func (f *flags) ExtraUsage() string { return f.extra }

func (f *flags) AddExtraUsage(text string) { f.extra += text + "\n" }

func (f *flags) Parse(usage func()) []string {
	f.Usage = usage
	if f.FlagSet.Parse(f.args) != nil {
		return nil
	}
	return f.Args()
}
