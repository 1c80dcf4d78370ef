// Every allocator function of C, with a prime number of blocks of a size of its own, some freed; and the calls that
// other tools book wrongly. argv[1] is the number of blocks that 8 threads churn.
#include "target.h"
#include <malloc.h>
#include <pthread.h>
#ifdef __GLIBC__
#include <dlfcn.h>
__attribute__((weak)) void *mallocx(size_t, int); // jemalloc's
#endif

#define MANY 64

static struct block blocks[MANY];
// volatile: the compiler would complain, or know the outcome, or call malloc where realloc of nothing is written.
static volatile size_t too_much = PTRDIFF_MAX;
static void *volatile nothing;

static void drop_first(int n)
{
	for (int i = 0; i < n; i++)
		drop(&blocks[i]);
	memset(blocks, 0, sizeof blocks);
}


PLAIN_SITE(malloc, "malloc", malloc(size))
PLAIN_SITE(malloc_zero, "malloc", malloc(size))
PLAIN_SITE(malloc_large, "malloc", malloc(size))
PLAIN_SITE(malloc_fails, "malloc", malloc(size))
PLAIN_SITE(calloc, "calloc", calloc(size / 3, 3))
PLAIN_SITE(calloc_overflows, "calloc", calloc(size, 16))
PLAIN_SITE(realloc_null, "realloc", realloc(nothing, size))
PLAIN_SITE(reallocarray_null, "reallocarray", reallocarray(nothing, size / 7, 7))
PLAIN_SITE(reallocarray_overflows, "reallocarray", reallocarray(nothing, size, 16))
PLAIN_SITE(aligned_alloc, "aligned_alloc", aligned_alloc(128, size))
PLAIN_SITE(memalign, "memalign", memalign(256, size))
PLAIN_SITE(valloc, "valloc", valloc(size))
#ifdef __GLIBC__
PLAIN_SITE(pvalloc, "pvalloc", pvalloc(size))
#endif
#if defined(__GLIBC__) && !defined(STATIC)
PLAIN_SITE(cfree_made, "malloc", malloc(size))
#endif
PLAIN_SITE(for_realloc_grow, "malloc", malloc(size))
PLAIN_SITE(for_realloc_shrink, "malloc", malloc(size))
PLAIN_SITE(for_realloc_zero, "malloc", malloc(size))
PLAIN_SITE(for_realloc_large, "malloc", malloc(size))
PLAIN_SITE(realloc_fails_on, "malloc", malloc(size))
PLAIN_SITE(reallocarray_fails_on, "malloc", malloc(size))
PLAIN_SITE(memalign_fails_on, "malloc", malloc(size))
PLAIN_SITE(thread_first, "malloc", malloc(size))
PLAIN_SITE(churn, "malloc", malloc(size))
PLAIN_SITE(cross, "malloc", malloc(size))

// strdup's malloc is its own call: the site is one frame further out.
ROW(strdup, "malloc", "");
SITE struct block site_strdup(const char *text)
{
	char *p = strdup(text);
	KEEP(p);
	return made(&row_strdup, p, strlen(text) + 1);
}

