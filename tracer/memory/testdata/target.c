// A process whose memory the tests know: it prints "name value" lines and "ready", and ends when its standard input does.
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096ul
static char initialised[3 * PAGE] = "variable with a value";
static char zeroed[5 * PAGE];
static pthread_barrier_t barrier;

static void show(const char *name, const void *at) { printf("%s %lx\n", name, (unsigned long)at); }

// Page i of a region holds the words (seed + i) * 2654435761 * (word + 1), never zero.
static void fill(void *at, size_t pages, uint64_t seed)
{
	for (size_t i = 0; i < pages; i++) {
		uint64_t *page = (uint64_t *)((char *)at + i * PAGE);
		for (size_t w = 0; w < PAGE / 8; w++)
			page[w] = (seed + i) * 2654435761u * (w + 1);
	}
}

static void *map(size_t pages)
{
	return mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static __attribute__((noinline)) void wait_in_worker(const char *text)
{
	char marker[64];
	snprintf(marker, sizeof marker, "stack of %s", text);
	show(text, marker);
	pthread_barrier_wait(&barrier);
	for (;;)
		pause();
}

static void *worker(void *arg)
{
	void *block = malloc(40000); // from this thread's own arena
	memset(block, 'w', 40000);
	if (strcmp(arg, "thread1") == 0)
		show("arena", block);
	wait_in_worker(arg);
	return block;
}

int main(int argc, char **argv)
{
	size_t heap = argc > 1 ? strtoul(argv[1], NULL, 0) : 2000000;
	setvbuf(stdout, NULL, _IOLBF, 0);
	mallopt(M_MMAP_THRESHOLD, 128 << 10);
	show("data", initialised);
	memset(zeroed + PAGE, 'b', PAGE);
	show("bss", zeroed);

	for (size_t done = 0; done < heap; done += 1000)
		fill(malloc(PAGE + 8), 1, done);
	show("heap", malloc(100));

	char *mapped = map(64); // pages 0-2 touched, 3-9 zeros written, 10 filled, the rest never touched
	mprotect(mapped, PAGE, PROT_READ | PROT_WRITE);
	fill(mapped, 3, 7);
	memset(mapped + 3 * PAGE, 0, 7 * PAGE);
	fill(mapped + 10 * PAGE, 1, 11);
	show("mapped", mapped);

	char *hidden = map(2); // filled, then without any access
	fill(hidden, 2, 13);
	mprotect(hidden, 2 * PAGE, PROT_NONE);
	show("hidden", hidden);

	char *secret = map(3);
	fill(secret, 3, 17);
	madvise(secret, 3 * PAGE, MADV_DONTDUMP);
	show("secret", secret);

	int fd = memfd_create("shared memory", 0);
	if (ftruncate(fd, 8 * PAGE))
		return 1;
	char *shared = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	fill(shared + PAGE, 2, 19); // page 0 and 3-7 are holes of the file
	show("shared", shared);

	if (argc > 2) {
		FILE *f = fopen(argv[2], "r");
		show("file", mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fileno(f), 0));
	}
	pthread_barrier_init(&barrier, NULL, 3);
	pthread_t threads[2];
	pthread_create(&threads[0], NULL, worker, "thread1");
	pthread_create(&threads[1], NULL, worker, "thread2");
	pthread_barrier_wait(&barrier);
	puts("ready");
	char c; // no stdio: its buffer would be touched after "ready"
	while (read(0, &c, 1) > 0)
		;
	return 0;
}
