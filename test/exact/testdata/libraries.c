// Blocks and pools of two libraries of others, as they are installed: libapr's pools and libcrypto's own malloc. Their
// declarations are here, so that no development package need be.
#include "target.h"

typedef struct apr_pool_t apr_pool_t;
extern int apr_initialize(void);
extern int apr_pool_create_ex(apr_pool_t **pool, apr_pool_t *parent, void *abort, void *allocator);
extern void *apr_palloc(apr_pool_t *pool, size_t size);
extern void *apr_pcalloc(apr_pool_t *pool, size_t size);
extern void apr_pool_clear(apr_pool_t *pool);
extern void apr_pool_destroy(apr_pool_t *pool);

extern void *CRYPTO_malloc(size_t size, const char *file, int line);
extern void *CRYPTO_zalloc(size_t size, const char *file, int line);
extern void *CRYPTO_realloc(void *p, size_t size, const char *file, int line);
extern void *CRYPTO_clear_realloc(void *p, size_t old, size_t size, const char *file, int line);
extern char *CRYPTO_strdup(const char *text, const char *file, int line);
extern void CRYPTO_free(void *p, const char *file, int line);
extern void CRYPTO_clear_free(void *p, size_t size, const char *file, int line);

#define HERE __FILE__, __LINE__

#define POOL_SITE(name, function)                                                                                      \
	ROW(name, "apr_pool", #function);                                                                              \
	SITE struct block site_##name(apr_pool_t *pool, size_t size)                                                   \
	{                                                                                                              \
		void *p = function(pool, size);                                                                        \
		KEEP(p);                                                                                               \
		return made(&row_##name, p, size);                                                                     \
	}

#define CRYPTO_SITE(name, function, call)                                                                              \
	ROW(name, "openssl", function);                                                                                \
	SITE struct block site_##name(void *old, size_t size)                                                          \
	{                                                                                                              \
		void *p = call;                                                                                        \
		KEEP(p);                                                                                               \
		KEEP(old);                                                                                             \
		return made(&row_##name, p, size);                                                                     \
	}

POOL_SITE(cleared, apr_palloc)
POOL_SITE(cleared_zeroed, apr_pcalloc)
POOL_SITE(kept, apr_palloc)
POOL_SITE(with_parent, apr_palloc)
POOL_SITE(in_parent, apr_palloc)
CRYPTO_SITE(crypto, "CRYPTO_malloc", CRYPTO_malloc(size, HERE))
CRYPTO_SITE(crypto_zeroed, "CRYPTO_zalloc", CRYPTO_zalloc(size, HERE))
CRYPTO_SITE(crypto_grown, "CRYPTO_realloc", CRYPTO_realloc(old, size, HERE))
CRYPTO_SITE(crypto_cleared, "CRYPTO_clear_realloc", CRYPTO_clear_realloc(old, 607, size, HERE))
CRYPTO_SITE(crypto_text, "", CRYPTO_strdup("seventeen letters", HERE))

static apr_pool_t *new_pool(apr_pool_t *parent)
{
	apr_pool_t *pool;

	check(apr_pool_create_ex(&pool, parent, NULL, NULL) == 0, "apr_pool_create_ex");
	return pool;
}

static void pools(void)
{
	apr_pool_t *pool = new_pool(NULL), *parent = new_pool(NULL), *child = new_pool(parent);
	struct block gone_soon[19];
	int n = 0;

	for (int i = 0; i < 7; i++)
		gone_soon[n++] = site_cleared(pool, 101);
	for (int i = 0; i < 5; i++)
		gone_soon[n++] = site_cleared_zeroed(pool, 211);
	apr_pool_clear(pool);
	for (int i = 0; i < 11; i++)
		site_kept(pool, 307);
	for (int i = 0; i < 4; i++)
		gone_soon[n++] = site_with_parent(child, 20011);
	for (int i = 0; i < 3; i++)
		gone_soon[n++] = site_in_parent(parent, 409);
	apr_pool_destroy(parent);
	for (int i = 0; i < n; i++)
		gone(&gone_soon[i]);
}

static void crypto(void)
{
	for (int i = 0; i < 13; i++) {
		struct block b = site_crypto(NULL, 503), c = site_crypto_zeroed(NULL, 607);

		if (i < 5) {
			CRYPTO_free(b.p, HERE);
			gone(&b);
		} else if (i < 8) {
			void *old = b.p;

			gone(&b);
			site_crypto_grown(old, 1009);
		}
		if (i < 2) {
			CRYPTO_clear_free(c.p, 607, HERE);
			gone(&c);
		} else if (i < 6) {
			void *old = c.p;

			gone(&c);
			site_crypto_cleared(old, 2003);
		}
	}
	for (int i = 0; i < 3; i++)
		site_crypto_text(NULL, sizeof("seventeen letters"));
}

int main(void)
{
	check(apr_initialize() == 0, "apr_initialize");
	CRYPTO_free(CRYPTO_malloc(1, HERE), HERE);
	say("ready\n");
	wait_for("go");
	pools();
	crypto();
	return finish();
}
