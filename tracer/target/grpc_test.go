package target

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// pb writes one field of a protobuf message: a string, a message within, or a number.
func pb(number int, value any) string {
	switch v := value.(type) {
	case int:
		return string(binary.AppendUvarint(binary.AppendUvarint(nil, uint64(number)<<3), uint64(v)))
	case string:
		return string(binary.AppendUvarint(binary.AppendUvarint(nil, uint64(number)<<3|2), uint64(len(v)))) + v
	}
	panic("a string or an int")
}

func pbLabels(number int, pairs ...string) string {
	text := ""
	for i := 0; i < len(pairs); i += 2 {
		text += pb(number, pb(1, pairs[i])+pb(2, pairs[i+1]))
	}
	return text
}

// serveGRPC answers calls on a socket below root: the key is "package.Service/Method" and, behind a space, the
// containerd namespace.
func serveGRPC(t *testing.T, root, socket string, answers map[string]string) {
	t.Helper()
	p := filepath.Join(root, socket)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", p)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		request, err := io.ReadAll(r.Body)
		method := strings.TrimSpace(strings.TrimPrefix(r.URL.Path, "/") + " " + r.Header.Get("Containerd-Namespace"))
		answer, known := answers[method]
		w.Header().Set("Content-Type", "application/grpc")
		if err != nil || len(request) != 5 || r.Header.Get("TE") != "trailers" || r.Header.Get("Content-Type") != "application/grpc" {
			t.Errorf("%s: request %q, headers %v, %v", method, request, r.Header, err)
		}
		if !known {
			// As real servers do: without a message the status stands among the headers.
			w.Header().Set("Grpc-Status", "12")
			w.Header().Set("Grpc-Message", "unknown service")
			return
		}
		w.Header().Set("Trailer", "Grpc-Status")
		w.Write(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(answer))))
		w.Write([]byte(answer))
		w.Header().Set("Grpc-Status", "0")
	})}
	server.Protocols.SetUnencryptedHTTP2(true)
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
}

func noEnv(string) string { return "" }

func TestCRIOIsAskedByKubernetesInterface(t *testing.T) {
	for _, version := range []string{"v1", "v1alpha2"} {
		t.Run(version, func(t *testing.T) {
			root := shortDir(t)
			serveGRPC(t, root, "run/crio/crio.sock", map[string]string{
				"runtime." + version + ".RuntimeService/ListContainers": pb(1, pb(1, id64)+pb(2, "sandbox")+pb(3, pb(1, "app")+pb(2, 1))+pb(6, 1)+
					pbLabels(8, "io.kubernetes.container.name", "app", "io.kubernetes.pod.name", "web-7", "io.kubernetes.pod.namespace", "prod")) +
					pb(1, pb(1, "other")+pb(3, pb(1, "plain"))),
			})
			list, errs := Names{Root: root, Env: noEnv}.List(t.Context())
			want := []Named{
				{ID: id64, Names: []string{"app", "web-7/app", "web-7", "prod/web-7/app", "prod/web-7"}},
				{ID: "other", Names: []string{"plain"}},
			}
			if diff := cmp.Diff(want, list); diff != "" || len(errs) > 0 {
				t.Errorf("%s errors %v", diff, errs)
			}
		})
	}
}

func TestContainerdIsAskedInEachOfItsNamespaces(t *testing.T) {
	root := shortDir(t)
	const containers, tasks = "containerd.services.containers.v1.Containers/List ", "containerd.services.tasks.v1.Tasks/List "
	serveGRPC(t, root, "run/containerd/containerd.sock", map[string]string{
		"containerd.services.namespaces.v1.Namespaces/List": pb(1, pb(1, "default")) + pb(1, pb(1, "prod")),
		containers + "default":                              pb(1, pb(1, "web")+pbLabels(2, "a", "b")) + pb(1, pb(1, id64)+pbLabels(2, "nerdctl/name", "nerd")),
		tasks + "default":                                   pb(1, pb(2, "web")+pb(3, 4211)+pb(4, 2)),
		containers + "prod":                                 pb(1, pb(1, "db")),
		tasks + "prod":                                      pb(1, pb(1, "db")+pb(2, "db")+pb(3, 4217)),
	})
	list, errs := Names{Root: root, Env: noEnv}.List(t.Context())
	want := []Named{{ID: "web", PID: 4211}, {ID: id64, Names: []string{"nerd"}}, {ID: "db", PID: 4217}}
	if diff := cmp.Diff(want, list); diff != "" || len(errs) > 0 {
		t.Errorf("%s errors %v", diff, errs)
	}
}

