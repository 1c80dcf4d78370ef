/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * True user stacks without frame pointers: a walker over tables that tracer/unwind makes from .eh_frame.
 *
 * How a caller uses it
 *	struct unwind *u = unwind_scratch();		// NULL: no memory; count the event as lost
 *	unwind_uprobe(u, ctx, slot);			// or unwind_uprobe_at, unwind_syscall
 *	u->frames[0 .. u->n)	innermost first; see FRAME_* for the two top bits
 *	u->end			enum unwind_end; END_COMPLETE and END_ZERO are whole stacks
 *	u->hash			64 bits over frames and end
 *	u->missing_pc		not 0: no mapping known here, user space shall read the maps again
 * slot is the index that Tables.Publish returned for the process; the caller keeps it in its map of processes.
 *
 * The scratch lives in task storage (kernel 5.13+), since a uprobe program may be preempted and per-CPU scratch is then
 * written by two. A caller that has task storage of its own embeds struct unwind there and defines UNWIND_OWN_SCRATCH.
 * With -DNO_TASK_STORAGE (kernels 5.10 to 5.12) the scratch is per CPU, u must come from unwind_scratch(), and a walk
 * that another one disturbed ends in END_DISTURBED with no frames (found in most cases, not in all).
 *
 * Traps
 *	The step is a global function, so that the verifier looks at it once and not once a frame; it must be reached
 *	with a pointer to the whole struct unwind.
 *	A slot is never edited while a process uses it. User space fills a fresh one, switches the process over, and
 *	raises the old one's generation before it reuses it or the rows behind it: a walk that sees the generation move
 *	throws its frames away.
 *	arm64 compiles and follows the same rules; it has not run on hardware.
 */
#ifndef ALLOCSNOOP_UNWIND_H
#define ALLOCSNOOP_UNWIND_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "core.h"

enum unwind_limits {
	UNWIND_MAX_FRAMES = 512,
	UNWIND_MAX_MAPPINGS = 512,
	UNWIND_MAX_RULES = 16384,
	UNWIND_MAX_BINS = 65536,
	UNWIND_CACHE = 65536,
	UNWIND_WINDOW = 128, /* words of the stack read at once */
	UNWIND_MAX_RETPROBES = 64,
};

/* Why a stack ends. Values are part of the Go side's contract: add at the end. */
enum unwind_end {
	END_NONE,
	END_COMPLETE,	/* a root: _start, a thread's start, a coroutine's start */
	END_DEPTH,	/* more frames than unwind_max_frames */
	END_NOMAP,	/* the address lies in no mapping that is known */
	END_NOTABLE,	/* the mapping's file has no unwind table */
	END_NOROW,	/* the file's table leaves this code out */
	END_INVALID,	/* the table has no usable rule for the address */
	END_READ,	/* the stack could not be read: paged out or damaged */
	END_LEAF,	/* a rule that holds in leaf functions only, met in a caller */
	END_TRAMPOLINE, /* a uretprobe's trampoline whose return address is not known */
	END_ZERO,	/* return address 0: a root by convention, as makecontext and clone leave it */
	END_BACKWARDS,	/* the caller's frame would lie below its callee's */
	END_JIT,	/* machine code in anonymous memory that could not be crossed */
	END_DISTURBED,	/* tables or scratch were changed under the walk */
	END_NOUSER,	/* no user registers, or 32-bit code */
	END_COUNT,
};

/* The two top bits of a frame, which no user address has. */
enum unwind_frame {
	FRAME_EXACT_BIT = 63, /* the pc itself; without it the frame is a return address */
	FRAME_MARK_BIT = 62,  /* no pc: the low bits are one of unwind_mark */
};

enum unwind_mark {
	MARK_LUAJIT = 1, /* code compiled by LuaJIT lay between these frames */
};

/* Only so that the types reach BTF and, through bpf2go, the Go side. */
const enum unwind_frame *unwind_frame_type __attribute__((unused));
const enum unwind_mark *unwind_mark_type __attribute__((unused));

#define FRAME_EXACT (1ULL << FRAME_EXACT_BIT)
#define FRAME_MARK  (1ULL << FRAME_MARK_BIT)

enum unwind_mapping_flags {
	MAPPING_ANON = 1, /* executable memory without a file: just-in-time code */
};

/* Register numbers, flags and commands of a rule, as the table extractor has them. */
enum unwind_reg {
	REG_NONE,
	REG_CFA,
	REG_PC,
	REG_SP,
	REG_FP,
	REG_LR,
	REG_AX,
	REG_DI,
	REG_R8,
	REG_R9,
	REG_R11,
	REG_R13,
	REG_R15
};
enum unwind_rule_flags {
	RULE_COMMAND = 1,
	RULE_FRAME = 2,
	RULE_LEAF_ONLY = 4,
	RULE_DEREF_CFA = 8,
	RULE_REGISTER_RA = 16
};
enum unwind_command { CMD_INVALID, CMD_STOP, CMD_PLT, CMD_SIGNAL, CMD_FRAME_POINTER, CMD_GO_ASMCGOCALL };

