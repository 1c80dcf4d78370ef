// clang-format off
//go:build ignore

// clang-format on
/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * allocsnoop's kernel side: see an allocator call or a mapping, unwind its
 * stack, count it in maps.
 *
 * Entry probe -> pending call on the thread (the outermost call of a kind wins)
 * -> stack unwound at entry -> return probe learns the pointer -> live block
 * and row of its stack. Kernel floor: 5.10 with -DNO_TASK_STORAGE, else 5.15.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stddef.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include "core.h"
#include <bpf/bpf_tracing.h>

#include "types.h"
#define UNWIND_OWN_SCRATCH
#include "unwind.h"
#include "thread.h"
#include "sample.h"
#include "books.h"

char LICENSE[] SEC("license") = "GPL";

/* nothing is booked while this is 0; user space opens and shuts it */
volatile __u32 gate = 0;
/* calls of allocators are no longer booked, though mappings are: the budget did not allow it */
volatile __u32 calls_shut = 0;
/* number of the time that the books of calls are open: what a thread noted of its calls in another one holds no more */
volatile __u32 window = 0;
/* session probes have taken over from the pairs of entry and return probes */
volatile __u32 sessions = 0;
/* the programs know the function by attach cookie (5.15+), else by its address */
volatile const __u32 have_cookie = 1;
/* exec of any process is told, for services selected by name, path, cgroup or library */
volatile const __u32 tell_execs = 0;

/* a request of at most so many bytes is not too large for the kernel; user space keeps it up to date */
volatile __u64 always_granted = 0;
/* vm.max_map_count */
volatile __u32 max_maps = 0;

/* tgid -> the traced process; sized by user space */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, struct proc);
} procs SEC(".maps");

#define MAX_FUNCS 512

/* number of a probed function -> what it does; filled at attach */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_FUNCS);
	__type(key, __u32);
	__type(value, struct func);
} funcs SEC(".maps");

/* hits of each probed function, per CPU */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MAX_FUNCS);
	__type(key, __u32);
	__type(value, __u64);
} hits SEC(".maps");

/* stacks by enum unwind_end, per CPU */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, END_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} ends SEC(".maps");

struct probe_at {
	__u64 ip;
	__u32 tgid;
	__u32 pad;
};

/* probed instruction of a process -> number of the function; only without cookies (< 5.15) */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, struct probe_at);
	__type(value, __u32);
} func_at SEC(".maps");

static __always_inline struct proc *current_proc(void)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;

	return bpf_map_lookup_elem(&procs, &tgid);
}

/*
 * Each load stands apart behind a barrier: merged into one, it would go through
 * a computed context pointer, which the verifier forbids.
 */
static __always_inline __u64 arg(struct pt_regs *ctx, __u32 n)
{
	__u64 v = 0;

	if (n == 1) {
		v = PT_REGS_PARM1(ctx);
		barrier_var(v);
	} else if (n == 2) {
		v = PT_REGS_PARM2(ctx);
		barrier_var(v);
	} else if (n == 3) {
		v = PT_REGS_PARM3(ctx);
		barrier_var(v);
	} else if (n == 4) {
		v = PT_REGS_PARM4(ctx);
		barrier_var(v);
	} else if (n == 5) {
		v = PT_REGS_PARM5(ctx);
		barrier_var(v);
	} else if (n == 6) {
		v = PARM6(ctx);
		barrier_var(v);
	} else if (n == ARG_AX) {
		v = PT_REGS_RC(ctx);
		barrier_var(v);
	}
	return v;
}

/* The requested size; n * size that overflows is as large as can be (and fails). */
static __always_inline __u64 requested(struct pt_regs *ctx, const struct func *f)
{
	__u64 size = arg(ctx, f->size), n, most;

	if (f->flags & FUNC_INT_SIZE)
		size = (__u32)size;
	if (!f->count)
		return size;
	n = arg(ctx, f->count);
	if (f->flags & FUNC_INT_SIZE)
		n = (__u32)n;
	if (!((size | n) >> 32) || !size)
		return size * n;
	most = ~0ULL / size;
	/* Hidden, or clang makes a 128-bit multiplication of it, which BPF has not. */
	barrier_var(most);
	return n > most ? ~0ULL : size * n;
}

/* ---- stacks ---- */

/*
 * send_frames gives a stack to user space once. When the buffer is full the
 * row stays unsent, so that its next hit tries again.
 */
