package allocator

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ulikunitz/xz"
)

const libs = "/usr/lib/x86_64-linux-gnu/"

func scanFile(t *testing.T, path string, options *Options) *File {
	t.Helper()
	r, err := os.Open(path)
	if err != nil {
		t.Fatalf("open a package of test/packages.txt: %v", err)
	}
	defer r.Close()
	file, err := Scan(r, options)
	if err != nil {
		t.Fatalf("scan %s: %v", path, err)
	}
	return file
}

func find(t *testing.T, f *File, name string) Found {
	t.Helper()
	for _, x := range f.Found {
		if slices.Contains(x.Names(), name) {
			return x
		}
	}
	t.Fatalf("%s was not found", name)
	return Found{}
}

func buildID(t *testing.T, path string) string {
	t.Helper()
	ef, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ef.Close()
	s := ef.Section(".note.gnu.build-id")
	if s == nil {
		return ""
	}
	data, err := s.Data()
	if err != nil || len(data) < 16 {
		t.Fatal("build-id note is cut short")
	}
	return fmt.Sprintf("%x", data[16:])
}

// The measured placements: any other build may have other offsets, so that the exact ones are tied to a build-id.
func TestPlacementInDebianLibraries(t *testing.T) {
	for _, tt := range []struct {
		path, buildID string
		family        Family
		offsets       map[string]uint64
		skipped       []string
	}{
		{libs + "libc.so.6", "93ac61ec5a8eb1396f9fbd350e3169a558528a40", FamilyGlibc, map[string]uint64{
			"malloc": 0, "free": 3, "cfree": 3, "calloc": 0, "realloc": 0, "posix_memalign": 7, "memalign": 7,
			"aligned_alloc": 7, "valloc": 7, "pvalloc": 7, "__libc_malloc": 0,
		}, []string{"reallocarray"}},
		{"/usr/lib/x86_64-linux-musl/libc.so", "54d00df44fce62f541ca62b56bdef5bf31ff077c", FamilyMusl, map[string]uint64{
			"malloc": 0, "free": 0, "calloc": 0, "realloc": 0, "posix_memalign": 0, "aligned_alloc": 0, "reallocarray": 6,
		}, []string{"valloc", "memalign"}},
		{libs + "libjemalloc.so.2", "1d5163c246dc9cd2b4d339f2ac42efd95c6e0ae1", FamilyJemalloc, map[string]uint64{
			"malloc": 7, "free": 48, "calloc": 0, "realloc": 0, "posix_memalign": 0, "memalign": 0, "aligned_alloc": 0,
			"valloc": 0, "mallocx": 0, "xallocx": 0, "dallocx": 0, "rallocx": 2, "sdallocx": 10, "_Znwm": 7, "_ZdlPvm": 3,
		}, []string{"_ZdlPv", "_ZdaPv", "_Znam"}},
		{libs + "libtcmalloc.so.4", "560cd227169ae8f93cb59e3215f4ea11c299fa69", FamilyTcmalloc, map[string]uint64{
			"malloc": 13, "free": 10, "calloc": 12, "realloc": 0, "posix_memalign": 11, "memalign": 10, "aligned_alloc": 10,
			"valloc": 0, "_Znwm": 13, "_Znam": 13, "_ZdlPvm": 10, "cfree": 10, "tc_free": 10, "_ZdlPv": 10, "_ZdaPv": 10,
		}, nil},
		{libs + "libtcmalloc_minimal.so.4", "39dfd4a5855703fa6c2469749282f75b18a1aa66", FamilyTcmalloc, map[string]uint64{
			"malloc": 10, "free": 10, "_Znwm": 10, "calloc": 0,
		}, nil},
		{libs + "libmimalloc.so.2.0", "d07f4e7dc9a039fcbe7747f416476bd65cb48e8b", FamilyMimalloc, map[string]uint64{
			"malloc": 21, "free": 6, "mi_free": 6, "_ZdlPv": 6, "mi_heap_realloc": 2, "_Znwm": 0, "mi_expand": 0,
		}, []string{"valloc", "cfree", "realloc", "_ZdlPvm"}},
		{libs + "libstdc++.so.6", "289ee39f8c07bd4fa48102dfeeb7e6f9c76158b4", FamilyCxx, map[string]uint64{
			"_ZnwmSt11align_val_t": 4,
		}, []string{"_Znwm", "_Znam", "_ZnwmRKSt9nothrow_t", "_ZdlPv", "_ZdlPvm", "_ZdlPvSt11align_val_t", "_ZdaPvmSt11align_val_t"}},
	} {
		t.Run(filepath.Base(tt.path), func(t *testing.T) {
			f := scanFile(t, tt.path, nil)
			if f.Family != tt.family {
				t.Errorf("family %q, want %q", f.Family, tt.family)
			}
			for _, x := range f.Found {
				if x.Place.Offset > 0 && !x.Place.Emulated {
					t.Errorf("%s: moved to +%d without being emulated", x.Name, x.Place.Offset)
				}
			}
			for _, name := range tt.skipped {
				if !slices.ContainsFunc(f.Skipped, func(s Skipped) bool { return s.Name == name }) {
					t.Errorf("%s is a forwarder and should be skipped", name)
				}
			}
			if id := buildID(t, tt.path); id != tt.buildID {
				t.Skipf("exact offsets are known for build-id %s, this is %s", tt.buildID, id)
			}
			for name, want := range tt.offsets {
				if got := find(t, f, name).Place; got.Offset != want || got.Emulated == (name == "") {
					t.Errorf("%s: at +%d %s (%s), want +%d", name, got.Offset, got.Instruction, got.Why, want)
				}
			}
		})
	}
}