// A realloc that succeeds ends the old block.
#define REALLOC_SITE(name, function, call)                                \
	ROW(name, "malloc", function);                                    \
	SITE struct block site_##name(struct block *old, size_t size)     \
	{                                                                 \
		void *p = call;                                           \
		KEEP(p);                                                  \
		if (p || size == 0)                                       \
			gone(old);                                        \
		return made(&row_##name, p, size);                        \
	}

REALLOC_SITE(realloc_grow, "realloc", realloc(old->p, size))
REALLOC_SITE(realloc_shrink, "realloc", realloc(old->p, size))
REALLOC_SITE(realloc_zero, "realloc", realloc(old->p, size))
REALLOC_SITE(realloc_large, "realloc", realloc(old->p, size))
REALLOC_SITE(realloc_fails, "realloc", realloc(old->p, size))
REALLOC_SITE(reallocarray_fails, "reallocarray", reallocarray(old->p, size, 16))

ROW(posix_memalign, "malloc", "posix_memalign");
SITE struct block site_posix_memalign(size_t size)
{
	void *p = NULL;
	int rc = posix_memalign(&p, 64, size);
	KEEP(rc);
	return made(&row_posix_memalign, rc ? NULL : p, size);
}

// The variable holds a live block already, and still does after the failure.
ROW(posix_memalign_fails, "malloc", "posix_memalign");
SITE int site_posix_memalign_fails(struct block *stale, size_t align, size_t size)
{
	void *p = stale->p;
	int rc = posix_memalign(&p, align, size);
	KEEP(rc);
	return rc;
}

static void *first_in_thread(void *out)
{
	*(struct block *)out = site_thread_first(1061);
	return NULL;
}

#define THREADS 8
static int churn_each, keep_each;

// Most blocks die young, some at once, some after a few others; every so many-th stays.
static void *churn(void *arg)
{
	struct block young[13] = { { 0 } };
	int kept = 0;

	(void)arg;
	for (int i = 0; i < churn_each; i++) {
		struct block b = site_churn(32 + i % 97);
		if (kept < keep_each && i % (churn_each / keep_each) == 0) {
			kept++;
			continue;
		}
		drop(&young[i % 13]);
		young[i % 13] = b;
	}
	for (int i = 0; i < 13; i++)
		drop(&young[i]);
	return NULL;
}

static void churn_all(int total)
{
	pthread_t threads[THREADS];

	churn_each = total / THREADS;
	keep_each = churn_each * 3 / 100;
	for (int i = 0; i < THREADS; i++)
		check(pthread_create(&threads[i], NULL, churn, NULL) == 0, "pthread_create");
	for (int i = 0; i < THREADS; i++)
		check(pthread_join(threads[i], NULL) == 0, "pthread_join");
}

// One thread makes, the main thread frees: all but 31 of 10,007.
#define CROSS 10007
static struct block crossing[CROSS];

static void *make_crossing(void *arg)
{
	(void)arg;
	for (int i = 0; i < CROSS; i++)
		crossing[i] = site_cross(1063);
	return NULL;
}

static void plain(void)
{
#define FILL(count, freed, call)                       \
	do {                                           \
		for (int i = 0; i < count; i++) {      \
			blocks[i] = call;              \
			check(!!blocks[i].p, #call);   \
		}                                      \
		drop_first(freed);                     \
	} while (0)
	FILL(23, 7, site_malloc(1009));
	FILL(13, 3, site_malloc_zero(0));
	FILL(3, 1, site_malloc_large(307201));
	FILL(29, 5, site_calloc(1011));
	FILL(17, 2, site_realloc_null(1019));
	FILL(13, 5, site_reallocarray_null(1043));
	FILL(13, 4, site_aligned_alloc(1152));
	FILL(11, 3, site_memalign(1039));
	FILL(7, 2, site_valloc(1049));
	FILL(37, 11, site_posix_memalign(1033));
	FILL(41, 6, site_strdup("sixty-seven bytes with its end, which is the zero at the very end."));
#ifdef __GLIBC__
	// Not freed: a preloaded allocator without a pvalloc leaves it to glibc, and its free does not know the block.
	FILL(5, 0, site_pvalloc(1051));
#endif
	free(NULL);
}

static void failures(void)
{
	for (int i = 0; i < 13; i++) {
		check(!site_malloc_fails(too_much).p, "malloc");
		check(!site_calloc_overflows(too_much).p, "calloc");
		check(!site_reallocarray_overflows(too_much).p, "reallocarray");
		free(NULL);
	}
	for (int i = 0; i < 11; i++) {
		blocks[i] = site_realloc_fails_on(1031);
		check(!site_realloc_fails(&blocks[i], too_much).p, "realloc");
	}
	drop_first(2);
	for (int i = 0; i < 11; i++) {
		blocks[i] = site_reallocarray_fails_on(1069);
		check(!site_reallocarray_fails(&blocks[i], too_much).p, "reallocarray");
	}
	drop_first(3);
	for (int i = 0; i < 11; i++) {
		blocks[i] = site_memalign_fails_on(1087);
		check(site_posix_memalign_fails(&blocks[i], 3, 1091) == EINVAL, "posix_memalign");
		check(site_posix_memalign_fails(&blocks[i], 64, too_much) == ENOMEM, "posix_memalign");
	}
	drop_first(5);
}

static void reallocs(void)
{
	for (int i = 0; i < 19; i++) {
		blocks[i] = site_for_realloc_grow(101);
		blocks[i] = site_realloc_grow(&blocks[i], 1013);
	}
	drop_first(3);
	for (int i = 0; i < 31; i++) {
		blocks[i] = site_for_realloc_shrink(4099);
		blocks[i] = site_realloc_shrink(&blocks[i], 61);
	}
	drop_first(7);
	// NULL means freed in glibc, jemalloc and tcmalloc; musl gives a block of no bytes.
	for (int i = 0; i < 13; i++) {
		blocks[i] = site_for_realloc_zero(1021);
		blocks[i] = site_realloc_zero(&blocks[i], 0);
	}
	drop_first(0);
	// Grown where the allocator uses mremap.
	for (int i = 0; i < 3; i++) {
		blocks[i] = site_for_realloc_large(400009);
		blocks[i] = site_realloc_large(&blocks[i], 800011);
	}
	drop_first(1);
}

#if defined(__GLIBC__) && !defined(STATIC)
// Gone from new programs since glibc 2.26, still there for old ones.
static void cfrees(void)
{
	void (*cfree_function)(void *) = (void (*)(void *))dlsym(RTLD_DEFAULT, "cfree");

	// Another allocator's blocks are not glibc's to free.
	if (!cfree_function && !getenv("LD_PRELOAD") && !mallocx)
		cfree_function = (void (*)(void *))dlvsym(RTLD_DEFAULT, "cfree", "GLIBC_2.2.5");
	if (!cfree_function)
		return;
	for (int i = 0; i < 11; i++) {
		struct block b = site_cfree_made(1093);
		if (i < 4) {
			void *p = b.p;
			gone(&b);
			cfree_function(p);
		}
	}
}
#endif

int main(int argc, char **argv)
{
	int total = argc > 1 ? atoi(argv[1]) : 8000;

	say("ready\n");
	wait_for("go");
	plain();
	failures();
	reallocs();
#if defined(__GLIBC__) && !defined(STATIC)
	cfrees();
#endif
	for (int i = 0; i < 5; i++)
		run_thread(first_in_thread, &blocks[i]);
	drop_first(2);
	run_thread(make_crossing, NULL);
	for (int i = 0; i < CROSS - 31; i++)
		drop(&crossing[i]);
	churn_all(total);
	return finish();
}
