// Four threads that are inside of long calls nearly all the time: large blocks are mapped, moved and unmapped each time.
#include <pthread.h>
#include <stdlib.h>

static void *work(void *unused)
{
	(void)unused;
	for (;;) {
		void *p = malloc(11);

		p = realloc(p, 2000003);
		free(p);
		p = calloc(3, 400009);
		free(p);
	}
	return NULL;
}

int main(void)
{
	pthread_t thread;

	for (int i = 0; i < 3; i++)
		pthread_create(&thread, NULL, work, NULL);
	work(NULL);
}