func TestMimallocsSizeIsFollowedIntoAnotherRegister(t *testing.T) {
	f := scanFile(t, libs+"libmimalloc.so.2.0", &Options{Rules: Rules{RAX: true}})
	if id := buildID(t, libs+"libmimalloc.so.2.0"); id != "d07f4e7dc9a039fcbe7747f416476bd65cb48e8b" {
		t.Skipf("the registers are known for another build, this is %s", id)
	}
	malloc, calloc := find(t, f, "malloc"), find(t, f, "calloc")
	if got := malloc.AtProbe(); got.Size != 2 || malloc.Size != 1 {
		t.Errorf("malloc's size is argument %d, at the probe %d, want 1 and 2", malloc.Size, got.Size)
	}
	if got := calloc.AtProbe(); got.Count != ArgRAX || got.Size != 2 || !calloc.Place.Emulated {
		t.Errorf("calloc's count and size are at %d and %d (%+v), want rax and 2", got.Count, got.Size, calloc.Place)
	}
}

func TestAliasesStandOnce(t *testing.T) {
	f := scanFile(t, libs+"libc.so.6", nil)
	got := find(t, f, "cfree")
	if got.Name != "free" || !slices.Contains(got.Aliases, "__libc_free") {
		t.Errorf("free's group is %v", got.Names())
	}
	offsets := map[uint64]string{}
	for _, x := range f.Found {
		if other, twice := offsets[x.Offset]; twice {
			t.Errorf("%s and %s are probed at the same offset", other, x.Name)
		}
		offsets[x.Offset] = x.Name
	}
}

// compile builds a C file from testdata and returns the program's path.
func compile(t *testing.T, compiler, source string, flags ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "prog")
	args := append([]string{"-O2", "-o", out, filepath.Join("testdata", source)}, flags...)
	if output, err := exec.Command(compiler, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", compiler, strings.Join(args, " "), err, output)
	}
	return out
}

func TestAllocatorsInsideExecutables(t *testing.T) {
	for _, tt := range []struct {
		name, compiler string
		flags          []string
		family         Family
		want, absent   []string
		note           string
	}{
		{"static glibc", "gcc", []string{"-static"}, FamilyGlibc, []string{"malloc", "free", "calloc", "realloc"}, nil, ""},
		{"static glibc, position independent", "gcc", []string{"-static-pie"}, FamilyGlibc, []string{"malloc", "free"}, nil, ""},
		{"static glibc, stripped", "gcc", []string{"-static", "-s"}, "", nil, []string{"malloc"}, "cannot be probed"},
		{"static musl", "musl-gcc", []string{"-static"}, FamilyMusl,
			[]string{"__libc_malloc_impl", "__libc_free", "__libc_realloc", "calloc"}, []string{"malloc", "free", "__libc_malloc"}, ""},
		{"dynamic glibc has no allocator of its own", "gcc", nil, "", nil, []string{"malloc", "free"}, ""},
		{"own malloc in the executable", "gcc", []string{"-DOWN_MALLOC"}, FamilyOther, []string{"malloc", "free"}, nil, ""},
		{"a local function named free is no allocator", "gcc", []string{"-DLOCAL_FREE"}, "", nil, []string{"free"}, ""},
		{"a jemalloc under a prefix", "gcc", []string{"-DPREFIXED"}, FamilyJemalloc,
			[]string{"_rjem_malloc", "_rjem_sdallocx"}, []string{"malloc", "_rjem_nallocx"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := scanFile(t, compile(t, tt.compiler, "program.c", tt.flags...), nil)
			if f.Family != tt.family || !f.Executable {
				t.Errorf("family %q, executable %v, want %q, true", f.Family, f.Executable, tt.family)
			}
			for _, name := range tt.want {
				find(t, f, name)
			}
			for _, x := range f.Found {
				for _, name := range tt.absent {
					if slices.Contains(x.Names(), name) {
						t.Errorf("%s should not be probed", name)
					}
				}
			}
			if !strings.Contains(strings.Join(f.Notes, "\n"), tt.note) {
				t.Errorf("notes %q do not say %q", f.Notes, tt.note)
			}
		})
	}
}

