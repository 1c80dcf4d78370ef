// The functions that only jemalloc, tcmalloc or mimalloc have. Weak: the program starts under each of them.
#pragma once
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

#define WEAK __attribute__((weak))
WEAK void *mallocx(size_t, int);
WEAK void *rallocx(void *, size_t, int);
WEAK size_t xallocx(void *, size_t, size_t, int);
WEAK void dallocx(void *, int);
WEAK void sdallocx(void *, size_t, int);
WEAK int mallctl(const char *, void *, size_t *, void *, size_t);
WEAK void *tc_malloc(size_t);
WEAK void *tc_calloc(size_t, size_t);
WEAK void *tc_realloc(void *, size_t);
WEAK void *tc_memalign(size_t, size_t);
WEAK void tc_free(void *);
WEAK void tc_free_sized(void *, size_t);
WEAK void *mi_malloc(size_t);
WEAK void *mi_zalloc(size_t);
WEAK void *mi_calloc(size_t, size_t);
WEAK void *mi_mallocn(size_t, size_t);
WEAK void *mi_malloc_small(size_t);
WEAK void *mi_malloc_aligned(size_t, size_t);
WEAK void *mi_realloc(void *, size_t);
WEAK void *mi_reallocn(void *, size_t, size_t);
WEAK void *mi_reallocf(void *, size_t);
WEAK void *mi_expand(void *, size_t);
WEAK void mi_free(void *);
WEAK void mi_free_size(void *, size_t);
WEAK void *mi_heap_get_default(void);
WEAK void *mi_heap_malloc(void *, size_t);
WEAK int mi_reserve_os_memory(size_t, int, int);

#ifdef __cplusplus
}
#endif
