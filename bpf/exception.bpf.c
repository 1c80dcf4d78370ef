// clang-format off
//go:build ignore

// clang-format on
/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Exceptions through return probes. A return probe replaces a function's return address by that of the kernel's
 * trampoline, which no unwinder of C++ knows: an exception that leaves the function would end the program. So the true
 * address is put back where an unwinder starts, and the trampoline where an exception is caught below the function,
 * which then lives on.
 *
 * Apart from the other programs because bpf_probe_write_user leaves a line in the kernel's log when such a program is
 * loaded, and lockdown forbids it: only targets that need it get it. What is written is the word that the kernel itself
 * keeps for that place, and only where its trampoline stands, so that whose thread it is does not matter.
 *
 * The traps: programs keep below 64 bytes of stack (see UNWIND_TASK_STACK in unwind.h); and arm64 has no place to write
 * to, as return addresses are in a register where its probes meet them.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include "core.h"
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

#define MAX_RETURN_PROBES 64 /* the kernel's own bound of one thread */

/* The address that replaced return addresses have; 0: the process has none. */
static __always_inline __u64 trampoline(struct task_struct *task)
{
	return BPF_CORE_READ(task, mm, uprobes_state.xol_area, vaddr);
}

/*
 * exchange writes into each live frame's return address that is probed: what the kernel keeps, or the trampoline.
 * Frames at or below sp are gone: the exception has left them.
 */
static __always_inline int exchange(__u64 sp, bool probe)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct return_instance *ri;
	__u64 word, kept, tramp = trampoline(task), at;

	if (!tramp)
		return 0;
	ri = BPF_CORE_READ(task, utask, return_instances);
	for (int i = 0; ri && i < MAX_RETURN_PROBES; i++) {
		at = BPF_CORE_READ(ri, stack);
		kept = BPF_CORE_READ(ri, orig_ret_vaddr);
		ri = BPF_CORE_READ(ri, next);
		if (at <= sp || bpf_probe_read_user(&word, sizeof(word), (void *)at))
			continue;
		if (word != (probe ? kept : tramp))
			continue;
		word = probe ? tramp : kept;
		bpf_probe_write_user((void *)at, &word, sizeof(word));
	}
	return 0;
}

SEC("uprobe")
int exception_thrown(struct pt_regs *ctx)
{
	return exchange(PT_REGS_SP(ctx), false);
}

SEC("uprobe")
int exception_caught(struct pt_regs *ctx)
{
	return exchange(PT_REGS_SP(ctx), true);
}
