// The "encryption library" of the scenario: a closed .so that a Lua service calls through ffi. It is built twice from
// this source. The old build (-DKEEP_SESSIONS) keeps the JSON record of every session for ever; the new one frees it.
//
// It counts its own outstanding records, for the tests to compare with: in a file that each process maps shared, so that
// the figures survive the process. None of its own bookkeeping allocates.
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifdef KEEP_SESSIONS
#define VERSION "libencrypt 1.4.2"
#else
#define VERSION "libencrypt 1.4.3"
#endif

struct ledger {
	_Atomic uint64_t pid, blocks, bytes; // outstanding
	_Atomic uint64_t made_blocks, made_bytes; // ever
};

struct session {
	struct session *next;
	size_t len;
	char json[];
};

static struct ledger in_memory; // when no file can be had
static struct ledger *ledger;
static pid_t owner;
#ifdef KEEP_SESSIONS
static struct session *sessions;
#endif

// A worker is a fork of the master: it needs a file of its own.
static struct ledger *own_ledger(void)
{
	const char *dir = getenv("ENCRYPT_LEDGER_DIR");
	char path[4096];
	int fd;

	if (owner == getpid())
		return ledger;
	owner = getpid();
	ledger = &in_memory;
	if (!dir || snprintf(path, sizeof path, "%s/%d", dir, owner) >= (int)sizeof path)
		return ledger;
	fd = open(path, O_RDWR | O_CREAT, 0644);
	if (fd < 0)
		return ledger;
	if (ftruncate(fd, sizeof *ledger) == 0) {
		void *mapped = mmap(NULL, sizeof *ledger, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
		if (mapped != MAP_FAILED)
			ledger = mapped;
	}
	close(fd);
	ledger->pid = owner;
	return ledger;
}

static size_t block_size(size_t len)
{
	return sizeof(struct session) + len + 1;
}

struct session *session_new(const char *json, size_t len)
{
	struct session *s = malloc(block_size(len));
	struct ledger *book = own_ledger();

	if (!s)
		return NULL;
	s->next = NULL;
	s->len = len;
	memcpy(s->json, json, len);
	s->json[len] = 0;
	book->blocks++;
	book->bytes += block_size(len);
	book->made_blocks++;
	book->made_bytes += block_size(len);
	return s;
}

void session_free(struct session *s)
{
	struct ledger *book = own_ledger();

	if (!s)
		return;
	book->blocks--;
	book->bytes -= block_size(s->len);
	free(s);
}

// XTEA over 8-byte blocks; what it computes does not matter, that it takes time and a scratch buffer does.
static void encrypt(uint32_t v[2], const uint32_t key[4])
{
	uint32_t sum = 0;

	for (int i = 0; i < 32; i++) {
		v[0] += (((v[1] << 4) ^ (v[1] >> 5)) + v[1]) ^ (sum + key[sum & 3]);
		sum += 0x9e3779b9;
		v[1] += (((v[0] << 4) ^ (v[0] >> 5)) + v[0]) ^ (sum + key[(sum >> 11) & 3]);
	}
}

// Makes a session of a JSON document and writes its token, 16 hex digits and a zero. 0 is success.
int encrypt_seal(const char *json, size_t len, char token[17])
{
	static const uint32_t key[4] = { 0x2b7e1516, 0x28aed2a6, 0xabf71588, 0x09cf4f3c };
	struct session *s = session_new(json, len);
	size_t padded = (len + 8) & ~(size_t)7;
	uint32_t chain[2] = { 0, 0 };
	char *scratch;

	if (!s)
		return -1;
	scratch = calloc(1, padded);
	if (!scratch) {
		session_free(s);
		return -1;
	}
	memcpy(scratch, json, len);
	for (size_t at = 0; at < padded; at += 8) {
		uint32_t v[2];

		memcpy(v, scratch + at, 8);
		v[0] ^= chain[0];
		v[1] ^= chain[1];
		encrypt(v, key);
		memcpy(chain, v, 8);
	}
	free(scratch);
	snprintf(token, 17, "%08x%08x", chain[0], chain[1]);
#ifdef KEEP_SESSIONS
	s->next = sessions;
	sessions = s;
#else
	session_free(s);
#endif
	return 0;
}

uint64_t session_blocks(void)
{
	return own_ledger()->blocks;
}

uint64_t session_bytes(void)
{
	return own_ledger()->bytes;
}

const char *encrypt_version(void)
{
	return VERSION;
}
