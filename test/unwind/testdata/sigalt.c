// A signal handler on an alternate stack that allocates, for ever.
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

__attribute__((noinline)) void *make(size_t n)
{
	void *p = malloc(n);

	__asm__ volatile("" ::"r"(p) : "memory");
	return p;
}

static void on_signal(int sig)
{
	free(make(100 + sig));
}

__attribute__((noinline)) int outer(int n)
{
	if (n > 0)
		return outer(n - 1) + 1;
	raise(SIGUSR1);
	return getpid() & 1;
}

int main(void)
{
	stack_t alt = {.ss_size = 1 << 16, .ss_sp = malloc(1 << 16)};
	struct sigaction act = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};

	sigaltstack(&alt, NULL);
	sigaction(SIGUSR1, &act, NULL);
	puts("ready");
	fflush(stdout);
	for (volatile int sum = 0;;)
		sum += outer(11);
}
