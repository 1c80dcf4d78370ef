package target

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
)

// fixture compiles the launched program with its library; kind is dynamic, static, static-pie or musl.
func fixture(t *testing.T, kind string) string {
	t.Helper()
	dir := t.TempDir()
	os.Chmod(dir, 0o755)
	for d := dir; d != "/" && d != "."; d = filepath.Dir(d) { // other users must get to it
		if st, err := os.Stat(d); err == nil && st.Mode().Perm()&1 == 0 && strings.Contains(d, t.Name()[:4]) {
			os.Chmod(d, st.Mode().Perm()|0o055)
		}
	}
	cc, flags := "gcc", []string{}
	switch kind {
	case "static":
		flags = []string{"-static"}
	case "static-pie":
		flags = []string{"-static-pie"}
	case "no-pie":
		flags = []string{"-no-pie"}
	case "musl":
		cc = "musl-gcc"
	}
	if _, err := exec.LookPath(cc); err != nil {
		t.Skipf("needs %s", cc)
	}
	main, lib := filepath.Join(dir, "main"), filepath.Join(dir, "liblaunched.so")
	build := [][]string{
		{cc, "-O1", "-fPIC", "-shared", "-o", lib, "testdata/lib.c"},
		append([]string{cc, "-O1", "-o", main, "testdata/main.c", lib, "-Wl,-rpath," + dir}, flags...),
	}
	if strings.HasPrefix(kind, "static") {
		build = [][]string{append([]string{cc, "-O1", "-o", main, "testdata/main.c", "testdata/lib.c"}, flags...)}
	}
	for _, args := range build {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	return main
}

// withOutput runs f with this process's standard output, which the command inherits, in a file.
func withOutput(t *testing.T, f func()) string {
	t.Helper()
	file, err := os.CreateTemp(t.TempDir(), "out")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	old := os.Stdout
	os.Stdout = file
	defer func() { os.Stdout = old }()
	f()
	text, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// mappedCode are the files with code in a process.
func mappedCode(t *testing.T, pid int) map[string]bool {
	t.Helper()
	ranges, err := memory.FS{}.Maps(pid)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]bool{}
	for i := range ranges {
		if ranges[i].Perms&memory.Exec != 0 && ranges[i].IsFile() {
			files[filepath.Base(ranges[i].Path)] = true
		}
	}
	return files
}

func TestEveryLibraryIsShownBeforeItsCodeRuns(t *testing.T) {
	for _, kind := range []string{"dynamic", "no-pie", "static", "static-pie", "musl"} {
		t.Run(kind, func(t *testing.T) {
			program := fixture(t, kind)
			var shown []map[string]bool
			var code int
			out := withOutput(t, func() {
				child, err := Start(Command{Args: []string{program, "7"}, Mapped: func(pid int) error {
					shown = append(shown, mappedCode(t, pid))
					return nil
				}})
				if err != nil {
					t.Fatal(err)
				}
				if code, err = child.Wait(); err != nil {
					t.Fatal(err)
				}
			})
			if code != 7 || !strings.HasPrefix(out, "block yes") || !strings.Contains(out, "TracerPid:\t0\n") {
				t.Errorf("exit code %d, output:\n%s", code, out)
			}
			first, last := shown[0], shown[len(shown)-1]
			if !first["main"] || first["libc.so.6"] || first["liblaunched.so"] {
				t.Errorf("at exec: %v", first)
			}
			if strings.HasPrefix(kind, "static") {
				return
			}
			if !last["liblaunched.so"] || kind != "musl" && !last["libc.so.6"] {
				t.Errorf("at the end: %v", last)
			}
		})
	}
}

func TestTheExitStatusIsPassedOn(t *testing.T) {
	program := fixture(t, "dynamic")
	for arg, want := range map[string]int{"0": 0, "131": 131, "kill": 128 + 9, "illegal": 128 + 4} {
		withOutput(t, func() {
			child, err := Start(Command{Args: []string{program, arg}})
			if err != nil {
				t.Fatal(err)
			}
			if code, err := child.Wait(); err != nil || code != want {
				t.Errorf("%s: exit code %d, %v; want %d", arg, code, err, want)
			}
		})
	}
}

func TestAScriptIsStartedThroughItsInterpreter(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit $1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	child, err := Start(Command{Args: []string{script, "19"}})
	if err != nil {
		t.Fatal(err)
	}
	if code, err := child.Wait(); err != nil || code != 19 {
		t.Errorf("exit code %d, %v", code, err)
	}
}

func TestPrivilegesAreDropped(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	program := fixture(t, "dynamic")
	for text, want := range map[string]string{
		"nobody":    "uid 65534 gid 65534 home /nonexistent\n",
		"4099":      "uid 4099 gid 4099 home /\n",
		"4099:4111": "uid 4099 gid 4111 home /\n",
		"nobody:0":  "uid 65534 gid 0 home /nonexistent\n",
	} {
		out := withOutput(t, func() {
			child, err := Start(Command{Args: []string{program}, User: text})
			if err != nil {
				t.Fatal(err)
			}
			child.Wait()
		})
		if !strings.Contains(out, want) || strings.Contains(out, "Groups:\t0") {
			t.Errorf("--user %s gives:\n%s", text, out)
		}
	}
	for _, text := range []string{"no-such-user", "nobody:no-such-group", "-1", ":"} {
		if _, err := Start(Command{Args: []string{program}, User: text}); err == nil || !strings.Contains(err.Error(), "--user") {
			t.Errorf("--user %s: %v", text, err)
		}
	}
}

func TestAnErrorWhileItStandsStillEndsTheProcess(t *testing.T) {
	program := fixture(t, "dynamic")
	stop := errors.New("no probes")
	for wanted := 1; wanted <= 3; wanted++ {
		calls, pid := 0, 0
		_, err := Start(Command{Args: []string{program}, Mapped: func(p int) error {
			pid = p
			if calls++; calls == wanted {
				return stop
			}
			return nil
		}})
		if !errors.Is(err, stop) {
			t.Errorf("call %d: %v", wanted, err)
		}
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); err == nil {
			t.Errorf("call %d: process %d is there", wanted, pid)
		}
	}
}

func TestWhatCannotBeStartedIsSaid(t *testing.T) {
	for _, args := range [][]string{nil, {""}, {"no-such-program"}, {"/etc/passwd"}, {t.TempDir()}} {
		if _, err := Start(Command{Args: args}); err == nil {
			t.Errorf("%q starts", args)
		}
	}
}
