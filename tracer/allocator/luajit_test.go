package allocator

import (
	"strings"
	"testing"

	"github.com/allocsnoop/allocsnoop/profile"
)

func TestLuaJITsAllocatorIsFoundByItsShape(t *testing.T) {
	f := scanFile(t, libs+"libluajit-5.1.so.2", nil)
	got := find(t, f, "lj_alloc_f")
	if got.Op != LuaAlloc || got.Kind != profile.KindLuaJIT || got.Ptr != 2 || got.Size != 4 {
		t.Errorf("%+v", got.Function)
	}
	if !got.Place.Emulated {
		t.Errorf("placed at %+v", got.Place)
	}
	if id := buildID(t, libs+"libluajit-5.1.so.2"); id == luaJITBuild && (got.Address != 0x18e60 || got.Place.Offset != 3) {
		t.Errorf("found at %#x +%d, want 0x18e60 +3", got.Address, got.Place.Offset)
	}
}

const luaJITBuild = "0a6563c55d870716908fd332f88bf7cdd9bc6a71"

// The functions of testdata/lua.c are LuaJIT's in shape, or just not.
func TestLuaAllocShapes(t *testing.T) {
	for _, tt := range []struct {
		name  string
		flags []string
		found bool
		note  string
	}{
		{"the shape", []string{"-DSHAPE=1"}, true, ""},
		{"the shape behind pushes", []string{"-DSHAPE=2"}, true, ""},
		{"the block is asked for first", []string{"-DSHAPE=3"}, false, "none was recognized"},
		{"only the size is asked for", []string{"-DSHAPE=4"}, false, "none was recognized"},
		{"two functions have the shape", []string{"-DSHAPE=5"}, false, "2 functions look like it"},
		{"not a LuaJIT at all", []string{"-DSHAPE=1", "-DPLAIN_LUA"}, false, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := scanFile(t, compile(t, "gcc", "lua.c", append(tt.flags, "-shared", "-fPIC", "-s", "-nostdlib")...), nil)
			found := false
			for _, x := range f.Found {
				found = found || x.Name == "lj_alloc_f"
			}
			notes := ""
			if len(f.Notes) > 0 {
				notes = f.Notes[0]
			}
			if found != tt.found || !strings.Contains(notes, tt.note) || (tt.note == "") != (notes == "") {
				t.Errorf("found %v, notes %q", found, f.Notes)
			}
		})
	}
}