struct unwind_row {
	__u32 vaddr;
	__u16 rule;
	__u16 pad;
};

struct unwind_rule {
	__u8 flags, base, aux, pad;
	__s32 param, aux_param;
};

/* A stretch of executable memory. bias is address minus the ELF file's virtual address. */
struct unwind_mapping {
	__u64 start, end, bias;
	__u32 row0, nrows;
	__u32 bin; /* number of the file, 1 and up, never reused; 0 has no cache entry */
	enum unwind_mapping_flags flags;
};

struct unwind_slot {
	__u32 gen; /* raised before the slot, or rows it points to, are used for something else */
	__u32 n;
	__u32 lua_cur;	  /* LuaJIT: offset of the running lua_State in global_State; 0: not known, do not cross */
	__u32 lua_cframe; /* of the innermost C frame in lua_State */
	__u32 lua_size;	  /* size of the interpreter's C frame */
	__u32 pad;
	struct unwind_mapping m[UNWIND_MAX_MAPPINGS]; /* by start, without overlap */
};

struct unwind {
	__u64 pc, sp, fp;
#if defined(__TARGET_ARCH_arm64)
	__u64 lr;
#else
	__u64 ax, di, r8, r9, r11, r13, r15;
#endif
	__u64 hash;
	__u64 missing_pc;
	__u64 win_base;
	__u64 owner; /* pid_tgid of the walk */
	__u32 win_valid;
	__u32 slot, gen;
	__u32 mapping; /* where the last frame was found; a guess for the next */
	__u32 n;
	enum unwind_end end;
	__u32 ra;    /* pc is a return address */
	__u32 entry; /* the first pc is a function's first instruction */
	__u32 jit_n; /* frames before the unproven ones in JIT code; 0: none */
	__u32 events;
	__u32 count_use;
	__u64 win[UNWIND_WINDOW];
	__u64 head[3]; /* the caller's, to send something in one piece with the frames */
	__u64 frames[UNWIND_MAX_FRAMES];
};

/* Frames walked at most; user space sets it, up to UNWIND_MAX_FRAMES. */
volatile const __u32 unwind_max_frames = 128;

/* rows: the unwind tables of all files, each sorted by vaddr; user space sizes it (--max-table-mb) and writes it
 * mapped. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1048576);
	__type(key, __u32);
	__type(value, struct unwind_row);
} unwind_rows SEC(".maps");

/* rules: the distinct rules that rows refer to; one set for all files. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, UNWIND_MAX_RULES);
	__type(key, __u32);
	__type(value, struct unwind_rule);
} unwind_rules SEC(".maps");

/* slots: executable mappings of a process, 20 KB each; user space sizes it by the number of processes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 256);
	__type(key, __u32);
	__type(value, struct unwind_slot);
} unwind_slots SEC(".maps");

/* rowcache: bin:16 vaddr:32 rule:16 in one word, so that CPUs share it without tearing; fixed size. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, UNWIND_CACHE);
	__type(key, __u32);
	__type(value, __u64);
} unwind_rowcache SEC(".maps");

/* bin_use: frames seen in each file in every 16th walk, for the choice of a table to evict; fixed size. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, UNWIND_MAX_BINS);
	__type(key, __u32);
	__type(value, __u32);
} unwind_bin_use SEC(".maps");

/* lua: global_State of the LuaJIT VM that a thread was found in last, by pid_tgid; fixed size, old threads fall out. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u64);
} unwind_lua SEC(".maps");

#if defined(NO_TASK_STORAGE)
/* scratch: one walk in progress per CPU (kernels before 5.13). */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct unwind);
} unwind_scratch_map SEC(".maps");

static __always_inline struct unwind *unwind_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&unwind_scratch_map, &zero);
}
#elif !defined(UNWIND_OWN_SCRATCH)
/* scratch: the walk of each thread. */
struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct unwind);
} unwind_scratch_map SEC(".maps");

static __always_inline struct unwind *unwind_scratch(void)
{
	return bpf_task_storage_get(&unwind_scratch_map, bpf_get_current_task_btf(), 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
}
#endif

/* An index that the compiler cannot prove redundant: it would drop a plain mask that the verifier needs. */
#define UNWIND_CLAMP(i, size)                                                                                          \
	({                                                                                                             \
		__u64 __i = (i);                                                                                       \
		_Static_assert(((size) & ((size)-1)) == 0, "not a power of two");                                      \
		asm volatile("%0 &= %1" : "+r"(__i) : "i"((size)-1));                                                  \
		__i;                                                                                                   \
	})

/* no_programs: always empty; see UNWIND_TASK_STACK. */
struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} unwind_no_programs SEC(".maps");

