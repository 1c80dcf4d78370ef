/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The books: which blocks are live, and what each call stack has allocated and
 * freed. The trap is order. A block is taken out where free is entered and put
 * in where malloc returns, because between the two another thread may get the
 * same address.
 */
#ifndef ALLOCSNOOP_BOOKS_H
#define ALLOCSNOOP_BOOKS_H

/* block in use -> its size and stack; sized by --max-live */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1000000);
	__type(key, struct live_key);
	__type(value, struct block);
} live SEC(".maps");

/* stack, process and kind -> what was allocated and freed; sized by --max-stacks */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__type(key, struct row_key);
	__type(value, struct row);
} rows_of_stacks SEC(".maps");

/* pool -> its youngest block; sized by user space, 1 without declared pools */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct live_key);
	__type(value, __u64);
} pools SEC(".maps");

/* block of a pool -> the pool's next older block; sized by user space, 1 without declared pools */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__type(key, struct live_key);
	__type(value, __u64);
} pool_next SEC(".maps");

/* enum counter -> count, per CPU */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNT_MAX);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* frames of stacks when first seen: struct stack_head, then n frames; sized by user space */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} frames SEC(".maps");

/* mappings and processes as they come and go, struct event; sized by user space */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 22);
} events SEC(".maps");

/* rows that user space keeps for row_other; they are of process 0, and their stack is their number */
volatile __u32 rows_reserve = 0;

/* An uprobe program may be preempted, so another one can run on this CPU between the load and the store. */
static __always_inline void count_add(__u32 which, __u64 n)
{
	__u64 *c = bpf_map_lookup_elem(&counters, &which);

	if (c)
		__sync_fetch_and_add(c, n);
}

static __always_inline void count(__u32 which)
{
	count_add(which, 1);
}

static __always_inline struct live_key live_key(__u64 proc, __u32 kind, __u64 addr)
{
	struct live_key k = {
	    .addr = (__u64)kind << KIND_SHIFT | (addr & ((1ULL << KIND_SHIFT) - 1)),
	    .proc = proc,
	};
	return k;
}

static __always_inline __u64 weight_of(__u32 prob)
{
	if (prob == ALWAYS || !prob)
		return 1ULL << WEIGHT_SHIFT;
	return (1ULL << (WEIGHT_SHIFT + 32)) / prob;
}

static __always_inline __u64 weighted_bytes(__u64 size, __u32 prob)
{
	if (prob == ALWAYS)
		return size;
	return size * weight_of(prob) >> WEIGHT_SHIFT;
}

static __always_inline struct row *row_get(__u64 proc, __u32 kind, __u64 stack)
{
	struct row_key k = {.proc = proc, .stack = stack, .kind = kind};
	struct row *r = bpf_map_lookup_elem(&rows_of_stacks, &k);
	struct row zero = {};

	if (r)
		return r;
	/* Two threads may both try: the loser finds the winner's row. */
	bpf_map_update_elem(&rows_of_stacks, &k, &zero, BPF_NOEXIST);
	return bpf_map_lookup_elem(&rows_of_stacks, &k);
}

/*
 * row_other is the row of the stacks that find none. There is no room for it
 * either by then: it takes the place of one that user space has kept for it.
 */
static __always_inline struct row *row_other(__u64 proc, __u32 kind)
{
	struct row_key k = {.proc = proc, .stack = OTHER_STACK, .kind = kind};
	struct row *r = bpf_map_lookup_elem(&rows_of_stacks, &k);
	struct row zero = {};
	struct row_key spare = {};

	if (r)
		return r;
	spare.stack = rows_reserve--;
	bpf_map_delete_elem(&rows_of_stacks, &spare);
	bpf_map_update_elem(&rows_of_stacks, &k, &zero, BPF_NOEXIST);
	return bpf_map_lookup_elem(&rows_of_stacks, &k);
}

static __always_inline void book_alloc(__u64 proc, __u32 kind, struct block *b)
{
	bool other = b->stack == OTHER_STACK;
	struct row *r = other ? row_other(proc, kind) : row_get(proc, kind, b->stack);

	if (!r) {
		count(COUNT_ROWS_LOST);
		return;
	}
	if (other)
		count(COUNT_ROWS_FULL);
	__sync_fetch_and_add(&r->alloc_bytes, weighted_bytes(b->size, b->prob));
	__sync_fetch_and_add(&r->alloc_objects, weight_of(b->prob));
}

static __always_inline void book_free(__u64 proc, __u32 kind, struct block *b)
{
	struct row_key k = {.proc = proc, .stack = b->stack, .kind = kind};
	struct row *r = bpf_map_lookup_elem(&rows_of_stacks, &k);

	if (!r)
		return; /* counted when its allocation found no room */
	__sync_fetch_and_add(&r->free_bytes, weighted_bytes(b->size, b->prob));
	__sync_fetch_and_add(&r->free_objects, weight_of(b->prob));
}

/* Global functions are verified once, not anew for each call. They take no pointers before 5.12. */
#ifdef NO_TASK_STORAGE
#define CHECKED_ONCE static __always_inline
#else
#define CHECKED_ONCE __attribute__((noinline))
#endif

/*
 * row_taken notes that a realloc under way holds a block of the stack, or (-1) no longer does. Where no row stands for
 * it, nothing does.
 */
CHECKED_ONCE int row_taken(__u64 proc, __u32 kind, __u64 stack, __u32 change)
{
	struct row_key k = {.proc = proc, .stack = stack, .kind = kind};
	struct row *r = bpf_map_lookup_elem(&rows_of_stacks, &k);

	if (r)
		__sync_fetch_and_add(&r->taken, change);
	return 0;
}

