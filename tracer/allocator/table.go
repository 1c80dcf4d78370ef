package allocator

import (
	"bytes"

	"github.com/allocsnoop/allocsnoop/profile"
)

// group says where a function of the table is looked for.
type group uint8

const (
	groupC        group = iota // the C interface: also under the prefix of an allocator (je_malloc)
	groupSibling               // other entries to the same allocator (__libc_malloc)
	groupJemalloc              // jemalloc's own: only under the prefix of a jemalloc
	groupTcmalloc
	groupMimalloc
	groupCxx // operator new and delete: left out where they forward to a probed function
	groupLua
)

type row struct {
	Function
	group group
}

// The rows below are the single source of what is probed. ZeroSizeFrees is not in them: it belongs to the family that
// the function is found in (see Family.zeroSizeFrees).
var (
	rows   = buildRows()
	byName = indexRows(rows)
)

func buildRows() []row {
	var rs []row
	add := func(g group, f Function) {
		if f.Kind == "" {
			f.Kind = profile.KindMalloc
		}
		rs = append(rs, row{f, g})
	}
	each := func(g group, f Function, names ...string) {
		for _, name := range names {
			f.Name = name
			add(g, f)
		}
	}
	sized := Function{Op: Alloc, Size: 1}
	counted := Function{Op: Alloc, Count: 1, Size: 2}
	aligned := Function{Op: Alloc, Size: 2} // alignment first
	memalign := Function{Op: Alloc, Out: 1, Size: 3, Flags: StatusZero}
	resize := Function{Op: Realloc, Ptr: 1, Size: 2}
	resizeArray := Function{Op: Realloc, Ptr: 1, Count: 2, Size: 3}
	release := Function{Op: Free, Ptr: 1}

	each(groupC, sized, "malloc", "valloc", "pvalloc")
	each(groupC, counted, "calloc")
	each(groupC, aligned, "memalign", "aligned_alloc")
	each(groupC, memalign, "posix_memalign")
	each(groupC, resize, "realloc")
	each(groupC, resizeArray, "reallocarray")
	each(groupC, Function{Op: Realloc, Ptr: 1, Size: 2, Flags: FreesOnFailure}, "reallocf")
	each(groupC, release, "free", "cfree", "free_sized", "free_aligned_sized")

	each(groupSibling, sized, "__libc_malloc", "__libc_valloc", "__libc_pvalloc")
	each(groupSibling, counted, "__libc_calloc")
	each(groupSibling, aligned, "__libc_memalign")
	each(groupSibling, memalign, "__posix_memalign")
	each(groupSibling, resize, "__libc_realloc")
	each(groupSibling, resizeArray, "__libc_reallocarray")
	each(groupSibling, release, "__libc_free", "__libc_cfree")

	each(groupJemalloc, sized, "mallocx", "smallocx")
	each(groupJemalloc, resize, "rallocx")
	each(groupJemalloc, Function{Op: Expand, Ptr: 1, Size: 2, Flags: ExpandReturnsSize}, "xallocx")
	each(groupJemalloc, release, "dallocx", "sdallocx")

	each(groupTcmalloc, sized, "tc_malloc", "tc_valloc", "tc_pvalloc", "tc_malloc_skip_new_handler",
		"tc_new_nothrow", "tc_newarray_nothrow", "tc_new_aligned_nothrow", "tc_newarray_aligned_nothrow")
	each(groupTcmalloc, Function{Op: Alloc, Size: 1, Flags: MayThrow}, "tc_new", "tc_newarray", "tc_new_aligned", "tc_newarray_aligned")
	each(groupTcmalloc, counted, "tc_calloc")
	each(groupTcmalloc, aligned, "tc_memalign")
	each(groupTcmalloc, memalign, "tc_posix_memalign")
	each(groupTcmalloc, resize, "tc_realloc")
	each(groupTcmalloc, release, "tc_free", "tc_cfree", "tc_free_sized", "tc_delete", "tc_deletearray",
		"tc_delete_nothrow", "tc_deletearray_nothrow", "tc_delete_sized", "tc_deletearray_sized",
		"tc_delete_aligned", "tc_deletearray_aligned", "tc_delete_aligned_nothrow", "tc_deletearray_aligned_nothrow",
		"tc_delete_sized_aligned", "tc_deletearray_sized_aligned")

	addMimalloc(each)
	addCxx(each)

	each(groupLua, Function{Op: LuaAlloc, Ptr: 2, Size: 4, Kind: profile.KindLuaJIT}, "lj_alloc_f")
	return rs
}

