// Calls one allocator function after another on command: it reads a function's name, calls it 23 times, and answers with
// the sum of the argument that a tracer reads (the size, or the block for free). It speaks by system calls alone, since
// stdio would allocate.
#define _GNU_SOURCE
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ROUNDS = 23, SIZE = 1009, LARGE = 300007 };
static void *blocks[ROUNDS];
static void *volatile sink;

static uint64_t call(const char *name, int i)
{
	size_t size = i == 7 ? LARGE : SIZE + i; // one of them above mmap's threshold
	void *p = NULL;
	if (!strcmp(name, "free")) {
		free(blocks[i]);
		return (uintptr_t)blocks[i];
	}
	if (!strcmp(name, "malloc"))
		sink = malloc(size);
	else if (!strcmp(name, "calloc"))
		sink = calloc(3, size);
	else if (!strcmp(name, "realloc"))
		sink = realloc(NULL, size);
	else if (!strcmp(name, "memalign"))
		sink = memalign(64, size);
	else if (!strcmp(name, "aligned_alloc"))
		sink = aligned_alloc(64, size = 64 * (size / 64));
	else if (!strcmp(name, "posix_memalign"))
		sink = posix_memalign(&p, 64, size) ? NULL : p;
	else
		_exit(3);
	return size;
}

int main(void)
{
	char name[64], answer[32];
	ssize_t n;
	for (int i = 0; i < ROUNDS; i++)
		blocks[i] = malloc(SIZE);
	if (write(1, "ready\n", 6) != 6)
		return 1;
	while ((n = read(0, name, sizeof(name) - 1)) > 0) {
		uint64_t sum = 0;
		name[n - 1] = 0;
		for (int i = 0; i < ROUNDS; i++)
			sum += call(name, i);
		for (n = 0; n < 16; n++)
			answer[n] = "0123456789abcdef"[sum >> (60 - 4 * n) & 15];
		answer[16] = '\n';
		if (write(1, answer, 17) != 17)
			return 1;
	}
	return 0;
}
