/* Allocates known numbers of known sizes in named functions, after the file in argv[1] exists if one is given. */
#include <stdlib.h>
#include <unistd.h>

static void *volatile keep[2048];

__attribute__((noinline)) void leak_small(void)
{
	for (int i = 0; i < 1009; i++)
		keep[i] = malloc(37);
}

__attribute__((noinline)) void leak_large(void)
{
	keep[2000] = calloc(3, 1000003);
}

__attribute__((noinline)) void churn(void)
{
	for (int i = 0; i < 503; i++) {
		keep[2001] = malloc(101);
		free((void *)keep[2001]);
	}
}

__attribute__((noinline)) void resized(void)
{
	keep[2002] = malloc(11);
	keep[2002] = realloc((void *)keep[2002], 4099);
}

int main(int argc, char **argv)
{
	while (argc > 1 && access(argv[1], F_OK))
		usleep(10000);
	leak_small();
	leak_large();
	churn();
	resized();
	return 17;
}