static __always_inline void send_frames(struct row *r, struct unwind *u, __u64 proc)
{
	struct stack_head *head;
	__u32 n = u->n;

	if (r->sent)
		return;
	if (n > UNWIND_MAX_FRAMES)
		n = UNWIND_MAX_FRAMES;
	head = (struct stack_head *)u->head;
	head->proc = proc;
	head->hash = u->hash;
	head->n = n;
	head->end = u->end;
	if (bpf_ringbuf_output(&frames, head, sizeof(*head) + n * sizeof(__u64), 0)) {
		count(COUNT_STACKS_FULL);
		return;
	}
	r->sent = 1;
}

static __always_inline void ask_for_table(struct proc *p, struct unwind *u)
{
	__u64 now;
	struct event *e;

	if (!u->missing_pc)
		return;
	now = bpf_ktime_get_ns();
	if (now - p->asked < 10 * 1000 * 1000)
		return;
	p->asked = now;
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e)
		return;
	__builtin_memset(e, 0, sizeof(*e));
	e->type = EVENT_UNKNOWN_PC;
	e->proc = p->key;
	e->tgid = bpf_get_current_pid_tgid() >> 32;
	e->time = now;
	e->args[0] = u->missing_pc;
	bpf_ringbuf_submit(e, 0);
}

/* stack_done hands a fresh stack's frames over and returns its hash. */
static __always_inline __u64 stack_done(struct proc *p, struct unwind *u, __u32 kind)
{
	struct row *r = row_get(p->key, kind, u->hash);
	__u32 end = u->end;
	__u64 *n = bpf_map_lookup_elem(&ends, &end);

	if (n)
		__sync_fetch_and_add(n, 1);
	ask_for_table(p, u);
	if (!r)
		return OTHER_STACK;
	send_frames(r, u, p->key);
	return u->hash;
}

/* ---- pending calls ---- */

/* is_trampoline tells whether a return address is that of the kernel's return probes. */
static __always_inline bool is_trampoline(__u64 ra)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 page = BPF_CORE_READ(task, mm, uprobes_state.xol_area, vaddr);

	return page && ra - page < 4096;
}

/* put_back undoes the taking out of a realloc that will never be seen to return. */
static __always_inline void put_back(struct proc *p, struct call *c)
{
	if (!(c->flags & CALL_TOOK_OLD))
		return;
	if (!live_put(p->key, c->func.kind, c->addr, &c->old, false))
		book_free(p->key, c->func.kind, &c->old);
	row_taken(p->key, c->func.kind, c->old.stack, -1);
}

/* free_old books the end of the block that a realloc had taken out. */
static __always_inline void free_old(struct proc *p, struct call *c)
{
	book_free(p->key, c->func.kind, &c->old);
	row_taken(p->key, c->func.kind, c->old.stack, -1);
}

/* forget_calls begins a window. Blocks that reallocs had taken out when the last one ended went unfollowed since. */
CHECKED_ONCE int forget_calls(struct thread *t, __u64 proc)
{
	if (!t)
		return 0;
	for (__u32 i = 0; i < MAX_PENDING; i++) {
		struct call *c = call_at(t, i);

		if (i >= t->depth)
			break;
		if (!(c->flags & CALL_TOOK_OLD))
			continue;
		book_free(proc, c->func.kind, &c->old);
		row_taken(proc, c->func.kind, c->old.stack, -1);
	}
	t->depth = 0;
	t->overflow = 0;
	t->window = window;
	return 0;
}

/*
 * A pending call may still return to its return probe if the word at its stack pointer is the trampoline's address.
 * bpf/exception.bpf.c puts the true one back before an exception leaves the call.
 */
static __always_inline bool returns_to_probe(struct call *c)
{
	__u64 word = 0;

	if (bpf_probe_read_user(&word, sizeof(word), (void *)c->sp))
		return false;
	return is_trampoline(word);
}

static __always_inline bool is_active(struct call *c, __u64 sp)
{
	/* Deeper than we are now, on the same stack: it was left by longjmp or an exception. */
	if (c->sp < sp && sp - c->sp < 1 << 20)
		return false;
	return returns_to_probe(c);
}

/*
 * count_stale counts a call of the books that never returned. For an operator new that is a way to say that it has
 * failed. While the probes are taken out, one by one, the probe on a call's return may go before that on its entry:
 * such calls are not left.
 */
