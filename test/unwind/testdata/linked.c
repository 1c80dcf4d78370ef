// A coroutine with a successor (uc_link): what follows its first function on the stack is no return address. For ever.
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

static ucontext_t back, there;

__attribute__((noinline)) void work(void)
{
	void *p = malloc(31);

	__asm__ volatile("" ::"r"(p) : "memory");
	free(p);
}

int main(void)
{
	static char stack[1 << 17];

	puts("ready");
	fflush(stdout);
	for (;;) {
		getcontext(&there);
		there.uc_stack.ss_sp = stack;
		there.uc_stack.ss_size = sizeof(stack);
		there.uc_link = &back;
		makecontext(&there, work, 0);
		swapcontext(&back, &there);
	}
}
