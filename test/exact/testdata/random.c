// The differential test: threads draw operations over all functions of the allocator from a seed, on blocks that they
// share, and the ledger is kept per call site. Usage: random SEED THREADS
//
// Lines: "run N" draws N operations in 4 rounds of new threads and answers "did". "attached" starts the books: what was
// made before stays out of them for good (its realloc too); from then on each round forks while its threads allocate,
// and the child, which draws operations of its own on what it inherited, answers "child PID" and its ledger. "ledger"
// answers with the ledger. "alone" ends the forking. "start" begins a run without end, "drain" ends it, frees every block and starts the books.
#include "native.h"
#include "target.h"
#include <malloc.h>
#include <pthread.h>
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define SLOTS 16384
#define MAPS 64
#define MAX_THREADS 64
#define ROUNDS 4

// How a block may be ended: by a function that is told its size, by one that is told its alignment of 64. NONZERO: of no
// bytes one was asked for (mallocx may not be asked for none, operator new of libstdc++ makes it one).
enum { SIZED = 1, ALIGNED = 2, NONZERO = 4 };

struct slot {
	atomic_int busy;
	int booked; // made after the attach
	int ends;
	struct block block;
};

// C++, by its names in symbol tables; musl-gcc has no library of it. Not weak: those pull nothing out of libstdc++.a.
#ifndef NO_CXX
#define CXX
enum { has_cxx = 1 };
#else
#define CXX WEAK
enum { has_cxx = 0 };
#endif
CXX void *new_plain(size_t) __asm__("_Znwm");
CXX void *new_array(size_t) __asm__("_Znam");
CXX void *new_nothrow(size_t, const char *) __asm__("_ZnwmRKSt9nothrow_t");
CXX void *new_aligned(size_t, size_t) __asm__("_ZnwmSt11align_val_t");
CXX void delete_plain(void *) __asm__("_ZdlPv");
CXX void delete_array(void *) __asm__("_ZdaPv");
CXX void delete_sized(void *, size_t) __asm__("_ZdlPvm");
CXX void delete_aligned(void *, size_t) __asm__("_ZdlPvSt11align_val_t");
CXX void delete_sized_aligned(void *, size_t, size_t) __asm__("_ZdlPvmSt11align_val_t");

static struct slot slots[SLOTS];
static int attached, alone;
static volatile size_t too_much = PTRDIFF_MAX;
static void *volatile nothing; // the compiler makes a malloc of realloc(nothing, size)

typedef struct block (*site_function)(size_t size);