func TestSymbolsInGnuDebugdataAreRead(t *testing.T) {
	program := compile(t, "musl-gcc", "program.c", "-static")
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
	}
	mini, packed := program+".mini", program+".mini.xz"
	run("objcopy", "-S", "--keep-symbol=__libc_malloc_impl", "--keep-symbol=__libc_free", program, mini)
	data, err := os.ReadFile(mini)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(packed, out.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	run("strip", program)
	run("objcopy", "--add-section", ".gnu_debugdata="+packed, program)
	f := scanFile(t, program, nil)
	if f.Family != FamilyMusl {
		t.Errorf("family %q, notes %q", f.Family, f.Notes)
	}
	find(t, f, "__libc_malloc_impl")
	find(t, f, "__libc_free")
}

func TestScanRefusesOtherFiles(t *testing.T) {
	for _, data := range [][]byte{nil, []byte("#!/bin/sh\n"), []byte("\x7fELF\x01\x01\x01"), bytes.Repeat([]byte{0}, 4096)} {
		if _, err := Scan(bytes.NewReader(data), nil); !errors.Is(err, ErrNotELF) {
			t.Errorf("scan of %d bytes: %v, want ErrNotELF", len(data), err)
		}
	}
}

func TestSelectProbesEachFileOnceAndNamesWhatIsInForce(t *testing.T) {
	libc := scanFile(t, libs+"libc.so.6", nil)
	je := scanFile(t, libs+"libjemalloc.so.2", nil)
	loader := &File{SONAME: "ld-linux-x86-64.so.2", Found: []Found{{Function: Function{Name: "malloc", Op: Alloc, Size: 1}}}}
	program := &File{Executable: true}
	plan := Select([]MappedFile{
		{ID: FileID{1, 2}, Path: "/bin/prog", File: program},
		{ID: FileID{1, 3}, Path: "/lib/libc.so.6", File: libc},
		{ID: FileID{1, 3}, Path: "/lib/libc.so.6", File: libc},
		{ID: FileID{1, 4}, Path: "/lib/libjemalloc.so.2", File: je},
		{ID: FileID{1, 7}, Path: "/lib/libgcc_s.so.1", File: scanFile(t, libs+"libgcc_s.so.1", nil)},
		{ID: FileID{1, 5}, Path: "/lib64/ld-linux-x86-64.so.2", File: loader},
		{ID: FileID{1, 6}, Path: "/lib/broken.so", Err: os.ErrPermission},
	})
	if want := "jemalloc (/lib/libjemalloc.so.2)"; plan.InForce != want {
		t.Errorf("in force is %q, want %q", plan.InForce, want)
	}
	if got, want := len(plan.Probes), len(libc.Found)+len(je.Found); got != want {
		t.Errorf("%d probes, want %d", got, want)
	}
	for _, p := range plan.Probes {
		if want := p.Path == "/lib/libjemalloc.so.2"; p.AllocatorOnly != want {
			t.Errorf("%s of %s: a library that is an allocator and nothing else: %t", p.Name, p.Path, p.AllocatorOnly)
		}
	}
	if diff := cmp.Diff([]string{"/lib/broken.so: not looked into: permission denied"}, plan.Notes); diff != "" {
		t.Error(diff)
	}
}

func TestFunctionsThatThrowNeedTheUnwinder(t *testing.T) {
	allocating := Found{Function: Function{Name: "malloc", Op: Alloc, Size: 1}}
	throwing := Found{Function: Function{Name: "_Znwm", Op: Alloc, Size: 1, Flags: MayThrow}}
	wrapping := Found{Function: Function{Name: "_ZnwmSt11align_val_t", Op: Wrap, Size: 1, Flags: MayThrow}}
	unwinder := Unwinder{Name: "_Unwind_RaiseException", Offset: 0x1000}
	caught := Unwinder{Name: "__cxa_begin_catch", Offset: 0x2000, Caught: true}
	for _, tt := range []struct {
		name            string
		found           []Found
		exceptions      bool
		unwinders       []Unwinder
		probes, watched int
		notes           int
	}{
		{"with the unwinder both are probed", []Found{allocating, throwing}, true, []Unwinder{unwinder, caught}, 2, 2, 0},
		{"without it the one that may throw is left alone, and that is said", []Found{allocating, throwing}, true, []Unwinder{caught}, 1, 0, 1},
		{"where nothing can throw all are probed", []Found{allocating, throwing}, false, nil, 2, 0, 0},
		{"where none may throw the unwinder is left alone", []Found{allocating}, true, []Unwinder{unwinder, caught}, 1, 0, 0},
		{"only return probes are in an exception's way", []Found{wrapping}, true, nil, 1, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan := Select([]MappedFile{{ID: FileID{1, 2}, Path: "/bin/prog", File: &File{
				Executable: true, Found: tt.found, Exceptions: tt.exceptions, Unwinders: tt.unwinders,
			}}})
			if len(plan.Probes) != tt.probes || len(plan.Unwinders) != tt.watched || len(plan.Notes) != tt.notes {
				t.Errorf("%d probes, %d unwinders, notes %q; want %d, %d and %d notes",
					len(plan.Probes), len(plan.Unwinders), plan.Notes, tt.probes, tt.watched, tt.notes)
			}
		})
	}
}