func TestASocketThatAPersonNamesIsAskedToo(t *testing.T) {
	for variable, serveIt := range map[string]func(root string){
		"DOCKER_HOST":    func(root string) { serve(t, root, "run/elsewhere.sock", `[{"Id":"x","Names":["/web"]}]`, 200) },
		"CONTAINER_HOST": func(root string) { serve(t, root, "run/elsewhere.sock", `[{"Id":"x","Names":["/web"]}]`, 200) },
		"CONTAINERD_ADDRESS": func(root string) {
			serveGRPC(t, root, "run/elsewhere.sock", map[string]string{"runtime.v1.RuntimeService/ListContainers": pb(1, pb(1, "x")+pb(3, pb(1, "web")))})
		},
		"CONTAINER_RUNTIME_ENDPOINT": func(root string) {
			serveGRPC(t, root, "run/elsewhere.sock", map[string]string{"runtime.v1.RuntimeService/ListContainers": pb(1, pb(1, "x")+pb(3, pb(1, "web")))})
		},
	} {
		for _, address := range []string{"unix:///run/elsewhere.sock", "/run/elsewhere.sock"} {
			t.Run(variable+" "+address, func(t *testing.T) {
				root := shortDir(t)
				serveIt(root)
				list, errs := Names{Root: root, Env: func(name string) string { return map[string]string{variable: address}[name] }}.List(t.Context())
				if diff := cmp.Diff([]Named{{ID: "x", Names: []string{"web"}}}, list); diff != "" || len(errs) > 0 {
					t.Errorf("%s errors %v", diff, errs)
				}
			})
		}
	}
}

func TestANamedSocketThatIsNotThereIsSaid(t *testing.T) {
	_, errs := Names{Root: t.TempDir(), Env: func(name string) string {
		return map[string]string{"DOCKER_HOST": "tcp://127.0.0.1:2375", "CONTAINERD_ADDRESS": "/run/none.sock"}[name]
	}}.List(t.Context())
	if len(errs) != 1 || !errors.Is(errs[0], os.ErrNotExist) || !strings.Contains(errs[0].Error(), "/run/none.sock") {
		t.Errorf("errors are %v, want one that names /run/none.sock", errs)
	}
}

func TestWhatIsNoRuntimeIsSaid(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		serve      func(root string)
	}{
		{"another gRPC service", "neither", func(root string) { serveGRPC(t, root, "run/crio/crio.sock", nil) }},
		{"a server of HTTP/1", "run/crio/crio.sock", func(root string) { serve(t, root, "run/crio/crio.sock", "[]", 200) }},
		{"a damaged message", "damaged", func(root string) {
			serveGRPC(t, root, "run/crio/crio.sock", map[string]string{"runtime.v1.RuntimeService/ListContainers": "\x0a\x7f"})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := shortDir(t)
			tt.serve(root)
			list, errs := Names{Root: root, Env: noEnv}.List(t.Context())
			if len(list) != 0 || len(errs) != 1 || !strings.Contains(errs[0].Error(), tt.want) {
				t.Errorf("list %v, errors %v, want one with %q", list, errs, tt.want)
			}
		})
	}
}

func TestPlainRuntimesAreKnownByTheirStateFiles(t *testing.T) {
	root := t.TempDir()
	put(t, root, "run/runc/web/state.json", `{"id":"web","init_process_pid":4211}`)
	put(t, root, "run/crun/db/status", `{"pid":4217,"cgroup-path":"/db"}`)
	put(t, root, "run/crun/broken/status", `{`)
	list, errs := Names{Root: root, Env: noEnv}.List(t.Context())
	pids := map[string]int{}
	for _, c := range list {
		pids[c.ID] = c.PID
	}
	if diff := cmp.Diff(map[string]int{"web": 4211, "db": 4217}, pids); diff != "" || len(errs) > 0 {
		t.Errorf("%s errors %v", diff, errs)
	}
}

func FuzzRuntimeMessages(f *testing.F) {
	f.Add([]byte(pb(1, pb(1, "a")+pb(3, pb(1, "b"))+pbLabels(8, "io.kubernetes.container.name", "c"))))
	f.Add([]byte(pb(1, pb(2, "web")+pb(3, 4211)+pb(4, 2))))
	f.Add([]byte("\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"))
	f.Add([]byte("\x09\x01\x02\x03\x04\x05\x06\x07\x08\x0d\x01\x02\x03\x04"))
	f.Fuzz(func(t *testing.T, message []byte) {
		for _, parse := range []func([]byte) ([]Named, error){parseCRIList, parseContainerdList} {
			list, _ := parse(message)
			if len(list) > len(message) {
				t.Errorf("%d containers out of %d bytes", len(list), len(message))
			}
			merge(list)
		}
		parseTasks(message)
		parseNamespaces(message)
		grpcMessage(message)
	})
}
