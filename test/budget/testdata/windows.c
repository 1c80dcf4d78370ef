// Two processes allocate without pause: all blocks of churn are freed at once, those of leak never. "stop" ends that; the
// answer is how many blocks each of them has leaked, the parent first.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include <poll.h>
#include <unistd.h>

struct shared {
	volatile int stop;
	volatile int stopped[2];
	volatile long leaked[2];
};

__attribute__((noinline)) static void churn(void)
{
	void *p = malloc(211);
	__asm__ volatile("" : "+r"(p) : : "memory");
	free(p);
	__asm__ volatile("" : : : "memory");
}

__attribute__((noinline)) static void leak(void)
{
	void *p = malloc(1009);
	__asm__ volatile("" : "+r"(p) : : "memory");
}

static void work(struct shared *s, int who)
{
	for (long i = 0; !s->stop; i++) {
		struct pollfd in = {.fd = 0, .events = POLLIN};

		churn();
		if (i % 53 == 0) {
			leak();
			s->leaked[who]++;
		}
		if (who == 0 && i % 1024 == 0 && poll(&in, 1, 0) > 0)
			s->stop = 1;
	}
	s->stopped[who] = 1;
}

int main(void)
{
	struct shared *s = mmap(NULL, sizeof(*s), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	char line[16];

	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IONBF, 0);
	if (s == MAP_FAILED)
		return 2;
	puts("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 3;
	pid_t pid = fork();
	if (pid == 0)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	printf("%s %d\n", pid ? "parent" : "child", getpid());
	work(s, pid == 0);
	if (pid == 0)
		pause();
	while (!s->stopped[1])
		usleep(1000);
	if (fgets(line, sizeof(line), stdin))
		printf("leaked %ld %ld\n", s->leaked[0], s->leaked[1]);
	return !fgets(line, sizeof(line), stdin);
}
