// A process's life: argv[1] is what happens after "go". Blocks have fixed counts and sizes, the test knows them.
#include "target.h"
#include <dlfcn.h>
#include <sys/wait.h>

#define SIMPLE_SITE(name)                                   \
	ROW(name, "malloc", "malloc");                      \
	SITE struct block site_##name(size_t size)          \
	{                                                   \
		void *p = malloc(size);                     \
		KEEP(p);                                    \
		return made(&row_##name, p, size);          \
	}

SIMPLE_SITE(before)
SIMPLE_SITE(parent)
SIMPLE_SITE(child)
SIMPLE_SITE(after)

ROW(realloc_old, "malloc", "realloc");
SITE void *site_realloc_old(void *old, size_t size)
{
	void *p = realloc(old, size);
	KEEP(p);
	return p;
}

static struct block blocks[64];

// The child frees 5 of its parent's 17 blocks, resizes 3, and keeps 11 of its own 13.
static void forks(void)
{
	int up[2], down[2];
	char c;
	pid_t pid;

	for (int i = 0; i < 17; i++)
		blocks[i] = site_parent(1009);
	check(pipe(up) == 0 && pipe(down) == 0, "pipe");
	pid = fork();
	check(pid >= 0, "fork");
	if (pid == 0) {
		close(down[1]);
		for (int i = 0; i < 5; i++)
			free(blocks[i].p);
		for (int i = 5; i < 8; i++)
			site_realloc_old(blocks[i].p, 5003);
		for (int i = 0; i < 13; i++) {
			struct block b = site_child(1013);
			if (i < 2)
				drop(&b);
		}
		check(write(up[1], "x", 1) == 1, "write");
		if (read(down[0], &c, 1) == 0) // until the parent ends
			_exit(0);
		_exit(1);
	}
	close(down[0]);
	check(read(up[0], &c, 1) == 1, "read");
	say("child %d\n", pid);
	for (int i = 0; i < 7; i++)
		site_after(1019);
	drop(&blocks[0]);
}

static void loads(const char *path)
{
	void *lib = dlopen(path, RTLD_NOW);
	void (*keep)(void);

	check(lib != NULL, "dlopen");
	keep = (void (*)(void))dlsym(lib, "plugin_keep");
	check(keep != NULL, "dlsym");
	keep();
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (strcmp(what, "at-once") == 0) { // for tools that start the target: every block counts
		for (int i = 0; i < 29; i++)
			site_after(1021);
		return 0;
	}
	for (int i = 0; i < 31; i++) // before the attach: in nobody's books
		blocks[i].p = malloc(1049);
	if (strcmp(what, "after-exec") == 0) {
		for (int i = 0; i < 19; i++)
			site_after(1031);
		return finish();
	}
	say("ready\n");
	wait_for("go");
	for (int i = 0; i < 13; i++)
		site_before(1033);
	if (strcmp(what, "fork") == 0) {
		forks();
	} else if (strcmp(what, "exec") == 0) {
		execl("/proc/self/exe", argv[0], "after-exec", NULL);
		die("exec");
	} else if (strcmp(what, "load") == 0) {
		loads(argv[2]);
	} else if (strcmp(what, "killed") == 0) {
		raise(9);
	} else if (strcmp(what, "exit") == 0) {
		return 0;
	} else if (strcmp(what, "old") == 0) { // blocks from before the attach
		for (int i = 0; i < 5; i++)
			free(blocks[i].p);
		for (int i = 5; i < 12; i++)
			blocks[i].p = site_realloc_old(blocks[i].p, 5003);
		for (int i = 5; i < 8; i++)
			free(blocks[i].p);
	} else if (strcmp(what, "many") == 0) { // more blocks than a small live map holds
		for (int i = 0; i < 5003; i++)
			site_after(1051);
		return 0;
	}
	return finish();
}