func addMimalloc(each func(group, Function, ...string)) {
	m := func(f Function, names ...string) { each(groupMimalloc, f, names...) }
	m(Function{Op: Alloc, Size: 1}, "mi_malloc", "mi_malloc_small", "mi_zalloc", "mi_zalloc_small", "mi_valloc", "mi_pvalloc",
		"mi_malloc_aligned", "mi_malloc_aligned_at", "mi_zalloc_aligned", "mi_zalloc_aligned_at",
		"mi_new_nothrow", "mi_new_aligned_nothrow")
	m(Function{Op: Alloc, Size: 1, Flags: MayThrow}, "mi_new", "mi_new_aligned")
	m(Function{Op: Alloc, Count: 1, Size: 2}, "mi_calloc", "mi_mallocn", "mi_calloc_aligned", "mi_calloc_aligned_at")
	m(Function{Op: Alloc, Count: 1, Size: 2, Flags: MayThrow}, "mi_new_n")
	m(Function{Op: Alloc, Size: 2}, "mi_memalign", "mi_aligned_alloc", "mi_heap_malloc", "mi_heap_malloc_small", "mi_heap_zalloc",
		"mi_heap_malloc_aligned", "mi_heap_malloc_aligned_at", "mi_heap_zalloc_aligned", "mi_heap_zalloc_aligned_at")
	m(Function{Op: Alloc, Size: 2, Flags: MayThrow}, "mi_heap_alloc_new")
	m(Function{Op: Alloc, Count: 2, Size: 3}, "mi_heap_calloc", "mi_heap_mallocn", "mi_heap_calloc_aligned", "mi_heap_calloc_aligned_at")
	m(Function{Op: Alloc, Count: 2, Size: 3, Flags: MayThrow}, "mi_heap_alloc_new_n")
	m(Function{Op: Alloc, Out: 1, Size: 3, Flags: StatusZero}, "mi_posix_memalign")
	m(Function{Op: Realloc, Ptr: 1, Size: 2}, "mi_realloc", "mi_rezalloc", "mi_realloc_aligned", "mi_realloc_aligned_at",
		"mi_rezalloc_aligned", "mi_rezalloc_aligned_at")
	m(Function{Op: Realloc, Ptr: 1, Size: 2, Flags: MayThrow}, "mi_new_realloc")
	m(Function{Op: Realloc, Ptr: 1, Count: 2, Size: 3}, "mi_reallocn", "mi_reallocarray", "mi_recalloc", "mi_recalloc_aligned",
		"mi_recalloc_aligned_at", "mi_aligned_recalloc", "mi_aligned_offset_recalloc")
	m(Function{Op: Realloc, Ptr: 1, Count: 2, Size: 3, Flags: MayThrow}, "mi_new_reallocn")
	m(Function{Op: Realloc, Ptr: 1, Count: 2, Size: 3, Flags: StatusZero | PtrIsOut}, "mi_reallocarr")
	m(Function{Op: Realloc, Ptr: 1, Size: 2, Flags: FreesOnFailure}, "mi_reallocf")
	m(Function{Op: Realloc, Ptr: 2, Size: 3}, "mi_heap_realloc", "mi_heap_rezalloc", "mi_heap_realloc_aligned",
		"mi_heap_realloc_aligned_at", "mi_heap_rezalloc_aligned", "mi_heap_rezalloc_aligned_at")
	m(Function{Op: Realloc, Ptr: 2, Count: 3, Size: 4}, "mi_heap_reallocn", "mi_heap_recalloc", "mi_heap_recalloc_aligned",
		"mi_heap_recalloc_aligned_at")
	m(Function{Op: Realloc, Ptr: 2, Size: 3, Flags: FreesOnFailure}, "mi_heap_reallocf")
	m(Function{Op: Expand, Ptr: 1, Size: 2}, "mi_expand")
	m(Function{Op: Free, Ptr: 1}, "mi_free", "mi_cfree", "mi_free_size", "mi_free_aligned", "mi_free_size_aligned")
}

func addCxx(each func(group, Function, ...string)) {
	const aligned, nothrow = "St11align_val_t", "RKSt9nothrow_t"
	for _, form := range []string{"", aligned} {
		each(groupCxx, Function{Op: Alloc, Size: 1, Flags: MayThrow}, "_Znwm"+form, "_Znam"+form)
		each(groupCxx, Function{Op: Alloc, Size: 1}, "_Znwm"+form+nothrow, "_Znam"+form+nothrow)
	}
	for _, form := range []string{"v", "vm", "v" + aligned, "vm" + aligned, "v" + nothrow, "v" + aligned + nothrow} {
		each(groupCxx, Function{Op: Free, Ptr: 1}, "_ZdlP"+form, "_ZdaP"+form)
	}
}

func indexRows(rs []row) map[string]int {
	index := make(map[string]int, len(rs))
	for i, r := range rs {
		index[r.Name] = i
	}
	return index
}

// Functions returns the whole table, in its fixed order.
func Functions() []Function {
	fs := make([]Function, len(rows))
	for i, r := range rows {
		fs[i] = r.Function
	}
	return fs
}

// Lookup finds a function by its plain name, without an allocator's prefix.
func Lookup(name string) (Function, bool) {
	i, ok := byName[name]
	if !ok {
		return Function{}, false
	}
	return rows[i].Function, true
}

// jemallocMarks are functions that no other allocator has; several of them prove a jemalloc under their common prefix.
// The longest come first: "sdallocx" ends in "dallocx" too.
var jemallocMarks = [...]string{"sdallocx", "mallocx", "rallocx", "xallocx", "sallocx", "nallocx", "dallocx"}

// jemallocPrefix returns the prefix under which name is one of jemalloc's marks.
func jemallocPrefix(name []byte) (prefix string, ok bool) {
	if !bytes.HasSuffix(name, []byte("allocx")) {
		return "", false
	}
	for _, mark := range jemallocMarks {
		if base, found := bytes.CutSuffix(name, []byte(mark)); found {
			return string(base), true
		}
	}
	return "", false
}