/* Stays 0. Not const: the branch must be there for the verifier. */
__u32 unwind_never;

/*
 * First thing in every uprobe program. Since 6.13 the kernel runs programs with more than 64 bytes of stack on a
 * "private" stack that each CPU has once, also uprobe programs, which may be preempted: another thread's probe on that
 * CPU then overwrites it, and the walk is silently wrong (seen on 7.3 with preempt=full and lazy). A program with a
 * tail call in it keeps the task's own stack.
 */
#define UNWIND_TASK_STACK(ctx)                                                                                         \
	do {                                                                                                           \
		if (unwind_never)                                                                                      \
			bpf_tail_call(ctx, &unwind_no_programs, 0);                                                    \
	} while (0)

static __always_inline int unwind_finish(struct unwind *u, __u32 end)
{
	u->end = end;
	return 1;
}

static __always_inline __u64 unwind_mix(__u64 h, __u64 v)
{
	h = (h ^ v) * 0x9e3779b97f4a7c15ULL;
	return h ^ (h >> 29);
}

static __always_inline void unwind_push(struct unwind *u, __u64 frame)
{
	__u32 n = u->n;

	u->frames[UNWIND_CLAMP(n, UNWIND_MAX_FRAMES)] = frame;
	u->n = n + 1;
}

/* One word of user memory. The stack is read in windows upwards, since that is the way the walk goes. */
static __always_inline int unwind_read(struct unwind *u, __u64 addr, __u64 *val)
{
	__u64 off = addr - u->win_base;

	/* A rounded index would hand out a neighbour, so that odd addresses never use the window. */
	if (off & 7)
		return bpf_probe_read_user(val, sizeof(*val), (void *)addr);
	if (!u->win_valid || off > sizeof(u->win) - 8) {
		if (bpf_probe_read_user(u->win, sizeof(u->win), (void *)addr)) {
			/* the window reaches past the stack's top */
			u->win_valid = 0;
			return bpf_probe_read_user(val, sizeof(*val), (void *)addr);
		}
		u->win_base = addr;
		u->win_valid = 1;
		off = 0;
	}
	*val = u->win[UNWIND_CLAMP(off >> 3, UNWIND_WINDOW)];
	return 0;
}

static __always_inline struct unwind_mapping *unwind_find(struct unwind *u, struct unwind_slot *s, __u64 pc)
{
	struct unwind_mapping *m = &s->m[UNWIND_CLAMP(u->mapping, UNWIND_MAX_MAPPINGS)];
	__u64 lo = 0, hi = s->n, mid; /* 64 bits: no shifts to cut off the upper half */
	int i;

	if (pc >= m->start && pc < m->end)
		return m;
	for (i = 0; i < 10; i++) {
		if (lo >= hi)
			break;
		mid = (lo + hi) >> 1;
		if (s->m[UNWIND_CLAMP(mid, UNWIND_MAX_MAPPINGS)].end <= pc)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo >= s->n || lo >= UNWIND_MAX_MAPPINGS)
		return 0;
	m = &s->m[UNWIND_CLAMP(lo, UNWIND_MAX_MAPPINGS)];
	if (pc < m->start || pc >= m->end)
		return 0;
	u->mapping = lo;
	return m;
}

/* The last row at or below vaddr; its rule's number, or -1. */
static __always_inline int unwind_search(struct unwind_mapping *m, __u32 vaddr)
{
	__u64 lo = m->row0, hi = lo + m->nrows, mid;
	struct unwind_row *row;
	__u32 key;
	int i;

	for (i = 0; i < 22; i++) {
		if (lo >= hi)
			break;
		mid = (lo + hi) >> 1;
		key = mid;
		row = bpf_map_lookup_elem(&unwind_rows, &key);
		if (!row)
			return -1;
		if (row->vaddr <= vaddr)
			lo = mid + 1;
		else
			hi = mid;
	}
	if (lo == m->row0)
		return -1;
	key = lo - 1;
	row = bpf_map_lookup_elem(&unwind_rows, &key);
	return row ? row->rule : -1;
}

