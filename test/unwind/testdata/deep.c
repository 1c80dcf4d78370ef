// Recursion without frame pointers, as deep as argv[1] says; allocates at the bottom, for ever.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct node {
	struct node *left, *right;
	char name[24];
};

__attribute__((noinline, noclone)) struct node *grow(int depth, unsigned seed)
{
	char local[48];
	struct node *n = NULL;

	snprintf(local, sizeof(local), "%u/%d", seed, depth);
	if (depth > 0)
		n = grow(depth - 1, seed * 31 + (unsigned char)local[0]);
	struct node *m = depth ? NULL : malloc(sizeof(*m));
	if (!m)
		return n;
	m->left = n;
	m->right = NULL;
	memcpy(m->name, local, sizeof(m->name));
	return m;
}

int main(int argc, char **argv)
{
	int depth = argc > 1 ? atoi(argv[1]) : 100;

	puts("ready");
	fflush(stdout);
	for (unsigned i = 0;; i++)
		free(grow(depth, i));
}
