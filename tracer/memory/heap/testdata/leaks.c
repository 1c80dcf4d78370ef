// Makes 100,000 reachable blocks and 1,000 that nothing points to, prints the addresses of the lost ones, and waits, or with
// "exit" ends at once, for LeakSanitizer's report.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int __lsan_do_recoverable_leak_check(void) __attribute__((weak));

struct node { struct node *next, *other; char text[32]; };

static struct node *list;         // reached one by one, in random order
static char **array;              // reached from one block
static char *inside[1000];        // pointers into the middle of blocks
static __thread void *thread_var; // reached only from thread-local storage
static pthread_barrier_t barrier;

static void reachable(void)
{
	struct node **nodes = malloc(50000 * sizeof *nodes);

	for (int i = 0; i < 50000; i++)
		nodes[i] = calloc(1, sizeof **nodes);
	for (int i = 49999; i > 0; i--) {
		int j = (i * 7919L + 13) % (i + 1);
		struct node *t = nodes[i];
		nodes[i] = nodes[j];
		nodes[j] = t;
	}
	for (int i = 0; i + 1 < 50000; i++)
		nodes[i]->next = nodes[i + 1];
	list = nodes[0];
	memset(nodes, 0, 50000 * sizeof *nodes);
	free(nodes);
	array = calloc(48894, sizeof *array);
	for (int i = 0; i < 48894; i++)
		array[i] = calloc(1, 17 + i % 200);
	for (int i = 1; i < 1000; i++)
		inside[i] = (char *)calloc(1, 100 + i) + i % 99;
	inside[0] = (char *)calloc(1, 5000000) + 4000000; // with a mapping of its own
}

static void print(void *p)
{
	printf("lost %lu\n", (unsigned long)p);
}

// 100 chains of 5 blocks, 100 rings of 2, 299 single blocks, one with a mapping of its own: 1,000.
static __attribute__((noinline)) void lost(void)
{
	for (int i = 0; i < 100; i++) {
		struct node *head = NULL;
		for (int k = 0; k < 5; k++) {
			struct node *n = calloc(1, sizeof *n);
			n->next = head;
			head = n;
			print(n);
		}
		struct node *a = calloc(1, sizeof *a), *b = calloc(1, sizeof *b);
		a->next = b;
		b->next = a;
		print(a);
		print(b);
	}
	for (int i = 0; i < 299; i++)
		print(memset(malloc(40 + i * 11), 'x', 40 + i * 11));
	print(calloc(1, 3000000));
}

// Overwrites what calls have left on the stack.
static __attribute__((noinline)) void clean_stack(void)
{
	volatile char waste[64 << 10];

	memset((char *)waste, 0, sizeof waste);
	asm volatile("" ::: "memory");
}

static void *thread(void *arg)
{
	void *volatile on_stack[100];

	for (int i = 0; i < 100; i++)
		on_stack[i] = calloc(1, 333);
	thread_var = calloc(1, 444);
	lost();
	clean_stack();
	pthread_barrier_wait(&barrier);
	pthread_barrier_wait(&barrier);
	return on_stack[3];
}

static void *short_lived(void *arg)
{
	return NULL;
}

int main(int argc, char **argv)
{
	static char out[1 << 16];
	pthread_t t;

	setvbuf(stdout, out, _IOFBF, sizeof out);
	reachable();
	pthread_create(&t, NULL, short_lived, NULL);
	pthread_join(t, NULL);
	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&t, NULL, thread, NULL);
	pthread_barrier_wait(&barrier);
	clean_stack();
	puts("ready");
	fflush(stdout);
	if (argc > 1) {
		_Exit((__lsan_do_recoverable_leak_check(), 0));
	}
	for (;;)
		pause();
}
