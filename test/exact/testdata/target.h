// What every target of the exactness tests shares: the words it exchanges with the test, and the ledger.
//
// Protocol: the target prints "ready", waits for a line, works, prints its ledger as one line of JSON, waits for the
// next line, and so on; at the end of its input it exits. Nothing here allocates, or the ledger would have to know.
//
// A call site is a function site_NAME that calls one allocator function itself and is never inlined, cloned or left by
// a tail call, so that it is the allocator function's caller in every stack. Its row in the ledger is row_NAME.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SITE __attribute__((noinline, noclone)) static
// The value is needed after the call: no tail call, no allocation that the compiler leaves out.
#define KEEP(p) __asm__ volatile("" : "+r"(p) : : "memory")

struct row {
	const char *kind, *function, *site;
	int64_t alloc_objects, alloc_bytes, free_objects, free_bytes;
};

// function is what the site calls; "" when the allocator function is not the site's own callee (strdup calls malloc).
#define ROW(name, kind, function) \
	__attribute__((section("rows"), used, aligned(8))) static struct row row_##name = { kind, function, "site_" #name, \
											      0, 0, 0, 0 }

extern struct row __start_rows[], __stop_rows[];

struct block {
	void *p;
	size_t size;
	struct row *row;
};

#define COUNT(field, n) __atomic_add_fetch(&(field), (int64_t)(n), __ATOMIC_RELAXED)

static inline struct block made(struct row *row, void *p, size_t size)
{
	struct block b = { p, size, row };

	if (p) {
		COUNT(row->alloc_objects, 1);
		COUNT(row->alloc_bytes, size);
	}
	return b;
}

// Defines site_NAME(size), which gets one block by CALL.
#define PLAIN_SITE(name, function, call)                       \
	ROW(name, "malloc", function);                         \
	SITE struct block site_##name(size_t size)             \
	{                                                      \
		void *p = call;                                \
		KEEP(p);                                       \
		return made(&row_##name, p, size);             \
	}

// The block's end, however it came.
static inline void gone(struct block *b)
{
	if (!b->p)
		return;
	COUNT(b->row->free_objects, 1);
	COUNT(b->row->free_bytes, b->size);
	b->p = NULL;
}

static inline void drop(struct block *b)
{
	void *p = b->p;

	gone(b);
	free(p);
}

static inline void die(const char *what)
{
	char text[256];
	int n = snprintf(text, sizeof text, "%s: %s\n", what, strerror(errno));

	if (write(2, text, n) < 0)
		_exit(4);
	_exit(3);
}

static inline void check(int ok, const char *what)
{
	if (!ok)
		die(what);
}

static inline void run_thread(void *(*body)(void *), void *arg)
{
	pthread_t thread;

	check(pthread_create(&thread, NULL, body, arg) == 0, "pthread_create");
	check(pthread_join(thread, NULL) == 0, "pthread_join");
}

static inline void say_bytes(const char *text, size_t n)
{
	while (n > 0) {
		ssize_t wrote = write(1, text, n);
		if (wrote <= 0)
			_exit(5);
		text += wrote;
		n -= wrote;
	}
}

static inline void say(const char *format, ...)
{
	static char text[65536]; // of the main thread only
	va_list args;
	int n;

	va_start(args, format);
	n = vsnprintf(text, sizeof text, format, args);
	va_end(args);
	say_bytes(text, n);
}

// Reads one line of the test's; returns 0 at the end of input.
static inline int hear(char *line, size_t size)
{
	size_t n = 0;
	char c;

	while (read(0, &c, 1) == 1) {
		if (c == '\n') {
			line[n] = 0;
			return 1;
		}
		if (n + 1 < size)
			line[n++] = c;
	}
	return 0;
}

static inline void wait_for(const char *word)
{
	char line[64];

	if (!hear(line, sizeof line) || strcmp(line, word) != 0)
		_exit(6);
}

static inline void say_ledger(void)
{
	const char *comma = "";

	say("[");
	for (struct row *r = __start_rows; r < __stop_rows; r++) {
		if (!r->kind) // of a function that is not there
			continue;
		say("%s{\"kind\":\"%s\",\"function\":\"%s\",\"site\":\"%s\",\"alloc_objects\":%lld,\"alloc_bytes\":%lld,"
		    "\"free_objects\":%lld,\"free_bytes\":%lld}",
		    comma, r->kind, r->function, r->site, (long long)r->alloc_objects, (long long)r->alloc_bytes,
		    (long long)r->free_objects, (long long)r->free_bytes);
		comma = ",";
	}
	say("]\n");
}

// Says the ledger, then stays alive until the test has seen enough.
static inline int finish(void)
{
	char line[64];

	say_ledger();
	while (hear(line, sizeof line))
		;
	return 0;
}

#ifdef __cplusplus
}
#endif
