// Uses jemalloc, which is preloaded: blocks of all sizes from three threads and the main one, a third of them freed, some of
// which wait in the threads' caches. Prints jemalloc's own count and waits.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

int mallctl(const char *, void *, size_t *, void *, size_t) __attribute__((weak));

static char *keep[100003];
static pthread_barrier_t barrier;

static void *thread(void *arg)
{
	char *p[100];

	for (int i = 0; i < 100; i++)
		p[i] = malloc(48);
	for (int i = 0; i < 60; i++)
		free(p[i]);
	pthread_barrier_wait(&barrier);
	for (;;)
		pause();
}

int main(void)
{
	static char out[4096];
	pthread_t t;
	size_t value = 1, length = sizeof value;

	setvbuf(stdout, out, _IOFBF, sizeof out);
	pthread_barrier_init(&barrier, NULL, 4);
	for (int i = 0; i < 3; i++)
		pthread_create(&t, NULL, thread, NULL);
	pthread_barrier_wait(&barrier);
	for (int i = 0; i < 100003; i++) {
		keep[i] = malloc(i % 50 == 0 ? 20 + i % 40000 : 20 + i % 150);
		sprintf(keep[i], "{\"leak\":%d}", i);
	}
	for (int i = 0; i < 100003; i += 3) {
		free(keep[i]);
		keep[i] = NULL;
	}
	for (int i = 0; i < 101; i++)
		*(volatile char *)malloc(8) = 1;
	if (mallctl) {
		mallctl("epoch", NULL, NULL, &value, length);
		mallctl("stats.allocated", &value, &length, NULL, 0);
		printf("allocated %zu\n", value);
	}
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
