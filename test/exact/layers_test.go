package exact

import (
	"os"
	"os/exec"
	"testing"

	"github.com/allocsnoop/allocsnoop/test/live"
)

// startPreloaded starts layers.c under a preloaded library and returns it when it is ready.
func startPreloaded(t *testing.T, library string, args ...string) *live.Process {
	t.Helper()
	cmd := exec.Command(live.CompileC(t, "testdata/layers.c"), args...)
	cmd.Env = append(os.Environ(), "LD_PRELOAD="+library)
	p := live.StartCmd(t, cmd)
	p.Expect(t, "ready")
	return p
}

func TestAWrapperOfMallocMakesNoSecondBlock(t *testing.T) {
	rows, result := traceGo(t, startPreloaded(t, live.CompileC(t, "testdata/wrapper.c", "-shared", "-fPIC")))
	requireLossless(t, result)
	for _, r := range rows {
		compareRow(t, result.Profile, r)
	}
}

func TestAPluginWithAnotherAllocatorThanItsProgram(t *testing.T) {
	plugin := live.CompileC(t, "testdata/plugin.c", "-shared", "-fPIC")
	rows, result := traceGo(t, startPreloaded(t, library(t, "libjemalloc.so.2"), plugin))
	requireLossless(t, result)
	for _, r := range rows {
		compareRow(t, result.Profile, r)
	}
	want := live.Book{AllocObjects: 23, AllocBytes: 23 * 1103, InUseObjects: 23, InUseBytes: 23 * 1103}
	if got := live.Sum(result.Profile, "malloc", "plugin_keep"); got != want {
		t.Errorf("the plugin has %+v, want %+v", got, want)
	}
}
