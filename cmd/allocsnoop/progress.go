package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
	"github.com/allocsnoop/allocsnoop/tracer"
)

// progress writes one line that renews itself on a terminal, and warnings anywhere.
type progress struct {
	w        io.Writer
	terminal bool

	mu    sync.Mutex
	shown bool
	hits  uint64
	at    time.Duration
}

func newProgress(f *os.File) *progress {
	return &progress{w: f, terminal: isTerminal(f)}
}

// say tells a person at a terminal something; scripts do not hear it.
func (p *progress) say(format string, args ...any) {
	if p.terminal {
		p.line(profile.Sanitize(fmt.Sprintf(format, args...)))
	}
}

func (p *progress) warn(text string) { p.line("allocsnoop: warning: " + profile.Sanitize(text)) }

func (p *progress) line(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
	fmt.Fprintln(p.w, text)
}

func (p *progress) clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
}

func (p *progress) erase() {
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}

// renew replaces the line.
func (p *progress) renew(text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.erase()
	fmt.Fprint(p.w, text)
	p.shown = true
}

// show renews the line: elapsed time, events a second, bytes in use by kind.
func (p *progress) show(t *tracer.Tracer, elapsed, of time.Duration) {
	if !p.terminal || elapsed-p.at < time.Second {
		return
	}
	inUse, err := t.InUse()
	if err != nil {
		return
	}
	hits := t.Hits()
	p.mu.Lock()
	defer p.mu.Unlock()
	rate := float64(hits-p.hits) / (elapsed - p.at).Seconds()
	p.hits, p.at = hits, elapsed
	text := elapsed.Round(time.Second).String()
	if of > 0 {
		text += "/" + of.String()
	}
	text += fmt.Sprintf("  %.0f events/s", rate)
	for _, kind := range slices.Sorted(maps.Keys(inUse)) {
		text += fmt.Sprintf("  %s %s", kind, profile.FormatBytes(uint64(max(inUse[kind], 0))))
	}
	p.erase()
	fmt.Fprint(p.w, text)
	p.shown = true
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// terminal is the width of what a writer leads to, 0 when it is no terminal, and whether it may be coloured.
func terminal(w io.Writer) (width int, color bool) {
	f, ok := w.(*os.File)
	if !ok || !isTerminal(f) {
		return 0, false
	}
	if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil {
		width = int(size.Col)
	}
	return width, os.Getenv("NO_COLOR") == "" && !strings.EqualFold(os.Getenv("TERM"), "dumb")
}
