package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// machine writes a fake procfs and sysfs; a file named with a trailing slash is a directory.
func machine(t *testing.T, files map[string]string) Machine {
	t.Helper()
	root := t.TempDir()
	for name, content := range files {
		path := filepath.Join(root, name)
		dir := path
		if !strings.HasSuffix(name, "/") {
			dir = filepath.Dir(path)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if dir == path {
			continue
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Machine{Proc: filepath.Join(root, "proc"), Sys: filepath.Join(root, "sys")}
}

func TestChecksOfAMachine(t *testing.T) {
	full := "CapEff:\t000001ffffffffff\n"
	for _, tt := range []struct {
		name   string
		files  map[string]string
		check  func(Machine) Check
		want   State
		detail string
	}{
		{"all capabilities", map[string]string{"proc/self/status": full}, Machine.capabilities, OK, "BPF PERFMON"},
		{"no capabilities", map[string]string{"proc/self/status": "CapEff:\t0000000000000000\n"}, Machine.capabilities, Missing, "none of those"},
		{"the administrator's alone", map[string]string{"proc/self/status": "CapEff:\t0000000000200000\n"}, Machine.capabilities, Limited, "SYS_ADMIN"},
		{"the two that tracing needs", map[string]string{"proc/self/status": fmt.Sprintf("CapEff:\t%016x\n", 1<<unix.CAP_BPF|1<<unix.CAP_PERFMON)},
			Machine.capabilities, Limited, "BPF PERFMON"},
		{"a status that says nothing", map[string]string{"proc/self/status": "Name:\tx\n"}, Machine.capabilities, Limited, "no CapEff"},
		{"BTF", map[string]string{"sys/kernel/btf/vmlinux": "x"}, Machine.btf, OK, ""},
		{"no BTF", nil, Machine.btf, Missing, "no "},
		{"tracefs at its own place", map[string]string{"sys/kernel/tracing/events/": ""}, Machine.tracefs, OK, "tracing"},
		{"tracefs under debugfs", map[string]string{"sys/kernel/debug/tracing/events/": ""}, Machine.tracefs, OK, "debug/tracing"},
		{"tracefs can be mounted", map[string]string{"proc/filesystems": "nodev\ttracefs\n"}, Machine.tracefs, OK, "private"},
		{"no tracefs", map[string]string{"proc/filesystems": "nodev\tproc\n"}, Machine.tracefs, Limited, "not in"},
		{"lockdown is not built in", nil, Machine.lockdown, OK, "off"},
		{"lockdown is off", map[string]string{"sys/kernel/security/lockdown": "[none] integrity confidentiality\n"}, Machine.lockdown, OK, "none"},
		{"lockdown of integrity", map[string]string{"sys/kernel/security/lockdown": "none [integrity] confidentiality\n"}, Machine.lockdown, OK, "integrity"},
		{"lockdown of confidentiality", map[string]string{"sys/kernel/security/lockdown": "none integrity [confidentiality]\n"}, Machine.lockdown, Missing, "confidentiality"},
		{"cgroup version 2", map[string]string{"sys/fs/cgroup/cgroup.controllers": "memory\n"}, Machine.cgroup, OK, "version 2"},
		{"cgroup version 1", map[string]string{"sys/fs/cgroup/memory/": ""}, Machine.cgroup, OK, "version 1"},
		{"no cgroups", nil, Machine.cgroup, Limited, "none"},
		{"perf events", map[string]string{"proc/sys/kernel/perf_event_paranoid": "2\n"}, Machine.paranoid, OK, "is 2,"},
		{"no perf events", nil, Machine.paranoid, Missing, "not in"},
		{"no procfs", nil, Machine.pidNamespace, Limited, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.check(machine(t, tt.files))
			if got.State != tt.want || !strings.Contains(got.Detail, tt.detail) {
				t.Errorf("%+v, want %s, %q", got, tt.want, tt.detail)
			}
			if (got.State == OK) != (got.Fix == "") {
				t.Errorf("state %s with fix %q", got.State, got.Fix)
			}
		})
	}
}

func TestVersions(t *testing.T) {
	for release, want := range map[string]string{
		"5.10.0-46-amd64": "5 10 true", "6.18.44-fc-v782": "6 18 true", "7.0-rc1": "7 0 true", "6.1": "6 1 true", "x": "0 0 false",
	} {
		major, minor, ok := version(release)
		if got := fmt.Sprint(major, minor, ok); got != want {
			t.Errorf("%s: %s, want %s", release, got, want)
		}
	}
}

func TestFeatureStates(t *testing.T) {
	for _, tt := range []struct {
		err    error
		want   State
		detail string
	}{
		{nil, OK, "good"},
		{fmt.Errorf("x: %w", ebpf.ErrNotSupported), Limited, "not in this kernel"},
		{unix.EPERM, Limited, "not allowed"},
		{errors.New("strange\nlog"), Limited, "strange"},
	} {
		if got := feature("f", tt.err, Limited, "good", "fix"); got.State != tt.want || !strings.Contains(got.Detail, tt.detail) {
			t.Errorf("%v: %+v", tt.err, got)
		}
	}
}

func TestThisMachineIsAble(t *testing.T) {
	needRoot(t)
	for _, c := range (Machine{}).Checks() {
		if c.Name == "" || c.State == "" || c.Detail == "" {
			t.Errorf("incomplete: %+v", c)
		}
	}
	if !Able((Machine{}).Checks()) {
		t.Errorf("tests of tracing run here, so it must be able: %+v", (Machine{}).Checks())
	}
}
