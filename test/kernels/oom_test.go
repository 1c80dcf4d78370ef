package kernels

import (
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"

	"github.com/google/pprof/profile"
)

// oomScript lets the OOM killer take a process of a group with memory.max and memory.swap.max, while it is traced. The
// target begins when the probes are live, which makes the ready file.
const oomScript = `
give() { echo "profile $1 $2"; base64 /tmp/$1.pb.gz; echo end; }
for life in "bomb 101" "early-thread-forks 13" "early-headless 5" "shared 11"; do
	name=${life% *}; rm -f /tmp/ready; mkfifo /tmp/$name
	/life $life /life </tmp/$name >/tmp/out &
	pid=$!
	exec 3>/tmp/$name
	while ! grep -q ready /tmp/out; do sleep 0.1; done
	(while [ ! -e /tmp/ready ]; do sleep 0.1; done; echo go >&3) &
	allocsnoop --pid $pid --mode exact --max-live 10000 --ready-file /tmp/ready -o /tmp/$name.pb.gz >/tmp/log 2>&1
	code=$?
	[ $code = 0 ] || cat /tmp/log
	give $name $code
done
rm -f /tmp/ready
g=/sys/fs/cgroup/pods
mkdir $g && echo 50331648 >$g/memory.max || exit 1
mkfifo /tmp/go
(echo 0 >$g/cgroup.procs; exec /grower 0 /tmp/ledger </tmp/go) &
exec 3>/tmp/go
while ! grep -q grower /proc/$!/comm; do sleep 0.1; done
(while [ ! -e /tmp/ready ]; do sleep 0.1; done; echo go >&3) &
allocsnoop --cgroup /pods --until-oom --content --mode exact --ready-file /tmp/ready -o /tmp/oom.pb.gz >/tmp/log 2>&1
code=$?
cat /tmp/log
echo "ledger $(od -An -tu8 /tmp/ledger)"
give oom $code
allocsnoop oom
`

var ledgerLine = regexp.MustCompile(`(?m)^ledger +(\d+)$`)

// Before 6.13 other means keep inherited probes alive, so that the lives of processes are run here, too.
func TestLivesOfProcessesAndAKillByAV2LimitAreRecorded(t *testing.T) {
	if *kernelList == "" {
		t.Skip("needs -kernels")
	}
	grower := filepath.Join(t.TempDir(), "grower")
	if out, err := exec.Command("gcc", "-O1", "-g", "-static", "-o", grower, "../service/testdata/grower.c").CombinedOutput(); err != nil {
		t.Fatalf("compile fixture: %v\n%s", err, out)
	}
	life := filepath.Join(t.TempDir(), "life")
	if out, err := exec.Command("gcc", "-O1", "-g", "-static", "-pthread", "-o", life, "../service/testdata/life.c").CombinedOutput(); err != nil {
		t.Fatalf("compile fixture: %v\n%s", err, out)
	}
	binary := goBinary(t, "cmd/allocsnoop")
	eachKernel(t, func(t *testing.T, k *Kernel) {
		image := newImage(t)
		for name, host := range map[string]string{"/bin/allocsnoop": binary, "/grower": grower, "/life": life} {
			if err := image.AddBinary(name, host); err != nil {
				t.Fatal(err)
			}
		}
		result := boot(t, k, Job{Image: image, Command: []string{"sh", "-c", oomScript}})
		t.Logf("output:\n%s", profileText.ReplaceAll(result.Output, nil))
		profiles := splitProfiles(t, result.Output)
		for name, want := range lives {
			checkLife(t, name, profiles[name], want)
		}
		p := profiles["oom"]
		m := ledgerLine.FindSubmatch(result.Output)
		if p == nil || m == nil {
			t.Fatal("no profile, or no ledger")
		}
		counted, err := strconv.ParseInt(string(m[1]), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		checkGrower(t, p, counted)
		for _, want := range []string{
			"profile oom 0", "the OOM killer took 1 process", "was killed by signal 9", "passed 70 %", "JSON {id, state, data}",
			"its cgroup met a memory limit", "of cgroup  /pods",
		} {
			if !regexp.MustCompile(regexp.QuoteMeta(want)).Match(result.Output) {
				t.Errorf("the output lacks %q", want)
			}
		}
	})
}

// lives says how many blocks each stage of ../service/testdata/life.c makes in the scenarios, by what the script asks for.
var lives = map[string]map[string]int64{
	"bomb":               {"in_child": 101 * 5, "in_grandchild": 101 * 11, "in_parent": 7},
	"early-thread-forks": {"in_child": 13 * 5, "in_thread": 13},
	"early-headless":     {"in_child": 5, "in_thread": 5 * 13},
	"shared":             {"in_child": 11 * 5, "in_parent": 7},
}

func checkLife(t *testing.T, name string, p *profile.Profile, want map[string]int64) {
	t.Helper()
	if p == nil {
		t.Errorf("no profile %s", name)
		return
	}
	for function, blocks := range want {
		var got int64
		for _, s := range p.Sample {
			if s.Label["kind"][0] == "malloc" && hasFunction(s, function) {
				got += s.Value[0]
			}
		}
		if got != blocks {
			t.Errorf("%s: %d blocks through %s, want %d", name, got, function, blocks)
		}
	}
}

// profileText is the body of a profile in a script's output.
var profileText = regexp.MustCompile(`(?ms)^H4sI.*?^end$`)

func checkGrower(t *testing.T, p *profile.Profile, counted int64) {
	t.Helper()
	var got int64
	for _, s := range p.Sample {
		if s.Label["kind"][0] == "malloc" && hasFunction(s, "grow") {
			got += s.Value[3]
		}
	}
	t.Logf("the target counted %d bytes, the profile has %d (%.3f %%)", counted, got, 100*float64(got)/float64(counted))
	if counted < 40<<20 || got < counted*99/100 || got > counted+10007 {
		t.Errorf("%d bytes through grow, the target counted %d", got, counted)
	}
}

func hasFunction(s *profile.Sample, name string) bool {
	for _, l := range s.Location {
		for _, line := range l.Line {
			if line.Function.Name == name {
				return true
			}
		}
	}
	return false
}