/* The same through the cache that all CPUs share. */
static __always_inline int unwind_rule_number(struct unwind_mapping *m, __u32 vaddr)
{
	__u64 tag, *slot = 0;
	__u32 idx;
	int rule;

	tag = ((__u64)m->bin << 48) | ((__u64)vaddr << 16);
	if (m->bin && m->bin < UNWIND_MAX_BINS) {
		idx = (tag * 0x9e3779b97f4a7c15ULL) >> 48;
		slot = bpf_map_lookup_elem(&unwind_rowcache, &idx);
		if (slot) {
			__u64 word = *(volatile __u64 *)slot;

			if ((word & ~0xffffULL) == tag)
				return word & 0xffff;
		}
	}
	rule = unwind_search(m, vaddr);
	if (slot && rule >= 0)
		*(volatile __u64 *)slot = tag | (__u32)rule;
	return rule;
}

/* pc is in the page of the kernel's uretprobe trampoline: put the address that belongs there. 0 when done. */
static __always_inline int unwind_repair(struct unwind *u)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct return_instance *ri;
	struct xol_area *xol;
	unsigned long page;
	int i;

	if (!bpf_core_type_exists(struct xol_area))
		return -1;
	xol = BPF_CORE_READ(task, mm, uprobes_state.xol_area);
	if (!xol)
		return -1;
	page = BPF_CORE_READ(xol, vaddr);
	if (u->pc < page || u->pc >= page + 4096)
		return -1;
	ri = BPF_CORE_READ(task, utask, return_instances);
	for (i = 0; i < UNWIND_MAX_RETPROBES; i++) {
		if (!ri)
			return END_TRAMPOLINE;
		if (BPF_CORE_READ(ri, stack) == u->sp - 8) {
			u->pc = BPF_CORE_READ(ri, orig_ret_vaddr);
			return 0;
		}
		ri = BPF_CORE_READ(ri, next);
	}
	return END_TRAMPOLINE;
}

#if defined(__TARGET_ARCH_arm64)

/* A pointer-authentication code sits above the 48 address bits. */
#define UNWIND_ADDRESS ((1ULL << 48) - 1)

static __always_inline __u64 unwind_get(struct unwind *u, __u8 id, __u64 cfa)
{
	switch (id) {
	case REG_CFA:
		return cfa;
	case REG_SP:
		return u->sp;
	case REG_FP:
		return u->fp;
	case REG_LR:
		return u->lr;
	}
	return 0;
}

static __always_inline int unwind_signal(struct unwind *u)
{
	/* sp is at the siginfo: 128 bytes, then 176 of ucontext and the fault address before x0 */
	__u64 x0 = u->sp + 128 + 176 + 8;

	if (unwind_read(u, x0 + 29 * 8, &u->fp) || unwind_read(u, x0 + 30 * 8, &u->lr) ||
	    unwind_read(u, x0 + 32 * 8, &u->pc) || unwind_read(u, x0 + 31 * 8, &u->sp))
		return unwind_finish(u, END_READ);
	u->ra = 0;
	return 0;
}

/* At a function's first instruction nothing was saved yet: no table is needed. */
static __always_inline int unwind_leave_entry(struct unwind *u)
{
	u->pc = u->lr & UNWIND_ADDRESS;
	u->ra = 1;
	return 0;
}

static __always_inline int unwind_apply(struct unwind *u, struct unwind_rule *r)
{
	__u64 cfa, pc, fp = u->fp;

	if (r->flags & RULE_COMMAND) {
		if (r->param == CMD_STOP)
			return unwind_finish(u, END_COMPLETE);
		if (r->param == CMD_SIGNAL)
			return unwind_signal(u);
		if (r->param != CMD_FRAME_POINTER)
			return unwind_finish(u, r->aux_param ? END_NOROW : END_INVALID);
		cfa = fp + 16;
		if (unwind_read(u, cfa - 16, &fp) || unwind_read(u, cfa - 8, &pc))
			return unwind_finish(u, END_READ);
		goto done;
	}
	cfa = unwind_get(u, r->base, 0) + r->param;
	if (r->aux == REG_LR) {
		/* the link register is only known in the innermost frame, and after a signal */
		if (u->ra)
			return unwind_finish(u, END_LEAF);
		pc = u->lr;
	} else if (r->aux == REG_CFA) {
		if ((r->flags & RULE_FRAME) && unwind_read(u, cfa + r->aux_param - 8, &fp))
			return unwind_finish(u, END_READ);
		if (unwind_read(u, cfa + r->aux_param, &pc))
			return unwind_finish(u, END_READ);
	} else {
		return unwind_finish(u, END_INVALID);
	}
done:
	if (cfa < u->sp || (u->ra && cfa == u->sp))
		return unwind_finish(u, END_BACKWARDS);
	u->sp = cfa;
	u->fp = fp;
	u->pc = pc & UNWIND_ADDRESS;
	u->ra = 1;
	return 0;
}

#else