static __always_inline void count_stale(struct call *c)
{
	if (gate && !calls_shut && !(c->flags & CALL_UNSAMPLED) && !(c->func.flags & FUNC_THROWS))
		count(COUNT_PENDING_STALE);
}

static __always_inline void drop_stale(struct proc *p, struct thread *t, __u64 sp)
{
	for (__u32 i = 0; i < MAX_PENDING; i++) {
		struct call *c;
		__u32 top = t->depth - 1;

		if (top >= MAX_PENDING)
			return;
		c = call_at(t, top);
		if (is_active(c, sp))
			return;
		put_back(p, c);
		t->depth = top;
		t->overflow = 0;
		count_stale(c);
	}
}

/*
 * An operator new that asks no probed function for its block: what is allocated within it comes from its new-handler,
 * or is the exception that it throws, and counts by itself.
 */
#define OWN_WITHIN (FUNC_THROWS | FUNC_LEAF)

/* pending_in tells whether a call of the kind is under way, so that another one within it is a part of it. */
static __always_inline bool pending_in(struct thread *t, __u32 kind)
{
	for (__u32 i = 0; i < MAX_PENDING; i++) {
		struct call *c = call_at(t, i);

		if (i >= t->depth)
			return false;
		if (c->func.kind == kind && (c->func.flags & OWN_WITHIN) != OWN_WITHIN)
			return true;
	}
	return false;
}

/* allocator_under_way tells whether the thread is inside a function that maps memory for its blocks. */
static __always_inline bool allocator_under_way(struct thread *t)
{
	for (__u32 i = 0; i < MAX_PENDING; i++) {
		struct call *c = call_at(t, i);

		if (i >= t->depth)
			return false;
		if (!(c->func.flags & FUNC_ALLOCATOR))
			continue;
		/* It may have been left since: no call dropped it yet. */
		if (!(c->func.flags & FUNC_THROWS) || returns_to_probe(c))
			return true;
	}
	return false;
}

/* ---- free ---- */

static __always_inline void unknown_free(struct proc *p, __u32 kind)
{
	struct thread *t;

	if (sampling)
		return; /* most unknown blocks were just not taken */
	/* realloc's own free of its input: already taken out */
	t = thread_get();
	if (t && pending_in(t, kind))
		return;
	count(p->flags & PROC_FORKED ? COUNT_FREE_INHERITED : COUNT_FREE_PREATTACH);
}

static __always_inline void on_free(struct proc *p, __u32 kind, __u64 addr)
{
	struct block b;

	if (!addr || !gate || calls_shut)
		return;
	if (live_take(p->key, kind, addr, &b))
		book_free(p->key, kind, &b);
	else
		unknown_free(p, kind);
}

/* ---- entry ---- */

static __always_inline void take_old(struct proc *p, struct call *c, __u64 addr)
{
	if (c->func.flags & FUNC_PTR_IS_OUT) {
		c->out = addr;
		if (bpf_probe_read_user(&addr, sizeof(addr), (void *)addr)) {
			count(COUNT_READ_FAULT);
			addr = 0;
		}
	}
	c->addr = addr;
	if (!addr)
		return;
	if (live_take(p->key, c->func.kind, addr, &c->old)) {
		c->flags |= CALL_TOOK_OLD;
		row_taken(p->key, c->func.kind, c->old.stack, 1);
	} else {
		c->flags |= CALL_UNKNOWN;
	}
}

/* wrap remembers the size that a call of OP_WRAP was asked for. */
static __always_inline void wrap(__u64 sp, __u64 size)
{
	struct thread *t = thread_make();

	if (!t)
		return; /* the call within it counts the loss */
	t->wrap.sp = sp;
	t->wrap.size = size;
	if (bpf_probe_read_user(&t->wrap.word, sizeof(t->wrap.word), (void *)sp))
		t->wrap.sp = 0;
}

/* unwrap is the size of a block: that of the call around it, which has rounded it up, or its own. */
static __always_inline __u64 unwrap(struct thread *t, __u64 sp, __u64 size)
{
	__u64 from = t->wrap.sp, word;

	t->wrap.sp = 0;
	if (sp > from || from - sp > 4096 || size < t->wrap.size)
		return size;
	if (bpf_probe_read_user(&word, sizeof(word), (void *)from) || word != t->wrap.word)
		return size;
	return t->wrap.size;
}

