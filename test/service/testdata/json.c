/* Keeps 101 JSON documents on "go", and 53 more on each further line. */
#include <stdio.h>
#include <stdlib.h>

void *volatile kept[1000];
static int n;

__attribute__((noinline)) void keep_document(int i)
{
	char *p = malloc(211);

	snprintf(p, 211, "{\"user\":%d,\"secret\":\"tango%dbravo\",\"roles\":[\"a\",\"b\"],\"note\":\"some text to fill\"}", i, i * 7919);
	kept[n++] = p;
}

int main(void)
{
	char line[64];

	setvbuf(stdout, NULL, _IONBF, 0);
	puts("ready");
	for (int round = 0; fgets(line, sizeof(line), stdin); round++) {
		for (int i = 0; i < (round ? 53 : 101); i++)
			keep_document(i);
		puts("done");
	}
	return 0;
}
