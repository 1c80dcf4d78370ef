package profile

import "testing"

func TestOwnerIsTheFirstFunctionThatIsNoHelper(t *testing.T) {
	libc := &Mapping{File: "/lib/x86_64-linux-gnu/libc.so.6"}
	libstdcxx := &Mapping{File: "/usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30"}
	jemalloc := &Mapping{File: "/usr/lib/libjemalloc.so.2"}
	app := &Mapping{Start: 0x400000, Offset: 0x1000, File: "/srv/app", BuildID: "0123456789abcdef"}
	at := func(m *Mapping, names ...string) *Location {
		l := &Location{Mapping: m, Address: 0x400123}
		for _, n := range names {
			l.Lines = append(l.Lines, Line{Function: n})
		}
		return l
	}
	for _, c := range []struct {
		name   string
		frames []*Location
		want   string
	}{
		{"the caller of malloc", []*Location{at(libc, "malloc"), at(app, "leak")}, "leak"},
		{"libc calls malloc for the program", []*Location{at(libc, "malloc"), at(libc, "__GI___strdup"), at(app, "name_of")}, "name_of"},
		{"operator new in libstdc++", []*Location{at(jemalloc, "malloc"), at(libstdcxx, "operator new(unsigned long)"), at(app, "make_node()")}, "make_node()"},
		{"templates of the standard library in the program", []*Location{
			at(libc, "malloc"), at(app, "std::allocator<int>::allocate(unsigned long)", "void std::vector<int, std::allocator<int> >::_M_realloc_insert<int const&>(int const&)", "Table::add(int)"),
		}, "Table::add(int)"},
		{"a return type is not the function", []*Location{at(libc, "malloc"), at(app, "std::pair<int, std::string> mine::make<int>(int)")}, "std::pair<int, std::string> mine::make<int>(int)"},
		{"an anonymous namespace", []*Location{at(libc, "malloc"), at(app, "(anonymous namespace)::grow(int)")}, "(anonymous namespace)::grow(int)"},
		{"Rust's library", []*Location{at(libc, "malloc"), at(app, "__rust_alloc", "alloc::alloc::alloc", "<alloc::vec::Vec<T> as core::clone::Clone>::clone", "app::cache::insert")}, "app::cache::insert"},
		{"a wrapper the program carries", []*Location{at(libc, "malloc"), at(app, "xmalloc"), at(app, "read_line")}, "read_line"},
		{"a thread's stack", []*Location{at(libc, "mmap"), at(libc, "pthread_create@@GLIBC_2.34"), at(app, "spawn")}, "spawn"},
		{"a static libc", []*Location{at(app, "malloc"), at(app, "strdup"), at(app, "main")}, "main"},
		{"no name in the program", []*Location{at(libc, "malloc"), at(app)}, "app+0x1123"},
		{"a mark in between", []*Location{at(libc, "malloc"), {Mark: "[LuaJIT]"}, at(app, "run")}, "run"},
		{"helpers only", []*Location{at(libc, "malloc"), at(libc, "__libc_start_main"), {Mark: "[truncated: x]"}}, "__libc_start_main"},
		{"a mark only", []*Location{{Mark: "[truncated: x]"}}, "[truncated: x]"},
		{"nothing", nil, "[no stack]"},
	} {
		if got := OwnerOf(c.frames).Function; got != c.want {
			t.Errorf("%s: owner %q, want %q", c.name, got, c.want)
		}
	}
	o := OwnerOf([]*Location{at(app, "f")})
	if o.Library() != "app" || o.ShortBuildID() != "0123456789ab" {
		t.Errorf("library %q, build %q", o.Library(), o.ShortBuildID())
	}
}