#define RLIMIT_DATA 2
#define RLIMIT_AS   9
#define VM_LOCKED   0x2000

/* Above it no request is granted: half of the address space. */
#define NEVER_GRANTED (1ULL << 47)
/* Maps that a call of an allocator may add. */
#define MAPS_OF_CALL 64

/*
 * within tells whether used pages and a request stay far below a limit, however the allocator rounds it up and whatever
 * other threads map meanwhile.
 */
static __always_inline bool within(__u64 limit, __u64 pages, __u64 size)
{
	return limit == ~0ULL || pages * 4096 + 2 * size + (16 << 20) < limit - limit / 8;
}

/*
 * may_throw tells whether operator new may find no memory for a block: then its return is not followed, for the
 * exception would meet the trampoline. The kernel refuses memory beyond limits, too many mappings, and requests too
 * large by far; else it hands out address space, whatever becomes of it. What may throw and may as well succeed is
 * counted.
 */
static __always_inline bool may_throw(__u64 size)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct mm_struct *mm = BPF_CORE_READ(task, mm);
	struct signal_struct *signal = BPF_CORE_READ(task, signal);

	if (size >= NEVER_GRANTED)
		return true;
	if (size <= always_granted &&
	    within(BPF_CORE_READ(signal, rlim[RLIMIT_AS].rlim_cur), BPF_CORE_READ(mm, total_vm), size) &&
	    within(BPF_CORE_READ(signal, rlim[RLIMIT_DATA].rlim_cur), BPF_CORE_READ(mm, data_vm), size) &&
	    (__u32)BPF_CORE_READ(mm, map_count) + MAPS_OF_CALL < max_maps &&
	    !(BPF_CORE_READ(mm, def_flags) & VM_LOCKED))
		return false;
	if (gate && !calls_shut)
		count(COUNT_NOT_FOLLOWED);
	return true;
}

/*
 * on_entry books the start of a call. It returns 1 when the return is of no
 * interest, which a session program passes on to the kernel.
 */
static __always_inline int on_entry(struct pt_regs *ctx, struct proc *p, const struct func *f)
{
	__u64 sp = PT_REGS_SP(ctx), size;
	bool frees = false;
	struct thread *t;
	struct call *c;
	__u32 op = f->op, prob;

	if (op == OP_FREE) {
		on_free(p, f->kind, arg(ctx, f->ptr));
		return 1;
	}
	if (op == OP_POOL_DESTROY) {
		if (gate && !calls_shut)
			pool_end(p->key, f->kind, arg(ctx, f->pool));
		/* the pool itself may be a block */
		on_free(p, f->kind, f->ptr ? arg(ctx, f->ptr) : 0);
		return 1;
	}
	size = requested(ctx, f);
	if (op == OP_WRAP) {
		wrap(sp, size);
		return 1;
	}
	if (f->flags & FUNC_SESSION && may_throw(size))
		return 1;
	if (op == OP_LUA_ALLOC && !size) {
		on_free(p, f->kind, arg(ctx, f->ptr));
		if (sessions)
			return 1;
		frees = true; /* its return will be seen: leave a record that it finds */
	}

	t = thread_make();
	if (!t) {
		if (gate)
			count(COUNT_THREAD_LOST);
		return 1;
	}
	if (t->window != window)
		forget_calls(t, p->key);
	if (t->depth)
		drop_stale(p, t, sp);
	if (t->depth >= MAX_PENDING) {
		t->overflow++;
		count(COUNT_PENDING_OVERFLOW);
		return 0;
	}
	c = call_at(t, t->depth);
	c->func = *f;
	c->sp = sp;
	c->addr = 0;
	c->out = 0;
	c->flags = 0;
	c->old.prob = 0;
	if (!gate || calls_shut || frees || pending_in(t, f->kind)) {
		c->flags = gate && !calls_shut && !frees ? CALL_NESTED : CALL_UNSAMPLED;
		t->depth++;
		return 0;
	}

	if (t->wrap.sp)
		size = unwrap(t, sp, size);
	if (op == OP_REALLOC || op == OP_EXPAND || op == OP_LUA_ALLOC)
		take_old(p, c, arg(ctx, f->ptr));
	else if (f->out)
		c->out = arg(ctx, f->out);
	c->pool = f->pool ? arg(ctx, f->pool) : 0;
	c->new.pool = c->pool;
	prob = sample(t, size);
	if (!prob) {
		c->flags |= CALL_UNSAMPLED;
		if (f->flags & FUNC_LEAF && !(c->flags & CALL_TOOK_OLD))
			return 1;
		t->depth++;
		return 0;
	}
	c->new.size = size;
	c->new.prob = prob;
	c->new.time = bpf_ktime_get_ns();

	struct unwind *u = thread_scratch(t);

	if (!u) {
		count(COUNT_THREAD_LOST);
		c->flags |= CALL_UNSAMPLED;
		t->depth++;
		return 0;
	}
	unwind_uprobe_at(u, ctx, p->slot, f->flags & FUNC_AT_ENTRY);
	c->new.stack = stack_done(p, u, f->kind);
	t->depth++;
	return 0;
}

