// A target that waits: it prints a line when it is ready and ends when its standard input does. With -DPATCH it has
// overwritten the entry of pvalloc in its own memory, as tools do that hook functions.
#define _GNU_SOURCE
#include <malloc.h>
#include <stdio.h>
#include <string.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int main(void) {
#ifdef PATCH
	unsigned char *entry = (unsigned char *)pvalloc;
	unsigned char *page = (unsigned char *)((unsigned long)entry & ~4095ul);
	if (mprotect(page, 8192, PROT_READ | PROT_WRITE | PROT_EXEC))
		return 1;
	memcpy(entry, "\xe9\x00\x00\x00\x00", 5);
#endif
	void *volatile block = malloc(17); // volatile: or the compiler leaves the pair out
	free(block);
	puts("ready");
	fflush(stdout);
	char c;
	return read(0, &c, 1) < 0;
}
