/*
 * life SCENARIO [N [PROGRAM]]: lives, forks, execs and ends in one of the ways below on "go", and makes a known number
 * of blocks in each stage. Says "done" at the end of what it does itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static int n;
static const char *program;
static char number[16];

/* Each stage is a function of its own, so that a profile tells them apart. All keep one block less than they make. */
#define STAGE(name, count, size)                                                                                       \
	__attribute__((noinline)) void name(void)                                                                      \
	{                                                                                                              \
		void *volatile kept[count];                                                                            \
                                                                                                                       \
		for (int i = 0; i < count; i++)                                                                        \
			kept[i] = malloc(size);                                                                        \
		free(kept[0]);                                                                                         \
	}

STAGE(in_parent, 7, 1009)
STAGE(in_child, 5, 211)
STAGE(in_grandchild, 11, 307)
STAGE(in_thread, 13, 401)
STAGE(before_exec, 3, 503)
STAGE(after_exec, 17, 601)

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(99);
}

/* Waits for one child; any when pid is -1. */
static void wait_for(pid_t pid)
{
	int status;

	if (waitpid(pid, &status, __WALL) < 0 || status)
		fail("waitpid");
}

static pid_t forked(void)
{
	pid_t pid = fork();

	if (pid < 0)
		fail("fork");
	return pid;
}

static void thread(void *(*run)(void *))
{
	pthread_t t;

	if (pthread_create(&t, NULL, run, NULL) || pthread_join(t, NULL))
		fail("pthread_create");
}

/* A thread from before the trace, which works on "go". */
static pthread_t early;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
static void *(*volatile early_run)(void *);

static void *early_thread(void *unused)
{
	pthread_mutex_lock(&gate);
	pthread_mutex_unlock(&gate);
	return early_run ? early_run(unused) : NULL;
}

static void start_early(void)
{
	pthread_mutex_lock(&gate);
	if (pthread_create(&early, NULL, early_thread, NULL))
		fail("pthread_create");
}

static void let_early(void *(*run)(void *))
{
	early_run = run;
	pthread_mutex_unlock(&gate);
	pthread_join(early, NULL);
}

/* A fork bomb with a fuse: n children, eight at a time, each with a child of its own, and none with a long life. */
static void bomb(void)
{
	void *inherited = malloc(53);

	for (int i = 0; i < n; i++) {
		if (i >= 8)
			wait_for(-1);
		if (forked())
			continue;
		in_child();
		free(inherited);
		pid_t child = forked();
		if (!child) {
			in_grandchild();
			_exit(0);
		}
		wait_for(child);
		_exit(0);
	}
	for (int i = 0; i < 8 && i < n; i++)
		wait_for(-1);
	in_parent();
}

/* Execs itself n times; each image makes blocks of both sides of an exec. */
static void chain(void)
{
	before_exec();
	snprintf(number, sizeof(number), "%d", n - 1);
	execl(program, "life", n > 1 ? "chain-on" : "after", number, program, NULL);
	fail("exec");
}

static void chain_on(void)
{
	after_exec();
	chain();
}

static void *daemon_thread(void *unused)
{
	in_thread();
	return unused;
}

/* A daemon: the child of a child of a child, in a session of its own, with threads; its parents do not wait. */
static void daemonize(void)
{
	if (forked())
		_exit(0);
	in_child();
	setsid();
	if (forked())
		_exit(0);
	in_grandchild();
	for (int i = 0; i < n; i++)
		thread(daemon_thread);
}

/* What a vforked child makes lies in its parent's memory. */
static void vforks(void)
{
	for (volatile int i = 0; i < n; i++) {
		pid_t pid = vfork();

		if (!pid) {
			in_child();
			execl(program, "life", "after", "0", program, NULL);
			_exit(98);
		}
		wait_for(pid);
	}
}

static void spawns(void)
{
	char *argv[] = {"life", "after", "0", (char *)program, NULL};

	for (int i = 0; i < n; i++) {
		pid_t pid;

		in_parent();
		if (posix_spawn(&pid, program, NULL, NULL, argv, environ))
			fail("posix_spawn");
		wait_for(pid);
	}
}

/* A child that gives up its rights before it works. */
static void drops(void)
{
	for (int i = 0; i < n; i++) {
		pid_t pid = forked();

		if (!pid) {
			if (setresgid(4099, 4099, 4099) || setresuid(4099, 4099, 4099))
				fail("setresuid");
			in_child();
			_exit(0);
		}
		wait_for(pid);
	}
}

/* Another user's child runs a program that makes it root again. It says so, and works when it is told. */
static void setuid_helper(void)
{
	if (setresgid(4099, 4099, 4099) || setresuid(4099, 4099, 4099))
		fail("setresuid");
	in_parent();
	execl(program, "life", "helper", "0", program, NULL);
	fail("exec");
}

static void helper(void)
{
	char line[16];

	if (geteuid() || getuid() != 4099)
		fail("not setuid");
	puts("helper");
	if (!fgets(line, sizeof(line), stdin))
		fail("stdin");
	after_exec();
}

static void *forking_thread(void *unused)
{
	for (int i = 0; i < n; i++) {
		pid_t pid = forked();

		if (!pid) {
			in_child();
			_exit(0);
		}
		wait_for(pid);
	}
	in_thread();
	return unused;
}

static void thread_forks(void)
{
	thread(forking_thread);
}