static __always_inline __u64 unwind_get(struct unwind *u, __u8 id, __u64 cfa)
{
	switch (id) {
	case REG_CFA:
		return cfa;
	case REG_SP:
		return u->sp;
	case REG_FP:
		return u->fp;
	case REG_AX:
		return u->ax;
	case REG_DI:
		return u->di;
	case REG_R8:
		return u->r8;
	case REG_R9:
		return u->r9;
	case REG_R11:
		return u->r11;
	case REG_R13:
		return u->r13;
	case REG_R15:
		return u->r15;
	}
	return 0;
}

/* sp is at the ucontext that the kernel pushed; its registers begin 40 bytes in: r8 to r15, rdi, rsi, rbp, ... rsp,
 * rip. */
static __always_inline int unwind_signal(struct unwind *u)
{
	__u64 regs = u->sp + 40;

	if (unwind_read(u, regs, &u->r8) || unwind_read(u, regs + 8, &u->r9) || unwind_read(u, regs + 24, &u->r11) ||
	    unwind_read(u, regs + 40, &u->r13) || unwind_read(u, regs + 56, &u->r15) ||
	    unwind_read(u, regs + 64, &u->di) || unwind_read(u, regs + 80, &u->fp) ||
	    unwind_read(u, regs + 104, &u->ax) || unwind_read(u, regs + 128, &u->pc) ||
	    unwind_read(u, regs + 120, &u->sp))
		return unwind_finish(u, END_READ);
	/* The interrupted pc is exact, and the interrupted stack may be another one, above or below. */
	u->ra = 0;
	return 0;
}

/* At a function's first instruction only the return address is on the stack: no table is needed. */
static __always_inline int unwind_leave_entry(struct unwind *u)
{
	if (unwind_read(u, u->sp, &u->pc))
		return unwind_finish(u, END_READ);
	u->sp += 8;
	u->ra = 1;
	return 0;
}

static __always_inline int unwind_apply(struct unwind *u, struct unwind_rule *r)
{
	__u64 cfa, pc, fp = u->fp;
	__u8 flags = r->flags;

	if (flags & RULE_COMMAND) {
		switch (r->param) {
		case CMD_STOP:
			return unwind_finish(u, END_COMPLETE);
		case CMD_SIGNAL:
			return unwind_signal(u);
		case CMD_PLT:
			/* aux_param: offset in a 16-byte entry from which the index is on the stack */
			cfa = u->sp + 8;
			if ((u->pc & 15) >= (__u32)r->aux_param)
				cfa += 8;
			break;
		case CMD_FRAME_POINTER:
			cfa = u->fp + 16;
			if (unwind_read(u, u->fp, &fp))
				return unwind_finish(u, END_READ);
			break;
		default:
			return unwind_finish(u, r->aux_param ? END_NOROW : END_INVALID);
		}
	} else if ((flags & RULE_LEAF_ONLY) && u->ra) {
		return unwind_finish(u, END_LEAF);
	} else {
		__s32 param = r->param;

		cfa = r->base == REG_SP ? u->sp : unwind_get(u, r->base, 0);
		if (flags & RULE_DEREF_CFA) {
			if (unwind_read(u, cfa + (param & ~7), &cfa))
				return unwind_finish(u, END_READ);
			cfa += 8 * (param & 7);
		} else {
			cfa += param;
		}
		if (flags & RULE_REGISTER_RA) {
			pc = unwind_get(u, r->aux, cfa) + r->aux_param;
			fp = 0;
			goto done;
		}
		if (r->aux == REG_CFA) {
			/* the lower address first: the window goes upwards */
			if (unwind_read(u, cfa + r->aux_param, &fp))
				fp = u->fp;
		} else if (r->aux) {
			if (unwind_read(u, unwind_get(u, r->aux, cfa) + r->aux_param, &fp))
				fp = u->fp;
		} else if (r->base == REG_FP) {
			fp = 0;
		}
	}
	if (unwind_read(u, cfa - 8, &pc))
		return unwind_finish(u, END_READ);
done:
	/* A call pushes at least its return address: a frame that does not grow upwards is a wrong one. */
	if (cfa <= u->sp && !(flags & RULE_REGISTER_RA))
		return unwind_finish(u, END_BACKWARDS);
	u->sp = cfa;
	u->fp = fp;
	u->pc = pc;
	u->ra = 1;
	return 0;
}

#endif

/* The innermost C frame of the interpreter in the VM that the thread is known to run; 0: it is not known, or not there.
 */
static __always_inline __u64 unwind_lua_cframe(struct unwind *u, struct unwind_slot *s)
{
	__u64 id = bpf_get_current_pid_tgid(), *g = bpf_map_lookup_elem(&unwind_lua, &id), state, cframe;

	if (!g || bpf_probe_read_user(&state, 8, (void *)(*g + s->lua_cur)) ||
	    bpf_probe_read_user(&cframe, 8, (void *)(state + s->lua_cframe)))
		return 0;
	cframe &= ~3ULL; /* two flags of the VM */
	return cframe < u->sp || cframe - u->sp > 65536 ? 0 : cframe;
}

