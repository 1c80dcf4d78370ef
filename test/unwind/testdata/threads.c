// More threads than CPUs, each at a depth of its own, all allocating for ever.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

__attribute__((noinline, noclone)) int down(int n)
{
	volatile char local[32];

	local[n & 15] = (char)n;
	if (n > 0)
		return down(n - 1) + local[n & 15];
	for (;;) {
		void *p = malloc(47);

		__asm__ volatile("" ::"r"(p) : "memory");
		free(p);
	}
}

static void *run(void *depth)
{
	down((int)(long)depth);
	return NULL;
}

int main(void)
{
	pthread_t t;

	for (long i = 1; i <= 11; i++)
		if (pthread_create(&t, NULL, run, (void *)(i * 7)))
			return 1;
	puts("ready");
	fflush(stdout);
	pthread_join(t, NULL);
	return 0;
}
