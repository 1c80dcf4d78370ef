// Children that get an exception from operator new, from their first call on. A return probe that its parent has left
// them would end them; then so does this program.
#include "target.h"
#include <new>
#include <sys/wait.h>

ROW(child, "malloc", "");
SITE void *site_child(size_t size)
{
	void *p = operator new(size);
	KEEP(p);
	return p;
}

static volatile size_t too_much = PTRDIFF_MAX;

static bool throws(size_t size)
{
	try {
		site_child(size);
	} catch (const std::bad_alloc &) {
		return true;
	}
	return false;
}

int main()
{
	// As a program at work has it: the allocator is set up, and has thrown before.
	check(throws(too_much), "operator new of too much");
	say("ready\n");
	wait_for("go");
	for (int i = 0; i < 23; i++) {
		pid_t pid = fork();

		check(pid >= 0, "fork");
		if (!pid) {
			for (int k = 0; k < 5; k++) {
				if (!throws(too_much) || throws(1039))
					_exit(1);
			}
			_exit(0);
		}
		int status = -1;
		check(waitpid(pid, &status, 0) == pid && status == 0, "a child that catches exceptions");
		row_child.alloc_objects += 5;
		row_child.alloc_bytes += 5 * 1039;
	}
	return finish();
}
