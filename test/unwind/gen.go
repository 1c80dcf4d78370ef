// Package unwindtest holds the unwinder's BPF test program, its oracles and its benchmarks. The trap: an oracle stops
// the target, so that nothing here may ever run against a process that a test did not start.
package unwindtest

// A uprobe reads the registers of its architecture, so that each has its own object; legacy is for kernels 5.10 to 5.12.
//go:generate go tool bpf2go -go-package unwindtest -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -type event -type counts -type unwind -type unwind_end -type unwind_frame -type unwind_mark Probe probe.bpf.c -- -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -go-package unwindtest -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 Legacy probe.bpf.c -- -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu -DNO_TASK_STORAGE
