// The situations of the coverage document, which other tools book wrongly: sites of situation 7 are named s07_...
// argv[1]: "all" (after "go", most of them), or one that needs a trace of its own: "churn", "sampled", "many", "mapstorm", "at-once".
#include "target.h"
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#if defined(__GLIBC__) && !defined(STATIC)
#include <dlfcn.h>
#endif

#define KIB ((size_t)1024)
#define MIB (1024 * KIB)

static size_t page;
static struct block blocks[64];
static volatile size_t too_much = PTRDIFF_MAX;
static void *volatile nothing;

#define RESIZE_OF(name, call)                                         \
	ROW(name, "malloc", "realloc");                               \
	SITE struct block site_##name(struct block *old, size_t size) \
	{                                                             \
		void *p = call;                                       \
		KEEP(p);                                              \
		if (p)                                                \
			gone(old);                                    \
		return made(&row_##name, p, size);                    \
	}
#define POSIX_OF(name)                                                                      \
	ROW(name, "malloc", "posix_memalign");                                              \
	SITE struct block site_##name(struct block *stale, size_t align, size_t size)       \
	{                                                                                   \
		void *p = stale->p;                                                         \
		int rc = posix_memalign(&p, align, size);                                   \
		KEEP(rc);                                                                   \
		return made(&row_##name, rc ? NULL : p, size);                              \
	}
#define MAP_OF(name)                                                                    \
	ROW(name, "mmap", "mmap");                                                      \
	SITE char *site_##name(void *at, size_t size, int flags, int fd)                \
	{                                                                               \
		void *p = mmap(at, size, PROT_READ | PROT_WRITE, flags, fd, 0);         \
		KEEP(p);                                                                \
		if (p != MAP_FAILED && fd < 0)                                          \
			made(&row_##name, p, size);                                     \
		return p;                                                               \
	}
#define ANONYMOUS (MAP_PRIVATE | MAP_ANONYMOUS)

#define FILL(count, frees, call)                       \
	do {                                           \
		for (int i = 0; i < count; i++) {      \
			blocks[i] = call;              \
			check(!!blocks[i].p, #call);   \
		}                                      \
		for (int i = 0; i < frees; i++)        \
			drop(&blocks[i]);              \
	} while (0)

/* ---- blocks ---- */

PLAIN_SITE(s01_block, "malloc", malloc(size))
RESIZE_OF(s01_fails, realloc(old->p, size))
PLAIN_SITE(s02_block, "malloc", malloc(size))
POSIX_OF(s02_fails)
PLAIN_SITE(s03_large, "malloc", malloc(size))
PLAIN_SITE(s04_first, "malloc", malloc(size))
PLAIN_SITE(s05_aligned, "aligned_alloc", aligned_alloc(128, size))
PLAIN_SITE(s05_reallocarray, "reallocarray", reallocarray(nothing, size / 7, 7))
PLAIN_SITE(s06_calloc, "calloc", calloc(size / 3, 3))
POSIX_OF(s06_posix_memalign)

static void fails(void)
{
	for (int i = 0; i < 11; i++) {
		blocks[i] = site_s01_block(1031);
		check(!site_s01_fails(&blocks[i], too_much).p, "realloc");
	}
	drop(&blocks[0]);
	for (int i = 0; i < 13; i++) {
		blocks[i] = site_s02_block(1033);
		check(!site_s02_fails(&blocks[i], 3, 1091).p, "posix_memalign");
		check(!site_s02_fails(&blocks[i], 64, too_much).p, "posix_memalign");
	}
	drop(&blocks[0]);
}

static void *first(void *out)
{
	*(struct block *)out = site_s04_first(1061);
	return NULL;
}

static void plain(void)
{
	struct block none = { NULL, 0, NULL };

	FILL(3, 1, site_s03_large(307201));
	for (int i = 0; i < 5; i++)
		run_thread(first, &blocks[i]);
	drop(&blocks[0]);
	FILL(13, 4, site_s05_aligned(1152));
	FILL(17, 5, site_s05_reallocarray(1043));
	FILL(29, 5, site_s06_calloc(1011));
	FILL(37, 11, site_s06_posix_memalign(&none, 64, 1033));
}

/* ---- mappings ---- */

MAP_OF(s07_head)
MAP_OF(s08_tail)
MAP_OF(s09_middle)
MAP_OF(s09_pieces)
MAP_OF(s10_file)
MAP_OF(s11_fails)
MAP_OF(s13_grown)
MAP_OF(s13_shrunk)
MAP_OF(s13_moved)
MAP_OF(s13_covered)

ROW(s10_thread, "malloc", ""); // makes nothing that is not labelled
SITE pthread_t site_s10_thread(void *(*body)(void *), void *arg)
{
	pthread_t thread;

	check(pthread_create(&thread, NULL, body, arg) == 0, "pthread_create");
	return thread;
}

static char *map(char *(*site)(void *, size_t, int, int), size_t size)
{
	char *p = site(NULL, size, ANONYMOUS, -1);

	check(p != MAP_FAILED, "mmap");
	return p;
}

static void unmap(struct row *row, char *p, size_t size)
{
	check(munmap(p, size) == 0, "munmap");
	COUNT(row->free_bytes, size);
}

static void mappings(void)
{
	char path[] = "/tmp/allocsnoop-map-XXXXXX";
	char *p, *target;
	int fd;

	p = map(site_s07_head, 7 * MIB);
	unmap(&row_s07_head, p, 2 * MIB);
	p = map(site_s08_tail, 11 * MIB);
	unmap(&row_s08_tail, p + 8 * MIB, 3 * MIB);
	p = map(site_s09_middle, 13 * MIB);
	unmap(&row_s09_middle, p + 5 * MIB, 4 * MIB);
	// Three neighbours, and one munmap of the end of the first, the second and the start of the third; twice.
	p = map(site_s09_pieces, 9 * MIB);
	for (int i = 0; i < 3; i++)
		check(site_s09_pieces(p + i * 3 * MIB, 3 * MIB, ANONYMOUS | MAP_FIXED, -1) != MAP_FAILED, "mmap fixed");
	COUNT(row_s09_pieces.free_bytes, 9 * MIB);
	unmap(&row_s09_pieces, p + 2 * MIB, 5 * MIB);
	check(munmap(p + 2 * MIB, 5 * MIB) == 0, "munmap a hole");

	fd = mkstemp(path);
	check(fd >= 0 && unlink(path) == 0 && ftruncate(fd, 6 * MIB) == 0, "file");
	check(site_s10_file(NULL, 6 * MIB, MAP_PRIVATE, fd) != MAP_FAILED, "mmap file");
	close(fd);

	check(site_s11_fails(NULL, (size_t)1 << 60, ANONYMOUS, -1) == MAP_FAILED, "mmap too much");

	p = map(site_s13_grown, 2 * MIB);
	check(mremap(p, 2 * MIB, 6 * MIB, MREMAP_MAYMOVE) != MAP_FAILED, "mremap grow");
	COUNT(row_s13_grown.alloc_bytes, 4 * MIB);
	p = map(site_s13_shrunk, 6 * MIB);
	check(mremap(p, 6 * MIB, 1 * MIB, 0) == p, "mremap shrink");
	COUNT(row_s13_shrunk.free_bytes, 5 * MIB);
	target = map(site_s13_covered, 3 * MIB);
	p = map(site_s13_moved, 2 * MIB);
	check(mremap(p, 2 * MIB, 2 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target, "mremap move");
	COUNT(row_s13_covered.free_bytes, 2 * MIB);
}

#ifdef __GLIBC__ // musl's sbrk refuses
ROW(s12_sbrk, "brk", "");
SITE void *site_s12_sbrk(intptr_t more)
{
	void *p = sbrk(more);
	KEEP(p);
	check(p != (void *)-1, "sbrk");
	return p;
}

static void breaks(void)
{
	site_s12_sbrk(3 * MIB);
	COUNT(row_s12_sbrk.alloc_bytes, 3 * MIB);
	site_s12_sbrk(-(intptr_t)MIB);
	COUNT(row_s12_sbrk.free_bytes, MIB);
	site_s12_sbrk(0);
}
#else
static void breaks(void)
{
}
#endif

/* ---- 8,192 stacks ---- */

PLAIN_SITE(s15_stacks, "malloc", malloc(size))

__attribute__((noinline, noclone)) static void left(unsigned path, int depth);

__attribute__((noinline, noclone)) static void right(unsigned path, int depth)
{
	if (depth == 0)
		site_s15_stacks(1009);
	else if (path & 1)
		right(path >> 1, depth - 1);
	else
		left(path >> 1, depth - 1);
	__asm__ volatile("");
}

static void left(unsigned path, int depth)
{
	if (depth == 0)
		site_s15_stacks(1009);
	else if (path & 1)
		right(path >> 1, depth - 1);
	else
		left(path >> 1, depth - 1);
	__asm__ volatile("");
}

/* ---- calls that are left, threads that die in one ---- */

PLAIN_SITE(s20_after, "malloc", malloc(size))
ROW(s20_left, "malloc", ""); // its block has no owner
SITE int site_s20_left(void)
{
	int rc = posix_memalign((void **)16, 64, 1013); // faults when it hands over the block
	KEEP(rc);
	return rc;
}

static sigjmp_buf back;
static atomic_int die_in_call, dying;

static void on_fault(int signal)
{
	(void)signal;
	if (die_in_call)
		syscall(SYS_exit, 0); // of the thread only
	siglongjmp(back, 1);
}

static void *dies(void *arg)
{
	(void)arg;
	dying = syscall(SYS_gettid);
	site_s20_left();
	return NULL;
}

static void leave_calls(void)
{
	struct sigaction action = { .sa_handler = on_fault, .sa_flags = SA_NODEFER }, old;
	pthread_t thread;

	check(sigaction(SIGSEGV, &action, &old) == 0, "sigaction");
	for (volatile int i = 0; i < 7; i++) {
		if (sigsetjmp(back, 1) == 0)
			site_s20_left();
		site_s20_after(1019);
	}
	die_in_call = 1;
	check(pthread_create(&thread, NULL, dies, NULL) == 0, "pthread_create");
	while (!dying || syscall(SYS_tgkill, getpid(), dying, 0) == 0)
		sched_yield();
	check(sigaction(SIGSEGV, &old, NULL) == 0, "sigaction");
	for (int i = 0; i < 6; i++)
		site_s20_after(1019);
}

/* ---- processes ---- */

PLAIN_SITE(s17_new, "malloc", malloc(size))
ROW(s17_realloc_old, "malloc", "realloc"); // what becomes of blocks from before the attach is in no book
SITE void *site_s17_realloc_old(void *p, size_t size)
{
	p = realloc(p, size);
	KEEP(p);
	return p;
}

PLAIN_SITE(s21_parent, "malloc", malloc(size))
PLAIN_SITE(s21_child, "malloc", malloc(size))
PLAIN_SITE(s22_both, "malloc", malloc(size))

static void fork_child(int out)
{
	void *at[11];

	for (struct row *r = __start_rows; r < __stop_rows; r++)
		r->alloc_objects = r->alloc_bytes = r->free_objects = r->free_bytes = 0;
	for (int i = 0; i < 11; i++)
		at[i] = site_s22_both(1021).p;
	check(write(out, at, sizeof at) == sizeof at, "write");
	for (int i = 0; i < 5; i++)
		free(blocks[i].p);
	for (int i = 0; i < 13; i++) {
		struct block b = site_s21_child(1013);
		if (i < 2)
			drop(&b);
	}
	say("child %d\n", getpid());
	say_ledger();
	_exit(0);
}

// Parent and child make blocks at the same addresses.
static void forks(void)
{
	int pipes[2], status, same = 0;
	void *at[11];
	pid_t child;

	FILL(17, 0, site_s21_parent(1009));
	check(pipe(pipes) == 0, "pipe");
	child = fork();
	check(child >= 0, "fork");
	if (child == 0)
		fork_child(pipes[1]);
	check(read(pipes[0], at, sizeof at) == sizeof at, "read");
	for (int i = 0; i < 11; i++)
		same += site_s22_both(1021).p == at[i];
	check(same > 0, "no address in common");
	check(waitpid(child, &status, 0) == child && status == 0, "child");
	drop(&blocks[0]);
}

/* ---- C++ by its names in symbol tables, in a chain of frames without frame pointers ---- */

#ifndef NO_CXX
void *new_plain(size_t) __asm__("_Znwm");
void delete_sized(void *, size_t) __asm__("_ZdlPvm");
PLAIN_SITE(s26_new, "", new_plain(size))
PLAIN_SITE(s27_balanced, "", new_plain(size))

__attribute__((noinline, noclone)) static void chain_inner(void)
{
	struct block b = site_s26_new(1087);
	KEEP(b.p);
}

__attribute__((noinline, noclone)) static void chain_outer(void)
{
	chain_inner();
	__asm__ volatile("");
}

static void cxx(void)
{
	for (int i = 0; i < 19; i++)
		chain_outer();
	for (int i = 0; i < 23; i++) {
		struct block b = site_s27_balanced(1091);
		void *p = b.p;
		gone(&b);
		delete_sized(p, 1091);
	}
}
#else
static void cxx(void)
{
}
#endif

/* ---- a library that comes late ---- */

ROW(s23_plugin, "malloc", "");
#if defined(__GLIBC__) && !defined(STATIC)
SITE void site_s23_plugin(const char *path)
{
	void *lib = dlopen(path, RTLD_NOW);
	void (*keep)(void);

	check(lib != NULL, "dlopen");
	keep = (void (*)(void))dlsym(lib, "plugin_keep");
	check(keep != NULL, "dlsym");
	keep();
	__asm__ volatile("");
}
#else
#define site_s23_plugin(path) (void)(path)
#endif

static void *wait_forever(void *arg)
{
	pause();
	return arg;
}

static int all(const char *plugin)
{
	void *old[7];

	for (int i = 0; i < 7; i++)
		old[i] = malloc(1049);
	say("ready\n");
	wait_for("go");
	fails();
	plain();
	mappings();
	breaks();
	for (unsigned path = 0; path < 8192; path++)
		left(path, 13);
	for (int i = 0; i < 7; i++)
		old[i] = site_s17_realloc_old(old[i], 5003);
	FILL(5, 1, site_s17_new(1051));
	leave_calls();
	forks();
	cxx();
	site_s23_plugin(plugin);
	site_s10_thread(wait_forever, NULL);
	return finish();
}

/* ---- those with a trace of their own ---- */

PLAIN_SITE(s16_kept, "malloc", malloc(size))
PLAIN_SITE(s16_churn, "malloc", malloc(size))
PLAIN_SITE(s18_small, "malloc", malloc(size))
PLAIN_SITE(s19_mapped, "malloc", malloc(size))
PLAIN_SITE(s14_many, "malloc", malloc(size))
PLAIN_SITE(s00_among_maps, "malloc", malloc(size))
PLAIN_SITE(s29_at_once, "malloc", malloc(size))

// 60,000 system calls.
static void map_storm(void)
{
	for (int i = 0; i < 30000; i++) {
		void *p = mmap(NULL, page, PROT_READ, ANONYMOUS, -1, 0);

		check(p != MAP_FAILED && munmap(p, page) == 0, "mmap");
		if (i % 300 == 0)
			site_s00_among_maps(1069);
	}
}

static void *churn(void *arg)
{
	struct block young[13] = { { 0 } };

	for (unsigned i = 0;; i++) {
		drop(&young[i % 13]);
		young[i % 13] = site_s16_churn(1063);
	}
	return arg;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	pthread_t thread;

	page = sysconf(_SC_PAGESIZE);
	if (strcmp(what, "all") == 0)
		return all(argc > 2 ? argv[2] : "");
	if (strcmp(what, "at-once") == 0) {
		FILL(29, 0, site_s29_at_once(1021));
		return 0;
	}
	say("ready\n");
	wait_for("go");
	if (strcmp(what, "churn") == 0) { // until it is killed
		FILL(31, 0, site_s16_kept(1033));
		for (int i = 0; i < 3; i++)
			check(pthread_create(&thread, NULL, churn, NULL) == 0, "pthread_create");
	} else if (strcmp(what, "sampled") == 0) {
		for (int i = 0; i < 20011; i++) {
			site_s18_small(1009);
			for (int spin = 0; spin < 30000; spin++) // or the budget would be broken
				__asm__ volatile("");
		}
		for (int i = 0; i < 199; i++)
			site_s19_mapped(200003);
	} else if (strcmp(what, "mapstorm") == 0) {
		map_storm();
	} else if (strcmp(what, "many") == 0) {
		for (int i = 0; i < 5003; i++)
			site_s14_many(1051);
		return 0;
	} else {
		die("unknown situation");
	}
	return finish();
}
