/* Grows on "go" until somebody stops it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void *volatile last;

__attribute__((noinline)) void grow(void)
{
	char *p = malloc(10007);

	memset(p, 'x', 10007);
	last = p;
}

int main(void)
{
	char line[64];

	setvbuf(stdout, NULL, _IONBF, 0);
	puts("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	for (int i = 0;; i++) {
		grow();
		if (i % 100 == 0)
			usleep(5000);
	}
}
