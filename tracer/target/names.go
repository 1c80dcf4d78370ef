package target

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/allocsnoop/allocsnoop/tracer/memory"
	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
	"golang.org/x/sys/unix"
)

// Named is a running or stopped container that a runtime knows.
type Named struct {
	ID    string
	Names []string // without Docker's leading slash; for Kubernetes see kubernetesNames
	// PID is the container's first process, where a runtime tells; 0 otherwise.
	PID int
}

// Names asks the container runtimes of a machine for their containers: Docker and Podman by HTTP on their sockets,
// containerd and CRI-O by gRPC on theirs. What is not running, or does not answer, is looked up in the files that runtimes
// keep beside their containers.
type Names struct {
	// Root is the root directory to look below. When empty, it is "/" and what else roots finds.
	Root string
	// Env looks up the variables with which people tell clients of runtimes about sockets; os.Getenv when nil.
	Env func(string) string
}

// limits of what runtimes may say, against a file or a socket that somebody else put there.
const (
	maxAnswer     = 32 << 20
	maxConfig     = 8 << 20
	maxContainers = 20000
	askTimeout    = 2 * time.Second
)

// List is every container that a runtime knows. An error of one runtime is returned beside what the others said.
func (n Names) List(ctx context.Context) ([]Named, []error) {
	if n.Root != "" {
		return n.list(ctx)
	}
	var all []Named
	var errs []error
	for _, root := range roots(memory.FS{}) {
		list, rootErrs := Names{Root: root, Env: n.Env}.list(ctx)
		all, errs = append(all, list...), append(errs, rootErrs...)
	}
	if len(all) > 0 {
		// A socket that was named is there in one root only.
		errs = slices.DeleteFunc(errs, func(err error) bool { return errors.Is(err, os.ErrNotExist) })
	}
	return merge(all), errs
}

// list is List below one root.
func (n Names) list(ctx context.Context) ([]Named, []error) {
	all, errs := n.askAll(ctx)
	add := func(list []Named, err error) {
		all = append(all, list...)
		if err != nil {
			errs = append(errs, err)
		}
	}
	add(n.docker())
	for _, dir := range []string{"/var/lib/containers/storage/overlay-containers", "/var/lib/containers/storage/vfs-containers"} {
		add(n.storage(dir + "/containers.json"))
	}
	add(n.bundles())
	add(n.states())
	return merge(all), errs
}

// parseDockerList reads the answer to GET /containers/json.
func parseDockerList(r io.Reader) ([]Named, error) {
	var list []struct {
		ID     string `json:"Id"`
		Names  []string
		Labels map[string]string
	}
	if err := json.NewDecoder(r).Decode(&list); err != nil {
		return nil, fmt.Errorf("parse list of containers: %w", err)
	}
	var out []Named
	for _, c := range list {
		named := Named{ID: c.ID, Names: kubernetesNames(c.Labels)}
		for _, name := range c.Names {
			named.Names = append(named.Names, strings.TrimPrefix(name, "/"))
		}
		out = append(out, named)
	}
	return out, nil
}

// docker reads what dockerd keeps on disk, for when its socket is not to be had.
func (n Names) docker() ([]Named, error) {
	const dir = "/var/lib/docker/containers"
	var out []Named
	for _, id := range n.entries(dir) {
		var config struct {
			ID     string
			Name   string
			Config struct{ Labels map[string]string }
		}
		if n.readJSON(path.Join(dir, id, "config.v2.json"), &config) != nil || config.ID == "" {
			continue
		}
		names := append(kubernetesNames(config.Config.Labels), strings.TrimPrefix(config.Name, "/"))
		out = append(out, Named{ID: config.ID, Names: names})
	}
	return out, nil
}

