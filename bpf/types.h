/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Types and numbers that the BPF programs share with user space. bpf2go carries
 * them to Go; nothing here is copied by hand.
 */
#ifndef ALLOCSNOOP_TYPES_H
#define ALLOCSNOOP_TYPES_H

/* What a probed function does to the books; see tracer/allocator. */
enum op {
	OP_NONE,
	OP_ALLOC,	 /* size [x count] -> pointer */
	OP_REALLOC,	 /* pointer, size [x count] -> pointer */
	OP_FREE,	 /* pointer */
	OP_EXPAND,	 /* pointer, size -> real size; never moves (xallocx) */
	OP_LUA_ALLOC,	 /* lua_Alloc: ud, pointer, old size, new size */
	OP_POOL_ALLOC,	 /* pool, size -> pointer that dies with the pool */
	OP_POOL_DESTROY, /* pool */
	OP_WRAP,	 /* size of the block that another probed function makes for it */
};

enum func_flag {
	/* realloc(p, 0) that returns NULL has freed p; without it, it has failed */
	FUNC_ZERO_FREES = 1 << 0,
	/* the return value is a status, 0 is success (posix_memalign) */
	FUNC_STATUS = 1 << 1,
	/* a failing realloc frees its block all the same (reallocf) */
	FUNC_FAIL_FREES = 1 << 2,
	/* takes its memory from the kernel: its mappings are internal */
	FUNC_ALLOCATOR = 1 << 3,
	/* calls no other probed function, so an unsampled call needs no record */
	FUNC_LEAF = 1 << 4,
	/* size and count are C ints: the low 32 bits */
	FUNC_INT_SIZE = 1 << 5,
	/* the block's address is in the variable that ptr points to (mi_reallocarr) */
	FUNC_PTR_IS_OUT = 1 << 6,
	/* the return value is a truth value: not 0 is success */
	FUNC_TRUTH = 1 << 7,
	/* OP_EXPAND: the result is the real size, not an address (xallocx) */
	FUNC_REAL_SIZE = 1 << 8,
	/* the probe is on the first instruction, where the stack pointer is at the return address */
	FUNC_AT_ENTRY = 1 << 9,
	/* may be left by an exception: then it has made no block */
	FUNC_THROWS = 1 << 10,
	/* always probed by a session, which follows no call that may throw */
	FUNC_SESSION = 1 << 11,
};

#define ARG_AX 7

/* One probed function. Argument positions count from 1, ARG_AX is rax; 0 is "none". */
struct func {
	__u8 op;
	__u8 size;
	__u8 count;
	__u8 ptr;
	__u8 out; /* points to the variable that gets the pointer; 0: returned */
	__u8 pool;
	__u8 kind; /* < 128; blocks of one kind never meet those of another */
	__u8 pad;
	__u32 flags; /* enum func_flag */
};

/*
 * One traced process. key is {generation, tgid of the owner of the memory}: the
 * generation changes with fork and exec, so that neither a reused pid nor a
 * new image meets the blocks of an old one. A vfork child has its parent's key.
 */
struct proc {
	__u64 key;
	__u64 asked; /* when user space was last told of an unknown pc, in ns */
	__u32 slot;  /* unwind tables */
	__u32 flags; /* enum proc_flag */
};

enum proc_flag {
	PROC_FORKED = 1 << 0, /* has inherited blocks of a traced parent */
	PROC_FOLLOW = 1 << 1, /* its children are traced too */
	PROC_PROBED = 1 << 2, /* has its own probes, or its parent's: its frees will be seen */
};

/* A block: kind sits in the address's unused top bits. */
struct live_key {
	__u64 addr; /* kind << 57 | address */
	__u64 proc;
};

#define KIND_SHIFT 57

/*
 * What stands for the stacks that found no row, in each process and kind. Their bytes are in the books, only not told
 * apart.
 */
#define OTHER_STACK (~0ULL)

/* Sampling probability in units of 2^-32; ALWAYS is exactly 1. */
#define ALWAYS 0xffffffffU
/* Object counts are kept in units of 2^-WEIGHT_SHIFT, as a weight is 1/p. */
#define WEIGHT_SHIFT 20

struct block {
	__u64 stack;
	__u64 size; /* requested bytes */
	__u64 time; /* of the call, CLOCK_MONOTONIC ns */
	__u32 prob;
	__u32 pool; /* low bits of its pool's address; 0: none */
};

struct row_key {
	__u64 proc;
	__u64 stack;
	__u32 kind;
	__u32 pad;
};

/* The book of one stack. In use = allocated - freed. */
struct row {
	__u64 alloc_bytes;
	__u64 alloc_objects; /* x 2^WEIGHT_SHIFT */
	__u64 free_bytes;
	__u64 free_objects; /* x 2^WEIGHT_SHIFT */
	__u32 sent;	    /* the frames are in user space */
	__u32 taken;	    /* blocks that reallocs under way hold: in no book's live map until they end */
};

/* Named ways to lose, cut or miss something; enum order is the index. */
enum counter {
	COUNT_LIVE_FULL,
	COUNT_ROWS_FULL,
	COUNT_THREAD_LOST,
	COUNT_PENDING_OVERFLOW,
	COUNT_PENDING_STALE,
	COUNT_RETURN_WITHOUT_ENTRY,
	COUNT_OVERWRITTEN,
	COUNT_FREE_PREATTACH,
	COUNT_FREE_INHERITED,
	COUNT_REALLOC_PREATTACH,
	COUNT_REALLOC_PREATTACH_BYTES,
	COUNT_DIED_IN_REALLOC,
	COUNT_STACKS_FULL,
	COUNT_MAP_GAP,
	COUNT_READ_FAULT,
	COUNT_NO_PROC_ROOM,
	COUNT_POOL_FULL,
	COUNT_RETURNS,
	COUNT_NOT_FOLLOWED,
	COUNT_ROWS_LOST,
	COUNT_MAX,
};

/* What the events ring buffer carries, in kernel order. */
enum event_type {
	EVENT_MMAP,
	EVENT_MUNMAP,
	EVENT_MREMAP,
	EVENT_BRK,
	EVENT_FORK,
	EVENT_EXEC,
	EVENT_EXIT,
	EVENT_UNKNOWN_PC,
	EVENT_LIVE_FULL, /* the live map wants to be thinned */
};

enum event_flag {
	EVENT_INTERNAL = 1 << 0,  /* within an allocator call */
	EVENT_SHARES_MM = 1 << 1, /* vfork: the child runs in its parent's memory */
	EVENT_BY_LEADER = 1 << 2, /* forked by the main thread, whose uprobes the child inherits */
};

struct event {
	__u32 type;
	__u32 flags;
	__u64 proc;
	__u64 time;
	__u32 tgid;
	__u32 other; /* child's tgid, exit code */
	__u64 stack;
	__u64 result;
	__u64 args[6];
};

/* Head of a record in the frames ring buffer; n frames of 8 bytes follow. */
struct stack_head {
	__u64 proc;
	__u64 hash;
	__u32 n;
	__u32 end;
};

#define PROB_BUCKETS 2048

/* A question to real_file and its answer. */
struct mapped_file {
	__u64 address; /* of a mapping of the asking process */
	__u64 device;  /* as the kernel numbers it inside: major << 20 | minor; 0: nothing is mapped there */
	__u64 inode;
};

#endif