func TestRuntimeWithinAFileWithoutSymbolsIsNoOtherFiles(t *testing.T) {
	throwing := Found{Function: Function{Name: "_Znwm", Op: Alloc, Size: 1, Flags: MayThrow}}
	library := MappedFile{ID: FileID{1, 3}, Path: "/lib/libgcc_s.so.1", File: &File{
		Unwinders: []Unwinder{{Name: "_Unwind_RaiseException", Offset: 0x1000}},
	}}
	for _, tt := range []struct {
		name            string
		own             bool
		probes, watched int
	}{
		{"a program that asks the library is probed", false, 1, 1},
		{"one that has a hidden runtime is left alone", true, 0, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			plan := Select([]MappedFile{
				{ID: FileID{1, 2}, Path: "/bin/prog", File: &File{Executable: true, Found: []Found{throwing}, Exceptions: true, OwnRuntime: tt.own}},
				library,
			})
			if len(plan.Probes) != tt.probes || len(plan.Unwinders) != tt.watched {
				t.Errorf("%d probes, %d unwinders, notes %q; want %d and %d", len(plan.Probes), len(plan.Unwinders), plan.Notes, tt.probes, tt.watched)
			}
		})
	}
}

func TestLibrariesOfDebianBringNoRuntimeAlong(t *testing.T) {
	for _, name := range []string{"libjemalloc.so.2", "libtcmalloc.so.4", "libtcmalloc_minimal.so.4"} {
		if scanFile(t, libs+name, nil).OwnRuntime {
			t.Errorf("%s asks libgcc_s for its unwinder, and is said to have one of its own", name)
		}
	}
}

func TestUnwindersOfDebian(t *testing.T) {
	for path, want := range map[string][]string{
		libs + "libgcc_s.so.1":    {"_Unwind_ForcedUnwind", "_Unwind_RaiseException", "_Unwind_Resume", "_Unwind_Resume_or_Rethrow"},
		libs + "libstdc++.so.6":   {"__cxa_begin_catch"},
		libs + "libjemalloc.so.2": nil,
	} {
		var got []string
		for _, u := range scanFile(t, path, nil).Unwinders {
			got = append(got, u.Name)
		}
		slices.Sort(got)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", path, diff)
		}
	}
}

func TestOperatorNewThatRoundsTheSizeIsAWrap(t *testing.T) {
	f := scanFile(t, libs+"libstdc++.so.6", nil)
	if got := find(t, f, "_ZnwmSt11align_val_t"); got.Op != Wrap {
		t.Errorf("libstdc++'s aligned operator new is %v, want wrap", got.Op)
	}
	for _, name := range []string{"_ZnamSt11align_val_t", "_ZnwmSt11align_val_tRKSt9nothrow_t"} {
		if !slices.ContainsFunc(f.Skipped, func(s Skipped) bool { return s.Name == name }) {
			t.Errorf("%s forwards to it and should be skipped", name)
		}
	}
	if got := find(t, scanFile(t, libs+"libjemalloc.so.2", nil), "_ZnwmSt11align_val_t"); got.Op != Alloc {
		t.Errorf("jemalloc's aligned operator new is %v, want alloc", got.Op)
	}
}

func FuzzScan(f *testing.F) {
	code := []byte("\x48\x85\xff\x74\x10\xc3\x53\x5b\xc3\xe9\xf2\xff\xff\xff\x48\x8d\x05\x00\x00\x00\x00\xc3")
	f.Add(syntheticELF(code, []syntheticSymbol{
		{name: "free", size: 6}, {name: "malloc", offset: 6, size: 3}, {name: "cfree", offset: 9, size: 5},
		{name: "_rjem_mallocx", offset: 6}, {name: "calloc", offset: 14, size: 8, ifunc: true},
		{name: "luaJIT_setmode", offset: 6}, {name: "lua_newstate", offset: 14, size: 8},
	}))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Scan(bytes.NewReader(data), nil)
		if (file == nil) == (err == nil) {
			t.Fatal("neither a file nor an error")
		}
	})
}