/* ---- return ---- */

static __always_inline void add_block(struct proc *p, struct call *c, __u64 addr)
{
	if (c->flags & CALL_UNSAMPLED)
		return;
	if (!live_put(p->key, c->func.kind, addr, &c->new, true))
		return;
	book_alloc(p->key, c->func.kind, &c->new);
	if (c->pool)
		pool_link(p->key, c->func.kind, c->pool, addr);
}

/*
 * The address that a call which returns a status has left in its out variable;
 * 0 when it failed, for then the variable holds something old.
 */
static __always_inline __u64 out_result(struct call *c, __u64 result)
{
	__u64 addr = 0;

	if (c->func.flags & FUNC_STATUS && (__s32)result)
		return 0;
	if (c->func.flags & FUNC_TRUTH && !(__u8)result)
		return 0;
	if (bpf_probe_read_user(&addr, sizeof(addr), (void *)c->out))
		count(COUNT_READ_FAULT);
	return addr;
}

static __always_inline void alloc_returned(struct proc *p, struct call *c, __u64 result)
{
	__u64 addr = result;

	if (c->out)
		addr = out_result(c, result);
	if (!addr)
		return;
	/* A call within this one has made the block, and has it in its book. */
	if ((c->func.flags & OWN_WITHIN) == OWN_WITHIN && live_since(p->key, c->func.kind, addr, c->new.time))
		return;
	add_block(p, c, addr);
}

static __always_inline void realloc_returned(struct proc *p, struct call *c, __u64 result)
{
	bool freed = !c->new.size && c->func.flags &FUNC_ZERO_FREES;

	if (c->out)
		result = out_result(c, result);
	if (!result) {
		if (!c->addr)
			return; /* a failed realloc(NULL) */
		if (!freed && !(c->func.flags & FUNC_FAIL_FREES)) {
			put_back(p, c);
			return;
		}
	}
	if (c->flags & CALL_TOOK_OLD)
		free_old(p, c);
	else if (c->flags & CALL_UNKNOWN && !sampling) {
		/* A block from before the trace is not a new leak of its full size. */
		if (p->flags & PROC_FORKED || result)
			count(COUNT_REALLOC_PREATTACH);
		else
			count(COUNT_FREE_PREATTACH);
		if (!result)
			return;
		count_add(COUNT_REALLOC_PREATTACH_BYTES, c->new.size);
		return;
	}
	if (result)
		add_block(p, c, result);
}

static __always_inline void expand_returned(struct proc *p, struct call *c, __u64 result)
{
	bool failed = c->func.flags & FUNC_REAL_SIZE ? result < c->new.size : !result;

	if (!(c->flags & CALL_TOOK_OLD))
		return;
	if (failed || c->flags & CALL_UNSAMPLED) {
		put_back(p, c);
		return;
	}
	free_old(p, c);
	add_block(p, c, c->addr);
}

/* pop finds the call that returns to sp and drops those above it that never will. */
static __always_inline struct call *pop(struct proc *p, struct thread *t, __u64 sp)
{
	for (__u32 i = 0; i < MAX_PENDING; i++) {
		__u32 top = t->depth - 1;
		struct call *c;

		if (top >= MAX_PENDING)
			return NULL;
		c = call_at(t, top);
		if (c->sp + RETURN_POPS == sp) {
			t->depth = top;
			return c;
		}
		if (c->sp + RETURN_POPS > sp)
			return NULL;
		put_back(p, c);
		t->depth = top;
		count_stale(c);
	}
	return NULL;
}

