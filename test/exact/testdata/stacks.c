// 16,384 call stacks (argv: how many, of which depth), one block each: the way through left and right spells its bits.
#include "target.h"

ROW(stacks, "malloc", "malloc");
SITE void site_stacks(void)
{
	void *p = malloc(1009);
	KEEP(p);
	made(&row_stacks, p, 1009);
}

__attribute__((noinline, noclone)) static void left(unsigned path, int depth);

__attribute__((noinline, noclone)) static void right(unsigned path, int depth)
{
	if (depth == 0)
		site_stacks();
	else if (path & 1)
		right(path >> 1, depth - 1);
	else
		left(path >> 1, depth - 1);
	__asm__ volatile("");
}

static void left(unsigned path, int depth)
{
	if (depth == 0)
		site_stacks();
	else if (path & 1)
		right(path >> 1, depth - 1);
	else
		left(path >> 1, depth - 1);
	__asm__ volatile("");
}

int main(int argc, char **argv)
{
	unsigned paths = argc > 1 ? atoi(argv[1]) : 16384;
	int depth = argc > 2 ? atoi(argv[2]) : 14;

	say("ready\n");
	wait_for("go");
	for (unsigned path = 0; path < paths; path++)
		left(path, depth);
	return finish();
}
