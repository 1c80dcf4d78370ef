package target

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/allocsnoop/allocsnoop/tracer/rootfs"
	"golang.org/x/sys/unix"
)

// Where runtimes listen unless told otherwise.
var (
	dockerSockets = []string{"/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock"}
	grpcSockets   = []string{
		"/run/containerd/containerd.sock", "/run/crio/crio.sock", "/run/k3s/containerd/containerd.sock",
		"/run/docker/containerd/containerd.sock", "/var/snap/microk8s/common/run/containerd.sock",
	}
)

// The variables that clients of these runtimes read.
var (
	dockerVariables = []string{"DOCKER_HOST", "CONTAINER_HOST"}
	grpcVariables   = []string{"CONTAINERD_ADDRESS", "CONTAINER_RUNTIME_ENDPOINT"}
)

// question is one socket and how to ask it.
type question struct {
	socket string
	ask    func(ctx context.Context, dial dialer) ([]Named, error)
	named  bool // by the person: then a socket that is not there is an error
}

type dialer func(ctx context.Context, network, address string) (net.Conn, error)

// questions are the sockets that may be there, those that the person named first.
func (n Names) questions() []question {
	var all []question
	add := func(sockets, variables []string, ask func(context.Context, dialer) ([]Named, error)) {
		for _, variable := range variables {
			if socket, ok := unixSocket(n.env(variable)); ok {
				all = append(all, question{socket, ask, true})
			}
		}
		for _, socket := range sockets {
			all = append(all, question{socket, ask, false})
		}
	}
	add(dockerSockets, dockerVariables, askDocker)
	// Podman without root has a service for each user.
	for _, user := range n.entries("/run/user") {
		all = append(all, question{"/run/user/" + user + "/podman/podman.sock", askDocker, false})
	}
	add(grpcSockets, grpcVariables, askGRPC)
	return all
}

func (n Names) env(name string) string {
	if n.Env != nil {
		return n.Env(name)
	}
	return os.Getenv(name)
}

// unixSocket is the path in an address of a client's variable. Runtimes on other machines have no processes here.
func unixSocket(address string) (string, bool) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return path, path != ""
	}
	return address, strings.HasPrefix(address, "/")
}

// askAll asks all sockets that are there, at once: one that does not answer shall not hold up the others.
func (n Names) askAll(ctx context.Context) ([]Named, []error) {
	questions := n.questions()
	lists, errs := make([][]Named, len(questions)), make([]error, len(questions))
	var asking sync.WaitGroup
	for i, q := range questions {
		asking.Go(func() { lists[i], errs[i] = n.ask(ctx, q) })
	}
	asking.Wait()
	return slices.Concat(lists...), slices.DeleteFunc(errs, func(err error) bool { return err == nil })
}

func (n Names) ask(ctx context.Context, q question) ([]Named, error) {
	fd, err := rootfs.OpenPath(n.Root, q.socket)
	if err != nil && !q.named {
		return nil, nil // no such runtime here
	}
	if err != nil {
		return nil, fmt.Errorf("ask a container runtime: %w", err)
	}
	defer unix.Close(fd)
	// Through the handle: the name could lead out of the root by now.
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(fd))
	}
	list, err := q.ask(ctx, dial)
	if err != nil {
		return list, fmt.Errorf("ask %s for its containers: %w", safe(q.socket), err)
	}
	return list, nil
}

// askDocker speaks Docker's protocol, which Podman's service speaks too.
func askDocker(ctx context.Context, dial dialer) ([]Named, error) {
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: askTimeout}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://runtime/containers/json?all=1", nil)
	if err != nil {
		return nil, err
	}
	answer, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the answer is %s", answer.Status)
	}
	return parseDockerList(io.LimitReader(answer.Body, maxAnswer))
}

func askGRPC(ctx context.Context, dial dialer) ([]Named, error) {
	client := newGRPC(dial)
	defer client.close()
	return client.containers(ctx)
}
