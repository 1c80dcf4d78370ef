// Calls malloc through code in anonymous memory, for ever. argv[1]: "fp" keeps a frame pointer there, "none" does not.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

// push %rbp; mov %rsp,%rbp; sub $0x20,%rsp; call *%rdi; leave; ret
static const unsigned char fp[] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x20, 0xff, 0xd7, 0xc9, 0xc3};
// push %rbp; xor %ebp,%ebp; sub $0x20,%rsp; call *%rdi; add $0x20,%rsp; pop %rbp; ret
static const unsigned char none[] = {0x55, 0x31, 0xed, 0x48, 0x83, 0xec, 0x20, 0xff, 0xd7, 0x48, 0x83, 0xc4, 0x20, 0x5d, 0xc3};

__attribute__((noinline)) void *make(void)
{
	void *p = malloc(77);

	__asm__ volatile("" ::"r"(p) : "memory");
	return p;
}

__attribute__((noinline)) void *through(void *(*code)(void *(*)(void)))
{
	void *p = code(make);

	__asm__ volatile("" ::"r"(p) : "memory");
	return p;
}

int main(int argc, char **argv)
{
	void *mem = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (mem == MAP_FAILED || argc < 2)
		return 1;
	if (strcmp(argv[1], "fp") == 0)
		memcpy(mem, fp, sizeof(fp));
	else
		memcpy(mem, none, sizeof(none));
	puts("ready");
	fflush(stdout);
	for (;;)
		free(through((void *(*)(void *(*)(void)))mem));
}
