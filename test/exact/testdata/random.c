// The differential test: threads draw operations over all allocator functions from a seed, on blocks that they share,
// and the ledger is kept per call site. Usage: random SEED THREADS
//
// Lines: "run N" draws N operations and answers "did"; "attached" starts the books, what was made before stays out of
// them for good (its realloc too); "ledger" answers with the ledger.
#include "target.h"
#include <malloc.h>
#include <pthread.h>

#define SLOTS 16384
#define MAX_THREADS 64

struct slot {
	atomic_int busy;
	int booked; // made after the attach
	struct block block;
};

static struct slot slots[SLOTS];
static int attached;
static volatile size_t too_much = PTRDIFF_MAX;
static void *volatile nothing; // the compiler makes a malloc of realloc(nothing, size)

typedef struct block (*site_function)(size_t size);

#define PLAIN_SITE(name, function, call)                       \
	ROW(name, "malloc", function);                         \
	SITE struct block site_##name(size_t size)             \
	{                                                      \
		void *p = call;                                \
		KEEP(p);                                       \
		return (struct block){ p, size, &row_##name }; \
	}

#define FOUR_SITES(name, function, call)             \
	PLAIN_SITE(name##_a, function, call)         \
	PLAIN_SITE(name##_b, function, call)         \
	PLAIN_SITE(name##_c, function, call)         \
	PLAIN_SITE(name##_d, function, call)


FOUR_SITES(malloc, "malloc", malloc(size))
FOUR_SITES(calloc, "calloc", calloc(1, size))
FOUR_SITES(realloc_null, "realloc", realloc(nothing, size))
FOUR_SITES(reallocarray_null, "reallocarray", reallocarray(nothing, 1, size))
FOUR_SITES(aligned_alloc, "aligned_alloc", aligned_alloc(64, size))
FOUR_SITES(memalign, "memalign", memalign(1024, size))
PLAIN_SITE(malloc_fails, "malloc", malloc(too_much))
PLAIN_SITE(calloc_fails, "calloc", calloc(too_much, size + 3))
PLAIN_SITE(aligned_alloc_fails, "aligned_alloc", aligned_alloc(64, too_much))

#define POSIX_SITE(name, align, bytes)                               \
	ROW(name, "malloc", "posix_memalign");                       \
	SITE struct block site_##name(size_t size)                   \
	{                                                            \
		void *p = &slots;                                    \
		int rc = posix_memalign(&p, align, bytes);           \
		KEEP(rc);                                            \
		return (struct block){ rc ? NULL : p, size, &row_##name }; \
	}

POSIX_SITE(posix_memalign_a, 16, size)
POSIX_SITE(posix_memalign_b, 64, size)
POSIX_SITE(posix_memalign_c, 4096, size)
POSIX_SITE(posix_memalign_bad_align, 24, size)
POSIX_SITE(posix_memalign_fails, 64, too_much)

#define REALLOC_SITE(name, function, call)                       \
	ROW(name, "malloc", function);                           \
	SITE struct block site_##name(void *old, size_t size)    \
	{                                                        \
		void *p = call;                                  \
		KEEP(p);                                         \
		return (struct block){ p, size, &row_##name };   \
	}

REALLOC_SITE(realloc_a, "realloc", realloc(old, size))
REALLOC_SITE(realloc_b, "realloc", realloc(old, size))
REALLOC_SITE(reallocarray, "reallocarray", reallocarray(old, 1, size))
REALLOC_SITE(realloc_fails, "realloc", realloc(old, too_much))
REALLOC_SITE(reallocarray_fails, "reallocarray", reallocarray(old, too_much, size + 3))

static const site_function makers[] = {
	site_malloc_a,		site_malloc_b,		  site_malloc_c,	    site_malloc_d,
	site_malloc_a,		site_malloc_b,		  site_malloc_c,	    site_malloc_d,
	site_calloc_a,		site_calloc_b,		  site_calloc_c,	    site_calloc_d,
	site_realloc_null_a,	site_realloc_null_b,	  site_realloc_null_c,	    site_realloc_null_d,
	site_reallocarray_null_a, site_reallocarray_null_b, site_reallocarray_null_c, site_reallocarray_null_d,
	site_aligned_alloc_a,	site_aligned_alloc_b,	  site_aligned_alloc_c,	    site_aligned_alloc_d,
	site_memalign_a,	site_memalign_b,	  site_memalign_c,	    site_memalign_d,
	site_posix_memalign_a,	site_posix_memalign_b,	  site_posix_memalign_c,
};

static const site_function failing_makers[] = {
	site_malloc_fails, site_calloc_fails, site_aligned_alloc_fails, site_posix_memalign_bad_align,
	site_posix_memalign_fails,
};

#define LEN(array) (sizeof(array) / sizeof(array)[0])

static uint64_t draw(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x >> 12;
	x ^= x << 25;
	x ^= x >> 27;
	*state = x;
	return x * 0x2545f4914f6cdd1d;
}

// The same site by 2^depth ways: the stacks differ, the site's row is their sum.
__attribute__((noinline, noclone)) static struct block via_left(site_function make, size_t size, unsigned path);

__attribute__((noinline, noclone)) static struct block via_right(site_function make, size_t size, unsigned path)
{
	struct block b = path <= 1 ? make(size) : via_left(make, size, path >> 1);
	KEEP(b.p);
	return b;
}

static struct block via_left(site_function make, size_t size, unsigned path)
{
	struct block b = path <= 1 ? make(size) : path & 1 ? via_right(make, size, path >> 1) : via_left(make, size, path >> 1);
	KEEP(b.p);
	return b;
}

static size_t draw_size(uint64_t *state)
{
	uint64_t r = draw(state);

	if (r % 997 == 0)
		return 0;
	if (r % 503 == 1)
		return 100000 + (r >> 32) % 500000; // above the mmap threshold, or not
	return 1 + (r >> 32) % (r % 7 == 0 ? 8192 : 200);
}

// A tracer that harmed the target would show here.
static void mark(struct block *b)
{
	if (b->size) {
		((char *)b->p)[0] = (char)b->size;
		((char *)b->p)[b->size - 1] = (char)b->size;
	}
}

static void verify(struct block *b)
{
	if (b->size && ((char *)b->p)[b->size - 1] != (char)b->size)
		die("a block's content changed");
}

static void put(struct slot *slot, struct block b)
{
	slot->block = b;
	slot->booked = attached;
	mark(&b);
	if (attached)
		made(b.row, b.p, b.size);
}

static void forget(struct slot *slot)
{
	if (slot->booked)
		gone(&slot->block);
	slot->block.p = NULL;
}

static void resize(struct slot *slot, uint64_t *state)
{
	size_t size = draw_size(state);
	int booked = slot->booked;
	struct block b;

	switch (draw(state) % 3) {
	case 0:
		b = site_realloc_a(slot->block.p, size);
		break;
	case 1:
		b = site_realloc_b(slot->block.p, size);
		break;
	default:
		b = site_reallocarray(slot->block.p, size);
	}
	check(b.p || size == 0, "realloc");
	forget(slot);
	if (!b.p)
		return;
	put(slot, b);
	if (!booked && attached) { // the realloc of an unknown block is unknown
		COUNT(b.row->alloc_objects, -1);
		COUNT(b.row->alloc_bytes, -(int64_t)b.size);
		slot->booked = 0;
	}
}

static void operate(struct slot *slot, uint64_t *state)
{
	uint64_t r = draw(state);
	void *p;

	if (r % 31 == 0) {
		struct block b = via_left(failing_makers[(r >> 8) % LEN(failing_makers)], 16, r >> 16 & 7);
		check(!b.p, "a failing call");
		return;
	}
	if (!slot->block.p) {
		struct block b = via_left(makers[(r >> 8) % LEN(makers)], draw_size(state), r >> 16 & 7);
		if (b.p)
			put(slot, b);
		return;
	}
	verify(&slot->block);
	switch (r >> 8 & 15) {
	case 0:
		check(!site_realloc_fails(slot->block.p, 16).p, "a failing realloc");
		break;
	case 1:
		check(!site_reallocarray_fails(slot->block.p, 16).p, "a failing reallocarray");
		break;
	case 2:
	case 3:
	case 4:
		resize(slot, state);
		break;
	default:
		p = slot->block.p;
		forget(slot);
		free(p);
	}
}

struct worker {
	pthread_t thread;
	uint64_t state;
	int operations;
};

static void *work(void *arg)
{
	struct worker *w = (struct worker *)arg;

	for (int i = 0; i < w->operations; i++) {
		struct slot *slot = &slots[draw(&w->state) % SLOTS];
		if (atomic_exchange(&slot->busy, 1))
			continue;
		operate(slot, &w->state);
		atomic_store(&slot->busy, 0);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	static struct worker workers[MAX_THREADS];
	int threads = argc > 2 ? atoi(argv[2]) : 8;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
	char line[64];

	check(threads > 0 && threads <= MAX_THREADS, "threads");
	for (int i = 0; i < threads; i++)
		workers[i].state = (seed + 1) * 0x9e3779b97f4a7c15 + i;
	say("ready\n");
	while (hear(line, sizeof line)) {
		int operations;

		if (sscanf(line, "run %d", &operations) == 1) {
			for (int i = 0; i < threads; i++) {
				workers[i].operations = operations / threads;
				check(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
			}
			for (int i = 0; i < threads; i++)
				check(pthread_join(workers[i].thread, NULL) == 0, "pthread_join");
			say("did\n");
		} else if (strcmp(line, "attached") == 0) {
			attached = 1;
			say("did\n");
		} else if (strcmp(line, "ledger") == 0) {
			say_ledger();
		} else {
			die("unknown line");
		}
	}
	return 0;
}
