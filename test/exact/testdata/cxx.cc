// Every form of operator new and delete. "no-throw" is for allocators that abort instead of throwing.
#include "target.h"
#include <new>

#define NEW_SITE(name, call)                                    \
	ROW(name, "malloc", "");                                \
	SITE struct block site_##name(size_t size)              \
	{                                                       \
		void *p = call;                                 \
		KEEP(p);                                        \
		return made(&row_##name, p, size);              \
	}

using std::align_val_t;
using std::nothrow;

NEW_SITE(new_plain, operator new(size))
NEW_SITE(new_array, operator new[](size))
NEW_SITE(new_nothrow, operator new(size, nothrow))
NEW_SITE(new_array_nothrow, operator new[](size, nothrow))
NEW_SITE(new_aligned, operator new(size, align_val_t(64)))
NEW_SITE(new_array_aligned, operator new[](size, align_val_t(64)))
NEW_SITE(new_aligned_nothrow, operator new(size, align_val_t(64), nothrow))
NEW_SITE(new_array_aligned_nothrow, operator new[](size, align_val_t(64), nothrow))
NEW_SITE(after_throw, operator new(size))

static volatile size_t too_much = PTRDIFF_MAX;

// The exception unwinds past the return probe that jemalloc's and tcmalloc's operator new have. The exception object is a block as well, which the
// C++ library allocates and frees.
static void new_throws()
{
	try {
		void *p = operator new(too_much);
		KEEP(p);
		die("operator new did not throw");
	} catch (const std::bad_alloc &) {
	}
	check(!operator new(too_much, nothrow), "operator new nothrow");
}

int main(int argc, char **)
{
	say("ready\n");
	wait_for("go");

#define FREED(make, count, frees, end)                    \
	for (int i = 0; i < count; i++) {                 \
		struct block b = make;                    \
		void *p = b.p;                            \
		if (i >= frees)                           \
			continue;                         \
		gone(&b);                                 \
		end;                                      \
	}
	// Each delete form once with a new of its kind. C++ libraries round sizes up to the alignment on their way to malloc.
	FREED(site_new_plain(1009), 23, 7, operator delete(p))
	FREED(site_new_plain(1013), 19, 5, operator delete(p, (size_t)1013))
	FREED(site_new_array(1019), 17, 3, operator delete[](p))
	FREED(site_new_array(1021), 13, 2, operator delete[](p, (size_t)1021))
	FREED(site_new_nothrow(1031), 11, 4, operator delete(p, nothrow))
	FREED(site_new_array_nothrow(1033), 29, 9, operator delete[](p, nothrow))
	FREED(site_new_aligned(1091), 31, 8, operator delete(p, align_val_t(64)))
	FREED(site_new_aligned(1153), 37, 6, operator delete(p, (size_t)1153, align_val_t(64)))
	FREED(site_new_array_aligned(1217), 41, 10, operator delete[](p, align_val_t(64)))
	FREED(site_new_array_aligned(1280), 43, 12, operator delete[](p, (size_t)1280, align_val_t(64)))
	FREED(site_new_aligned_nothrow(1361), 47, 14, operator delete(p, align_val_t(64), nothrow))
	FREED(site_new_array_aligned_nothrow(1408), 53, 15, operator delete[](p, align_val_t(64), nothrow))
	for (int i = 0; i < 13; i++) {
		if (argc == 1)
			new_throws();
		site_after_throw(1039);
	}
	return finish();
}
