package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/allocsnoop/allocsnoop/profile"
)

// A running trace answers inspect --stack over an abstract socket, which needs no directory and goes with its process. A
// question is a pid and a newline; the answer is a line of JSON, and unless that has an error the profile of that process with
// its blocks. Both sides look at who the other one is: anybody may bind such a name or connect to it.
const (
	doorPrefix = "allocsnoop-trace-"
	// doorPatience is how long one side waits for the other: the first answer of a large program takes reading its symbols.
	doorPatience = 2 * time.Minute
	maxAnswer    = 1 << 30
)

// answerHead is the line before an answer.
type answerHead struct {
	Error string `json:"error,omitempty"`
}

// question is one that the trace's own loop answers.
type question struct {
	pid    int
	answer chan<- answer
}

type answer struct {
	profile []byte
	err     error
}

// door is where a running trace takes questions.
type door struct {
	listener  net.Listener
	questions chan question
	shut      chan struct{}
	once      sync.Once
}

// openDoor never fails a trace: without it only inspect --stack does not find the trace while it runs.
func openDoor() (*door, error) {
	listener, err := net.Listen("unix", "@"+doorPrefix+strconv.Itoa(os.Getpid()))
	if err != nil {
		return nil, fmt.Errorf("take questions of allocsnoop inspect --stack: %w", err)
	}
	d := &door{listener: listener, questions: make(chan question), shut: make(chan struct{})}
	go d.accept()
	return d, nil
}

func (d *door) close() {
	if d == nil {
		return
	}
	d.once.Do(func() {
		close(d.shut)
		_ = d.listener.Close()
	})
}

// asked is where questions come in; nil, on which nothing ever comes, without a door.
func (d *door) asked() <-chan question {
	if d == nil {
		return nil
	}
	return d.questions
}

func (d *door) accept() {
	for {
		conn, err := d.listener.Accept()
		if err != nil {
			return
		}
		go d.serve(conn)
	}
}

func (d *door) serve(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(doorPatience))
	a := d.answer(conn)
	head := answerHead{}
	if a.err != nil {
		head.Error = a.err.Error()
	}
	if json.NewEncoder(conn).Encode(head) == nil {
		_, _ = conn.Write(a.profile) // a reader that is gone wants no answer
	}
}

func (d *door) answer(conn net.Conn) answer {
	if !trusted(conn) {
		return answer{err: errors.New("only root and the user of the trace may ask it")}
	}
	line, err := bufio.NewReader(io.LimitReader(conn, 32)).ReadString('\n')
	if err != nil {
		return answer{err: errors.New("the question is not complete")}
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		return answer{err: errors.New("the question is no pid")}
	}
	got := make(chan answer, 1)
	select {
	case d.questions <- question{pid, got}:
	case <-d.shut:
		return answer{err: errTraceEnds}
	}
	select {
	case a := <-got:
		return a
	case <-d.shut:
		return answer{err: errTraceEnds}
	}
}

var errTraceEnds = errors.New("the trace is ending")

// trusted says whether the other side is root or the same user.
func trusted(conn net.Conn) bool {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := unixConn.SyscallConn()
	if err != nil {
		return false
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return err == nil && credErr == nil && (cred.Uid == 0 || int(cred.Uid) == os.Geteuid())
}

// reply answers a question from within the trace's loop.
func (r *traceRun) reply(q question) {
	text, err := r.blocksOf(q.pid)
	q.answer <- answer{text, err}
}

func (r *traceRun) blocksOf(pid int) ([]byte, error) {
	s, err := r.finish(extras{blocks: true})
	if err != nil {
		return nil, err
	}
	one := onlyProcess(s, pid)
	if len(one.Processes) == 0 {
		return nil, fmt.Errorf("process %d is not traced", pid)
	}
	var out bytes.Buffer
	if err := profile.Write(&out, one); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// errNoTrace is returned by askTraces when there is none that runs.
var errNoTrace = errors.New("no running trace")

// askTraces finds the running trace of a process and returns its profile, with blocks.
func askTraces(ctx context.Context, pid int) (*profile.Snapshot, error) {
	text, err := os.ReadFile("/proc/net/unix")
	if err != nil {
		return nil, fmt.Errorf("look for running traces: %w", err)
	}
	names := doorNames(string(text))
	var errs []error
	for _, name := range names {
		s, err := askTrace(ctx, name, pid)
		if err == nil {
			return s, nil
		}
		// The door was closed since it was listed; the connections that it took keep its name in the list for a while.
		if errors.Is(err, unix.ECONNREFUSED) {
			continue
		}
		errs = append(errs, fmt.Errorf("trace %s: %w", strings.TrimPrefix(name, doorPrefix), err))
	}
	if len(errs) == 0 {
		return nil, errNoTrace
	}
	return nil, errors.Join(errs...)
}

// doorNames are the doors in /proc/net/unix, without the at sign of abstract names.
func doorNames(text string) []string {
	var names []string
	seen := map[string]bool{}
	for line := range strings.Lines(text) {
		fields := append([]string{""}, strings.Fields(line)...)
		name := strings.TrimPrefix(fields[len(fields)-1], "@")
		if ok, _ := path.Match(doorPrefix+"[0-9]*", name); ok && !seen[name] {
			seen[name] = true // connections that were accepted have the name too
			names = append(names, name)
		}
	}
	return names
}

func askTrace(ctx context.Context, name string, pid int) (*profile.Snapshot, error) {
	ctx, cancel := context.WithTimeout(ctx, doorPatience)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", "@"+name)
	if err != nil {
		return nil, fmt.Errorf("ask: %w", err)
	}
	defer conn.Close()
	context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	if !trusted(conn) {
		return nil, errors.New("it belongs to another user")
	}
	if _, err := fmt.Fprintln(conn, pid); err != nil {
		return nil, fmt.Errorf("ask: %w", err)
	}
	in := bufio.NewReader(io.LimitReader(conn, maxAnswer))
	line, err := in.ReadBytes('\n')
	var head answerHead
	if err == nil {
		err = json.Unmarshal(line, &head)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("read answer: %w", err)
	case head.Error != "":
		return nil, errors.New(profile.Sanitize(head.Error))
	}
	s, err := profile.Read(in)
	if err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return s, nil
}
