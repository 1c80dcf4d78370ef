// What compiled Lua calls.
#include <stdlib.h>

__attribute__((noinline)) void *lua_made(size_t n)
{
	void *p = malloc(n);

	__asm__ volatile("" ::"r"(p) : "memory");
	free(p);
	return p;
}
