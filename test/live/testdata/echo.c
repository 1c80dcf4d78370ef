// Says ready, then allocates as many blocks of 41 bytes as each line asks for.
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
	int n;

	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	while (scanf("%d", &n) == 1) {
		for (int i = 0; i < n; i++)
			*(volatile char *)malloc(41) = 1;
		printf("did %d\n", n);
	}
	return 7;
}
