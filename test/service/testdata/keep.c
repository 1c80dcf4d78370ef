/* A library that keeps 31 blocks of 211 bytes at each call. */
#include <stdlib.h>

static void *volatile kept[31];

__attribute__((noinline)) void lib_keep(void)
{
	for (int i = 0; i < 31; i++)
		kept[i] = malloc(211);
}
