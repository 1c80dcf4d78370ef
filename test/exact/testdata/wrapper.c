// An allocator that only wraps another, as those that people preload to count, to poison or to log: each block is one
// block, of the size that the program asked for.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

static void *(*real_malloc)(size_t);
static void *(*real_realloc)(void *, size_t);
static void (*real_free)(void *);

__attribute__((constructor)) static void find(void)
{
	real_malloc = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
	real_realloc = (void *(*)(void *, size_t))dlsym(RTLD_NEXT, "realloc");
	real_free = (void (*)(void *))dlsym(RTLD_NEXT, "free");
}

void *malloc(size_t size)
{
	if (!real_malloc)
		find();
	char *p = real_malloc(size + 16);
	if (p)
		p[size] = 1; // no tail call
	return p;
}

void *realloc(void *p, size_t size)
{
	if (!real_realloc)
		find();
	char *q = real_realloc(p, size + 16);
	if (q)
		q[size] = 1;
	return q;
}

void free(void *p)
{
	if (!real_free)
		find();
	real_free(p);
	__asm__ volatile("" : : : "memory");
}
