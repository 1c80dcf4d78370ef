// Calls the functions that only jemalloc, tcmalloc or mimalloc have.
#include "native.h"
#include "target.h"

#define REALLOC_SITE(name, function, call)                                \
	ROW(name, "malloc", function);                                    \
	SITE struct block site_##name(struct block *old, size_t size)     \
	{                                                                 \
		void *p = call;                                           \
		KEEP(p);                                                  \
		if (p)                                                    \
			gone(old);                                        \
		return made(&row_##name, p, size);                        \
	}

PLAIN_SITE(mallocx, "mallocx", mallocx(size, 0))
REALLOC_SITE(rallocx, "rallocx", rallocx(old->p, size, 0))
REALLOC_SITE(rallocx_fails, "rallocx", rallocx(old->p, size, 0))
PLAIN_SITE(tc_malloc, "tc_malloc", tc_malloc(size))
PLAIN_SITE(tc_calloc, "tc_calloc", tc_calloc(size, 1))
PLAIN_SITE(tc_memalign, "tc_memalign", tc_memalign(64, size))
REALLOC_SITE(tc_realloc, "tc_realloc", tc_realloc(old->p, size))
PLAIN_SITE(mi_malloc, "mi_malloc", mi_malloc(size))
PLAIN_SITE(mi_zalloc, "mi_zalloc", mi_zalloc(size))
PLAIN_SITE(mi_calloc, "mi_calloc", mi_calloc(size, 1))
PLAIN_SITE(mi_mallocn, "mi_mallocn", mi_mallocn(size, 1))
PLAIN_SITE(mi_malloc_small, "mi_malloc_small", mi_malloc_small(size))
PLAIN_SITE(mi_malloc_aligned, "mi_malloc_aligned", mi_malloc_aligned(size, 64))
PLAIN_SITE(mi_heap_malloc, "mi_heap_malloc", mi_heap_malloc(mi_heap_get_default(), size))
REALLOC_SITE(mi_realloc, "mi_realloc", mi_realloc(old->p, size))
REALLOC_SITE(mi_reallocn, "mi_reallocn", mi_reallocn(old->p, size, 1))

// Resized in place or not at all; the requested size counts once it was reached. Both calls are in one site, whichever
// of them a tracer says holds the block.
ROW(xallocx, "malloc", "");
SITE void site_xallocx(void)
{
	void *p = mallocx(20011, 0);
	size_t real = xallocx(p, 20021, 0, 0);
	KEEP(p);
	check(real >= 20021, "xallocx");
	made(&row_xallocx, p, 20021);
}

static struct block blocks[64];
static volatile size_t too_much = PTRDIFF_MAX;

// Makes count blocks and ends the first few with END, which finds the pointer in p and the size in size.
#define FILL(count, frees, make, end)                        \
	for (int i = 0; i < count; i++) {                    \
		void *p;                                     \
		size_t size;                                 \
		blocks[i] = make;                            \
		p = blocks[i].p;                             \
		size = blocks[i].size;                       \
		check(p != NULL, #make);                     \
		(void)size;                                  \
		if (i < frees) {                             \
			gone(&blocks[i]);                    \
			end;                                 \
		}                                            \
	}

static void jemalloc(void)
{
	FILL(23, 7, site_mallocx(1009), dallocx(p, 0))
	FILL(19, 5, site_mallocx(1013), sdallocx(p, size, 0))
	FILL(17, 3, site_mallocx(1019), free(p))
	for (int i = 0; i < 13; i++) {
		struct block b = site_mallocx(101);
		b = site_rallocx(&b, 4001);
		check(!site_rallocx_fails(&b, too_much).p, "rallocx");
	}
	for (int i = 0; i < 11; i++)
		site_xallocx();
}

static void tcmalloc(void)
{
	FILL(23, 7, site_tc_malloc(1009), tc_free(p))
	FILL(19, 5, site_tc_calloc(1013), tc_free_sized(p, size))
	FILL(17, 3, site_tc_memalign(1019), free(p))
	for (int i = 0; i < 13; i++) {
		struct block b = site_tc_malloc(101);
		b = site_tc_realloc(&b, 4001);
		if (i < 2)
			drop(&b);
	}
}

static void mimalloc(void)
{
	FILL(23, 7, site_mi_malloc(1009), mi_free(p))
	FILL(19, 5, site_mi_zalloc(1013), mi_free_size(p, size))
	FILL(17, 3, site_mi_calloc(1019), free(p))
	FILL(13, 2, site_mi_mallocn(1021), mi_free(p))
	FILL(11, 4, site_mi_malloc_small(97), mi_free(p))
	FILL(29, 9, site_mi_malloc_aligned(1031), mi_free(p))
	FILL(31, 8, site_mi_heap_malloc(1033), mi_free(p))
	for (int i = 0; i < 13; i++) {
		struct block b = site_mi_malloc(101);
		b = site_mi_realloc(&b, 4001);
		b = site_mi_reallocn(&b, 8009);
		if (i < 2)
			drop(&b);
	}
}

// What an allocator maps outside of its functions that make blocks is of no other kind all the same: blocks will be in it.
ROW(unasked, "malloc", "");
SITE void *site_unasked(void *unused)
{
	size_t size = sizeof(unsigned);
	unsigned arena;

	if (mallctl)
		check(!mallctl("arenas.create", &arena, &size, NULL, 0), "arenas.create");
	if (mi_reserve_os_memory)
		check(!mi_reserve_os_memory(64 << 20, 1, 1) && mi_heap_get_default(), "mi_reserve_os_memory");
	return unused;
}

static void unasked(void)
{
	pthread_t thread;

	check(!pthread_create(&thread, NULL, site_unasked, NULL), "pthread_create");
	check(!pthread_join(thread, NULL), "pthread_join");
}

int main(int argc, char **argv)
{
	int linked = argc > 1 && !strcmp(argv[1], "linked"); // into the program: nobody knows where the allocator's code ends

	say("ready\n");
	wait_for("go");
	if (!linked)
		unasked();
	if (mallocx)
		jemalloc();
	else if (tc_malloc)
		tcmalloc();
	else if (mi_malloc)
		mimalloc();
	return finish();
}
