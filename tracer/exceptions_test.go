package tracer

import (
	"testing"

	"github.com/prometheus/procfs"
)

func TestSizesThatAreAlwaysGranted(t *testing.T) {
	const gib = 1 << 30
	total, swap, limit, used := uint64(23*gib), uint64(7*gib), uint64(18*gib), uint64(13*gib)
	info := procfs.Meminfo{MemTotalBytes: &total, SwapTotalBytes: &swap, CommitLimitBytes: &limit, CommittedASBytes: &used}
	nearlyUsed := info
	most := limit - 1
	nearlyUsed.CommittedASBytes = &most
	for _, tt := range []struct {
		name   string
		policy uint64
		info   *procfs.Meminfo
		want   uint64
	}{
		{"policy 0 refuses more than all memory", 0, &info, 30 * gib},
		{"policy 1 refuses nothing below the address space", 1, &info, 1024 * gib},
		{"policy 2 refuses what is committed, and others commit too", 2, &info, 4 * gib},
		{"policy 2 near its limit", 2, &nearlyUsed, 0},
		{"a kernel that does not tell", 2, &procfs.Meminfo{}, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := granted(tt.policy, tt.info); got != tt.want {
				t.Errorf("granted %d bytes, want %d", got, tt.want)
			}
		})
	}
}
