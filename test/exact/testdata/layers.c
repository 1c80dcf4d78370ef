// Blocks of a program, and, with an argument, of a plugin that it loads with RTLD_DEEPBIND: the plugin calls the malloc
// of its own libraries, not the program's.
#include "target.h"
#include <dlfcn.h>

PLAIN_SITE(kept, "malloc", malloc(size))
PLAIN_SITE(freed, "malloc", malloc(size))

ROW(grown, "malloc", "realloc");
SITE struct block site_grown(struct block *old, size_t size)
{
	void *p = realloc(old->p, size);
	KEEP(p);
	gone(old);
	return made(&row_grown, p, size);
}

int main(int argc, char **argv)
{
	void (*keep)(void) = NULL;

	if (argc > 1) {
		void *plugin = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);

		check(plugin != NULL, "dlopen");
		keep = (void (*)(void))dlsym(plugin, "plugin_keep");
		check(keep != NULL, "dlsym");
	}
	free(malloc(1));
	say("ready\n");
	wait_for("go");
	for (int i = 0; i < 23; i++) {
		struct block b = site_freed(307);

		drop(&b);
		b = site_kept(101);
		if (i < 7)
			site_grown(&b, 5003);
	}
	if (keep)
		keep();
	return finish();
}