/*
 * live_take takes a block out of the live map into b, without touching the
 * rows. The value is read before the delete: afterwards it may belong to
 * another block. Only whoever deleted it may book it.
 */
static __always_inline bool live_take(__u64 proc, __u32 kind, __u64 addr, struct block *b)
{
	struct live_key k = live_key(proc, kind, addr);
	struct block *v = bpf_map_lookup_elem(&live, &k);

	if (!v)
		return false;
	*b = *v;
	return bpf_map_delete_elem(&live, &k) == 0;
}

/* live_since tells whether a block at the address was put in by a call that began later than the given time. */
static __always_inline bool live_since(__u64 proc, __u32 kind, __u64 addr, __u64 time)
{
	struct live_key k = live_key(proc, kind, addr);
	struct block *v = bpf_map_lookup_elem(&live, &k);

	return v && v->time > time;
}

/*
 * make_room is called when the live map is full. Where that is allowed it asks
 * user space to thin the map; from then on blocks are sampled, and the few that
 * are taken meanwhile have a reserve. A fresh block is itself among those that
 * chance decides about. Returns whether the block is to be put in again.
 */
CHECKED_ONCE int make_room(struct block *b, int fresh)
{
	struct live_key spare = {};
	struct event *e;

	if (!b || !may_sample) {
		count(COUNT_LIVE_FULL);
		return 0;
	}
	sampling = 1;
	if (!thinning) {
		thinning = 1;
		e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);
		if (e) {
			__builtin_memset(e, 0, sizeof(*e));
			e->type = EVENT_LIVE_FULL;
			e->time = bpf_ktime_get_ns();
			bpf_ringbuf_submit(e, 0);
		} else {
			thinning = 0;
		}
	}
	if (fresh && b->prob == ALWAYS && !retake(b))
		return 0;
	/* Two threads may be after the same entry: one of them takes the next. */
	for (int i = 0; i < 4; i++) {
		spare.addr = live_reserve--;
		if (!bpf_map_delete_elem(&live, &spare))
			return 1;
	}
	count(COUNT_LIVE_FULL);
	return 0;
}

/* live_put puts a block in, a fresh one or one that had been taken out. False when it is not followed. */
static __always_inline bool live_put(__u64 proc, __u32 kind, __u64 addr, struct block *b, bool fresh)
{
	struct live_key k = live_key(proc, kind, addr);
	struct block old;
	long err;

	err = bpf_map_update_elem(&live, &k, b, BPF_NOEXIST);
	if (!err)
		return true;
	/* A block at this address is still in the books: its free was missed. */
	if (live_take(proc, kind, addr, &old)) {
		book_free(proc, kind, &old);
		count(COUNT_OVERWRITTEN);
		err = bpf_map_update_elem(&live, &k, b, BPF_NOEXIST);
	}
	if (!err)
		return true;
	if (!make_room(b, fresh))
		return false;
	if (!bpf_map_update_elem(&live, &k, b, BPF_NOEXIST))
		return true;
	count(COUNT_LIVE_FULL); /* another thread has taken the room */
	return false;
}

/* Blocks of one pool that its end is followed through; what lies beyond is counted. */
#ifdef NO_TASK_STORAGE
#define MAX_POOL 32 /* the step is inlined */
#else
#define MAX_POOL 8192
#endif

struct pool_walk {
	__u64 proc;
	__u64 addr;
	__u32 kind;
	__u32 pool;
};

/* pool_link puts a new block at the head of its pool's chain. */
static __always_inline void pool_link(__u64 proc, __u32 kind, __u64 pool, __u64 addr)
{
	struct live_key head = live_key(proc, kind, pool), block = live_key(proc, kind, addr);
	__u64 *first = bpf_map_lookup_elem(&pools, &head);
	__u64 next = first ? *first : 0;

	if (bpf_map_update_elem(&pool_next, &block, &next, BPF_ANY) ||
	    bpf_map_update_elem(&pools, &head, &addr, BPF_ANY))
		count(COUNT_POOL_FULL);
}

/*
 * pool_step frees the block that the walk is at and goes to the next. Global,
 * so that the verifier checks it once, where that can be.
 */
CHECKED_ONCE int pool_step(struct pool_walk *w)
{
	struct live_key k;
	struct block *v;
	__u64 *next;

	if (!w || !w->addr)
		return 1;
	k = live_key(w->proc, w->kind, w->addr);
	/* A block that was freed alone may live on, at the same address, in another pool. */
	v = bpf_map_lookup_elem(&live, &k);
	if (v && v->pool == w->pool) {
		struct block b = *v;

		if (!bpf_map_delete_elem(&live, &k))
			book_free(w->proc, w->kind, &b);
	}
	next = bpf_map_lookup_elem(&pool_next, &k);
	w->addr = next ? *next : 0;
	if (next && (!v || v->pool == w->pool))
		bpf_map_delete_elem(&pool_next, &k);
	return 0;
}

/* pool_end frees all blocks of a pool. */
static __always_inline void pool_end(__u64 proc, __u32 kind, __u64 pool)
{
	struct live_key head = live_key(proc, kind, pool);
	struct pool_walk w = {.proc = proc, .kind = kind, .pool = pool};
	__u64 *first = bpf_map_lookup_elem(&pools, &head);

	if (!first)
		return;
	w.addr = *first;
	bpf_map_delete_elem(&pools, &head);
	for (int i = 0; i < MAX_POOL; i++)
		if (pool_step(&w))
			return;
	count(COUNT_POOL_FULL);
}

#endif
