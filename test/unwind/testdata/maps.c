// Large blocks, which the C library gets and gives back with mmap and munmap, for ever.
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

__attribute__((noinline)) void *big(int n)
{
	char *p = malloc((size_t)n << 20);

	if (p)
		memset(p, n, 4096);
	return p;
}

int main(void)
{
	mallopt(M_MMAP_THRESHOLD, 1 << 16); // or the threshold follows the first block that is freed
	puts("ready");
	fflush(stdout);
	for (;;)
		free(big(3));
}
