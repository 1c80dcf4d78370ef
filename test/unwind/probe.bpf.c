//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only
// The unwinder alone, for its tests and benchmarks: walks at a probe and sends stacks of chosen events, so that an
// oracle can check them.
#include "../../bpf/unwind.h"

char LICENSE[] SEC("license") = "GPL";

#define SIGSTOP 19

struct event {
	__u64 pid_tgid;
	__u64 hash;
	__u64 missing_pc;
	__u32 n, end;
	__u64 frames[UNWIND_MAX_FRAMES];
};

struct counts {
	__u64 events, frames, lost, unsent;
	__u64 ends[END_COUNT];
};

// armed: how many stacks to send. After each the thread stops itself when stop is set.
__u32 armed;
__u32 stop;
// skip events between two sent ones
__u32 every;
__u32 seen;
// stacks that end so are sent whatever armed says, until it is used up too
__u32 bad_armed;

// procs: slot of each traced process.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, __u32);
} procs SEC(".maps");

// events: the sent stacks.
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
	__type(value, struct event);
} events SEC(".maps");

// totals: of all events.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counts);
} totals SEC(".maps");

// stackbuf: where bpf_get_stack writes in the benchmark.
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64[127]);
} stackbuf SEC(".maps");

static __always_inline struct counts *counts(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&totals, &zero);
}

static __always_inline __u32 *slot_of(void)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;

	return bpf_map_lookup_elem(&procs, &tgid);
}

static __always_inline bool wanted(struct unwind *u)
{
	if (u->end != END_COMPLETE && bad_armed) {
		bad_armed--;
		return true;
	}
	if (!armed)
		return false;
	if (every && seen++ % every)
		return false;
	armed--; // a race between two CPUs sends one more stack, which the reader drops
	return true;
}

static __always_inline int report(struct unwind *u)
{
	struct counts *c = counts();
	struct event *e;

	if (!c)
		return 0;
	c->events++;
	c->frames += u->n;
	if (u->end < END_COUNT)
		c->ends[u->end]++;
	if (!wanted(u))
		return 0;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		c->unsent++;
		return 0;
	}
	e->pid_tgid = bpf_get_current_pid_tgid();
	e->hash = u->hash;
	e->missing_pc = u->missing_pc;
	e->n = u->n;
	e->end = u->end;
	bpf_probe_read_kernel(e->frames, sizeof(e->frames), u->frames);
	bpf_ringbuf_submit(e, 0);
	if (stop)
		bpf_send_signal_thread(SIGSTOP);
	return 0;
}

static __always_inline struct unwind *scratch(void)
{
	struct unwind *u = unwind_scratch();
	struct counts *c;

	if (!u) {
		c = counts();
		if (c)
			c->lost++;
	}
	return u;
}

SEC("uprobe")
int on_uprobe(struct pt_regs *ctx)
{
	__u32 *slot = slot_of();
	struct unwind *u;

	UNWIND_TASK_STACK(ctx);
	if (!slot)
		return 0;
	u = scratch();
	if (!u)
		return 0;
	unwind_uprobe(u, ctx, *slot);
	return report(u);
}

// at a function's first instruction
SEC("uprobe")
int on_entry(struct pt_regs *ctx)
{
	__u32 *slot = slot_of();
	struct unwind *u;

	UNWIND_TASK_STACK(ctx);
	if (!slot)
		return 0;
	u = scratch();
	if (!u)
		return 0;
	unwind_uprobe_at(u, ctx, *slot, true);
	return report(u);
}

// the end of any system call; raw, since tracefs may not be mounted
SEC("raw_tracepoint/sys_exit")
int on_syscall(void *ctx)
{
	__u32 *slot = slot_of();
	struct unwind *u;

	if (!slot)
		return 0;
	u = scratch();
	if (!u)
		return 0;
	unwind_syscall(u, *slot);
	return report(u);
}

// another tool's return probe
SEC("uprobe")
int on_return(struct pt_regs *ctx)
{
	return 0;
}

// For the benchmark: the walk without a report, the kernel's frame-pointer walk, and nothing.
SEC("uprobe")
int bench_unwind(struct pt_regs *ctx)
{
	__u32 *slot = slot_of();
	struct unwind *u;
	struct counts *c;

	UNWIND_TASK_STACK(ctx);
	if (!slot)
		return 0;
	u = unwind_scratch();
	if (!u)
		return 0;
	unwind_uprobe(u, ctx, *slot);
	c = counts();
	if (!c)
		return 0;
	c->events++;
	c->frames += u->n;
	return 0;
}

SEC("uprobe")
int bench_get_stack(struct pt_regs *ctx)
{
	struct counts *c = counts();
	__u32 *slot = slot_of();
	__u32 zero = 0;
	long n;
	__u64(*buf)[127] = bpf_map_lookup_elem(&stackbuf, &zero);

	if (!slot || !c || !buf)
		return 0;
	n = bpf_get_stack(ctx, buf, sizeof(*buf), BPF_F_USER_STACK);
	c->events++;
	if (n > 0)
		c->frames += (__u64)n >> 3;
	return 0;
}

SEC("uprobe")
int bench_empty(struct pt_regs *ctx)
{
	__u32 *slot = slot_of();
	struct counts *c = counts();

	if (!slot || !c)
		return 0;
	c->events++;
	return 0;
}