/* Steps of 16 bytes in which the interpreter's C frame is looked for: compiled code's own frame is smaller. */
#define LUA_SEARCH 128
/* Where that frame keeps its lua_State (CFRAME_OFS_L in lj_frame.h, x64), and a lua_State its global_State. */
#define LUA_STATE_OF_CFRAME 16
#define LUA_GLOBAL_OF_STATE 16

/*
 * Find the VM of a thread that is in compiled code at sp: code and interpreter share a C frame, which remembers its
 * lua_State, and the state that runs in that one's VM remembers the frame. Nothing else on a stack is such a circle.
 */
__attribute__((noinline)) int unwind_find_lua(__u64 sp, __u32 cur, __u32 cframe)
{
	__u64 id = bpf_get_current_pid_tgid(), state, g, running, frame;
	int i;

	sp = (sp + 15) & ~15ULL;
	for (i = 0; i < LUA_SEARCH; i++, sp += 16) {
		if (bpf_probe_read_user(&state, 8, (void *)(sp + LUA_STATE_OF_CFRAME)))
			return -1; /* above the stack */
		if (state < 4096 || (state & 7) || bpf_probe_read_user(&g, 8, (void *)(state + LUA_GLOBAL_OF_STATE)) ||
		    bpf_probe_read_user(&running, 8, (void *)(g + cur)) ||
		    bpf_probe_read_user(&frame, 8, (void *)(running + cframe)))
			continue;
		if ((frame & ~3ULL) != sp)
			continue;
		return bpf_map_update_elem(&unwind_lua, &id, &g, BPF_ANY);
	}
	return -1;
}

/* Cross code that LuaJIT compiled: its C frame is the interpreter's, which lua_State remembers. 0 when crossed. */
static __always_inline int unwind_cross_lua(struct unwind *u, struct unwind_slot *s, bool search)
{
	__u64 cframe, fp, pc;

	if (!s->lua_cur)
		return -1;
	cframe = unwind_lua_cframe(u, s);
	if (!cframe && search && !unwind_find_lua(u->sp, s->lua_cur, s->lua_cframe))
		cframe = unwind_lua_cframe(u, s);
	if (!cframe)
		return -1;
	if (unwind_read(u, cframe + s->lua_size - 16, &fp) || unwind_read(u, cframe + s->lua_size - 8, &pc))
		return -1;
	unwind_push(u, FRAME_MARK | MARK_LUAJIT);
	u->sp = cframe + s->lua_size;
	u->fp = fp;
	u->pc = pc;
	u->ra = 1;
	return 0;
}

#if !defined(__TARGET_ARCH_arm64)
/* Does a call instruction end at pc? Guards the frame-pointer attempt, which has no table to hold on to. */
static __always_inline bool unwind_after_call(__u64 pc)
{
	__u8 code[8];
	int i;

	if (bpf_probe_read_user(code, sizeof(code), (void *)(pc - 8)))
		return false;
	if (code[3] == 0xe8)
		return true;
	/* ff /2: call through a register or memory, 2 to 7 bytes */
	for (i = 1; i <= 6; i++)
		if (code[i] == 0xff && ((code[i + 1] >> 3) & 7) == 2)
			return true;
	return false;
}

/* Code in anonymous memory may keep a frame pointer. The frames are kept only when the walk gets out of it. */
static __always_inline int unwind_cross_fp(struct unwind *u)
{
	__u64 fp = u->fp, next, pc;

	if (fp < u->sp || fp - u->sp > 65536 || (fp & 7))
		return -1;
	if (unwind_read(u, fp, &next) || unwind_read(u, fp + 8, &pc))
		return -1;
	if (!unwind_after_call(pc))
		return -1;
	if (!u->jit_n)
		u->jit_n = u->n + 1;
	unwind_push(u, u->ra ? u->pc : u->pc | FRAME_EXACT);
	u->sp = fp + 16;
	u->fp = next;
	u->pc = pc;
	u->ra = 1;
	return 0;
}
#else
static __always_inline int unwind_cross_fp(struct unwind *u)
{
	return -1;
}
#endif

static __always_inline int unwind_cross_jit(struct unwind *u, struct unwind_slot *s)
{
	if (!unwind_cross_lua(u, s, true) || !unwind_cross_fp(u))
		return 0;
	unwind_push(u, u->ra ? u->pc : u->pc | FRAME_EXACT);
	return unwind_finish(u, END_JIT);
}

