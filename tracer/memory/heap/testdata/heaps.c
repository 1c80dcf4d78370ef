// Makes heaps of known content, says what glibc counts in them, prints "ready" and waits to be killed.
//   heaps small N     N blocks of 24 to 200 bytes, nothing freed
//   heaps fragmented  200,003 blocks, every third freed, some reallocated
//   heaps cache       every size of the thread cache filled, and fastbins
//   heaps arenas N    N threads, each with an arena of its own that is in use
//   heaps bigarena    one thread fills several heaps of its arena
//   heaps mmapped     blocks with mappings of their own, aligned ones too, some freed
//   heaps foreign     somebody else takes memory with brk in the middle
//   heaps nobrk       brk fails after the first megabytes
//   heaps damaged     a chunk's size is overwritten in the middle of each of two arenas
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static pthread_barrier_t barrier;
static void *keep[1 << 20];
static unsigned seed = 12345;

static unsigned rnd(unsigned n)
{
	seed = seed * 1103515245 + 12345;
	return (seed >> 8) % n;
}

static void *thread(void *arg)
{
	long n = (long)arg;
	void *last[64] = {0};

	for (int i = 0; i < 1009 + n; i++) {
		void *p = malloc(16 + (i * 37 + n) % 3000);
		if (i % 5 == 0) {
			free(last[i % 64]);
			last[i % 64] = p;
		}
	}
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	return NULL;
}

static void arenas(int n)
{
	pthread_t t;

	mallopt(M_ARENA_MAX, n + 1);
	pthread_barrier_init(&barrier, NULL, n + 1);
	for (long i = 0; i < n; i++)
		pthread_create(&t, NULL, thread, (void *)i);
	pthread_barrier_wait(&barrier);
}

static void *fill(void *arg)
{
	void *last = NULL;

	for (int i = 0; i < 20011; i++) {
		void *p = malloc(1000 + (i * 31) % 18000);
		if (i % 3 == 0)
			free(last);
		last = p;
	}
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	return NULL;
}

static void bigarena(void)
{
	pthread_t t;

	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&t, NULL, fill, NULL);
	pthread_barrier_wait(&barrier);
}

static void small(long n)
{
	for (long i = 0; i < n; i++) {
		char *p = malloc(24 + rnd(177));
		p[0] = 'x';
	}
}

static void fragmented(void)
{
	const int n = 200003;

	for (int i = 0; i < n; i++)
		keep[i] = malloc(1 + rnd(i % 100 ? 300 : 20000));
	for (int i = 0; i < n; i += 3) {
		free(keep[i]);
		keep[i] = NULL;
	}
	for (int i = 1; i < n; i += 7)
		if (keep[i])
			keep[i] = realloc(keep[i], 1 + rnd(500));
}

static void cache(void)
{
	for (int size = 24; size <= 1032; size += 16) {
		void *p[20];
		for (int i = 0; i < 20; i++)
			p[i] = malloc(size);
		malloc(24);
		for (int i = 0; i < 20; i++)
			free(p[i]);
	}
}

static void mmapped(void)
{
	for (int i = 0; i < 101; i++)
		keep[i] = malloc(200000 + 10007 * i);
	keep[200] = aligned_alloc(64, 300032);
	keep[201] = aligned_alloc(4096, 409600);
	keep[202] = aligned_alloc(1 << 20, 3 << 20);
	mmap(NULL, 1234567, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (int i = 0; i < 101; i += 4)
		free(keep[i]);
}

static void foreign(void)
{
	small(5003);
	sbrk(100000);
	small(7001);
	mallopt(M_MMAP_THRESHOLD, 1 << 30);
	for (int i = 0; i < 10; i++)
		malloc(150000);
}

static void nobrk(void)
{
	char *end = sbrk(0);

	small(3001);
	end = sbrk(0);
	mmap(end, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	small(50021);
}

static void *damage(void *arg)
{
	char *p[2003];

	for (int i = 0; i < 2003; i++)
		p[i] = malloc(100);
	memset(p[1000], 'A', 136);
	if (arg == NULL)
		return NULL;
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	return NULL;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	long n = argc > 2 ? atol(argv[2]) : 0;
	static char out[1 << 16];
	pthread_t t;

	setvbuf(stdout, out, _IOFBF, sizeof out);
	if (!strcmp(mode, "small"))
		small(n);
	else if (!strcmp(mode, "fragmented"))
		fragmented();
	else if (!strcmp(mode, "cache"))
		cache();
	else if (!strcmp(mode, "arenas"))
		arenas(n);
	else if (!strcmp(mode, "bigarena"))
		bigarena();
	else if (!strcmp(mode, "mmapped"))
		mmapped();
	else if (!strcmp(mode, "foreign"))
		foreign();
	else if (!strcmp(mode, "nobrk"))
		nobrk();
	else if (!strcmp(mode, "damaged")) {
		pthread_barrier_init(&barrier, NULL, 2);
		pthread_create(&t, NULL, damage, "");
		pthread_barrier_wait(&barrier);
		damage(NULL);
	}
#if __GLIBC_PREREQ(2, 33)
	struct mallinfo2 m = mallinfo2();
#else
	struct mallinfo m = mallinfo();
#endif
	// mallinfo2 adds up all arenas' bytes but only the main one's counts of blocks.
	printf("arena %zu uordblks %zu fordblks %zu smblks %zu fsmblks %zu hblks %zu hblkhd %zu\nready\n", (size_t)m.arena,
	       (size_t)m.uordblks, (size_t)m.fordblks, (size_t)m.smblks, (size_t)m.fsmblks, (size_t)m.hblks, (size_t)m.hblkhd);
	fflush(stdout);
	for (;;)
		pause();
}
