// Loaded by life.c while it is traced.
#include <stdlib.h>

void plugin_keep(void)
{
	for (int i = 0; i < 23; i++) {
		void *p = malloc(1103);
		__asm__ volatile("" : "+r"(p));
	}
}
