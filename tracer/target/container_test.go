package target

import "testing"

const id64 = "4f1c8d9a0b2e3f4a5b6c7d8e9f00112233445566778899aabbccddeeff001122"
const pod = "0a1b2c3d-4e5f-6071-8293-a4b5c6d7e8f9"
const podUnderscores = "0a1b2c3d_4e5f_6071_8293_a4b5c6d7e8f9"

func TestContainersOfEveryRuntimeAreRecognised(t *testing.T) {
	tests := []struct {
		name, path string
		want       Container
	}{
		{"no container", "/user.slice/user-1000.slice/session-2.scope", Container{}},
		{"the root group", "/", Container{}},
		{"no group", "", Container{}},
		{"Docker, cgroupfs", "/docker/" + id64, Container{id64, "", "docker"}},
		{"Docker, systemd", "/system.slice/docker-" + id64 + ".scope", Container{id64, "", "docker"}},
		{"a group inside of a Docker container", "/docker/" + id64 + "/init.scope", Container{id64, "", "docker"}},
		{"Docker in Docker", "/docker/" + id64 + "/docker/" + "aa" + id64[2:], Container{"aa" + id64[2:], "", "docker"}},
		{"Kubernetes, cgroupfs", "/kubepods/burstable/pod" + pod + "/" + id64, Container{id64, pod, ""}},
		{"Kubernetes guaranteed pod", "/kubepods/pod" + pod + "/" + id64, Container{id64, pod, ""}},
		{"Kubernetes, containerd, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + podUnderscores + ".slice/cri-containerd-" + id64 + ".scope", Container{id64, pod, "containerd"}},
		{"Kubernetes, CRI-O", "/kubepods.slice/kubepods-pod" + podUnderscores + ".slice/crio-" + id64 + ".scope", Container{id64, pod, "cri-o"}},
		{"Kubernetes in kind", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + podUnderscores + ".slice/cri-containerd-" + id64 + ".scope", Container{id64, pod, "containerd"}},
		{"a static pod's plain hash", "/kubepods/pod0123456789abcdef0123456789abcdef/" + id64, Container{id64, "0123456789abcdef0123456789abcdef", ""}},
		{"a pod's own group", "/kubepods/burstable/pod" + pod, Container{"", pod, ""}},
		{"Podman, systemd", "/machine.slice/libpod-" + id64 + ".scope/container", Container{id64, "", "podman"}},
		{"Podman, cgroupfs", "/libpod_parent/libpod-" + id64, Container{id64, "", "podman"}},
		{"Podman rootless", "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-" + id64 + ".scope", Container{id64, "", "podman"}},
		{"Podman's monitor is not the container", "/machine.slice/libpod-conmon-" + id64 + ".scope", Container{}},
		{"CRI-O's monitor is not the container", "/system.slice/crio-conmon-" + id64 + ".scope", Container{}},
		{"nerdctl", "/system.slice/nerdctl-" + id64 + ".scope", Container{id64, "", "containerd"}},
		{"ctr", "/default/web-1", Container{"web-1", "", "containerd"}},
		{"containerd's own Kubernetes namespace", "/k8s.io/" + id64, Container{id64, "", "containerd"}},
		{"LXC 4", "/lxc.payload.web/system.slice", Container{"web", "", "lxc"}},
		{"LXC", "/lxc/web", Container{"web", "", "lxc"}},
		{"nspawn", "/machine.slice/systemd-nspawn@web.service/payload", Container{"web", "", "nspawn"}},
		{"ECS", "/ecs/0123456789abcdef0123456789abcdef/0123456789abcdef0123456789abcdef-1234567890", Container{"0123456789abcdef0123456789abcdef-1234567890", "", "ecs"}},
		{"seen from another cgroup namespace", "/../" + id64, Container{id64, "", ""}},
		{"63 digits are none", "/docker/" + id64[1:], Container{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := ContainerOf(tt.path); got != tt.want {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestALongIdentifierIsShortenedANameIsNot(t *testing.T) {
	if got := (Container{ID: id64}).Short(); got != "4f1c8d9a0b2e" {
		t.Errorf("got %q", got)
	}
	if got := (Container{ID: "web"}).Short(); got != "web" {
		t.Errorf("got %q", got)
	}
}

func FuzzContainerOf(f *testing.F) {
	f.Add("/kubepods.slice/kubepods-pod" + podUnderscores + ".slice/crio-" + id64 + ".scope")
	f.Fuzz(func(t *testing.T, path string) {
		c := ContainerOf(path)
		c.Short()
		if c.ID == "" && c.Runtime != "" {
			t.Errorf("%q: a runtime without a container: %+v", path, c)
		}
	})
}
