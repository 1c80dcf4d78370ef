package main

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/allocsnoop/allocsnoop/profile"
)

func TestDoorsAreFoundAmongTheSockets(t *testing.T) {
	const text = `Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 99901 @allocsnoop-trace-942
0000000000000000: 00000003 00000000 00000000 0001 03 99902 @allocsnoop-trace-942
0000000000000000: 00000003 00000000 00000000 0001 03 99903
0000000000000000: 00000002 00000000 00010000 0001 01 99904 /run/allocsnoop-trace-1
0000000000000000: 00000002 00000000 00010000 0001 01 99905 @allocsnoop-trace-
0000000000000000: 00000002 00000000 00010000 0001 01 99906 @other-trace-7

0000000000000000: 00000002 00000000 00010000 0001 01 99907 @allocsnoop-trace-17`
	want := []string{"allocsnoop-trace-942", "allocsnoop-trace-17"}
	if d := cmp.Diff(want, doorNames(text)); d != "" {
		t.Error(d)
	}
}

// openTestDoor answers each question with a profile of process 7, and with an error for every other one.
func openTestDoor(t *testing.T) *door {
	t.Helper()
	d, err := openDoor()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	go func() {
		for {
			select {
			case <-d.shut:
				return
			case q := <-d.asked():
				if q.pid != 7 {
					q.answer <- answer{err: errors.New("process " + strconv.Itoa(q.pid) + " is not\x1b[31m traced")}
					continue
				}
				var text strings.Builder
				err := profile.Write(&text, &profile.Snapshot{
					HasBlocks: true, Processes: []*profile.Process{{PID: 7}},
					Stacks: []*profile.Stack{{Kind: profile.KindMalloc, PID: 7, AllocObjects: 1, AllocBytes: 23, Blocks: []profile.Block{{Addr: 4096, Size: 23, Weight: 1}}}},
				})
				q.answer <- answer{[]byte(text.String()), err}
			}
		}
	}()
	return d
}

func TestARunningTraceAnswersWithBlocks(t *testing.T) {
	openTestDoor(t)
	s, err := askTraces(context.Background(), 7)
	if err != nil {
		t.Fatal(err)
	}
	if !s.HasBlocks || len(s.Stacks) != 1 || len(s.Stacks[0].Blocks) != 1 || s.Stacks[0].Blocks[0].Size != 23 {
		t.Errorf("the answer is %+v", s)
	}
	_, err = askTraces(context.Background(), 8)
	if err == nil || !strings.Contains(err.Error(), "process 8 is not") || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("of a process that is not traced: %q", err)
	}
}

func TestATraceThatEndsSaysSo(t *testing.T) {
	d, err := openDoor()
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		<-d.questions
		d.close() // without an answer
	}()
	_, err = askTraces(context.Background(), 7)
	if err == nil || !strings.Contains(err.Error(), errTraceEnds.Error()) {
		t.Errorf("got %v, want %v", err, errTraceEnds)
	}
	if _, err = askTraces(context.Background(), 7); !errors.Is(err, errNoTrace) {
		t.Errorf("after its end: %v, want %v", err, errNoTrace)
	}
	d.close() // a second time
}

func TestNonsenseAtTheDoorIsRefused(t *testing.T) {
	openTestDoor(t)
	for _, tt := range []struct{ name, question, want string }{
		{"no number", "nginx\n", "the question is no pid"},
		{"no end of line", strings.Repeat("9", 100), "the question is not complete"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			conn, err := net.Dial("unix", "@"+doorPrefix+strconv.Itoa(os.Getpid()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := conn.Write([]byte(tt.question)); err != nil {
				t.Fatal(err)
			}
			text := make([]byte, 256)
			n, _ := conn.Read(text)
			if !strings.Contains(string(text[:n]), tt.want) {
				t.Errorf("the answer is %q, want %q in it", text[:n], tt.want)
			}
		})
	}
}

// Whoever sits behind a trace's name may say anything.
func TestAnswersThatAreNoneAreErrors(t *testing.T) {
	for _, tt := range []struct{ name, answer string }{
		{"nothing", ""},
		{"no JSON", "hello\n"},
		{"no profile", "{}\nhello"},
		{"an endless line", strings.Repeat("x", 1<<16)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := doorPrefix + strconv.Itoa(os.Getpid())
			listener, err := net.Listen("unix", "@"+name)
			if err != nil {
				t.Fatal(err)
			}
			defer listener.Close()
			go func() {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Read(make([]byte, 16))
				_, _ = conn.Write([]byte(tt.answer))
				conn.Close()
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			if _, err := askTrace(ctx, name, 7); err == nil {
				t.Error("it was taken for an answer")
			}
		})
	}
}