static __always_inline int unwind_unmapped(struct unwind *u, struct unwind_slot *s)
{
	int end;

	if (u->ra) {
		end = unwind_repair(u);
		if (!end)
			return 0;
		if (end > 0)
			return unwind_finish(u, end);
	}
	/* LuaJIT maps memory for its code when it needs some, which user space may not have seen yet. */
	if (u->ra && !unwind_cross_lua(u, s, true))
		return 0;
	/*
	 * A caller outside everything known may be garbage: no frame, user space is told of it apart. The probed
	 * function's own caller is sure: code of a library that was mapped a moment ago.
	 */
	if (!u->ra)
		unwind_push(u, u->pc | FRAME_EXACT);
	else if (u->n == 1)
		unwind_push(u, u->pc);
	u->missing_pc = u->pc;
	return unwind_finish(u, END_NOMAP);
}

static __always_inline int unwind_one(struct unwind *u)
{
	struct unwind_mapping *m;
	struct unwind_slot *s;
	struct unwind_rule *r;
	__u32 rule_no, slot = u->slot;
	__u64 pc;
	int n;

	if (u->entry) {
		u->entry = 0;
		unwind_push(u, u->pc | FRAME_EXACT);
		return unwind_leave_entry(u);
	}
	if (u->n >= unwind_max_frames || u->n >= UNWIND_MAX_FRAMES)
		return unwind_finish(u, END_DEPTH);
	s = bpf_map_lookup_elem(&unwind_slots, &slot);
	if (!s)
		return unwind_finish(u, END_DISTURBED);
	if (!u->pc) {
		/* LuaJIT's way out of compiled code has a deeper frame than its table says */
		if (u->ra && !unwind_cross_lua(u, s, false))
			return 0;
		return unwind_finish(u, END_ZERO);
	}
	pc = u->pc - (u->ra ? 1 : 0);
	m = unwind_find(u, s, pc);
	if (!m)
		return unwind_unmapped(u, s);
	if (m->flags & MAPPING_ANON)
		return unwind_cross_jit(u, s);
	if (u->count_use) {
		__u32 bin = m->bin, *use = bpf_map_lookup_elem(&unwind_bin_use, &bin);

		if (use)
			++*use; /* a lost count does no harm */
	}
	n = -1;
	if (m->nrows)
		n = unwind_rule_number(m, pc - m->bias);
	rule_no = n;
	r = n < 0 ? 0 : bpf_map_lookup_elem(&unwind_rules, &rule_no);
	if (!r) {
		unwind_push(u, u->ra ? u->pc : u->pc | FRAME_EXACT);
		return unwind_finish(u, m->nrows ? END_NOROW : END_NOTABLE);
	}
	u->jit_n = 0; /* proven: the walk is back in a file */
	/* the signal trampoline's "return address" is its first instruction, no call stands before it */
	if (!u->ra || (r->flags == RULE_COMMAND && r->param == CMD_SIGNAL))
		unwind_push(u, u->pc | FRAME_EXACT);
	else
		unwind_push(u, u->pc);
	return unwind_apply(u, r);
}

/* One frame; not 0 when the walk has ended. Global: the verifier checks it once, however deep stacks are. */
#if defined(NO_TASK_STORAGE)
__attribute__((noinline)) int unwind_step(void)
{
	struct unwind *u = unwind_scratch();

	if (!u)
		return 1;
	return unwind_one(u);
}
#define UNWIND_STEP(u) unwind_step()
#else
__attribute__((noinline)) int unwind_step(struct unwind *u)
{
	if (!u)
		return 1;
	return unwind_one(u);
}
#define UNWIND_STEP(u) unwind_step(u)
#endif

/* Before the registers are set. */
static __always_inline void unwind_begin(struct unwind *u, __u32 slot)
{
	struct unwind_slot *s = bpf_map_lookup_elem(&unwind_slots, &slot);

	u->slot = slot;
	u->gen = s ? *(volatile __u32 *)&s->gen : 0;
	u->owner = bpf_get_current_pid_tgid();
	u->n = 0;
	u->end = END_NONE;
	u->missing_pc = 0;
	u->win_valid = 0;
	u->mapping = 0;
	u->jit_n = 0;
	u->entry = 0;
	u->events++;
	u->count_use = (u->events & 15) == 0;
}

/* Nothing of a walk that ran over changing tables is kept. */
static __always_inline bool unwind_disturbed(struct unwind *u)
{
	__u32 slot = u->slot;
	struct unwind_slot *s = bpf_map_lookup_elem(&unwind_slots, &slot);

	return !s || *(volatile __u32 *)&s->gen != u->gen || u->owner != bpf_get_current_pid_tgid();
}

