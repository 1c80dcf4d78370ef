/* maker N SIZE: makes N blocks of SIZE bytes on "go". */
#include <stdio.h>
#include <stdlib.h>

void *volatile kept[1000];

__attribute__((noinline)) void make_blocks(int n, size_t size)
{
	for (int i = 0; i < n; i++)
		kept[i] = malloc(size);
}

int main(int argc, char **argv)
{
	char line[64];

	if (argc < 3)
		return 2;
	setvbuf(stdout, NULL, _IONBF, 0);
	puts("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	make_blocks(atoi(argv[1]), atol(argv[2]));
	puts("done");
	return !fgets(line, sizeof(line), stdin);
}
