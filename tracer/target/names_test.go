package target

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/google/go-cmp/cmp"
)

func put(t *testing.T, root, name, text string) {
	t.Helper()
	p := filepath.Join(root, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// serve answers like a Docker daemon on a socket below root.
func serve(t *testing.T, root, socket, answer string, status int) {
	t.Helper()
	p := filepath.Join(root, socket)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/containers/json" {
			http.NotFound(w, r)
			return
		}
		w.WriteHeader(status)
		w.Write([]byte(answer))
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
}

// shortDir is a directory whose sockets have short enough names (108 bytes).
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "as")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestDockerIsAskedOnItsSocket(t *testing.T) {
	root := shortDir(t)
	serve(t, root, "run/docker.sock", `[{"Id":"`+id64+`","Names":["/web"],"Labels":{"io.kubernetes.container.name":"app","io.kubernetes.pod.name":"web-7","io.kubernetes.pod.namespace":"prod"}}]`, 200)
	// As on real machines: /var/run leads to /run, absolutely.
	os.MkdirAll(filepath.Join(root, "var"), 0o755)
	if err := os.Symlink("/run", filepath.Join(root, "var/run")); err != nil {
		t.Fatal(err)
	}
	list, errs := Names{Root: root}.List(t.Context())
	want := []Named{{ID: id64, Names: []string{"app", "web-7/app", "web-7", "prod/web-7/app", "prod/web-7", "web"}}}
	if diff := cmp.Diff(want, list); diff != "" || len(errs) > 0 {
		t.Errorf("%s errors %v", diff, errs)
	}
}

func TestWithoutASocketTheFilesOfEachRuntimeAreRead(t *testing.T) {
	root := t.TempDir()
	id := func(c string) string { return strings.Repeat(c, 64) }
	put(t, root, "var/lib/docker/containers/"+id("a")+"/config.v2.json", `{"ID":"`+id("a")+`","Name":"/docker-web","Config":{"Labels":{}}}`)
	put(t, root, "var/lib/containers/storage/overlay-containers/containers.json", `[{"id":"`+id("b")+`","names":["podman-web"]}]`)
	put(t, root, "run/containerd/io.containerd.runtime.v2.task/k8s.io/"+id("c")+"/config.json",
		`{"annotations":{"io.kubernetes.cri.container-name":"app","io.kubernetes.cri.sandbox-name":"web-9","io.kubernetes.cri.sandbox-namespace":"prod"}}`)
	put(t, root, "run/containers/storage/overlay-containers/"+id("d")+"/userdata/config.json",
		`{"annotations":{"io.kubernetes.container.name":"crio-app","io.kubernetes.pod.name":"web-3"}}`)
	put(t, root, "run/containerd/io.containerd.runtime.v2.task/default/nerd/config.json", `{"annotations":{"nerdctl/name":"nerd-web"}}`)
	put(t, root, "run/containerd/io.containerd.runtime.v2.task/k8s.io/broken/config.json", `{"annotations":`)
	list, errs := Names{Root: root}.List(t.Context())
	want := []Named{
		{ID: id("a"), Names: []string{"docker-web"}},
		{ID: id("b"), Names: []string{"podman-web"}},
		{ID: id("c"), Names: []string{"app", "web-9/app", "web-9", "prod/web-9/app", "prod/web-9"}},
		{ID: "nerd", Names: []string{"nerd-web"}},
		{ID: id("d"), Names: []string{"crio-app", "web-3/crio-app", "web-3"}},
	}
	if diff := cmp.Diff(want, list); diff != "" || len(errs) > 0 {
		t.Errorf("%s errors %v", diff, errs)
	}
}

func TestABrokenRuntimeIsReportedBesideWhatOthersSay(t *testing.T) {
	root := shortDir(t)
	serve(t, root, "run/docker.sock", "no json", 500)
	put(t, root, "var/lib/containers/storage/overlay-containers/containers.json", `[{"id":"x","names":["podman-web"]}]`)
	list, errs := Names{Root: root}.List(t.Context())
	if len(list) != 1 || len(errs) == 0 || !strings.Contains(errs[0].Error(), "500") {
		t.Errorf("got %v, %v", list, errs)
	}
}

func TestNoRuntimeIsNoError(t *testing.T) {
	if list, errs := (Names{Root: t.TempDir()}).List(t.Context()); len(list)+len(errs) > 0 {
		t.Errorf("got %v, %v", list, errs)
	}
}

func TestALinkOutOfTheRootIsNotFollowed(t *testing.T) {
	base := t.TempDir()
	root := filepath.Join(base, "root")
	put(t, base, "outside.json", `[{"id":"stolen","names":["x"]}]`)
	dir := filepath.Join(root, "var/lib/containers/storage/overlay-containers")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(base, "outside.json"), filepath.Join(dir, "containers.json")); err != nil {
		t.Fatal(err)
	}
	list, _ := Names{Root: root}.List(t.Context())
	if slices.ContainsFunc(list, func(n Named) bool { return n.ID == "stolen" }) {
		t.Errorf("read outside of the root: %v", list)
	}
}

func FuzzParseDockerList(f *testing.F) {
	f.Add(`[{"Id":"a","Names":["/b",""],"Labels":{"nerdctl/name":"c"}}]`)
	f.Add(`null`)
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseDockerList(strings.NewReader(text))
		if err == nil {
			merge(list)
		}
		var labels map[string]string
		if json.Unmarshal([]byte(text), &labels) == nil {
			kubernetesNames(labels)
		}
	})
}

func TestANameThatIsGoneDoesNotHideAnotherThatIsReplaced(t *testing.T) {
	root := t.TempDir()
	is := func(id, name string) {
		put(t, root, "var/lib/docker/containers/"+id+"/config.v2.json", `{"ID":"`+id+`","Name":"/`+name+`"}`)
	}
	id := func(c string) string { return strings.Repeat(c, 64) }
	is(id("a"), "first of two")
	is(id("b"), "second of two")
	f, err := NewFinder(t.Context(), Selector{Containers: []string{"second of two", "first of two"}}, memory.FS{}, Names{Root: root, Env: noEnv})
	if err != nil {
		t.Fatal(err)
	}
	for _, gone := range []string{id("a"), id("b")} {
		if err := os.RemoveAll(filepath.Join(root, "var/lib/docker/containers", gone)); err != nil {
			t.Fatal(err)
		}
	}
	is(id("c"), "first of two")
	if err := f.Refresh(t.Context()); err == nil || !strings.Contains(err.Error(), "second of two") {
		t.Errorf("error %v, want one about the second", err)
	}
	if why, ok := f.Match(&Process{Container: Container{ID: id("c")}}); !ok || why != "--container first of two" {
		t.Errorf("the new container is matched: %t, %q", ok, why)
	}
}
