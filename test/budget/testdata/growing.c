// Leaks blocks and holds others for a while, line by line:
//   leak N   N blocks are leaked; their bytes
//   hold N   N blocks are held; their bytes
//   drop     all blocks that are held are freed; 0
#include <stdio.h>
#include <stdlib.h>

#define MOST 100000

static void *held[MOST];
static int n_held;

static size_t size_of(int i)
{
	return 16 + (i * 7919) % 3001;
}

__attribute__((noinline)) static long leak(int n)
{
	long sum = 0;

	for (int i = 0; i < n; i++) {
		char *p = malloc(size_of(i));
		__asm__ volatile("" : "+r"(p) : : "memory");
		sum += size_of(i);
	}
	return sum;
}

__attribute__((noinline)) static long hold(int n)
{
	long sum = 0;

	for (int i = 0; i < n && n_held < MOST; i++) {
		held[n_held++] = malloc(size_of(i));
		sum += size_of(i);
	}
	return sum;
}

static long drop(void)
{
	while (n_held > 0)
		free(held[--n_held]);
	return 0;
}

int main(void)
{
	char line[64];
	int n;

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "leak %d", &n) == 1)
			printf("%ld\n", leak(n));
		else if (sscanf(line, "hold %d", &n) == 1)
			printf("%ld\n", hold(n));
		else
			printf("%ld\n", drop());
	}
	return 0;
}
