package containers

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

const imageName = "docker.io/allocsnoop/leaker:1"

// image writes an image with a leaker on musl as `docker save` would, which every runtime can load.
func image(t *testing.T) string {
	t.Helper()
	layer := layerOf(t, muslRoot(t))
	config := map[string]any{
		"architecture": "amd64", "os": "linux",
		"config": map[string]any{"Cmd": []string{"/bin/busybox", "sleep", "100000"}}, // for a pod's own container; others say what to run
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{fmt.Sprintf("sha256:%x", sha256.Sum256(layer))}},
	}
	manifest := []map[string]any{{"Config": "config.json", "RepoTags": []string{imageName}, "Layers": []string{"layer.tar"}}}
	path := filepath.Join(t.TempDir(), "image.tar")
	archive(t, path, map[string][]byte{"layer.tar": layer, "config.json": asJSON(t, config), "manifest.json": asJSON(t, manifest)})
	return path
}

func asJSON(t *testing.T, v any) []byte {
	t.Helper()
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func layerOf(t *testing.T, root string) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.AddFS(os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func archive(t *testing.T, path string, files map[string][]byte) {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for name, data := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, buf.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}

// requireTool fails where a runtime is not installed; the test says below why one that is there cannot run.
func requireTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("this test needs the package of %s from test/packages.txt (make setup): %v", name, err)
	}
	return path
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	text, err := try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func try(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return strings.TrimSpace(stdout.String()), nil
}

// shortDir is a directory whose sockets have short enough names (108 bytes).
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "as")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// ioDir is a place for pipes that a container mounts.
func ioDir(t *testing.T) *pipes {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "io")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return newPipes(t, dir)
}

// awaitProbed waits until a process that joined a running trace has as many probes as another with the same files. Nothing
// signals that from outside.
func awaitProbed(t *testing.T, pid, want int) {
	t.Helper()
	await(t, fmt.Sprintf("%d probes in process %d", want, pid), func() bool { return live.Breakpoints(t, pid) >= want })
}
