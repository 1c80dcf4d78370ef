package bpf

// Two builds of one source: Current needs task storage for tracing programs (5.13+), Legacy keeps its scratch per CPU and
// runs on 5.10. amd64 and arm64 differ in how arguments are read from the registers. Exception is loaded apart, and on
// amd64 only; see there.
//
//go:generate go tool bpf2go -go-package bpf -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 -type func -type proc -type live_key -type block -type row_key -type row -type event -type stack_head -type probe_at -type mapped_file -type op -type func_flag -type proc_flag -type counter -type event_type -type event_flag -type unwind_end -type unwind_frame -type unwind_mark -type unwind_slot -type unwind_row -type unwind_rule Current allocsnoop.bpf.c -- -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
//go:generate go tool bpf2go -go-package bpf -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 Legacy allocsnoop.bpf.c -- -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu -DNO_TASK_STORAGE
//go:generate go tool bpf2go -go-package bpf -cc clang-14 -strip llvm-strip-14 -target amd64,arm64 Exception exception.bpf.c -- -O2 -g -Wall -Wextra -Werror -Wno-unused-parameter -I/usr/include/x86_64-linux-gnu
