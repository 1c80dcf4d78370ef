package kernels

import (
	"bytes"
	"encoding/base64"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/pprof/profile"
)

// traceScript traces the fixture in every way and prints each profile between two lines of its own.
const traceScript = `
give() { echo "profile $1 $2"; base64 /tmp/$1.pb.gz; echo end; }
for kind in static dynamic; do
	allocsnoop --mode exact -o /tmp/started-$kind.pb.gz -- /leak-$kind >/tmp/log 2>&1
	give started-$kind $? || cat /tmp/log
	/leak-$kind /tmp/go-$kind &
	allocsnoop --mode exact --ready-file /tmp/go-$kind -o /tmp/attached-$kind.pb.gz --pid $! >/tmp/log 2>&1
	code=$?
	[ $code = 0 ] || cat /tmp/log
	give attached-$kind $code
done
`

// leak is what the fixture's functions do: blocks and bytes allocated, blocks and bytes in use at the end.
var leaks = map[string][4]int64{
	"leak_small": {1009, 1009 * 37, 1009, 1009 * 37},
	"leak_large": {1, 3 * 1000003, 1, 3 * 1000003},
	"churn":      {503, 503 * 101, 0, 0},
	"resized":    {2, 11 + 4099, 1, 4099},
}

func TestTracesAreExact(t *testing.T) {
	if *kernelList == "" {
		t.Skip("needs -kernels")
	}
	dir := t.TempDir()
	for kind, flag := range map[string]string{"static": "-static", "dynamic": "-pie"} {
		out, err := exec.Command("gcc", "-O1", "-g", flag, "-o", filepath.Join(dir, "leak-"+kind), "testdata/leak.c").CombinedOutput()
		if err != nil {
			t.Fatalf("compile fixture: %v\n%s", err, out)
		}
	}
	binary := goBinary(t, "cmd/allocsnoop")
	eachKernel(t, func(t *testing.T, k *Kernel) {
		image := newImage(t)
		for name, host := range map[string]string{
			"/bin/allocsnoop": binary, "/leak-static": dir + "/leak-static", "/leak-dynamic": dir + "/leak-dynamic",
		} {
			if err := image.AddBinary(name, host); err != nil {
				t.Fatal(err)
			}
		}
		result := boot(t, k, Job{Image: image, Command: []string{"sh", "-c", traceScript}})
		profiles := splitProfiles(t, result.Output)
		if len(profiles) < 4 {
			t.Logf("output:\n%s", result.Output)
		}
		for _, name := range []string{"started-static", "started-dynamic", "attached-static", "attached-dynamic"} {
			p := profiles[name]
			if p == nil {
				t.Errorf("no profile %s", name)
				continue
			}
			if diff := cmp.Diff(leaks, sums(p)); diff != "" {
				t.Errorf("%s: -want +got:\n%s", name, diff)
			}
		}
	})
}

// splitProfiles finds the profiles in a script's output.
func splitProfiles(t *testing.T, output []byte) map[string]*profile.Profile {
	t.Helper()
	profiles := map[string]*profile.Profile{}
	for part := range bytes.SplitSeq(output, []byte("profile ")) {
		head, body, _ := bytes.Cut(part, []byte("\n"))
		body, _, ended := bytes.Cut(body, []byte("end"))
		name, code, ok := strings.Cut(string(head), " ")
		if !ended || !ok {
			continue
		}
		packed, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(body)), ""))
		if err != nil {
			continue // not a profile but a sentence with the word in it
		}
		p, err := profile.ParseData(packed)
		if err != nil {
			t.Errorf("profile %s, exit code %s: %v", name, code, err)
			continue
		}
		profiles[name] = p
	}
	return profiles
}

// sums are the figures of the fixture's functions, wherever in a stack they are.
func sums(p *profile.Profile) map[string][4]int64 {
	found := map[string][4]int64{}
	for _, s := range p.Sample {
		if s.Label["kind"][0] != "malloc" {
			continue
		}
		for _, l := range s.Location {
			for _, line := range l.Line {
				if _, ours := leaks[line.Function.Name]; !ours {
					continue
				}
				sum := found[line.Function.Name]
				for i, v := range s.Value {
					sum[i] += v
				}
				found[line.Function.Name] = sum
			}
		}
	}
	return found
}