static __always_inline void unwind_close(struct unwind *u)
{
	__u64 h = 0x243f6a8885a308d3ULL;
	__u32 i;

	if (u->end == END_NONE)
		u->end = END_DEPTH;
	if (u->jit_n) {
		/* the frames in JIT code led nowhere: keep the first, which is sure */
		u->n = u->jit_n;
		u->end = END_JIT;
		u->missing_pc = 0;
	}
	if (unwind_disturbed(u)) {
		u->n = 0;
		u->end = END_DISTURBED;
	}
	for (i = 0; i < UNWIND_MAX_FRAMES; i++) {
		if (i >= u->n)
			break;
		h = unwind_mix(h, u->frames[i]);
	}
	h = unwind_mix(h, u->end);
	h ^= h >> 33;
	h *= 0xff51afd7ed558ccdULL;
	u->hash = h ^ (h >> 33);
}

/* All frames, from the registers in u. Global as well, so that each program that unwinds costs the verifier little. */
#if defined(NO_TASK_STORAGE)
__attribute__((noinline)) int unwind_walk(void)
{
	struct unwind *u = unwind_scratch();
#define UNWIND_WALK(u) unwind_walk()
#else
__attribute__((noinline)) int unwind_walk(struct unwind *u)
{
#define UNWIND_WALK(u) unwind_walk(u)
#endif
	__u32 i;

	if (!u)
		return -1;
	/* turns over the frames: the last one finds the depth, trampolines take one each */
	for (i = 0; i < UNWIND_MAX_FRAMES + UNWIND_MAX_RETPROBES; i++)
		if (UNWIND_STEP(u))
			break;
	unwind_close(u);
	return 0;
}

static __always_inline int unwind_nothing(struct unwind *u)
{
	u->n = 0;
	u->end = END_NOUSER;
	u->hash = END_NOUSER;
	return -1;
}

#if defined(__TARGET_ARCH_arm64)
static __always_inline bool unwind_regs(struct unwind *u, struct user_pt_regs *regs)
{
	u->pc = regs->pc & UNWIND_ADDRESS;
	u->sp = regs->sp;
	u->fp = regs->regs[29];
	u->lr = regs->regs[30];
	u->ra = 0;
	return !(regs->pstate & 0x10); /* AArch32 */
}
#define UNWIND_USER_REGS struct user_pt_regs
#else
static __always_inline bool unwind_regs(struct unwind *u, struct pt_regs *regs)
{
	u->pc = regs->rip;
	u->sp = regs->rsp;
	u->fp = regs->rbp;
	u->ax = regs->rax;
	u->di = regs->rdi;
	u->r8 = regs->r8;
	u->r9 = regs->r9;
	u->r11 = regs->r11;
	u->r13 = regs->r13;
	u->r15 = regs->r15;
	u->ra = 0;
	return regs->cs != 0x23; /* the code segment of 32-bit programs */
}
#define UNWIND_USER_REGS struct pt_regs
#endif

/*
 * From a uprobe. entry: it sits at a function's first instruction, so that the function itself needs no table (musl's
 * allocator has none); false is right at any instruction. 0, or -1 without a stack.
 */
static __always_inline int unwind_uprobe_at(struct unwind *u, struct pt_regs *ctx, __u32 slot, bool entry)
{
	unwind_begin(u, slot);
	if (!unwind_regs(u, (UNWIND_USER_REGS *)ctx))
		return unwind_nothing(u);
	u->entry = entry;
	return UNWIND_WALK(u);
}

static __always_inline int unwind_uprobe(struct unwind *u, struct pt_regs *ctx, __u32 slot)
{
	return unwind_uprobe_at(u, ctx, slot, false);
}

/* Where the kernel keeps the registers with which the current task entered it; 0 for kernel threads. */
static __always_inline void *unwind_user_regs(void)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	__u64 stack;

	if (!BPF_CORE_READ(task, mm))
		return 0;
#if !defined(NO_TASK_STORAGE)
	if (bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs))
		return (void *)bpf_task_pt_regs(bpf_get_current_task_btf());
#endif
	/* They are the first thing on the kernel stack, which is 16 KB unless the kernel was built for sanitizers. */
	stack = (__u64)BPF_CORE_READ(task, stack);
	return (void *)(stack + 16384 - bpf_core_type_size(struct pt_regs___kernel));
}

/* From a system call's tracepoint: the user registers of the current task. The pc follows the syscall instruction. */
static __always_inline int unwind_syscall(struct unwind *u, __u32 slot)
{
	UNWIND_USER_REGS regs;
	void *from = unwind_user_regs();

	unwind_begin(u, slot);
	if (!from || bpf_probe_read_kernel(&regs, sizeof(regs), from))
		return unwind_nothing(u);
	if (!unwind_regs(u, &regs))
		return unwind_nothing(u);
	return UNWIND_WALK(u);
}

#endif
