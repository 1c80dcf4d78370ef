// A child allocates once a line: argv[1] is "fork" or "vfork". It says its number first.
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

__attribute__((noinline)) void child(void)
{
	char text[32], c;
	int n = snprintf(text, sizeof(text), "%d\n", getpid());

	if (write(1, text, n) != n)
		_exit(1);
	while (read(0, &c, 1) == 1) {
		void *p = malloc(55);

		__asm__ volatile("" ::"r"(p) : "memory");
		free(p);
	}
	_exit(0);
}

__attribute__((noinline)) int with_vfork(void)
{
	int pid = vfork();

	if (pid == 0)
		child();
	return pid;
}

int main(int argc, char **argv)
{
	puts("ready");
	fflush(stdout);
	if (argc > 1 && !strcmp(argv[1], "vfork"))
		return with_vfork() < 0;
	if (fork() == 0)
		child();
	return wait(NULL) < 0;
}
