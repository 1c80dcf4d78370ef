// Keeps 101 blocks of 53 bytes and frees 3 of them; the rest of its life it waits.
#include <stdio.h>
#include <stdlib.h>

static void *kept[101];

int main(void)
{
	char line[16];

	puts("ready");
	fflush(stdout);
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	for (int i = 0; i < 101; i++)
		kept[i] = malloc(53);
	for (int i = 0; i < 3; i++)
		free(kept[i]);
	puts("did");
	fflush(stdout);
	return fgets(line, sizeof(line), stdin) != NULL;
}
