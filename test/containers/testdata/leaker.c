/*
 * leaker DIR: is told and tells through the pipes DIR/in and DIR/out. "leak N SIZE" makes N blocks of SIZE bytes in
 * libleak.so, "fork N SIZE" has a child do it, "end" ends. It allocates nothing by itself.
 */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

void leak_blocks(int n, size_t size);

static int out;

static int say(const char *line)
{
	return write(out, line, strlen(line)) == (ssize_t)strlen(line) ? 0 : 1;
}

static int read_line(int in, char *line, int size)
{
	for (int n = 0; n < size - 1; n++) {
		if (read(in, line + n, 1) != 1)
			return 0;
		if (line[n] == '\n') {
			line[n] = 0;
			return 1;
		}
	}
	return 0;
}

static void leak(char *args)
{
	int n = strtol(args, &args, 10);

	leak_blocks(n, strtoul(args, NULL, 10));
}

int main(int argc, char **argv)
{
	char line[64];
	int in;

	if (argc < 2 || chdir(argv[1]))
		return 2;
	in = open("in", O_RDONLY);
	out = open("out", O_WRONLY);
	if (in < 0 || out < 0 || say("ready\n"))
		return 3;
	while (read_line(in, line, sizeof(line))) {
		if (!strncmp(line, "leak ", 5))
			leak(line + 5);
		if (!strncmp(line, "fork ", 5)) {
			pid_t child = fork();

			if (child < 0)
				return 4;
			if (child == 0) {
				leak(line + 5);
				say("done\n");
				pause();
			}
			continue;
		}
		if (!strcmp(line, "end"))
			return 0;
		if (say("done\n"))
			return 5;
	}
	return 6;
}
