/* libleak.so: keeps every block that it makes. */
#include <stdlib.h>

static void *volatile last;

__attribute__((noinline)) void leak_blocks(int n, size_t size)
{
	for (int i = 0; i < n; i++) {
		void **block = malloc(size);

		if (!block)
			abort();
		*block = last;
		last = block;
	}
}
