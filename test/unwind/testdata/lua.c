// Runs Lua that LuaJIT compiles and that calls C functions which allocate, for ever. argv[1]: libluajit.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static const char script[] =
	"local ffi = require 'ffi'\n"
	"ffi.cdef[[ void *lua_made(size_t n); ]]\n"
	"local C = ffi.load('%s')\n"
	"local function hot(n)\n"
	"  local sum = 0\n"
	"  for i = 1, n do\n"
	"    local p = C.lua_made(i)\n"
	"    if p ~= nil then sum = sum + 1 end\n"
	"  end\n"
	"  return sum\n"
	"end\n"
	"return coroutine.wrap(function() for i = 1, 10 do hot(1000) end return 1 end)()\n";

int main(int argc, char **argv)
{
	char text[2048];

	if (argc < 3)
		return 2;
	void *lib = dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL);
	void *(*newstate)(void) = lib ? dlsym(lib, "luaL_newstate") : NULL;
	void (*openlibs)(void *) = lib ? dlsym(lib, "luaL_openlibs") : NULL;
	int (*load)(void *, const char *) = lib ? dlsym(lib, "luaL_loadstring") : NULL;
	int (*pcall)(void *, int, int, int) = lib ? dlsym(lib, "lua_pcall") : NULL;
	const char *(*str)(void *, int, size_t *) = lib ? dlsym(lib, "lua_tolstring") : NULL;
	void (*settop)(void *, int) = lib ? dlsym(lib, "lua_settop") : NULL;

	if (!newstate || !openlibs || !load || !pcall || !str || !settop)
		return 1;
	void *L = newstate();

	openlibs(L);
	snprintf(text, sizeof(text), script, argv[2]);
	puts("ready");
	fflush(stdout);
	for (;;) {
		if (load(L, text) || pcall(L, 0, 0, 0)) {
			fprintf(stderr, "lua: %s\n", str(L, -1, NULL));
			return 1;
		}
		settop(L, 0);
	}
}