// PLAIN_SITE without the book: a block is booked when it gets into its slot.
#define UNBOOKED_SITE(name, function, call)                    \
	ROW(name, "malloc", function);                         \
	SITE struct block site_##name(size_t size)             \
	{                                                      \
		void *p = call;                                \
		KEEP(p);                                       \
		return (struct block){ p, size, &row_##name }; \
	}

#define FOUR_SITES(name, function, call)                \
	UNBOOKED_SITE(name##_a, function, call)         \
	UNBOOKED_SITE(name##_b, function, call)         \
	UNBOOKED_SITE(name##_c, function, call)         \
	UNBOOKED_SITE(name##_d, function, call)


FOUR_SITES(malloc, "malloc", malloc(size))
FOUR_SITES(calloc, "calloc", calloc(1, size))
FOUR_SITES(realloc_null, "realloc", realloc(nothing, size))
FOUR_SITES(reallocarray_null, "reallocarray", reallocarray(nothing, 1, size))
FOUR_SITES(aligned_alloc, "aligned_alloc", aligned_alloc(64, size))
FOUR_SITES(memalign, "memalign", memalign(1024, size))
UNBOOKED_SITE(valloc, "valloc", valloc(size))
UNBOOKED_SITE(mallocx_a, "mallocx", mallocx(size + !size, 0))
UNBOOKED_SITE(mallocx_b, "mallocx", mallocx(size + !size, 0))
UNBOOKED_SITE(tc_malloc, "tc_malloc", tc_malloc(size))
UNBOOKED_SITE(tc_calloc, "tc_calloc", tc_calloc(1, size))
UNBOOKED_SITE(tc_memalign, "tc_memalign", tc_memalign(64, size))
UNBOOKED_SITE(mi_malloc, "mi_malloc", mi_malloc(size))
UNBOOKED_SITE(mi_zalloc, "mi_zalloc", mi_zalloc(size))
UNBOOKED_SITE(mi_calloc, "mi_calloc", mi_calloc(1, size))
UNBOOKED_SITE(mi_malloc_aligned, "mi_malloc_aligned", mi_malloc_aligned(size, 64))
UNBOOKED_SITE(mi_heap_malloc, "mi_heap_malloc", mi_heap_malloc(mi_heap_get_default(), size))
UNBOOKED_SITE(new_plain, "", new_plain(size + !size))
UNBOOKED_SITE(new_array, "", new_array(size + !size))
UNBOOKED_SITE(new_nothrow, "", new_nothrow(size + !size, ""))
UNBOOKED_SITE(new_aligned, "", new_aligned(size + !size, 64))

UNBOOKED_SITE(malloc_fails, "malloc", malloc(too_much))
UNBOOKED_SITE(calloc_fails, "calloc", calloc(too_much, size + 3))
UNBOOKED_SITE(aligned_alloc_fails, "aligned_alloc", aligned_alloc(64, too_much))
UNBOOKED_SITE(mallocx_fails, "mallocx", mallocx(too_much, 0))
UNBOOKED_SITE(tc_malloc_fails, "tc_malloc", tc_malloc(too_much))
UNBOOKED_SITE(mi_malloc_fails, "mi_malloc", mi_malloc(too_much))
UNBOOKED_SITE(new_nothrow_fails, "", new_nothrow(too_much, ""))

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
REALLOC_SITE(rallocx, "rallocx", rallocx(old, size + !size, 0))
REALLOC_SITE(tc_realloc, "tc_realloc", tc_realloc(old, size))
REALLOC_SITE(mi_realloc, "mi_realloc", mi_realloc(old, size))
REALLOC_SITE(mi_reallocn, "mi_reallocn", mi_reallocn(old, 1, size))
REALLOC_SITE(realloc_fails, "realloc", realloc(old, too_much))
REALLOC_SITE(reallocarray_fails, "reallocarray", reallocarray(old, too_much, size + 3))
REALLOC_SITE(rallocx_fails, "rallocx", rallocx(old, too_much, 0))
REALLOC_SITE(mi_realloc_fails, "mi_realloc", mi_realloc(old, too_much))

#define LEN(array) (sizeof(array) / sizeof(array)[0])

// needs: a function that may not be there; what is not there leaves the list, and its row the ledger.
struct maker {
	site_function site;
	struct row *row;
	void *needs;
	int ends;
};

#define EACH(name, needs, ends) { site_##name, &row_##name, (void *)(needs), ends }
#define EACH_OF_FOUR(name, ends) \
	EACH(name##_a, malloc, ends), EACH(name##_b, malloc, ends), EACH(name##_c, malloc, ends), EACH(name##_d, malloc, ends)

static struct maker makers[] = {
	EACH_OF_FOUR(malloc, SIZED),
	EACH_OF_FOUR(malloc, SIZED),
	EACH_OF_FOUR(calloc, SIZED),
	EACH_OF_FOUR(realloc_null, SIZED),
	EACH_OF_FOUR(reallocarray_null, SIZED),
	EACH_OF_FOUR(aligned_alloc, 0),
	EACH_OF_FOUR(memalign, 0),
	EACH(posix_memalign_a, malloc, 0),
	EACH(posix_memalign_b, malloc, 0),
	EACH(posix_memalign_c, malloc, 0),
	EACH(valloc, malloc, 0),
	EACH(mallocx_a, mallocx, SIZED | NONZERO),
	EACH(mallocx_b, mallocx, SIZED | NONZERO),
	EACH(tc_malloc, tc_malloc, SIZED),
	EACH(tc_calloc, tc_malloc, SIZED),
	EACH(tc_memalign, tc_malloc, 0),
	EACH(mi_malloc, mi_malloc, SIZED),
	EACH(mi_zalloc, mi_malloc, SIZED),
	EACH(mi_calloc, mi_malloc, SIZED),
	EACH(mi_malloc_aligned, mi_malloc, 0),
	EACH(mi_heap_malloc, mi_malloc, SIZED),
	EACH(new_plain, new_plain, SIZED | NONZERO),
	EACH(new_array, new_plain, SIZED | NONZERO),
	EACH(new_nothrow, new_plain, SIZED | NONZERO),
	EACH(new_aligned, new_plain, ALIGNED | NONZERO),
};
static unsigned maker_count;

static struct maker failing_makers[] = {
	EACH(malloc_fails, malloc, 0),	     EACH(calloc_fails, malloc, 0),
	EACH(aligned_alloc_fails, malloc, 0), EACH(posix_memalign_bad_align, malloc, 0),
	EACH(posix_memalign_fails, malloc, 0), EACH(mallocx_fails, mallocx, 0),
	EACH(tc_malloc_fails, tc_malloc, 0), EACH(mi_malloc_fails, mi_malloc, 0),
	EACH(new_nothrow_fails, 0, 0), // needs is filled in
};
static unsigned failing_count;

struct resizer {
	struct block (*site)(void *old, size_t size);
	struct row *row;
	void *needs;
};

#define RESIZE(name, needs) { site_##name, &row_##name, (void *)(needs) }
static struct resizer resizers[] = {
	RESIZE(realloc_a, malloc),	RESIZE(realloc_b, malloc),	    RESIZE(reallocarray, malloc),
	RESIZE(rallocx, rallocx),	RESIZE(tc_realloc, tc_realloc), RESIZE(mi_realloc, mi_realloc),
	RESIZE(mi_reallocn, mi_realloc),
};
static unsigned resizer_count;

static struct resizer failing_resizers[] = {
	RESIZE(realloc_fails, malloc),
	RESIZE(reallocarray_fails, malloc),
	RESIZE(rallocx_fails, rallocx),
	RESIZE(mi_realloc_fails, mi_realloc),
};
static unsigned failing_resizer_count;

#define KEEP_AVAILABLE(list, count)                      \
	for (unsigned i = 0; i < LEN(list); i++) {       \
		if (list[i].needs)                       \
			list[count++] = list[i];         \
		else                                     \
			list[i].row->kind = NULL;        \
	}

static void keep_available(void)
{
	// libstdc++'s own form throws and catches: the exception is a block too.
	failing_makers[LEN(failing_makers) - 1].needs = mallocx ? (void *)mallocx : tc_malloc ? (void *)tc_malloc : (void *)mi_malloc;
	KEEP_AVAILABLE(makers, maker_count)
	KEEP_AVAILABLE(failing_makers, failing_count)
	KEEP_AVAILABLE(resizers, resizer_count)
	KEEP_AVAILABLE(failing_resizers, failing_resizer_count)
}

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

static void put(struct slot *slot, struct block b, int ends)
{
	slot->block = b;
	slot->booked = attached;
	slot->ends = ends;
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
	struct block b = resizers[draw(state) % resizer_count].site(slot->block.p, size);

	check(b.p || size == 0, "realloc");
	forget(slot);
	if (!b.p)
		return;
	if (b.row == &row_rallocx)
		b.size += !size;
	// tcmalloc keeps a block that shrinks a little, and takes a size that it is told on trust: the block would get into the
	// list of smaller ones.
	put(slot, b, tc_malloc ? 0 : SIZED);
	if (!booked && attached) { // the realloc of an unknown block is unknown
		COUNT(b.row->alloc_objects, -1);
		COUNT(b.row->alloc_bytes, -(int64_t)b.size);
		slot->booked = 0;
	}
}

// Of the functions that are there one that may end the block.
static void end(struct slot *slot, uint64_t choice)
{
	void *p = slot->block.p;
	size_t size = slot->block.size;
	int sized = (slot->ends & SIZED) && size > 0;

	forget(slot);
	switch (choice % 8) {
	case 0:
		if (sdallocx && sized)
			return sdallocx(p, size, 0);
		if (tc_free_sized && sized)
			return tc_free_sized(p, size);
		if (mi_free_size && sized)
			return mi_free_size(p, size);
		break;
	case 1:
		if (dallocx)
			return dallocx(p, 0);
		if (tc_free)
			return tc_free(p);
		if (mi_free)
			return mi_free(p);
		break;
	case 2:
		if (has_cxx && slot->ends & ALIGNED)
			return delete_aligned(p, 64);
		if (has_cxx)
			return delete_plain(p);
		break;
	case 3:
		if (has_cxx && slot->ends & ALIGNED)
			return delete_sized_aligned(p, size, 64);
		if (has_cxx && sized)
			return delete_sized(p, size);
		break;
	case 4:
		if (has_cxx)
			return delete_array(p);
	}
	free(p);
}

static void make(struct slot *slot, uint64_t *state)
{
	uint64_t r = draw(state);
	struct maker *maker = &makers[(r >> 8) % maker_count];
	struct block b = via_left(maker->site, draw_size(state), r >> 32 & 31);

	if (maker->ends & NONZERO)
		b.size += !b.size;
	if (b.p)
		put(slot, b, maker->ends);
}

static void fail(uint64_t r)
{
	struct block b = via_left(failing_makers[(r >> 8) % failing_count].site, 16, r >> 32 & 31);

	check(!b.p, "a failing call");
}

static void operate(struct slot *slot, uint64_t *state)
{
	uint64_t r = draw(state);

	if (r % 151 == 0) // mimalloc collects the whole heap before it says no
		return fail(r);
	if (!slot->block.p)
		return make(slot, state);
	verify(&slot->block);
	switch (r >> 8 & 63) {
	case 0:
		check(!failing_resizers[(r >> 16) % failing_resizer_count].site(slot->block.p, 16).p, "a failing realloc");
		break;
	case 1 ... 12:
		resize(slot, state);
		break;
	default:
		end(slot, r >> 16);
	}
}

// The program's own mappings: a whole number of pages that lie at p.
struct map {
	atomic_int busy;
	int booked;
	char *p;
	size_t size;
	struct row *row;
};

static struct map maps[MAPS];
#define PAGE ((size_t)4096)

#define MAP_SITE(name)                                                                                          \
	ROW(name, "mmap", "mmap");                                                                              \
	SITE struct block site_##name(size_t size)                                                              \
	{                                                                                                       \
		void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);         \
		KEEP(p);                                                                                        \
		check(p != MAP_FAILED, "mmap");                                                                 \
		return (struct block){ p, size, &row_##name };                                                  \
	}

MAP_SITE(map_a)
MAP_SITE(map_b)

static void book_map(struct map *map, int64_t bytes)
{
	if (!map->booked)
		return;
	if (bytes > 0)
		COUNT(map->row->alloc_bytes, bytes);
	else
		COUNT(map->row->free_bytes, -bytes);
}

static void cut(struct map *map, size_t from, size_t size)
{
	check(munmap(map->p + from, size) == 0, "munmap");
	book_map(map, -(int64_t)size);
}

static void remap(struct map *map, size_t size)
{
	char *p = mremap(map->p, map->size, size, MREMAP_MAYMOVE);

	check(p != MAP_FAILED, "mremap");
	book_map(map, (int64_t)size - (int64_t)map->size);
	map->p = p;
	map->size = size;
}

// Maps, cuts, grows and moves. A hole is never unmapped again: another thread's mapping may be in it by then, or the
// allocator's.
static void operate_map(struct map *map, uint64_t *state)
{
	uint64_t r = draw(state);
	size_t some = PAGE * (1 + (r >> 32) % 16);

	if (!map->p) {
		struct block b = (r & 1 ? site_map_a : site_map_b)(some + PAGE);
		*map = (struct map){ .busy = 1, .booked = attached, .p = b.p, .size = b.size, .row = b.row };
		book_map(map, map->size);
		return;
	}
	if (attached && !map->booked) { // it would grow by something new
		cut(map, 0, map->size);
		map->p = NULL;
		return;
	}
	if (map->size <= 2 * PAGE || r % 7 == 0)
		return remap(map, some + PAGE);
	switch (r % 3) {
	case 0:
		cut(map, 0, PAGE);
		map->p += PAGE;
		map->size -= PAGE;
		break;
	case 1:
		cut(map, map->size - PAGE, PAGE);
		map->size -= PAGE;
		break;
	default:
		cut(map, PAGE, PAGE);
		cut(map, 0, PAGE);
		cut(map, 2 * PAGE, map->size - 2 * PAGE);
		map->p = NULL;
	}
}

struct worker {
	pthread_t thread;
	uint64_t state;
	int operations;
	sem_t *midway;
};

static atomic_int stop;

static void *work(void *arg)
{
	struct worker *w = (struct worker *)arg;

	for (int i = 0; i < w->operations && !stop; i++) {
		uint64_t r = draw(&w->state);
		struct slot *slot = &slots[r % SLOTS];
		struct map *map = &maps[(r >> 32) % MAPS];

		if (w->midway && i == w->operations / 2)
			sem_post(w->midway);
		if (r >> 48 < 256 && !atomic_exchange(&map->busy, 1)) {
			operate_map(map, &w->state);
			atomic_store(&map->busy, 0);
		}
		if (atomic_exchange(&slot->busy, 1))
			continue;
		operate(slot, &w->state);
		atomic_store(&slot->busy, 0);
	}
	return NULL;
}

static struct worker workers[MAX_THREADS];

static void start_workers(int threads, int operations, sem_t *midway)
{
	for (int i = 0; i < threads; i++) {
		workers[i].operations = operations;
		workers[i].midway = i == 0 ? midway : NULL;
		check(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "pthread_create");
	}
}

static void join_workers(int threads)
{
	for (int i = 0; i < threads; i++)
		check(pthread_join(workers[i].thread, NULL) == 0, "pthread_join");
}

static void clear_books(void)
{
	for (struct row *r = __start_rows; r < __stop_rows; r++)
		r->alloc_objects = r->alloc_bytes = r->free_objects = r->free_bytes = 0;
	for (int i = 0; i < SLOTS; i++)
		slots[i].booked = 0;
	for (int i = 0; i < MAPS; i++)
		maps[i].booked = 0;
}

// What a thread of the parent's was working on stays busy for good.
static void be_child(int operations)
{
	clear_books();
	for (int i = 0; i < 2; i++)
		workers[i].state += 0x9e3779b97f4a7c15;
	start_workers(2, operations / 2, NULL);
	join_workers(2);
	say("child %d\n", getpid());
	say_ledger();
	_exit(0);
}

static void run_round(int threads, int operations)
{
	sem_t midway;
	pid_t child;

	check(sem_init(&midway, 0, 0) == 0, "sem_init");
	start_workers(threads, operations, attached ? &midway : NULL);
	if (attached && !alone) {
		int status;

		while (sem_wait(&midway))
			;
		child = fork();
		check(child >= 0, "fork");
		if (child == 0)
			be_child(operations);
		check(waitpid(child, &status, 0) == child && status == 0, "child");
	}
	join_workers(threads);
}

static void drain(int threads)
{
	stop = 1;
	join_workers(threads);
	stop = 0;
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i].block.p)
			end(&slots[i], i);
	}
	for (int i = 0; i < MAPS; i++) {
		if (maps[i].p)
			cut(&maps[i], 0, maps[i].size);
		maps[i].p = NULL;
	}
	clear_books();
	attached = 1;
}

int main(int argc, char **argv)
{
	int threads = argc > 2 ? atoi(argv[2]) : 8;
	uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1;
	char line[64];

	check(threads > 0 && threads <= MAX_THREADS, "threads");
	for (int i = 0; i < threads; i++)
		workers[i].state = (seed + 1) * 0x9e3779b97f4a7c15 + i;
	keep_available();
	say("ready\n");
	while (hear(line, sizeof line)) {
		int operations;

		if (sscanf(line, "run %d", &operations) == 1) {
			for (int round = 0; round < ROUNDS; round++)
				run_round(threads, operations / threads / ROUNDS);
		} else if (strcmp(line, "attached") == 0) {
			attached = 1;
		} else if (strcmp(line, "alone") == 0) {
			alone = 1;
		} else if (strcmp(line, "start") == 0) {
			start_workers(threads, INT32_MAX, NULL);
		} else if (strcmp(line, "drain") == 0) {
			drain(threads);
		} else if (strcmp(line, "ledger") == 0) {
			say_ledger();
			continue;
		} else {
			die("unknown line");
		}
		say("did\n");
	}
	return 0;
}