// storage reads the list of containers that Podman, CRI-O and Buildah share.
func (n Names) storage(name string) ([]Named, error) {
	var list []struct {
		ID    string   `json:"id"`
		Names []string `json:"names"`
	}
	err := n.readJSON(name, &list)
	if os.IsNotExist(err) {
		return nil, nil
	}
	var out []Named
	for _, c := range list {
		out = append(out, Named{ID: c.ID, Names: c.Names})
	}
	return out, err
}

// bundleDirs hold a directory for each container with its OCI configuration, whose annotations name it.
var bundleDirs = []string{
	"/run/containerd/io.containerd.runtime.v2.task/k8s.io",
	"/run/containerd/io.containerd.runtime.v2.task/default",
	"/run/containerd/io.containerd.runtime.v2.task/moby",
	"/run/k3s/containerd/io.containerd.runtime.v2.task/k8s.io",
	"/run/containers/storage/overlay-containers",
	"/var/lib/containers/storage/overlay-containers",
}

func (n Names) bundles() ([]Named, error) {
	var out []Named
	for _, dir := range bundleDirs {
		for _, id := range n.entries(dir) {
			for _, name := range []string{"config.json", "userdata/config.json"} {
				var config struct {
					Hostname    string            `json:"hostname"`
					Annotations map[string]string `json:"annotations"`
				}
				if n.readJSON(path.Join(dir, id, name), &config) != nil {
					continue
				}
				if names := kubernetesNames(config.Annotations); len(names) > 0 {
					out = append(out, Named{ID: id, Names: names})
				}
			}
		}
	}
	return out, nil
}

// states reads where runc and crun note the containers that were started without any runtime above them.
func (n Names) states() ([]Named, error) {
	var out []Named
	for dir, file := range map[string]string{"/run/runc": "state.json", "/run/crun": "status"} {
		for _, id := range n.entries(dir) {
			var state struct {
				PID  int `json:"pid"`              // crun
				Init int `json:"init_process_pid"` // runc
			}
			if n.readJSON(path.Join(dir, id, file), &state) == nil {
				out = append(out, Named{ID: id, PID: max(state.PID, state.Init)})
			}
		}
	}
	return out, nil
}

// kubernetesNames are the names in labels or annotations, in all spellings that a person may use: "container",
// "pod/container", "namespace/pod/container", and for all containers of a pod "pod" and "namespace/pod".
func kubernetesNames(labels map[string]string) []string {
	first := func(keys ...string) string {
		for _, key := range keys {
			if labels[key] != "" {
				return labels[key]
			}
		}
		return ""
	}
	container := first("io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name")
	pod := first("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name")
	namespace := first("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace")
	if container == "" {
		return nil
	}
	names := []string{container}
	if pod != "" {
		names = append(names, pod+"/"+container, pod)
		if namespace != "" {
			names = append(names, namespace+"/"+pod+"/"+container, namespace+"/"+pod)
		}
	}
	return names
}

// entries are the names in a directory of the machine; none when it is not there.
func (n Names) entries(dir string) []string {
	fd, err := rootfs.OpenPath(n.Root, dir)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	f, err := os.Open("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return nil
	}
	defer f.Close()
	names, _ := f.Readdirnames(maxContainers)
	return names
}

func (n Names) readJSON(name string, into any) error {
	text, err := rootfs.ReadFile(n.Root, name, maxConfig)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(bytes.TrimSpace(text), into); err != nil {
		return fmt.Errorf("parse %s: %w", name, err)
	}
	return nil
}

// merge puts what several sources said about one container together.
func merge(all []Named) []Named {
	at := map[string]int{}
	var out []Named
	for _, c := range all {
		i, known := at[c.ID]
		if !known {
			at[c.ID] = len(out)
			out = append(out, Named{ID: c.ID})
			i = len(out) - 1
		}
		out[i].PID = max(out[i].PID, c.PID)
		for _, name := range c.Names {
			if name != "" && !slices.Contains(out[i].Names, name) {
				out[i].Names = append(out[i].Names, name)
			}
		}
	}
	return out
}
