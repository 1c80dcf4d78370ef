// A program whose allocator depends on how it is built.
#include <stddef.h>
#ifdef LOCAL_FREE
// The name says free, but it is this program's own affair.
__attribute__((noinline)) static void free(int *p) { *p = 0; }
int main(int argc, char **argv) {
	(void)argv;
	free(&argc);
	return argc;
}
#elif defined(OWN_MALLOC)
static char arena[1 << 20];
static size_t used;
void *malloc(size_t n) {
	void *p = arena + used;
	used += (n + 15) & ~15ul;
	return p;
}
void free(void *p) { (void)p; }
void *__libc_malloc(size_t n) __attribute__((alias("malloc")));
int main(void) { return malloc(7) == NULL; }
#elif defined(PREFIXED)
#define F(name) __attribute__((noinline, used)) void *name(size_t n) { static char a[64]; return a + n % 64; }
F(_rjem_malloc) F(_rjem_free) F(_rjem_mallocx) F(_rjem_rallocx) F(_rjem_xallocx) F(_rjem_sallocx) F(_rjem_dallocx)
F(_rjem_sdallocx) F(_rjem_nallocx)
int main(void) { return 0; }
#else
#include <stdlib.h>
int main(int argc, char **argv) {
	(void)argv;
	void *volatile p = malloc(argc + 13), *volatile q = calloc(argc, 17);
	p = realloc(p, 4099);
	free(p);
	free(q);
	return 0;
}
#endif
