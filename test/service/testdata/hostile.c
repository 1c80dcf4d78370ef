/*
 * hostile MODE [ARG...]: a process that means no good to whoever looks at it. It makes 23 blocks of 307 bytes on "go".
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void *volatile kept[64];

__attribute__((noinline)) void keep_blocks(void)
{
	for (int i = 0; i < 23; i++)
		kept[i] = malloc(307);
}

/* The library's own function of the name lib_keep, if there is a library. */
static void (*lib_keep)(void);

static int load(const char *path)
{
	void *lib = dlopen(path, RTLD_NOW);

	if (!lib) {
		fprintf(stderr, "%s\n", dlerror());
		return -1;
	}
	lib_keep = (void (*)(void))dlsym(lib, "lib_keep");
	return 0;
}

static void rename_self(char **argv)
{
	char *end = argv[0];

	for (int i = 0; argv[i]; i++)
		end = argv[i] + strlen(argv[i]);
	prctl(PR_SET_NAME, "\x1b[2J%n\n\"\r<b>\x9b");
	memset(argv[0], 0x1b, end - argv[0]);
}

/* Every second page has other rights, so that each is a mapping of its own. */
static int map_many(int n)
{
	long page = sysconf(_SC_PAGESIZE);
	char *p = mmap(NULL, n * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return -1;
	for (int i = 0; i < n; i += 2)
		if (mprotect(p + i * page, page, PROT_READ | PROT_WRITE))
			return -1;
	return 0;
}

/* Maps a file as if it were code; what is in it is the test's choice. */
static int map_code(const char *path)
{
	int fd = open(path, O_RDONLY);
	void *p = mmap(NULL, 1 << 16, PROT_READ | PROT_EXEC, MAP_PRIVATE, fd, 0);

	return fd < 0 || p == MAP_FAILED ? -1 : 0;
}

/* Four at a time come and go, each with mappings that do, until the parent ends. */
static void storm(void)
{
	for (int i = 0; i < 4; i++) {
		if (fork())
			continue;
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		for (;;) {
			pid_t pid = fork();

			if (!pid) {
				void *p = mmap(NULL, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

				free(malloc(101));
				munmap(p, 1 << 20);
				_exit(0);
			}
			waitpid(pid, NULL, 0);
		}
	}
}

int main(int argc, char **argv)
{
	char line[16], mode[16] = "", arg[4096] = "";

	setvbuf(stdout, NULL, _IONBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
	if (argc < 2)
		return 2;
	strncat(mode, argv[1], sizeof(mode) - 1);
	if (argc > 2)
		strncat(arg, argv[2], sizeof(arg) - 1);
	if (!strcmp(mode, "names"))
		rename_self(argv);
	if (!strcmp(mode, "many") && map_many(atoi(arg)))
		return 3;
	for (int i = 2; !strcmp(mode, "code") && i < argc; i++)
		if (map_code(argv[i]))
			return 3;
	if (!strcmp(mode, "storm"))
		storm();
	if ((!strcmp(mode, "names") || !strcmp(mode, "lib")) && load(arg))
		return 3;
	puts("ready");
	while (fgets(line, sizeof(line), stdin)) {
		keep_blocks();
		if (lib_keep)
			lib_keep();
		puts("done");
	}
	return 0;
}
