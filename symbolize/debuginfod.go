package symbolize

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	connectTimeout  = 5 * time.Second
	silenceTimeout  = 20 * time.Second // without a byte
	downloadTimeout = 3 * time.Minute
	negativeTime    = 10 * time.Minute // a server's 404 is believed for so long, as elfutils does by default
	maxDownload     = 4 << 30
)

// downloads fetches debug files by build-id and keeps them where elfutils' programs find them too:
// CACHE/BUILDID/debuginfo, empty and unreadable when the servers did not have it.
type downloads struct {
	s       *Symbolizer
	client  *http.Client
	silence time.Duration // without a byte that ends a download

	mu    sync.Mutex
	asked map[string]*download
}

type download struct {
	done chan struct{}
	path string // empty when it failed
}

func newDownloads(s *Symbolizer) *downloads {
	dialer := &net.Dialer{Timeout: connectTimeout}
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DialContext: dialer.DialContext,
		TLSHandshakeTimeout: connectTimeout, ResponseHeaderTimeout: silenceTimeout,
	}
	return &downloads{s: s, client: &http.Client{Transport: transport}, silence: silenceTimeout, asked: map[string]*download{}}
}

// cacheDir is the elfutils client's, unless the caller named another one.
func (d *downloads) cacheDir() (string, error) {
	if d.s.options.CacheDir != "" {
		return d.s.options.CacheDir, nil
	}
	if dir := os.Getenv("DEBUGINFOD_CACHE_PATH"); dir != "" {
		return dir, nil
	}
	dir, err := os.UserCacheDir() // $XDG_CACHE_HOME or $HOME/.cache
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "debuginfod_client"), nil
}

// debugInfo returns the debug file of the build-id from the cache or the servers, nil when there is none. Each build-id is
// asked for once.
func (d *downloads) debugInfo(ctx context.Context, id string) *object {
	if !validBuildID(id) {
		return nil
	}
	dir, err := d.cacheDir()
	if err != nil {
		if len(d.s.options.DebuginfodURLs) > 0 {
			d.s.warn("find debuginfod's cache: %v", err)
		}
		return nil
	}
	path := filepath.Join(dir, id, "debuginfo")
	info, err := os.Stat(path)
	switch {
	case err == nil && info.Size() > 0:
		if o := d.s.openBuildID(path, id); o != nil {
			return o
		}
	case err == nil && time.Since(info.ModTime()) < negativeTime:
		return nil
	}
	if len(d.s.options.DebuginfodURLs) == 0 {
		return nil
	}
	path = d.once(ctx, id, path)
	if path == "" {
		return nil
	}
	return d.s.openBuildID(path, id)
}

// once downloads, or waits for the download that somebody else began.
func (d *downloads) once(ctx context.Context, id, path string) string {
	d.mu.Lock()
	get, ok := d.asked[id]
	if !ok {
		get = &download{done: make(chan struct{})}
		d.asked[id] = get
	}
	d.mu.Unlock()
	if ok {
		select {
		case <-get.done:
			return get.path
		case <-ctx.Done():
			return ""
		}
	}
	defer close(get.done)
	get.path = d.fetch(ctx, id, path)
	return get.path
}

var errNotFound = errors.New("the server does not have it")

// fetch asks one server after the other.
func (d *downloads) fetch(ctx context.Context, id, path string) string {
	missing := true
	for _, server := range d.s.options.DebuginfodURLs {
		err := d.get(ctx, server, id, path)
		if err == nil {
			return path
		}
		if ctx.Err() != nil {
			return ""
		}
		if !errors.Is(err, errNotFound) {
			missing = false
		}
		d.s.warn("get debug file %s from %s: %v", id, server, err)
	}
	if missing {
		d.noteMissing(path)
	}
	return ""
}

// noteMissing leaves the mark that keeps everybody from asking again for a while.
func (d *downloads) noteMissing(path string) {
	if os.MkdirAll(filepath.Dir(path), 0o700) != nil {
		return // only a saved request is lost
	}
	os.Remove(path)
	if f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0); err == nil {
		f.Close()
	}
}

// get downloads to a temporary file, checks what came and moves it into its place.
func (d *downloads) get(ctx context.Context, server, id, path string) error {
	ctx, cancel := context.WithTimeout(ctx, downloadTimeout)
	defer cancel()
	url := strings.TrimRight(server, "/") + "/buildid/" + id + "/debuginfo"
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	request.Header.Set("User-Agent", "allocsnoop")
	response, err := d.client.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	switch {
	case response.StatusCode == http.StatusNotFound:
		return errNotFound
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("the server answers %s", response.Status)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "debuginfo.*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // fails after the rename
	defer tmp.Close()
	body := &watchedBody{body: response.Body, cancel: cancel, d: d, what: server, total: response.ContentLength}
	if err := body.saveTo(tmp); err != nil {
		return err
	}
	got, err := BuildID(tmp)
	if err != nil {
		return fmt.Errorf("what came is %w", errNoELF)
	}
	if got != id {
		return fmt.Errorf("what came has build-id %s", orNone(got))
	}
	return os.Rename(tmp.Name(), path)
}

// watchedBody copies a response, shows progress and gives up on silence.
type watchedBody struct {
	body   io.Reader
	cancel context.CancelFunc
	d      *downloads
	what   string
	total  int64
}

func (w *watchedBody) saveTo(f *os.File) error {
	silence := time.AfterFunc(w.d.silence, w.cancel)
	defer silence.Stop()
	var n int64
	shown := time.Now()
	for {
		k, err := io.CopyN(f, w.body, 256<<10)
		n += k
		silence.Reset(w.d.silence)
		if n > maxDownload {
			return fmt.Errorf("more than %d bytes", int64(maxDownload))
		}
		if time.Since(shown) > time.Second {
			shown = time.Now()
			w.show(n)
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
	}
	if w.total >= 0 && n != w.total {
		return fmt.Errorf("%d of %d bytes came", n, w.total)
	}
	w.show(n)
	return nil
}

func (w *watchedBody) show(n int64) {
	const mib = 1 << 20
	text := fmt.Sprintf("%s: %.1f MiB", w.what, float64(n)/mib)
	if w.total > 0 {
		text += fmt.Sprintf(" of %.1f MiB", float64(w.total)/mib)
	}
	w.d.s.progress(text)
}
