/* Allocates in a constructor and as the first thing of main. */
#include <stdlib.h>

void *volatile kept[18];

__attribute__((constructor, noinline)) static void in_constructor(void)
{
	for (int i = 0; i < 17; i++)
		kept[i] = malloc(1511);
}

int main(void)
{
	kept[17] = malloc(4001);
	return 7;
}
