package target

import (
	"context"
	"errors"
	"fmt"
	"slices"
)

// containers asks a server for its containers: CRI-O knows Kubernetes' interface only, containerd has its own
// besides, which tells of containers outside of Kubernetes too.
func (c *grpcClient) containers(ctx context.Context) ([]Named, error) {
	cri, errCRI := c.listCRI(ctx)
	own, errOwn := c.listContainerd(ctx)
	if isUnimplemented(errCRI) && isUnimplemented(errOwn) {
		return nil, fmt.Errorf("it speaks neither Kubernetes' container runtime interface nor containerd's: %w", errCRI)
	}
	// One of them is enough: containerd may run without CRI.
	if isUnimplemented(errCRI) {
		errCRI = nil
	}
	if isUnimplemented(errOwn) {
		errOwn = nil
	}
	return slices.Concat(cri, own), errors.Join(errCRI, errOwn)
}

// listCRI is Kubernetes' container runtime interface. v1alpha2 is the same under another name, up to Kubernetes 1.25.
func (c *grpcClient) listCRI(ctx context.Context) ([]Named, error) {
	answer, err := c.call(ctx, "runtime.v1.RuntimeService/ListContainers", nil, nil)
	if isUnimplemented(err) {
		answer, err = c.call(ctx, "runtime.v1alpha2.RuntimeService/ListContainers", nil, nil)
	}
	if err != nil {
		return nil, err
	}
	return parseCRIList(answer)
}

// parseCRIList reads ListContainersResponse: containers (1) with id (1), metadata (3) that has the name (1), labels (8).
func parseCRIList(message []byte) ([]Named, error) {
	return listOf(message, func(f field, c *containerRecord) error {
		switch f.number {
		case 1:
			c.id = string(f.bytes)
		case 3:
			return eachField(f.bytes, func(f field) error {
				if f.number == 1 {
					c.name = string(f.bytes)
				}
				return nil
			})
		case 8:
			return c.label(f.bytes)
		}
		return nil
	})
}

// listContainerd walks containerd's namespaces: "k8s.io" of Kubernetes, "moby" of Docker, "default" of ctr and nerdctl.
func (c *grpcClient) listContainerd(ctx context.Context) ([]Named, error) {
	answer, err := c.call(ctx, "containerd.services.namespaces.v1.Namespaces/List", nil, nil)
	if err != nil {
		return nil, err
	}
	namespaces, err := parseNamespaces(answer)
	if err != nil {
		return nil, err
	}
	var all []Named
	for _, namespace := range namespaces {
		list, err := c.listNamespace(ctx, namespace)
		if err != nil {
			return all, fmt.Errorf("namespace %s: %w", safe(namespace), err)
		}
		all = append(all, list...)
	}
	return all, nil
}

func (c *grpcClient) listNamespace(ctx context.Context, namespace string) ([]Named, error) {
	header := map[string]string{"Containerd-Namespace": namespace}
	answer, err := c.call(ctx, "containerd.services.containers.v1.Containers/List", nil, header)
	if err != nil {
		return nil, err
	}
	list, err := parseContainerdList(answer)
	if err != nil {
		return nil, err
	}
	answer, err = c.call(ctx, "containerd.services.tasks.v1.Tasks/List", nil, header)
	if err != nil {
		return nil, err
	}
	pids, err := parseTasks(answer)
	for i := range list {
		list[i].PID = pids[list[i].ID]
	}
	return list, err
}

// parseNamespaces reads ListNamespacesResponse: namespaces (1) with name (1).
func parseNamespaces(message []byte) ([]string, error) {
	list, err := listOf(message, func(f field, c *containerRecord) error {
		if f.number == 1 {
			c.id = string(f.bytes)
		}
		return nil
	})
	var names []string
	for _, n := range list {
		names = append(names, n.ID)
	}
	return names, err
}

// parseContainerdList reads ListContainersResponse: containers (1) with id (1) and labels (2).
func parseContainerdList(message []byte) ([]Named, error) {
	return listOf(message, func(f field, c *containerRecord) error {
		switch f.number {
		case 1:
			c.id = string(f.bytes)
		case 2:
			return c.label(f.bytes)
		}
		return nil
	})
}

// parseTasks reads ListTasksResponse: tasks (1) with the container's id (1, or 2 where that is empty) and the pid of its
// first process (3).
func parseTasks(message []byte) (map[string]int, error) {
	pids := map[string]int{}
	err := eachField(message, func(f field) error {
		var container, id string
		pid := 0
		if f.number != 1 {
			return nil
		}
		err := eachField(f.bytes, func(f field) error {
			switch f.number {
			case 1:
				container = string(f.bytes)
			case 2:
				id = string(f.bytes)
			case 3:
				pid = int(uint32(f.value))
			}
			return nil
		})
		if container == "" {
			container = id
		}
		pids[container] = pid
		return err
	})
	return pids, err
}

// containerRecord is what a list tells of one container.
type containerRecord struct {
	id, name string
	labels   map[string]string
}

func (c *containerRecord) label(entry []byte) error {
	key, value, err := mapEntry(entry)
	if c.labels == nil {
		c.labels = map[string]string{}
	}
	c.labels[key] = value
	return err
}

// listOf reads a message whose field 1 repeats records.
func listOf(message []byte, take func(field, *containerRecord) error) ([]Named, error) {
	var list []Named
	err := eachField(message, func(f field) error {
		if f.number != 1 {
			return nil
		}
		if len(list) == maxContainers {
			return fmt.Errorf("more than %d containers", maxContainers)
		}
		var c containerRecord
		if err := eachField(f.bytes, func(f field) error { return take(f, &c) }); err != nil {
			return err
		}
		named := Named{ID: c.id, Names: kubernetesNames(c.labels)}
		if c.name != "" {
			named.Names = append(named.Names, c.name)
		}
		list = append(list, named)
		return nil
	})
	return list, err
}
