/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Per-thread state: the stack of pending allocator calls, the arguments of the
 * system call under way, and scratch for the unwinder.
 */
#ifndef ALLOCSNOOP_THREAD_H
#define ALLOCSNOOP_THREAD_H

#define MAX_PENDING 8

/* What a return takes off the stack before the return probe sees the stack pointer. */
#if defined(__TARGET_ARCH_x86)
#define RETURN_POPS 8
#else
#define RETURN_POPS 0
#endif

enum call_flag {
	CALL_NESTED = 1 << 0,	 /* within another call of its kind: not booked */
	CALL_UNSAMPLED = 1 << 1, /* runs, but is not booked */
	CALL_TOOK_OLD = 1 << 2,	 /* realloc: .old was taken out of the books */
	CALL_UNKNOWN = 1 << 3,	 /* realloc of a block that was not in the books */
};

/* A call of a probed function that has not returned. */
struct call {
	struct func func;
	__u64 sp;   /* at entry, where the return address is */
	__u64 addr; /* realloc's block */
	__u64 out;  /* where the variable is that gets the block's address */
	__u64 pool;
	__u32 flags;
	__u32 pad;
	struct block new;
	struct block old;
};

/* A call that asks another probed function for a larger block than it was asked for. */
struct wrap {
	__u64 sp;   /* at entry; 0: none */
	__u64 word; /* that is there: its return address, while it runs */
	__u64 size;
};

struct thread {
	struct call calls[MAX_PENDING];
	__u32 depth;
	__u32 overflow; /* calls beyond MAX_PENDING that have not returned */
	__u64 random;
	struct wrap wrap;
	__u64 syscall[6];
	__s32 syscall_nr; /* -1: none that matters */
	__u32 window;	  /* that the calls were entered in */
#ifndef NO_TASK_STORAGE
	struct unwind unwind;
#endif
};

/* thread_scratch is the thread's own where that can be, so that a preempting program cannot overwrite it. */
static __always_inline struct unwind *thread_scratch(struct thread *t)
{
#ifdef NO_TASK_STORAGE
	return t ? unwind_scratch() : NULL;
#else
	return &t->unwind;
#endif
}

/* The mask, on a value the compiler knows nothing of, is the bound that the verifier sees. */
static __always_inline struct call *call_at(struct thread *t, __u32 i)
{
	barrier_var(i);
	return &t->calls[i & (MAX_PENDING - 1)];
}

#ifdef NO_TASK_STORAGE
/* pid_tgid -> struct thread; one a traced thread, cleared at its exit; sized by user space */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct thread);
} threads SEC(".maps");

/* one zeroed struct thread, to make new ones of */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct thread);
} thread_zero SEC(".maps");

static __always_inline struct thread *thread_get(void)
{
	__u64 id = bpf_get_current_pid_tgid();

	return bpf_map_lookup_elem(&threads, &id);
}

static __always_inline struct thread *thread_make(void)
{
	__u64 id = bpf_get_current_pid_tgid();
	struct thread *t = bpf_map_lookup_elem(&threads, &id);
	__u32 zero = 0;
	void *init;

	if (t)
		return t;
	init = bpf_map_lookup_elem(&thread_zero, &zero);
	if (!init)
		return NULL;
	bpf_map_update_elem(&threads, &id, init, BPF_NOEXIST);
	return bpf_map_lookup_elem(&threads, &id);
}

static __always_inline void thread_end(void)
{
	__u64 id = bpf_get_current_pid_tgid();

	bpf_map_delete_elem(&threads, &id);
}
#else
/* struct thread of each traced thread; goes with the thread */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct thread);
} threads SEC(".maps");

static __always_inline struct thread *thread_get(void)
{
	return bpf_task_storage_get(&threads, bpf_get_current_task_btf(), NULL, 0);
}

static __always_inline struct thread *thread_make(void)
{
	return bpf_task_storage_get(&threads, bpf_get_current_task_btf(), NULL, BPF_LOCAL_STORAGE_GET_F_CREATE);
}

static __always_inline void thread_end(void)
{
	bpf_task_storage_delete(&threads, bpf_get_current_task_btf());
}
#endif

#endif
