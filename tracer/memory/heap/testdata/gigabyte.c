// Fills the heap with blocks of 40 to 200 bytes, 120 on average, until it has so many MiB: JSON documents, structures
// with pointers, text, and numbers, turn by turn. Prints "ready" and waits to be killed.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	size_t want = (size_t)atol(argc > 1 ? argv[1] : "64") << 20, got = 0;
	void *last = NULL;
	char line[256];

	for (uint32_t i = 0; got < want; i++) {
		size_t size = 40 + i * 7919u % 161;
		char *p = malloc(size);

		got += (size + 8 + 15) & ~15ul;
		switch (i % 4) {
		case 0:
			snprintf(line, sizeof line, "{\"uid\":%u,\"token\":\"%08x\",\"payload\":\"%.*s\"}", i, i * 2654435761u, (int)(size > 80 ? size - 80 : 0),
				"the quick brown fox jumps over the lazy dog the quick brown fox jumps over the lazy dog the quick brown fox jumps");
			snprintf(p, size, "%s", line);
			break;
		case 1:
			memset(p, 0, size);
			((void **)p)[0] = last;
			((void **)p)[1] = p;
			((uint64_t *)p)[2] = i % 1000;
			((void **)p)[3] = last;
			break;
		case 2:
			for (size_t n = 0; n + 1 < size; n++)
				p[n] = "some words of a text that is neither long nor short, "[n % 53];
			p[size - 1] = 0;
			break;
		default:
			for (size_t n = 0; n + 8 <= size; n += 8)
				*(uint64_t *)(p + n) = i * 0x9e3779b97f4a7c15 ^ n << 40;
		}
		last = p;
	}
	puts("ready");
	fflush(stdout);
	for (;;)
		pause();
}
