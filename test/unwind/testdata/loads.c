// Loads the library argv[1] when told so by a line, then allocates through it, once a line.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv)
{
	void *(*make)(size_t) = NULL;
	char line[16];

	if (argc < 2)
		return 2;
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!make) {
			void *lib = dlopen(argv[1], RTLD_NOW);

			make = lib ? (void *(*)(size_t))dlsym(lib, "bare_make") : NULL;
			if (!make) {
				fprintf(stderr, "%s\n", dlerror());
				return 1;
			}
			puts("loaded");
			fflush(stdout);
			if (!fgets(line, sizeof(line), stdin))
				return 0;
		}
		free(make(100));
	}
	return 0;
}
