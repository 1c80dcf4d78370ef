package allocator

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestDefinitionsMeanWhatTheySay(t *testing.T) {
	for _, tt := range []struct {
		name, text string
		alloc      bool
		want       Definition
	}{
		{"an alloc", "libfoo.so:foo_new(size=1)", true,
			Definition{"libfoo.so", Function{Name: "foo_new", Op: Alloc, Size: 1, Kind: "libfoo"}}},
		{"a free", "libfoo.so:foo_del(ptr=1)", false,
			Definition{"libfoo.so", Function{Name: "foo_del", Op: Free, Ptr: 1, Kind: "libfoo"}}},
		{"spaces are allowed", "  libfoo.so:foo_new( size=1 , kind=foo )  ", true,
			Definition{"libfoo.so", Function{Name: "foo_new", Op: Alloc, Size: 1, Kind: "foo"}}},
		{"elements", "libfoo.so.3:foo_array(count=1,size=2)", true,
			Definition{"libfoo.so.3", Function{Name: "foo_array", Op: Alloc, Count: 1, Size: 2, Kind: "libfoo"}}},
		{"the address in a variable", "/opt/foo.so:f(out=1,size=3)", true,
			Definition{"/opt/foo.so", Function{Name: "f", Op: Alloc, Out: 1, Size: 3, Kind: "foo", Flags: StatusZero}}},
		{"the address in a variable, true is success", "foo:f(out=2,size=1,status=nonzero)", true,
			Definition{"foo", Function{Name: "f", Op: Alloc, Out: 2, Size: 1, Kind: "foo", Flags: StatusNonZero}}},
		{"the result by its name", "foo:f(out=ret,size=1)", true,
			Definition{"foo", Function{Name: "f", Op: Alloc, Size: 1, Kind: "foo"}}},
		{"a realloc", "foo:f(ptr=1,size=2,zero=frees,failure=frees,width=int)", true,
			Definition{"foo", Function{Name: "f", Op: Realloc, Ptr: 1, Size: 2, Kind: "foo", Flags: ZeroSizeFrees | FreesOnFailure | IntSize}}},
		{"a pool is made", "nginx:ngx_create_pool(pool=ret)", true,
			Definition{"nginx", Function{Name: "ngx_create_pool", Op: PoolCreate, Kind: "nginx"}}},
		{"a block of a pool", "nginx:ngx_palloc(pool=1,size=2)", true,
			Definition{"nginx", Function{Name: "ngx_palloc", Op: PoolAlloc, Pool: 1, Size: 2, Kind: "nginx"}}},
		{"a pool dies", "nginx:ngx_destroy_pool(pool=1)", false,
			Definition{"nginx", Function{Name: "ngx_destroy_pool", Op: PoolDestroy, Pool: 1, Kind: "nginx"}}},
		{"one block of a pool is freed", "nginx:ngx_pfree(pool=1,ptr=2)", false,
			Definition{"nginx", Function{Name: "ngx_pfree", Op: Free, Pool: 1, Ptr: 2, Kind: "nginx"}}},
		{"any file, a mangled name", "*:_ZN3foo3newEm(size=1,kind=foo)", true,
			Definition{"*", Function{Name: "_ZN3foo3newEm", Op: Alloc, Size: 1, Kind: "foo"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			parse := ParseFree
			if tt.alloc {
				parse = ParseAlloc
			}
			got, err := parse(tt.text)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDefinitionErrorsNameThePlace(t *testing.T) {
	for _, tt := range []struct {
		text   string
		alloc  bool
		column int
		says   string
	}{
		{"", true, 1, "the file is missing"},
		{"libfoo.so", true, 10, "a colon is missing"},
		{"libfoo.so:", true, 11, "the function's name is missing"},
		{"libfoo.so:f", true, 12, "the arguments are missing; write f(size=1)"},
		{"libfoo.so:f", false, 12, "write f(ptr=1)"},
		{"libfoo.so:f()", true, 13, "an argument is missing"},
		{"libfoo.so:f(size)", true, 17, "size needs a value"},
		{"libfoo.so:f(size=)", true, 18, "size needs a value"},
		{"libfoo.so:f(size=1", true, 19, "the closing parenthesis is missing"},
		{"libfoo.so:f(size=1 2)", true, 20, "a comma"},
		{"libfoo.so:f(size=1) x", true, 21, "something follows"},
		{"libfoo.so:f(size=0)", true, 13, "1 to 6"},
		{"libfoo.so:f(size=7)", true, 13, "1 to 6"},
		{"libfoo.so:f(size=99999999999999999999)", true, 13, "1 to 6"},
		{"libfoo.so:f(size=1,size=2)", true, 20, "given twice"},
		{"libfoo.so:f(count=1)", true, 13, "count=N needs size=N"},
		{"libfoo.so:f(ptr=1)", true, 1, "needs size=N"},
		{"libfoo.so:f(size=1)", false, 13, "unknown argument \"size\" of a free"},
		{"libfoo.so:f(kind=foo)", false, 1, "needs ptr=N"},
		{"libfoo.so:f(size=1,colour=2)", true, 20, "unknown argument \"colour\""},
		{"libfoo.so:f(size=1,kind=malloc)", true, 20, "kind=malloc is taken"},
		{"libfoo.so:f(size=1,kind=a/b)", true, 20, "letters"},
		{"libfoo.so:f(size=1,status=zero)", true, 20, "give out=N"},
		{"libfoo.so:f(out=2,size=1,status=maybe)", true, 26, "one of nonzero, zero"},
		{"libfoo.so:f(size=1,zero=frees)", true, 1, "give ptr=N"},
		{"nginx:f(pool=ret,ptr=1)", true, 9, "no other pool"},
		{"nginx:f(pool=1,ptr=2,size=3)", true, 16, "not supported"},
		{"*:f(size=1)", true, 1, "add kind=NAME"},
		{"foo:Foo::alloc(size=1)", true, 8, "mangled name"},
		{"foo:f(size=1)\x1b[31m", true, 14, "not printable"},
		{strings.Repeat("x", 2000), true, 1, "longer than"},
	} {
		t.Run(tt.text[:min(len(tt.text), 40)], func(t *testing.T) {
			parse := ParseFree
			if tt.alloc {
				parse = ParseAlloc
			}
			_, err := parse(tt.text)
			var syntax *SyntaxError
			if !errors.As(err, &syntax) {
				t.Fatalf("error is %v", err)
			}
			if syntax.Column != tt.column || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%v; want column %d and %q", err, tt.column, tt.says)
			}
		})
	}
}

func TestFunctionsFile(t *testing.T) {
	got, err := ParseFunctions("my.functions", strings.NewReader("# pools\n\n  alloc a.so:f(size=1)   # the maker\r\n\tfree a.so:g(ptr=1)\n"))
	if err != nil || len(got) != 2 || got[0].Name != "f" || got[1].Op != Free {
		t.Errorf("%v, %v", got, err)
	}
	_, err = ParseFunctions("my.functions", strings.NewReader("alloc a.so:f(size=1)\nalloc a.so:g(size=x)\n"))
	if want := "my.functions:2:14: size=x: a position of an argument is 1 to 6"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	_, err = ParseFunctions("my.functions", strings.NewReader("malloc a.so:f(size=1)\n"))
	if err == nil || !strings.Contains(err.Error(), "my.functions:1:1: \"malloc\" is neither alloc nor free") {
		t.Error(err)
	}
	if _, err = ParseFunctions("my.functions", strings.NewReader("\n"+strings.Repeat("x", 5000))); err == nil {
		t.Error("a line of 5000 bytes was read")
	}
}

func TestShippedDefinitionsArePairsAndReadBack(t *testing.T) {
	for _, name := range Shipped() {
		t.Run(name, func(t *testing.T) {
			definitions, err := ShippedDefinitions(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := CheckPairs(definitions); err != nil {
				t.Error(err)
			}
			var text strings.Builder
			for _, d := range definitions {
				fmt.Fprintln(&text, d)
			}
			again, err := ParseFunctions("again", strings.NewReader(text.String()))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(definitions, again); diff != "" {
				t.Error(diff)
			}
		})
	}
	if _, err := ShippedDefinitions("../table.go"); err == nil {
		t.Error("a name outside the set was read")
	}
}

func TestHalfAPairIsRefused(t *testing.T) {
	alloc, _ := ParseAlloc("a.so:f(size=1)")
	free, _ := ParseFree("b.so:g(ptr=1)")
	if err := CheckPairs([]Definition{alloc, free}); err == nil || !strings.Contains(err.Error(), "kind=a") {
		t.Error(err)
	}
	if err := CheckPairs([]Definition{free}); err == nil || !strings.Contains(err.Error(), "--alloc") {
		t.Error(err)
	}
	free.Kind = alloc.Kind
	if err := CheckPairs([]Definition{alloc, free}); err != nil {
		t.Error(err)
	}
}

func TestLibraryMatching(t *testing.T) {
	for _, tt := range []struct {
		library, path string
		want          bool
	}{
		{"libfoo.so", "/usr/lib/libfoo.so.3.1", true},
		{"libfoo", "/usr/lib/libfoo.so.3.1", true},
		{"libfoo.so.3", "/usr/lib/libfoo.so.3", true},
		{"libfoo.so.3", "/usr/lib/libfoo.so.31", false},
		{"libfoo", "/usr/lib/libfoobar.so", false},
		{"/usr/lib/libfoo.so", "/usr/lib/libfoo.so", true},
		{"/opt/libfoo.so", "/usr/lib/libfoo.so", false},
		{"nginx", "/usr/sbin/nginx", true},
		{"nginx", "/usr/sbin/nginx-debug", false},
		{"*", "/anything", true},
	} {
		if got := (Definition{Library: tt.library}).Matches(tt.path); got != tt.want {
			t.Errorf("%s matches %s: %v", tt.library, tt.path, got)
		}
	}
}

func TestDeclaredFunctionsAreFoundInRealFiles(t *testing.T) {
	for _, tt := range []struct {
		set, path string
		want      int
	}{
		{"nginx", "/usr/sbin/nginx", 8},
		{"openssl", libs + "libcrypto.so.3", 6}, // no CRYPTO_aligned_alloc before OpenSSL 3.4
	} {
		definitions, err := ShippedDefinitions(tt.set)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(tt.path); err != nil {
			t.Fatalf("a package of test/packages.txt is missing: %v", err)
		}
		f := scanFile(t, tt.path, &Options{Declared: DeclaredFor(definitions, tt.path)})
		n := 0
		for _, x := range f.Found {
			if x.Family == FamilyDeclared {
				n++
			}
		}
		if n != tt.want {
			t.Errorf("%s: %d functions in %s, want %d", tt.set, n, tt.path, tt.want)
		}
	}
}

func FuzzParseFunctions(f *testing.F) {
	for _, name := range Shipped() {
		data, _ := shippedFiles.ReadFile("functions/" + name)
		f.Add(string(data))
	}
	f.Add("alloc a:b(out=1,size=2,status=nonzero)")
	f.Fuzz(func(t *testing.T, text string) {
		definitions, err := ParseFunctions("fuzz", strings.NewReader(text))
		if err != nil {
			return
		}
		for _, d := range definitions {
			again, err := ParseFunctions("again", strings.NewReader(d.String()))
			if err != nil || len(again) != 1 || again[0] != d {
				t.Fatalf("%q reads back as %v, %v", d, again, err)
			}
		}
	})
}
