// The labelled programs of the verdict test, one a process: programs NAME. Each waits for a line, so that it is traced from
// its first allocation, then works in ticks of 10 ms, of which it catches up on those that it was kept from, until 120 s are
// over. Every one allocates in a function of its own name. Rates are low on purpose: the class must not depend on a fast
// machine.
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define NOINLINE __attribute__((noinline, noclone, no_icf)) // icf folds functions of the same code into one
static int tick;                     // ticks since the start
static void *volatile sink;          // keeps the compiler from dropping a block
static uint32_t seed = 12345;
static uint32_t rnd(uint32_t n) { return (seed = seed * 1103515245u + 12345u) / 65536u % n; }
static void *fill(void *p, size_t n) { memset(p, 'x', n); sink = p; return p; }
#define ALLOC(name) NOINLINE static void *name(size_t n) { void *p = fill(malloc(n), n); __asm__ volatile("" ::: "memory"); return p; }

ALLOC(leak_block)
static void leak(void) { for (int i = 0; i < 5; i++) leak_block(900 + rnd(700)); }

ALLOC(busy_request) ALLOC(busy_context)
static void slow_leak(void) {
  for (int i = 0; i < 40; i++) free(busy_request(4099));
  if (rnd(20) == 0) busy_context(211);
}

#define SLOTS 1009
ALLOC(lru_put)
static void lru(void) {
  static void *ring[SLOTS];
  static int next;
  for (int i = 0; i < 6; i++, next = (next + 1) % SLOTS) { free(ring[next]); ring[next] = lru_put(2039); }
}

ALLOC(filling_put)
static void filling(void) { for (int i = 0; i < 3; i++) if (tick < 1200) filling_put(4093); }

ALLOC(warm_config) ALLOC(warm_request)
static void warm_up(void) {
  if (tick < 400) for (int i = 0; i < 7; i++) warm_config(307);
  for (int i = 0; i < 5; i++) free(warm_request(8191));
}

ALLOC(batch_row)
static void saw_tooth(void) {
  static void *rows[6000];
  static int n;
  for (int i = 0; i < 12; i++) rows[n++] = batch_row(701);
  if (tick % 430 == 0) while (n > 0) free(rows[--n]);
}

ALLOC(pool_grow)
static void pool(void) {
  static char *chunk[8];
  if (tick <= 8) chunk[tick - 1] = pool_grow(1 << 20);
  else chunk[rnd(8)][rnd(1 << 20)] = 'y';
}

ALLOC(chunk_make)
static void fragmentation(void) {
  static void *all[12000];
  static int n, at;
  if (tick < 300) for (int i = 0; i < 40; i++) all[n++] = chunk_make(16 + rnd(2000));
  else for (int i = 0; i < 40 && at < n; i++, at++) if (at % 10) free(all[at]);
}

static void *idle(void *unused) { char deep[4096]; fill(deep, sizeof deep); pause(); return unused; }
NOINLINE static void thread_spawn(void) {
  pthread_t t;
  pthread_create(&t, NULL, idle, NULL);
  pthread_detach(t);
}
static void thread_growth(void) { if (tick % 50 == 0) thread_spawn(); }

NOINLINE static void map_more(void) {
  fill(mmap(NULL, 1 << 18, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 1 << 18);
}
static void mmap_leak(void) { if (tick % 20 == 0) map_more(); }

NOINLINE static void *append_row(void *p, size_t n) { p = realloc(p, n); sink = p; __asm__ volatile("" ::: "memory"); return p; }
static void realloc_growth(void) {
  static char *rows;
  static size_t n = 4096;
  if (tick % 20) return;
  rows = append_row(rows, n += 16384);
  memset(rows + n - 16384, 'x', 16384);
}

ALLOC(table_entry)
static void freed_at_exit(void) {
  static void *all[12000];
  static int n;
  if (tick < 1400) for (int i = 0; i < 5; i++) all[n++] = table_entry(1013);
  else if (tick == 1500) {
    while (n > 0) free(all[--n]);
    exit(0);
  }
}

static const struct { const char *name; void (*step)(void); } programs[] = {
  {"leak", leak}, {"slow_leak", slow_leak}, {"lru", lru}, {"filling", filling}, {"warm_up", warm_up}, {"saw_tooth", saw_tooth},
  {"pool", pool}, {"fragmentation", fragmentation}, {"thread_growth", thread_growth}, {"mmap_leak", mmap_leak},
  {"realloc_growth", realloc_growth}, {"freed_at_exit", freed_at_exit},
};

int main(int argc, char **argv) {
  void (*step)(void) = NULL;
  for (unsigned i = 0; argc > 1 && i < sizeof programs / sizeof *programs; i++)
    if (!strcmp(argv[1], programs[i].name)) step = programs[i].step;
  if (!step) return 2;
  setvbuf(stdout, NULL, _IONBF, 0);
  setvbuf(stdin, NULL, _IONBF, 0);
  puts("ready");
  char c;
  if (read(0, &c, 1) != 1) return 0;
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  for (tick = 1; tick < 12000; tick++) {
    step();
    if (tick == 800 || tick == 2000) printf("tick %d\n", tick);
    if ((at.tv_nsec += 10000000) >= 1000000000) { at.tv_nsec -= 1000000000; at.tv_sec++; }
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
  }
  return 0;
}
