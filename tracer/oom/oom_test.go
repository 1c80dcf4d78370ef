package oom

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const id64 = "4f1c8d9a0b2e3f4a5b6c7d8e9f00112233445566778899aabbccddeeff001122"

var now = time.Date(2026, 11, 25, 0, 0, 0, 0, time.UTC)

func kills(t *testing.T, name string) []*Kill {
	t.Helper()
	f, err := os.Open(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var list []*Kill
	if err := Read(f, now, func(k *Kill) error { list = append(list, k); return nil }); err != nil {
		t.Fatal(err)
	}
	return list
}

// brief is what of a kill the table compares.
func brief(k *Kill) string {
	v := func(p *uint64) string {
		if p == nil {
			return "-"
		}
		return strconv.FormatUint(*p/1024, 10)
	}
	i := func(p *int) string {
		if p == nil {
			return "-"
		}
		return strconv.Itoa(*p)
	}
	return fmt.Sprintf("%s %d %s uid %s anon %s file %s shmem %s tables %s score %s adj %s | by %d %s order %d | usage %s of %s hits %s | %d candidates, kernel %s",
		k.Scope, k.PID, k.Comm, i(k.UID), v(k.Anon), v(k.File), v(k.Shmem), v(k.PageTables), i(k.Score), i(k.ScoreAdj),
		k.Invoker.PID, k.Invoker.Comm, k.Invoker.Order, v(k.Usage), v(k.Limit), show(fmt.Sprint(deref(k.Failures)), 20), k.Candidates, k.Kernel)
}

func deref(p *uint64) any {
	if p == nil {
		return "-"
	}
	return *p
}

func TestEveryKernelsFormIsRead(t *testing.T) {
	tests := []struct {
		file string
		want []string
	}{
		{"3.10-memcg.log", []string{"cgroup 942 nginx uid - anon 519203 file 1001 shmem 0 tables - score 1991 adj 997 | by 942 nginx order 0 | usage 524288 of 524288 hits 26 | 2 candidates, kernel 3.10.0-1160.el7.x86_64"}},
		{"3.10-uid.log", []string{"system 2017 sh uid 1001 anon 519203 file 1001 shmem 7 tables - score - adj - | by 2001 java order 0 | usage - of - hits - | 1 candidates, kernel 3.10.0-1160.el7.x86_64"}},
		{"4.19-memcg.log", []string{"cgroup 53 php uid - anon 13001 file 0 shmem 0 tables - score 796 adj 0 | by 51 php order 0 | usage 65536 of 65536 hits 31 | 1 candidates, kernel 4.19.0-27-amd64"}},
		{"4.4-system.log", []string{"system 20811 java uid - anon 3600011 file 17 shmem - tables - score 907 adj 0 | by 20811 java order 0 | usage - of - hits - | 2 candidates, kernel 4.4.0-210-generic"}},
		{"4.15-nodemask.log", []string{"cgroup 1201 php-fpm uid - anon 119003 file 1009 shmem 13 tables - score 1881 adj 968 | by 1201 php-fpm order 0 | usage 131072 of 131072 hits 1009 | 2 candidates, kernel 4.15.0-213-generic"}},
		{"5.10-v2.log", []string{"cgroup 812 python3 uid 1000 anon 256003 file 19 shmem 0 tables 596 score - adj 0 | by 812 python3 order 0 | usage 262144 of 262144 hits 53 | 1 candidates, kernel 5.10.0-28-amd64"}},
		{"5.15-nodes.log", []string{"nodes 631 sim uid 1003 anon 60013 file 7 shmem 0 tables 144 score - adj 0 | by 631 sim order 0 | usage - of - hits - | 0 candidates, kernel 5.15.0-91-generic"}},
		{"sysrq.log", []string{"system 2221 firefox uid 1000 anon 8009 file 701 shmem 61 tables 40 score - adj 100 | by 3217 kworker/1:2 order -1 | usage - of - hits - | 0 candidates, kernel 6.1.0-18-amd64"}},
		{"5.0-system.log", []string{"system 73 db,main uid 107 anon 7000003 file 0 shmem 11 tables 14000 score - adj -900 | by 71 exe order 3 | usage - of - hits - | 0 candidates, kernel 5.4.0-200-generic"}},
		{"6.18-memcg.log", []string{"cgroup 5938 exe uid 0 anon 48512 file 4288 shmem 0 tables 192 score - adj 3 | by 5938 exe order 0 | usage 49152 of 49152 hits 45 | 2 candidates, kernel 6.18.44"}},
		{"6.1-group.log", []string{
			"cgroup 11 hog uid 0 anon 503 file 0 shmem 0 tables 12 score - adj 0 | by 0 hog order 0 | usage 1031 of 1031 hits 7 | 0 candidates, kernel ",
			"cgroup 13 hog uid 0 anon 509 file 0 shmem 0 tables 12 score - adj 0 | by 0 hog order 0 | usage 1031 of 1031 hits 7 | 0 candidates, kernel ",
		}},
		{"journal.log", []string{
			"system 7 a uid 1 anon 13 file 11 shmem 0 tables 4 score - adj 0 | by 0  order 0 | usage - of - hits - | 0 candidates, kernel ",
			"system 8 b uid - anon 13 file 11 shmem 0 tables - score - adj - | by 0  order 0 | usage - of - hits - | 0 candidates, kernel ",
		}},
		{"cut.log", []string{"cgroup 99 evil) score 3 (x uid 0 anon 13 file 11 shmem 0 tables 4 score - adj 0 | by 0  order 0 | usage - of - hits - | 0 candidates, kernel "}},
	}
	for _, tt := range tests {
		t.Run(tt.file, func(t *testing.T) {
			var got []string
			for _, k := range kills(t, tt.file) {
				got = append(got, brief(k))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestGroupsAndContainersAreRead(t *testing.T) {
	const pod = "/kubepods/burstable/pod0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
	k := kills(t, "6.18-memcg.log")[0]
	if k.LimitCgroup != pod || k.TaskCgroup != pod+"/"+id64 {
		t.Errorf("limit of %q, victim in %q", k.LimitCgroup, k.TaskCgroup)
	}
	if k.Container.ID != id64 || k.Container.Pod != "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9" {
		t.Errorf("container %+v", k.Container)
	}
	if m := k.meaning(); !strings.Contains(m, "the pod's limit was met, not the container's") || !strings.Contains(m, "99 %") {
		t.Errorf("meaning %q", m)
	}
	k = kills(t, "3.10-memcg.log")[0]
	if k.LimitCgroup != k.TaskCgroup || k.Container.ID != id64 || k.Container.Runtime != "docker" {
		t.Errorf("got %+v in %q", k.Container, k.TaskCgroup)
	}
	k = kills(t, "4.19-memcg.log")[0]
	if k.LimitCgroup != "/docker" || !strings.Contains(k.meaning(), "above its own group") || !strings.Contains(k.meaning(), "neighbours") {
		t.Errorf("limit of %q: %s", k.LimitCgroup, k.meaning())
	}
	group := kills(t, "6.1-group.log")
	if k := group[0]; k.LimitCgroup != "/a,b,task=x" || k.TaskCgroup != "/a,b,task=x/c" || k.Group || !group[1].Group {
		t.Errorf("limit of %q, victim in %q, group %v %v", k.LimitCgroup, k.TaskCgroup, k.Group, group[1].Group)
	}
}

func TestWhoeverWasChosenForAnotherReasonIsExplained(t *testing.T) {
	for file, want := range map[string]string{
		"sysrq.log":      "somebody told the kernel to kill (SysRq f); no memory was missing",
		"5.15-nodes.log": "the NUMA nodes it may use had no memory left; a cpuset or a memory policy",
		"4.4-system.log": "the machine had no memory left; no limit was met",
	} {
		if d := kills(t, file)[0].Document(); !strings.Contains(d.Explanation, want) {
			t.Errorf("%s: the explanation %q lacks %q", file, d.Explanation, want)
		}
	}
	if k := kills(t, "5.15-nodes.log")[0]; !k.Asker || !strings.Contains(k.chosenText(), "whoever asks is killed") {
		t.Errorf("chosen: %s", k.chosenText())
	}
	if k := kills(t, "4.4-system.log")[0]; !strings.Contains(k.invokerText(), "the victim itself") {
		t.Errorf("asked by %s, but it was a thread of the victim", k.invokerText())
	}
}

func TestTimesOfEveryLogAreRead(t *testing.T) {
	utc := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339Nano, s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	tests := []struct {
		name, line string
		want       Line
	}{
		{"dmesg", "[    1.500000] x", Line{Uptime: 1500 * time.Millisecond, Text: "x"}},
		{"dmesg with caller", "[    1.500000][ T12] x", Line{Uptime: 1500 * time.Millisecond, Text: "x"}},
		{"dmesg -r", "<6>[    1.500000] x", Line{Uptime: 1500 * time.Millisecond, Text: "x"}},
		{"dmesg -T", "[Tue Nov 24 23:12:51 2026] x", Line{Time: utc("2026-11-24T23:12:51Z"), Text: "x"}},
		{"dmesg -T with caller", "[Tue Nov 24 23:12:51 2026][  T12] x", Line{Time: utc("2026-11-24T23:12:51Z"), Text: "x"}},
		{"dmesg iso", "2026-11-24T23:12:51,989095+01:00 x y", Line{Time: utc("2026-11-24T22:12:51.989095Z"), Text: "x y"}},
		{"journal iso", "2026-11-24T23:12:51+0100 host kernel: x", Line{Time: utc("2026-11-24T22:12:51Z"), Text: "x"}},
		{"syslog", "Nov  4 23:12:51 host kernel: [ 77.000001] x", Line{Time: utc("2026-11-04T23:12:51Z"), Text: "x"}},
		{"syslog of last year", "Dec 24 23:12:51 host kernel: x", Line{Time: utc("2025-12-24T23:12:51Z"), Text: "x"}},
		{"another program", "Nov  4 23:12:51 host sshd[7]: x", Line{Time: utc("2026-11-04T23:12:51Z")}},
		{"nothing in front", "x", Line{Text: "x"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := ParseLine(tt.line, now)
			if !got.Time.Equal(tt.want.Time) || got.Uptime != tt.want.Uptime || got.Text != tt.want.Text {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestRecordsOfKmsgAreRead(t *testing.T) {
	l, ok := parseRecord("3,1234,5678901,-,caller=T7;Killed process 7 (a\\x1b[31m\\x5cx)\n SUBSYSTEM=x\n")
	if !ok || l.Uptime != 5678901*time.Microsecond || l.Text != "Killed process 7 (a\x1b[31m\\x)" {
		t.Errorf("got %+v, %v", l, ok)
	}
	for _, record := range []string{"", "x", "3,1;x", "12,1,2,-;a user wrote this", "a,1,2,-;x", "3,1,x,-;x"} {
		if l, ok := parseRecord(record); ok {
			t.Errorf("%q is taken: %+v", record, l)
		}
	}
}

func TestExplanationsAreCleanAndFit(t *testing.T) {
	files, _ := filepath.Glob("testdata/*.log")
	for _, file := range files {
		for _, k := range kills(t, filepath.Base(file)) {
			k.Comm += "\x1b[31m\n"
			k.TaskCgroup += "\n\x1b"
			lines := []string{k.Headline()}
			for _, f := range k.Facts() {
				lines = append(lines, fmt.Sprintf("  %-9s  %s", f.Name, f.Text))
			}
			for _, line := range lines {
				if strings.ContainsAny(line, "\x1b\n") || len([]rune(line)) > 100 {
					t.Errorf("%s: %d columns: %q", file, len([]rune(line)), line)
				}
			}
			if _, err := json.Marshal(k.Document()); err != nil {
				t.Error(err)
			}
		}
	}
}

// A real kill on this machine, by a real limit: the log must tell who it was.
func TestARealKillIsReadFromTheLog(t *testing.T) {
	group := "/sys/fs/cgroup/memory"
	limit := "memory.limit_in_bytes"
	if _, err := os.Stat(group); err != nil {
		group, limit = "/sys/fs/cgroup", "memory.max"
	}
	name := fmt.Sprintf("allocsnoop-oom-test-%d", os.Getpid())
	group = filepath.Join(group, name)
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("needs root and a memory controller: %v", err)
	}
	t.Cleanup(func() {
		for range 500 {
			if os.Remove(group) == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("group %s cannot be removed", group)
	})
	if err := os.WriteFile(filepath.Join(group, limit), []byte("33554432"), 0); err != nil {
		t.Skipf("needs a writable memory limit: %v", err)
	}
	kmsg, err := OpenKmsg()
	if err != nil {
		t.Skipf("needs /dev/kmsg: %v", err)
	}
	defer kmsg.Close()
	if err := kmsg.SeekEnd(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	found := make(chan *Kill, 16)
	go func() {
		done := errors.New("done")
		kmsg.Kills(ctx, true, func(k *Kill) error {
			if !strings.Contains(k.TaskCgroup, name) {
				return nil // of other tests
			}
			found <- k
			return done
		})
		close(found)
	}()
	// tail keeps a line without end in memory.
	cmd := exec.Command("/bin/sh", "-c", `echo $$ >"$0/cgroup.procs" && exec tail -n 1 /dev/zero`, group)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	cmd.Wait()
	k := <-found
	if k == nil {
		t.Fatal("the log tells of no kill")
	}
	if k.PID != pid || k.Comm != "tail" || k.Scope != Cgroup || k.Limit == nil || *k.Limit != 33554432 ||
		!strings.HasSuffix(k.LimitCgroup, name) || k.UID == nil || *k.UID != 0 || k.Anon == nil || *k.Anon < 16<<20 {
		t.Errorf("got %s, limit of %s", brief(k), k.LimitCgroup)
	}
	if age := time.Since(k.Time); age < -time.Minute || age > 5*time.Minute {
		t.Errorf("the kill was %v ago", age)
	}
}

func FuzzRead(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.log")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Add([]byte("3,1234,5678901,-,caller=T7;Killed process 7 (a\\x1b) total-vm:1kB, anon-rss:1kB, file-rss:1kB"))
	f.Fuzz(func(t *testing.T, text []byte) {
		parseRecord(string(text))
		err := Read(bytes.NewReader(text), now, func(k *Kill) error {
			for _, fact := range append(k.Facts(), Fact{"", k.Headline()}) {
				if strings.ContainsAny(fact.Text, "\x1b\n") {
					t.Errorf("%q", fact)
				}
			}
			_, err := json.Marshal(k.Document())
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}
