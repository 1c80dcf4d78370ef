// Exceptions that leave operator new: requests that can never be granted, and the first one beyond RLIMIT_AS. It says
// how often operator new threw below the limit, then its ledger.
#include "target.h"
#include <new>
#include <sys/resource.h>

#define NEW_SITE(name)                                       \
	ROW(name, "malloc", "");                             \
	SITE struct block site_##name(size_t size)           \
	{                                                    \
		void *p = operator new(size);                \
		KEEP(p);                                     \
		return made(&row_##name, p, size);           \
	}

NEW_SITE(huge)
NEW_SITE(limited)
NEW_SITE(after)

static volatile size_t too_much = PTRDIFF_MAX;

static bool throws(struct block (*site)(size_t), size_t size)
{
	try {
		site(size);
	} catch (const std::bad_alloc &) {
		return true;
	}
	return false;
}

int main()
{
	struct rlimit limit;
	int failed = 0;

	// As a program at work has it: the allocator is set up, and has thrown before.
	check(throws(site_huge, too_much), "operator new of too much");
	row_huge = row{"malloc", "", "site_huge", 0, 0, 0, 0};
	say("ready\n");
	wait_for("go");
	for (int i = 0; i < 13; i++) {
		check(throws(site_huge, too_much), "operator new of too much");
		struct block b = site_after(1039);
		if (i < 5) {
			operator delete(b.p);
			gone(&b);
		}
	}
	check(getrlimit(RLIMIT_AS, &limit) == 0, "getrlimit");
	limit.rlim_cur = 1 << 30;
	check(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
	for (int i = 0; i < 3; i++) {
		while (!throws(site_limited, 11 << 20))
			;
		failed++;
	}
	limit.rlim_cur = limit.rlim_max;
	check(setrlimit(RLIMIT_AS, &limit) == 0, "setrlimit");
	for (int i = 0; i < 7; i++)
		site_after(2003);
	say("%d\n", failed);
	return finish();
}
