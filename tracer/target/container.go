package target

import (
	"regexp"
	"strings"
)

// Container says which container a process is in, by its control group's path.
type Container struct {
	ID      string // 64 hex digits from most runtimes, a name from LXC, nspawn and containerd's own client
	Pod     string // uid of the Kubernetes pod; empty outside of one
	Runtime string // "docker", "containerd", "cri-o", "podman", "lxc", "nspawn", "ecs"; empty when the path does not say
}

// Short is the identifier as tools print it: twelve digits of a long one.
func (c Container) Short() string {
	if hexID.MatchString(c.ID) {
		return c.ID[:12]
	}
	return c.ID
}

var (
	hexID = regexp.MustCompile(`^[0-9a-f]{64}$`)
	// With dashes from cgroupfs, with underscores from systemd; static pods have a plain hash.
	podUID = regexp.MustCompile(`pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?:\.slice)?$`)
	ecsID  = regexp.MustCompile(`^[0-9a-f]{32}-\d+$`)
)

// scopes are the prefixes of systemd scopes (NAME-ID.scope) and of Podman's groups (libpod-ID), and whose they are.
// "conmon" scopes hold the runtime's monitor, not the container.
var scopes = []struct{ prefix, runtime string }{
	{"docker-", "docker"},
	{"cri-containerd-", "containerd"},
	{"containerd-", "containerd"},
	{"nerdctl-", "containerd"},
	{"crio-", "cri-o"},
	{"libpod-", "podman"},
}

// ContainerOf reads a control group's path, from the innermost part outwards: containers in containers belong to the
// inner one. The zero value is no container.
func ContainerOf(cgroup string) Container {
	parts := strings.Split(cgroup, "/")
	var c Container
	for i := len(parts) - 1; i >= 0; i-- {
		parent := ""
		if i > 0 {
			parent = parts[i-1]
		}
		if c.ID == "" {
			c.ID, c.Runtime = containerPart(parts[i], parent)
		}
		if m := podUID.FindStringSubmatch(parts[i]); m != nil {
			c.Pod = strings.ReplaceAll(m[1], "_", "-")
			break
		}
	}
	return c
}

// containerPart is the container that one part of a path names, given the part above it.
func containerPart(part, parent string) (id, runtime string) {
	if hexID.MatchString(part) {
		return part, runtimeOfParent(parent)
	}
	if ecsID.MatchString(part) && parent != "" {
		return part, "ecs"
	}
	name := strings.TrimSuffix(part, ".scope")
	for _, s := range scopes {
		if rest, ok := strings.CutPrefix(name, s.prefix); ok && hexID.MatchString(rest) {
			return rest, s.runtime
		}
	}
	return namedPart(part, parent)
}

// namedPart knows the runtimes whose containers have names rather than numbers.
func namedPart(part, parent string) (id, runtime string) {
	if parent == "lxc" || parent == "lxc.payload" {
		return part, "lxc"
	}
	if rest, ok := strings.CutPrefix(part, "lxc.payload."); ok {
		return rest, "lxc"
	}
	if parent == "machine.slice" {
		if rest, ok := strings.CutPrefix(part, "systemd-nspawn@"); ok {
			return strings.TrimSuffix(rest, ".service"), "nspawn"
		}
	}
	// containerd's groups outside of Kubernetes: /NAMESPACE/NAME with the namespace "default" of ctr.
	if parent == "default" && part != "" {
		return part, "containerd"
	}
	return "", ""
}

// runtimeOfParent is what the group above a bare identifier tells.
func runtimeOfParent(parent string) string {
	switch {
	case parent == "docker":
		return "docker"
	case parent == "k8s.io", parent == "default", parent == "moby":
		return "containerd"
	case parent == "libpod_parent":
		return "podman"
	}
	return ""
}
