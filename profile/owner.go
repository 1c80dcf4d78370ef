package profile

import (
	"regexp"
	"strconv"
	"strings"
)

// Owner is the function that a stack's memory is put down to: the innermost one outside of allocators and of the helper
// functions of libc, libstdc++ and Rust's standard library, which allocate on behalf of whoever calls them.
type Owner struct {
	Function string // or the mark, or "libfoo.so+0x1234" where no name is known
	Source   string // "session.c:42"; empty when unknown
	Mapping  *Mapping
}

// Library is the file name of the owner's shared object; empty when no file backs it.
func (o Owner) Library() string { return baseName(o.Mapping) }

// String is "libenc.so session_new".
func (o Owner) String() string {
	library := o.Library()
	if library == "" || strings.HasPrefix(o.Function, library+"+0x") {
		return o.Function
	}
	return library + " " + o.Function
}

// ShortBuildID is enough of the build-id to tell builds apart by eye.
func (o Owner) ShortBuildID() string {
	if o.Mapping == nil {
		return ""
	}
	return shortID(o.Mapping.BuildID)
}

func shortID(id string) string { return id[:min(len(id), 12)] }

func baseName(m *Mapping) string {
	if m == nil {
		return ""
	}
	return m.File[strings.LastIndexByte(m.File, '/')+1:]
}

// OwnerOf finds the owner of a stack. Where nothing but helpers is known, the outermost frame before the cut stands in.
func OwnerOf(frames []*Location) Owner { return ownerOf(frames, roleOf) }

func ownerOf(frames []*Location, roleOf func(*Location) role) Owner {
	owner := Owner{Function: "[no stack]"}
	for i, l := range frames {
		r := roleOf(l)
		switch {
		case r.owns:
			return r.owner
		case !r.mark || i == 0:
			owner = r.owner
		}
	}
	return owner
}

// role is what a location is to a stack's owner.
type role struct {
	owner Owner // or what stands in for one
	owns  bool  // it is no helper
	mark  bool  // it is no function
}

func roleOf(l *Location) role {
	if l.Mark != "" && len(l.Lines) == 0 {
		return role{Owner{l.Mark, "", l.Mapping}, false, true}
	}
	standIn := frameOwner(l, len(l.Lines)-1)
	if helperFiles.MatchString(baseName(l.Mapping)) {
		return role{standIn, false, false}
	}
	if len(l.Lines) == 0 {
		return role{standIn, true, false}
	}
	for i, line := range l.Lines {
		if !isHelper(line.Function) {
			return role{frameOwner(l, i), true, false}
		}
	}
	return role{standIn, false, false}
}

func frameOwner(l *Location, line int) Owner {
	if line < 0 {
		return Owner{placeName(l), "", l.Mapping}
	}
	return Owner{l.Lines[line].Function, source(l.Lines[line]), l.Mapping}
}

// source is the short form of a line's place: "session.c:42".
func source(l Line) string {
	if l.File == "" {
		return ""
	}
	name := l.File[strings.LastIndexByte(l.File, '/')+1:]
	if l.Line > 0 {
		name += ":" + strconv.Itoa(l.Line)
	}
	return name
}

// placeName names a frame without a symbol so that the name is the same in every process that has the same file.
func placeName(l *Location) string {
	if l.Mapping == nil {
		return "0x" + strconv.FormatUint(l.Address, 16)
	}
	return baseName(l.Mapping) + "+0x" + strconv.FormatUint(l.Address-l.Mapping.Start+l.Mapping.Offset, 16)
}

// helperFiles hold allocators and what allocates on behalf of others.
var helperFiles = regexp.MustCompile(`^(libc|libc-2\.\d+|ld-linux.*|ld-musl.*|ld-2.*|libpthread.*|libjemalloc|libtcmalloc.*|libmimalloc.*|libstdc\+\+|libc\+\+|libc\+\+abi|libgcc_s|libm|libdl|librt)\.so(\.|$)|^ld-musl|^libc\.musl`)

// helperNames are allocator functions and thin wrappers around them, as programs carry them inside.
var helperNames = map[string]bool{}

func init() {
	for _, name := range strings.Fields(`
		malloc calloc realloc reallocarray free posix_memalign aligned_alloc memalign valloc pvalloc cfree mmap mmap64 mremap brk sbrk
		__libc_malloc __libc_calloc __libc_realloc __libc_memalign __mmap strdup strndup __strdup asprintf vasprintf getline getdelim
		mallocx rallocx xallocx je_malloc je_calloc je_realloc je_mallocx tc_malloc tc_calloc tc_realloc tc_new mi_malloc mi_calloc mi_realloc
		xmalloc xcalloc xrealloc xstrdup g_malloc g_malloc0 g_realloc g_strdup g_slice_alloc CRYPTO_malloc CRYPTO_zalloc CRYPTO_realloc
		ngx_alloc ngx_calloc ngx_memalign PyMem_Malloc PyMem_RawMalloc PyMem_Realloc PyObject_Malloc _PyMem_RawMalloc zmalloc zcalloc zrealloc
		__rust_alloc __rust_alloc_zeroed __rust_realloc __rdl_alloc __rdl_realloc __rg_alloc __rg_realloc pthread_create`) {
		helperNames[name] = true
	}
}

var helperPrefixes = []string{
	"std::", "__gnu_cxx::", "operator new", "alloc::", "core::", "hashbrown::", "__rustc::", "boost::container::", "void* operator new",
}

func isHelper(function string) bool {
	if helperNames[function] {
		return true
	}
	name := strings.TrimLeft(qualifiedName(function), "<")
	for _, prefix := range helperPrefixes {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return helperNames[name]
}

// qualifiedName strips parameters and the return type that the names of C++ function templates begin with:
// "std::pair<int, A> mine::make<A>(int)" is mine's function, not std's.
func qualifiedName(function string) string {
	depth, start := 0, 0
	for i, c := range function {
		switch c {
		case '<', '[':
			depth++
		case '>', ']':
			depth--
		case '(':
			if depth == 0 && !strings.HasPrefix(function[i:], "(anonymous namespace)") {
				return function[start:i]
			}
			depth++
		case ')':
			depth--
		case ' ':
			if depth == 0 && !strings.HasSuffix(function[:i], "operator") {
				start = i + 1
			}
		}
	}
	return function[start:]
}