/* Forks with a pid that the child is to have, in every pid namespace the caller is in. */
static pid_t fork_as(const pid_t *pids, int levels)
{
	struct clone_args args = {
	    .exit_signal = SIGCHLD, .set_tid = (__u64)(unsigned long)pids, .set_tid_size = levels};

	for (;;) {
		pid_t pid = syscall(SYS_clone3, &args, sizeof(args));

		if (pid >= 0)
			return pid;
		if (errno != EEXIST)
			fail("clone3");
		usleep(1000); /* somebody else has it at this moment */
	}
}

/* n children one after the other, all with the pid of the first; their blocks have the same addresses, too. */
static void reuse(void)
{
	pid_t pid = forked();

	if (!pid) {
		in_child();
		_exit(0);
	}
	wait_for(pid);
	for (int i = 1; i < n; i++) {
		if (!fork_as(&pid, 1)) {
			in_child();
			_exit(0);
		}
		wait_for(pid);
	}
}

/* The same inside of a small pid namespace, whose pid 2 is taken n times. */
static void small_namespace(void)
{
	if (unshare(CLONE_NEWPID))
		fail("unshare");
	pid_t init = forked(), two = 2;

	if (!init) {
		for (int i = 0; i < n; i++) {
			if (!fork_as(&two, 1)) {
				if (getpid() != 2)
					fail("getpid");
				in_child();
				_exit(0);
			}
			wait_for(two);
		}
		_exit(0);
	}
	wait_for(init);
}

static int lone(void *unused)
{
	(void)unused;
	in_child();
	syscall(SYS_exit, 0); /* exit() would end the C library of the parent */
	return 0;
}

/* A process that shares its parent's memory, and is no thread of it. */
static void shared(void)
{
	char *stack = mmap(NULL, 1 << 18, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	for (int i = 0; i < n; i++) {
		pid_t pid = clone(lone, stack + (1 << 18), CLONE_VM | SIGCHLD, NULL);

		if (pid < 0)
			fail("clone");
		wait_for(pid);
	}
	in_parent();
}

static int orphan(void *parent)
{
	while (getppid() == *(pid_t *)parent)
		usleep(1000);
	usleep(300000); /* the tracer hears of the parent's end meanwhile */
	for (int i = 0; i < n; i++)
		in_child();
	syscall(SYS_exit, 0);
	return 0;
}

/* One that outlives its parent. */
static void orphaned(void)
{
	static pid_t self; /* the child may come to look when this process is gone already */
	char *stack = mmap(NULL, 1 << 18, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	self = getpid();
	in_parent();
	if (clone(orphan, stack + (1 << 18), CLONE_VM | SIGCHLD, &self) < 0)
		fail("clone");
	syscall(SYS_exit_group, 0);
}

static void *late_thread(void *unused)
{
	usleep(300000); /* the main thread is gone by now */
	for (int i = 0; i < n; i++)
		in_thread();
	pid_t pid = forked();
	if (!pid) {
		in_child();
		_exit(0);
	}
	wait_for(pid);
	puts("done");
	_exit(0);
	return unused;
}

/* The main thread ends, the process does not. */
static void headless(void)
{
	pthread_t t;

	if (pthread_create(&t, NULL, late_thread, NULL))
		fail("pthread_create");
	pthread_exit(NULL);
}

static void *exec_thread(void *unused)
{
	before_exec();
	execl(program, "life", "after", "0", program, NULL);
	fail("exec");
	return unused;
}

/* A thread other than the main one execs, which makes it the main one. */
static void early_thread_execs(void)
{
	let_early(exec_thread);
}

static void early_thread_forks(void)
{
	let_early(forking_thread);
}

static void early_headless(void)
{
	early_run = late_thread;
	pthread_mutex_unlock(&gate);
	pthread_exit(NULL);
}

static const struct {
	const char *name;
	void (*run)(void);
} scenarios[] = {
    {"bomb", bomb},
    {"chain", chain},
    {"daemon", daemonize},
    {"vfork", vforks},
    {"spawn", spawns},
    {"drop", drops},
    {"setuid", setuid_helper},
    {"thread-forks", thread_forks},
    {"reuse", reuse},
    {"namespace", small_namespace},
    {"shared", shared},
    {"orphaned", orphaned},
    {"headless", headless},
    {"early-thread-forks", early_thread_forks},
    {"early-headless", early_headless},
    {"early-thread-execs", early_thread_execs},
};

/* Images that an exec leads to start at once. */
static const struct {
	const char *name;
	void (*run)(void);
} images[] = {{"after", after_exec}, {"chain-on", chain_on}, {"helper", helper}};

int main(int argc, char **argv)
{
	char line[16];

	setvbuf(stdout, NULL, _IONBF, 0);
	setvbuf(stdin, NULL, _IONBF, 0);
	if (argc < 4)
		return 2;
	n = atoi(argv[2]);
	program = argv[3];
	for (size_t i = 0; i < sizeof(images) / sizeof(*images); i++)
		if (!strcmp(argv[1], images[i].name)) {
			images[i].run();
			return 0;
		}
	start_early();
	puts("ready");
	if (!fgets(line, sizeof(line), stdin))
		return 1;
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++)
		if (!strcmp(argv[1], scenarios[i].name)) {
			scenarios[i].run();
			puts("done");
			return 0;
		}
	return 2;
}
