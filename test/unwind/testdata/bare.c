// A library built without unwind tables; BARE_TABLES builds the same with them.
#include <stdlib.h>
#include <string.h>

__attribute__((noinline)) void *bare_make(size_t n)
{
	char local[64];
	void *p;

	memset(local, (int)n, sizeof(local));
	p = malloc(n + (size_t)local[3]);
	__asm__ volatile("" ::"r"(p), "r"(local) : "memory");
	return p;
}