static __always_inline int on_return(struct pt_regs *ctx, struct proc *p)
{
	struct thread *t = thread_get();
	struct call *c;
	__u64 result = PT_REGS_RC(ctx);

	if (!t)
		return 0;
	if (t->overflow) {
		t->overflow--;
		return 0;
	}
	c = pop(p, t, PT_REGS_SP(ctx));
	if (!c) {
		/*
		 * While sessions take over, both kinds of probes see a return, and one finds the call popped; and
		 * calls that were not sampled have left no record.
		 */
		if (gate && !sessions && !sampling)
			count(COUNT_RETURN_WITHOUT_ENTRY);
		return 0;
	}
	if (c->flags & CALL_NESTED)
		return 0;
	if (!gate || calls_shut || (c->flags & CALL_UNSAMPLED && !(c->flags & (CALL_TOOK_OLD | CALL_UNKNOWN)))) {
		put_back(p, c);
		return 0;
	}
	switch (c->func.op) {
	case OP_ALLOC:
	case OP_POOL_ALLOC:
		alloc_returned(p, c, result);
		break;
	case OP_REALLOC:
	case OP_LUA_ALLOC:
		realloc_returned(p, c, result);
		break;
	case OP_EXPAND:
		expand_returned(p, c, result);
		break;
	}
	return 0;
}

/* ---- the probes ---- */

static __always_inline const struct func *probed_func(struct pt_regs *ctx, __u32 *id)
{
	if (have_cookie) {
		*id = bpf_get_attach_cookie(ctx);
	} else {
		struct probe_at at = {
		    .ip = PT_REGS_IP(ctx),
		    .tgid = bpf_get_current_pid_tgid() >> 32,
		};
		__u32 *v = bpf_map_lookup_elem(&func_at, &at);

		if (!v)
			return NULL;
		*id = *v;
	}
	return bpf_map_lookup_elem(&funcs, id);
}

/* Both sorts of probes may be in: one of them enters a call. */
static __always_inline int enter(struct pt_regs *ctx, bool session)
{
	struct proc *p = current_proc();
	const struct func *f;
	__u32 id;
	__u64 *n;

	if (!p)
		return 1;
	f = probed_func(ctx, &id);
	if (!f || session != (sessions || f->flags & FUNC_SESSION))
		return 1;
	/* A session that all processes share meets children that were born before their parent's other probes were in.
	 */
	if (session && !(p->flags & PROC_PROBED))
		return 1;
	n = bpf_map_lookup_elem(&hits, &id);
	if (n)
		__sync_fetch_and_add(n, 1);
	return on_entry(ctx, p, f);
}

static __always_inline int leave(struct pt_regs *ctx)
{
	struct proc *p = current_proc();

	if (!p)
		return 0;
	count(COUNT_RETURNS);
	return on_return(ctx, p);
}

SEC("uprobe")
int call_entered(struct pt_regs *ctx)
{
	UNWIND_TASK_STACK(ctx);
	enter(ctx, false);
	return 0;
}

SEC("uretprobe")
int call_returned(struct pt_regs *ctx)
{
	UNWIND_TASK_STACK(ctx);
	leave(ctx);
	return 0;
}

#ifndef NO_TASK_STORAGE
/* always empty; see UNWIND_TASK_STACK */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} no_sessions SEC(".maps");

/*
 * Both halves of a session are the same program: at the entry the thread is at
 * the probe, at the return it is elsewhere. (The kernel's own
 * bpf_session_is_return has changed its arguments between versions.)
 */
static __always_inline bool is_return(struct pt_regs *ctx)
{
	return PT_REGS_IP(ctx) != bpf_get_func_ip(ctx);
}

SEC("uprobe.session")
int call_session(struct pt_regs *ctx)
{
	/* UNWIND_TASK_STACK, with a map of its own: one serves a single sort of program */
	if (unwind_never)
		bpf_tail_call(ctx, &no_sessions, 0);
	if (is_return(ctx))
		return leave(ctx);
	return enter(ctx, true);
}
#endif

/* ---- mappings ---- */

struct syscall_enter {
	__u64 unused;
	__s64 nr;
	__u64 args[6];
};

struct syscall_exit {
	__u64 unused;
	__s64 nr;
	__s64 result;
};

#if defined(__TARGET_ARCH_x86)
enum { NR_MMAP = 9, NR_MUNMAP = 11, NR_BRK = 12, NR_MREMAP = 25 };
#else
enum { NR_MMAP = 222, NR_MUNMAP = 215, NR_BRK = 214, NR_MREMAP = 216 };
#endif

