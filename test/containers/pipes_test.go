package containers

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds every wait for something that comes at once on a quiet machine, and late on one with twenty others at work.
const patience = 3 * time.Minute

// pipes are how a leaker is spoken to, whatever made its container: runtimes keep stdin and stdout to themselves.
type pipes struct {
	dir     string
	in, out *os.File
	lines   *bufio.Reader
}

// newPipes makes the pair in a directory.
func newPipes(t *testing.T, dir string) *pipes {
	t.Helper()
	p := &pipes{dir: dir}
	for name, file := range map[string]**os.File{"in": &p.in, "out": &p.out} {
		path := filepath.Join(dir, name)
		if err := unix.Mkfifo(path, 0o666); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o666); err != nil {
			t.Fatal(err)
		}
		// For both directions, so that neither opening waits for the other end nor its going is an end of file.
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		*file = f
	}
	p.lines = bufio.NewReader(p.out)
	return p
}

func (p *pipes) send(t *testing.T, line string) {
	t.Helper()
	if _, err := p.in.WriteString(line + "\n"); err != nil {
		t.Fatalf("send %q to the leaker: %v", line, err)
	}
}

func (p *pipes) expect(t *testing.T, want string) {
	t.Helper()
	if err := p.out.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	line, err := p.lines.ReadString('\n')
	if err != nil {
		t.Fatalf("wait for the leaker's %q: %v", want, err)
	}
	if got := strings.TrimSuffix(line, "\n"); got != want {
		t.Fatalf("the leaker says %q, want %q", got, want)
	}
}

// leak has the leaker make blocks.
func (p *pipes) leak(t *testing.T, order string) {
	t.Helper()
	p.send(t, order)
	p.expect(t, "done")
}
