/* grower [N [LEDGER]]: grows on "go", by N blocks or, with 0, until somebody stops it. The ledger outlives it. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

void *volatile last;
static volatile unsigned long own, *made = &own;

__attribute__((noinline)) void grow(void)
{
	char *p = malloc(10007);

	*made += 10007;
	snprintf(p, 10007, "{\"id\":%lu,\"state\":\"kept\",\"data\":\"", *made);
	memset(p + strlen(p), 'x', 10007 - strlen(p) - 2);
	memcpy(p + 10005, "\"}", 2);
	last = p;
}

static int open_ledger(const char *path)
{
	int fd = open(path, O_RDWR | O_CREAT, 0600);

	if (fd < 0 || ftruncate(fd, sizeof(*made)))
		return -1;
	made = mmap(NULL, sizeof(*made), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	return made == MAP_FAILED ? -1 : 0;
}

int main(int argc, char **argv)
{
	int most = argc > 1 ? atoi(argv[1]) : 0;
	char line[64];

	setvbuf(stdout, NULL, _IONBF, 0);
	if (argc > 2 && open_ledger(argv[2]))
		return 2;
	puts("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	for (int i = 0; !most || i < most; i++) {
		grow();
		if (i % 100 == 0)
			usleep(5000);
	}
	puts("done");
	return !fgets(line, sizeof(line), stdin);
}