/* The event of a system call, -1 for one that moves no memory. */
static __always_inline __s32 mapping_event(__s64 nr)
{
	switch (nr) {
	case NR_MMAP:
		return EVENT_MMAP;
	case NR_MUNMAP:
		return EVENT_MUNMAP;
	case NR_BRK:
		return EVENT_BRK;
	case NR_MREMAP:
		return EVENT_MREMAP;
	}
	return -1;
}

static __always_inline int syscall_entered(struct syscall_enter *ctx, __s32 type, int nargs)
{
	struct thread *t;

	if (type < 0 || !gate || !current_proc())
		return 0;
	t = thread_make();
	if (!t) {
		count(COUNT_MAP_GAP);
		return 0;
	}
	/* Stored one above the type, so that fresh zeroed state means "none". */
	t->syscall_nr = type + 1;
#pragma unroll
	for (int i = 0; i < 6; i++)
		t->syscall[i] = i < nargs ? ctx->args[i] : 0;
	return 0;
}

#define MAP_ANONYMOUS 0x20
#define PROT_EXEC     0x4

static __always_inline bool adds_memory(struct thread *t, __s32 type)
{
	switch (type) {
	case EVENT_MMAP:
		return t->syscall[3] & MAP_ANONYMOUS;
	case EVENT_BRK:
		return t->syscall[0];
	case EVENT_MREMAP:
		return true; /* a part that grows from nothing known takes this stack */
	}
	return false;
}

static __always_inline int syscall_returned(struct syscall_exit *ctx, __s32 type)
{
	struct proc *p = current_proc();
	__s64 result = ctx->result;
	struct thread *t;
	struct event *e;
	__u64 stack = 0;
	bool internal;

	if (type < 0 || !gate || !p)
		return 0;
	t = thread_get();
	if (!t || t->syscall_nr != type + 1)
		return 0;
	t->syscall_nr = 0;
	if (result < 0 && result >= -4095)
		return 0;
	internal = allocator_under_way(t);
	if (!internal && adds_memory(t, type)) {
		struct unwind *u = thread_scratch(t);

		if (u) {
			unwind_syscall(u, p->slot);
			stack = stack_done(p, u, 0);
		} else {
			count(COUNT_THREAD_LOST);
		}
	}
	e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
	if (!e) {
		count(COUNT_MAP_GAP);
		return 0;
	}
	e->type = type;
	e->flags = internal ? EVENT_INTERNAL : 0;
	e->proc = p->key;
	e->time = bpf_ktime_get_ns();
	e->tgid = bpf_get_current_pid_tgid() >> 32;
	e->other = 0;
	e->stack = stack;
	e->result = result;
	for (int i = 0; i < 6; i++)
		e->args[i] = t->syscall[i];
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* The kernel refuses a program that reads more arguments than the system call has, so that each has its own. */
#define ENTER_SYSCALL(name, type, nargs)                                                                               \
	SEC("tracepoint/syscalls/sys_enter_" #name)                                                                    \
	int enter_##name(struct syscall_enter *ctx)                                                                    \
	{                                                                                                              \
		return syscall_entered(ctx, type, nargs);                                                              \
	}

ENTER_SYSCALL(mmap, EVENT_MMAP, 6)
ENTER_SYSCALL(munmap, EVENT_MUNMAP, 2)
ENTER_SYSCALL(mremap, EVENT_MREMAP, 5)
ENTER_SYSCALL(brk, EVENT_BRK, 1)

/* One program for all returns, as each that unwinds costs the verifier anew. */
SEC("tracepoint/syscalls/exit")
int syscall_exit(struct syscall_exit *ctx)
{
	return syscall_returned(ctx, mapping_event(ctx->nr));
}

/* ---- processes ---- */

static __always_inline void tell(__u32 type, __u64 proc, __u32 tgid, __u32 other, __u32 flags)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e) {
		count(COUNT_MAP_GAP);
		return;
	}
	__builtin_memset(e, 0, sizeof(*e));
	e->type = type;
	e->flags = flags;
	e->proc = proc;
	e->tgid = tgid;
	e->other = other;
	e->time = bpf_ktime_get_ns();
	bpf_ringbuf_submit(e, 0);
}

