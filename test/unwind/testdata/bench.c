// The benchmark's target: for each line, argv[2] times a probed call argv[1] frames deep; prints nanoseconds of CPU time for all.
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

__attribute__((noinline, noclone)) void probed(int x)
{
	__asm__ volatile("nop" ::"r"(x) : "memory"); // an instruction that the kernel emulates, as allocators begin with
}

__attribute__((noinline, noclone)) int deep(int n, int times)
{
	volatile char local[40];

	local[n & 31] = (char)times;
	if (n > 0)
		return deep(n - 1, times) + local[n & 31];
	for (int i = 0; i < times; i++)
		probed(i);
	return local[0];
}

static long long now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv)
{
	int depth = argc > 2 ? atoi(argv[1]) : 10, times = argc > 2 ? atoi(argv[2]) : 1000;
	char line[16];

	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		long long start = now();

		deep(depth, times);
		printf("%lld\n", now() - start);
		fflush(stdout);
	}
	return 0;
}
