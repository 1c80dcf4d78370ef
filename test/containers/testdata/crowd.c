/*
 * crowd DIR LEDGER WORKERS: keeps WORKERS processes and is told through the pipes DIR/in and DIR/out. "work" has each
 * worker make its blocks; "fork N MICROSECONDS" has N children born at that distance, each of which makes three blocks,
 * frees one and ends. LEDGER counts, in memory that all share, what was done: workers, children.
 */
#include <fcntl.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct ledger {
	unsigned workers, children, work;
};

static struct ledger *ledger;
static void *volatile kept[16];
static int out;

__attribute__((noinline)) static void worker_blocks(void)
{
	for (int i = 0; i < 7; i++)
		kept[i] = malloc(2003);
}

__attribute__((noinline)) static void child_blocks(void)
{
	for (int i = 0; i < 3; i++)
		kept[i] = malloc(1009);
	free(kept[0]);
}

static void worker(void)
{
	while (!__atomic_load_n(&ledger->work, __ATOMIC_ACQUIRE))
		syscall(SYS_futex, &ledger->work, FUTEX_WAIT, 0, NULL, NULL, 0);
	worker_blocks();
	__atomic_add_fetch(&ledger->workers, 1, __ATOMIC_ACQ_REL);
	for (;;)
		pause();
}

static void births(int n, long microseconds)
{
	struct timespec distance = {microseconds / 1000000, microseconds % 1000000 * 1000};

	for (int i = 0; i < n; i++) {
		pid_t pid = fork();

		if (pid == 0) {
			child_blocks();
			__atomic_add_fetch(&ledger->children, 1, __ATOMIC_ACQ_REL);
			_exit(0);
		}
		if (pid < 0)
			_exit(9);
		nanosleep(&distance, NULL);
	}
}

static int say(const char *line)
{
	return write(out, line, strlen(line)) == (ssize_t)strlen(line) ? 0 : 1;
}

static int read_line(int in, char *line, int size)
{
	for (int n = 0; n < size - 1; n++) {
		if (read(in, line + n, 1) != 1)
			return 0;
		if (line[n] == '\n') {
			line[n] = 0;
			return 1;
		}
	}
	return 0;
}

int main(int argc, char **argv)
{
	char line[64], *rest;
	int in, file;

	if (argc < 4 || (file = open(argv[2], O_RDWR)) < 0 || chdir(argv[1]))
		return 2;
	ledger = mmap(NULL, sizeof(*ledger), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (ledger == MAP_FAILED)
		return 3;
	signal(SIGCHLD, SIG_IGN); /* nobody waits for the children */
	for (int i = atoi(argv[3]); i > 0; i--) {
		pid_t pid = fork();

		if (pid == 0)
			worker();
		if (pid < 0)
			return 4;
	}
	in = open("in", O_RDONLY);
	out = open("out", O_WRONLY);
	if (in < 0 || out < 0 || say("ready\n"))
		return 5;
	while (read_line(in, line, sizeof(line))) {
		if (!strcmp(line, "work")) {
			__atomic_store_n(&ledger->work, 1, __ATOMIC_RELEASE);
			syscall(SYS_futex, &ledger->work, FUTEX_WAKE, 1 << 30, NULL, NULL, 0);
		}
		if (!strncmp(line, "fork ", 5)) {
			int n = strtol(line + 5, &rest, 10);

			births(n, strtol(rest, NULL, 10));
		}
		if (say("done\n"))
			return 6;
	}
	return 0;
}
