package containers

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// What the kubelet does, by the same interface: make a pod and a container in it.

func pb(number int, value any) string {
	switch v := value.(type) {
	case int:
		return string(binary.AppendUvarint(binary.AppendUvarint(nil, uint64(number)<<3), uint64(v)))
	case string:
		return string(binary.AppendUvarint(binary.AppendUvarint(nil, uint64(number)<<3|2), uint64(len(v)))) + v
	}
	panic("a string or an int")
}

// cri makes a call and returns the string in the answer's field 1, the identifier of what was made.
func (d *containerd) cri(t *testing.T, method, message string) string {
	t.Helper()
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.socket)
	}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	body := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...)
	request, err := http.NewRequest(http.MethodPost, "http://localhost/runtime.v1.RuntimeService/"+method, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/grpc")
	request.Header.Set("TE", "trailers")
	answer, err := (&http.Client{Transport: transport, Timeout: patience}).Do(request)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatalf("%s: %v", method, err)
	}
	if status := answer.Trailer.Get("Grpc-Status") + answer.Header.Get("Grpc-Status"); status != "0" {
		t.Fatalf("%s: status %s: %s%s", method, status, answer.Trailer.Get("Grpc-Message"), answer.Header.Get("Grpc-Message"))
	}
	if len(text) < 7 {
		return ""
	}
	return string(text[7:]) // five bytes of frame, tag and length of a short string
}

// startPod makes a pod on the host's network, which needs no network plug-in, with one leaker.
func (d *containerd) startPod(t *testing.T, pod, uid string, p *pipes) {
	t.Helper()
	const own, node = 1, 2 // modes of namespaces
	labels := ""
	for key, value := range map[string]string{"io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": "prod", "io.kubernetes.container.name": "app"} {
		labels += pb(9, pb(1, key)+pb(2, value))
	}
	sandbox := pb(1, pb(1, pod)+pb(2, uid)+pb(3, "prod")) + pb(3, t.TempDir()) +
		pb(8, pb(1, "/kubepods/besteffort/pod"+uid)+pb(2, pb(1, pb(1, node)+pb(2, own))))
	podID := d.cri(t, "RunPodSandbox", pb(1, sandbox))
	t.Cleanup(func() {
		d.cri(t, "StopPodSandbox", pb(1, podID))
		d.cri(t, "RemovePodSandbox", pb(1, podID))
	})
	container := pb(1, pb(1, "app")) + pb(2, pb(1, imageName)) + pb(3, "/bin/leaker") + pb(4, "/io") +
		pb(7, pb(1, "/io")+pb(2, p.dir)) + labels + pb(11, "app.log") + pb(15, pb(2, pb(3, pb(1, node)+pb(2, own))))
	id := d.cri(t, "CreateContainer", pb(1, podID)+pb(2, container)+pb(3, sandbox))
	d.cri(t, "StartContainer", pb(1, id))
	p.expect(t, "ready")
}

func TestAContainerOfKubernetesIsFoundByEachOfItsNames(t *testing.T) {
	d := startContainerd(t)
	d.load(t, "k8s.io")
	await(t, "the image in containerd's CRI", func() bool {
		text, err := try("ctr", "-a", d.socket, "-n", "k8s.io", "image", "ls")
		return err == nil && strings.Contains(text, "io.cri-containerd.image=managed")
	})
	const uid = "0b5c1d7e-3f0a-4c55-9d53-7a1f2b3c4d5e"
	p, other := ioDir(t), ioDir(t)
	d.startPod(t, "web-7d4f9", uid, p)
	d.startPod(t, "db-0", "1b5c1d7e-3f0a-4c55-9d53-7a1f2b3c4d5e", other)
	for name, whom := range map[string]string{"the pod's name": "web-7d4f9", "namespace, pod and container": "prod/web-7d4f9/app", "the pod's uid": uid} {
		t.Run(name, func(t *testing.T) {
			tr := live.TraceArgs(t, "--container", whom, "--mode", "exact")
			p.leak(t, "leak 23 1009")
			other.leak(t, "leak 37 1019")
			result := tr.Stop(t)
			checkLeak(t, result, result.Profile, blocks(23, 1009))
		})
	}
}