static __always_inline __u64 new_key(__u32 tgid, __u64 old)
{
	__u32 generation = bpf_ktime_get_ns() >> 10;

	if (generation == old >> 32)
		generation++;
	return (__u64)generation << 32 | tgid;
}

SEC("raw_tracepoint/sched_process_fork")
int process_forked(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *parent = (void *)ctx->args[0];
	struct task_struct *child = (void *)ctx->args[1];
	__u32 from = BPF_CORE_READ(parent, tgid);
	__u32 to = BPF_CORE_READ(child, tgid);
	struct proc *p, new;
	bool shares;

	if (from == to)
		return 0; /* a thread */
	p = bpf_map_lookup_elem(&procs, &from);
	if (!p || !(p->flags & PROC_FOLLOW))
		return 0;
	new = *p;
	shares = BPF_CORE_READ(parent, mm) == BPF_CORE_READ(child, mm);
	if (!shares) {
		new.key = new_key(to, p->key);
		new.flags |= PROC_FORKED;
	}
	if (bpf_map_update_elem(&procs, &to, &new, BPF_ANY)) {
		count(COUNT_NO_PROC_ROOM);
		return 0;
	}
	tell(EVENT_FORK, new.key, from, to,
	     (shares ? EVENT_SHARES_MM : 0) | ((__u32)BPF_CORE_READ(parent, pid) == from ? EVENT_BY_LEADER : 0));
	return 0;
}

SEC("raw_tracepoint/sched_process_exec")
int process_execed(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct proc *p = bpf_map_lookup_elem(&procs, &tgid);
	struct proc new;

	if (!p) {
		/* user space decides whether the new image is a member */
		if (tell_execs)
			tell(EVENT_EXEC, 0, tgid, 0, 0);
		return 0;
	}
	new = *p;
	new.key = new_key(tgid, p->key);
	new.flags &= ~PROC_FORKED;
	new.slot = ~0U; /* none until user space has read the new image's maps */
	bpf_map_update_elem(&procs, &tgid, &new, BPF_ANY);
	thread_end();
	tell(EVENT_EXEC, new.key, tgid, 0, 0);
	return 0;
}

SEC("raw_tracepoint/sched_process_exit")
int process_exited(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct proc *p = current_proc();
	struct thread *t;
	__u32 tgid;

	if (!p)
		return 0;
	t = thread_get();
	if (t) {
		for (__u32 i = 0; i < MAX_PENDING; i++) {
			if (i >= t->depth)
				break;
			if (call_at(t, i)->flags & CALL_TOOK_OLD) {
				put_back(p, call_at(t, i));
				count(COUNT_DIED_IN_REALLOC);
			}
		}
		thread_end();
	}
	if (BPF_CORE_READ(task, signal, live.counter))
		return 0; /* other threads live on */
	tgid = bpf_get_current_pid_tgid() >> 32;
	tell(EVENT_EXIT, p->key, tgid, BPF_CORE_READ(task, exit_code), 0);
	bpf_map_delete_elem(&procs, &tgid);
	return 0;
}

#ifndef NO_TASK_STORAGE
static long note_file(struct task_struct *task, struct vm_area_struct *vma, void *data)
{
	struct inode *inode = BPF_CORE_READ(vma, vm_file, f_inode);
	struct mapped_file *answer = data;

	answer->inode = BPF_CORE_READ(inode, i_ino);
	answer->device = BPF_CORE_READ(inode, i_sb, s_dev);
	return 0;
}

/*
 * Tells which inode lies below a mapping of the calling process. On overlay file systems it is not the one of stat and
 * maps: a file of an image has another number there in each container, yet it is one file, and the kernel's uprobes and
 * page cache know it as that.
 */
SEC("syscall")
int real_file(struct mapped_file *ask)
{
	struct mapped_file answer = {};
	long err = bpf_find_vma(bpf_get_current_task_btf(), ask->address, note_file, &answer, 0);

	ask->device = answer.device;
	ask->inode = answer.inode;
	return err; /* EBUSY when somebody else changes the mappings right now */
}
#endif

/* Holds the types that no map names, so that bpf2go finds them; never used. */
const struct {
	enum op op;
	enum func_flag func_flag;
	enum proc_flag proc_flag;
	enum counter counter;
	enum event_type event_type;
	enum event_flag event_flag;
	enum unwind_end unwind_end;
	struct event event;
	struct stack_head stack_head;
	struct mapped_file mapped_file;
} exported = {};
