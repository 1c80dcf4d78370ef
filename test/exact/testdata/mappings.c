// Mappings that the program makes itself, cut in every way; its own brk; and what must not be counted.
#include "target.h"
#include <fcntl.h>
#include <sys/mman.h>

#define KIB 1024
#define MIB (1024 * KIB)

static size_t page;

// The object count of a cut mapping is a matter of taste, so its row says bytes only: free_objects stays 0, and the
// test compares bytes.
#define MAP_SITE(name)                                                                                  \
	ROW(name, "mmap", "mmap");                                                                      \
	SITE char *site_##name(size_t size, int prot, int flags, int fd)                                \
	{                                                                                               \
		void *p = mmap(NULL, size, prot, flags, fd, 0);                                         \
		KEEP(p);                                                                                \
		if (p != MAP_FAILED && fd < 0)                                                          \
			made(&row_##name, p, size);                                                     \
		return p;                                                                               \
	}

MAP_SITE(map_whole)
MAP_SITE(map_unmapped)
MAP_SITE(map_head)
MAP_SITE(map_tail)
MAP_SITE(map_middle)
MAP_SITE(map_covered_by_three)
MAP_SITE(map_shared)
MAP_SITE(map_odd_size)
MAP_SITE(map_fails)
MAP_SITE(map_file)
MAP_SITE(map_grown)
MAP_SITE(map_moved)
MAP_SITE(map_shrunk)
MAP_SITE(map_covered)

ROW(map_fixed, "mmap", "mmap");
SITE void site_map_fixed(char *at, size_t size)
{
	void *p = mmap(at, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	KEEP(p);
	check(p == at, "mmap fixed");
	made(&row_map_fixed, p, size);
}

static char *map(char *(*site)(size_t, int, int, int), size_t size)
{
	char *p = site(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	check(p != MAP_FAILED, "mmap");
	return p;
}

static void unmap(struct row *row, char *p, size_t size)
{
	check(munmap(p, size) == 0, "munmap");
	COUNT(row->free_bytes, size);
}

static void cuts(void)
{
	char *p;

	map(site_map_whole, 3 * MIB);
	p = map(site_map_unmapped, 5 * MIB);
	unmap(&row_map_unmapped, p, 5 * MIB);
	p = map(site_map_head, 7 * MIB);
	unmap(&row_map_head, p, 2 * MIB);
	p = map(site_map_tail, 11 * MIB);
	unmap(&row_map_tail, p + 8 * MIB, 3 * MIB);
	p = map(site_map_middle, 13 * MIB);
	unmap(&row_map_middle, p + 5 * MIB, 4 * MIB);
	unmap(&row_map_middle, p, 1 * MIB);

	// Three neighbours, and one munmap that takes the end of the first, the second, and the start of the third. They
	// replace a mapping of the whole range.
	p = map(site_map_covered_by_three, 9 * MIB);
	for (int i = 0; i < 3; i++)
		site_map_fixed(p + i * 3 * MIB, 3 * MIB);
	COUNT(row_map_covered_by_three.free_bytes, 9 * MIB);
	unmap(&row_map_fixed, p + 2 * MIB, 5 * MIB);
	// Again: what is not there any more is no error and no second end.
	check(munmap(p + 2 * MIB, 5 * MIB) == 0, "munmap a hole");
}

static void others(void)
{
	char path[] = "/tmp/allocsnoop-map-XXXXXX";
	int fd = mkstemp(path);
	char *p;

	check(fd >= 0 && unlink(path) == 0 && ftruncate(fd, 6 * MIB) == 0, "file");
	p = site_map_file(6 * MIB, PROT_READ, MAP_PRIVATE, fd);
	check(p != MAP_FAILED, "mmap file");
	close(fd);

	p = site_map_shared(2 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
	check(p != MAP_FAILED, "mmap shared");

	// 1 MiB and a byte is one page more than 1 MiB.
	map(site_map_odd_size, 1 * MIB + 1);
	COUNT(row_map_odd_size.alloc_bytes, page - 1);

	check(site_map_fails((size_t)1 << 60, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1) == MAP_FAILED, "mmap too much");

	p = map(site_map_covered, 4 * MIB);
	fd = open("/proc/self/exe", O_RDONLY);
	check(fd >= 0 && mmap(p + 1 * MIB, page, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) != MAP_FAILED, "mmap over");
	COUNT(row_map_covered.free_bytes, page);
	close(fd);
}

static void remaps(void)
{
	char *p = map(site_map_grown, 2 * MIB);
	char *target;

	check(mremap(p, 2 * MIB, 6 * MIB, MREMAP_MAYMOVE) != MAP_FAILED, "mremap grow");
	COUNT(row_map_grown.alloc_bytes, 4 * MIB);

	p = map(site_map_shrunk, 6 * MIB);
	check(mremap(p, 6 * MIB, 1 * MIB, 0) == p, "mremap shrink");
	COUNT(row_map_shrunk.free_bytes, 5 * MIB);

	target = map(site_map_covered, 3 * MIB);
	p = map(site_map_moved, 2 * MIB);
	check(mremap(p, 2 * MIB, 2 * MIB, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target, "mremap move");
	COUNT(row_map_covered.free_bytes, 2 * MIB);
}

#ifdef __GLIBC__ // musl's sbrk refuses
ROW(brk, "brk", "");
SITE void *site_brk(intptr_t more)
{
	void *p = sbrk(more);
	KEEP(p);
	return p;
}

static void breaks(void)
{
	check(site_brk(3 * MIB) != (void *)-1, "sbrk");
	COUNT(row_brk.alloc_objects, 1);
	COUNT(row_brk.alloc_bytes, 3 * MIB);
	check(site_brk(-1 * MIB) != (void *)-1, "sbrk");
	COUNT(row_brk.free_bytes, 1 * MIB);
	check(site_brk(0) != (void *)-1, "sbrk");
}
#endif

int main(void)
{
	char *p = malloc(1); // a static program without malloc would have nothing to probe

	KEEP(p);
	free(p);
	page = sysconf(_SC_PAGESIZE);
	say("ready\n");
	wait_for("go");
	cuts();
	others();
	remaps();
#ifdef __GLIBC__
	breaks();
#endif
	return finish();
}
