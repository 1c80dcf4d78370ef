// The benchmarks' target: malloc+free pairs at a depth of frames, over a number of call stacks, by several threads or
// processes, beside a number of live blocks. Usage: pairs DEPTH STACKS THREADS
//
// Each line of input is an order, each answer one number:
//   run N     each thread does N pairs; CPU nanoseconds of this process for all of them
//   fork K N  K child processes do N pairs each; CPU nanoseconds of the children
//   fill N    N blocks stay live from here on; N
//   pace R S  R pairs a second for S seconds; pairs done
// CPU time, not wall time: on busy cores the latter measures the neighbours.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define FRAME __attribute__((noinline, noclone)) static

static int depth, stacks, threads;
static long pairs;

FRAME void pair(long n)
{
	for (long i = 0; i < n; i++) {
		void *p = malloc(64);
		__asm__ volatile("" : "+r"(p) : : "memory");
		free(p);
		__asm__ volatile("" : : : "memory");
	}
}

FRAME void left(unsigned path, int more, long n);

FRAME void right(unsigned path, int more, long n)
{
	if (more <= 0)
		pair(n);
	else if (path & 1)
		right(path >> 1, more - 1, n);
	else
		left(path >> 1, more - 1, n);
	__asm__ volatile("");
}

FRAME void left(unsigned path, int more, long n)
{
	if (more <= 0)
		pair(n);
	else if (path & 1)
		right(path >> 1, more - 1, n);
	else
		left(path >> 1, more - 1, n);
	__asm__ volatile("");
}

// With one stack the way down is walked once: what is timed is the pairs. With many it is walked for each pair.
FRAME void *work(void *arg)
{
	(void)arg;
	if (stacks == 1) {
		left(0, depth, pairs);
		return NULL;
	}
	for (long i = 0; i < pairs; i++)
		left(i % stacks, depth, 1);
	return NULL;
}

static long nanoseconds(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000 + t.tv_nsec;
}

static long run(void)
{
	long start = nanoseconds(CLOCK_PROCESS_CPUTIME_ID);
	pthread_t thread[MAX_THREADS];

	for (int i = 1; i < threads; i++)
		if (pthread_create(&thread[i], NULL, work, NULL) != 0)
			_exit(3);
	work(NULL);
	for (int i = 1; i < threads; i++)
		pthread_join(thread[i], NULL);
	return nanoseconds(CLOCK_PROCESS_CPUTIME_ID) - start;
}

static long children_cpu(void)
{
	struct rusage u;

	getrusage(RUSAGE_CHILDREN, &u);
	return (u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000000000 + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) * 1000;
}

static long run_children(int children)
{
	long start = children_cpu();

	for (int i = 0; i < children; i++) {
		pid_t pid = fork();
		if (pid < 0)
			_exit(4);
		if (pid == 0) {
			work(NULL);
			_exit(0);
		}
	}
	while (wait(NULL) > 0)
		;
	return children_cpu() - start;
}

static long pace(long rate, int seconds)
{
	long start = nanoseconds(CLOCK_MONOTONIC), done = 0, slice = rate / 100;

	for (int i = 1; i <= seconds * 100; i++) {
		struct timespec until = { 0 };
		long at = start + i * 10000000L;

		left(0, depth, slice);
		done += slice;
		until.tv_sec = at / 1000000000;
		until.tv_nsec = at % 1000000000;
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
	}
	return done;
}

static long fill(long n)
{
	for (long i = 0; i < n; i++) {
		void *p = malloc(64);
		__asm__ volatile("" : "+r"(p) : : "memory");
	}
	return n;
}

int main(int argc, char **argv)
{
	char line[128];
	long a;
	int b;

	if (argc != 4)
		return 2;
	depth = atoi(argv[1]);
	stacks = atoi(argv[2]);
	threads = atoi(argv[3]);
	if (threads < 1 || threads > MAX_THREADS || stacks < 1)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "run %ld", &pairs) == 1)
			printf("%ld\n", run());
		else if (sscanf(line, "fork %d %ld", &b, &pairs) == 2)
			printf("%ld\n", run_children(b));
		else if (sscanf(line, "fill %ld", &a) == 1)
			printf("%ld\n", fill(a));
		else if (sscanf(line, "pace %ld %d", &a, &b) == 2)
			printf("%ld\n", pace(a, b));
		else
			return 2;
	}
	return 0;
}
