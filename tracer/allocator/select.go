package allocator

import (
	"fmt"
	"slices"
	"strings"
)

// FileID is what makes two paths the same file: a probe belongs to an inode.
type FileID struct {
	Device, Inode uint64
}

// MappedFile is a file that is mapped executable into a process.
type MappedFile struct {
	ID   FileID
	Path string // as the target sees it
	// OpenPath leads to the very file that is mapped; uprobes are attached through it.
	OpenPath string
	BuildID  string
	File     *File // nil when it could not be read; then Err says why
	Err      error
	// Patched are the addresses (Found.Address) of functions whose code in memory is not the file's.
	Patched []uint64
}

// Probe is one function of one file that has to be probed.
type Probe struct {
	ID   FileID
	Path string
	// OpenPath is a path of this machine for attaching.
	OpenPath string
	BuildID  string
	// AllocatorOnly is whether its file is an allocator's own library: whatever code in it maps is for blocks.
	AllocatorOnly bool
	Found
}

// SkippedProbe is a function of one file that is left alone.
type SkippedProbe struct {
	Path string `json:"path"`
	Skipped
}

// Plan says what to probe in a process.
type Plan struct {
	// InForce is the allocator that the process's ordinary calls of malloc reach, as a person reads it.
	InForce string
	Probes  []Probe
	Skipped []SkippedProbe
	Notes   []string
	// Unwinders have to be probed before any probe of a function that MayThrow; empty when there is none of those.
	Unwinders []UnwinderProbe
}

// UnwinderProbe is an unwinder in a file of the process.
type UnwinderProbe struct {
	ID   FileID
	Path string
	Unwinder
}

// Select decides what to probe, given the files mapped into a process, the executable first. All real allocators are
// probed, not only the one in force: a plugin loaded with RTLD_DEEPBIND calls libc's malloc beside a preloaded one,
// and a function that nobody calls costs nothing.
func Select(files []MappedFile) Plan {
	var plan Plan
	seen := map[FileID]bool{}
	for _, m := range files {
		if seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		if m.Err != nil {
			plan.Notes = append(plan.Notes, fmt.Sprintf("%s: not looked into: %v", m.Path, m.Err))
		}
		if m.File == nil {
			continue
		}
		plan.add(m)
	}
	plan.guardExceptions(files)
	plan.InForce = inForce(files)
	if len(plan.Probes) == 0 {
		note := "no allocator function found in any mapped file: only brk and mmap can be seen"
		if len(files) > 0 {
			note = files[0].Path + ": " + note
		}
		plan.Notes = append(plan.Notes, note)
	}
	return plan
}

func (p *Plan) add(m MappedFile) {
	for _, note := range m.File.Notes {
		p.Notes = append(p.Notes, m.Path+": "+note)
	}
	skip := func(f Found, why string) {
		for _, name := range f.Names() {
			p.Skipped = append(p.Skipped, SkippedProbe{m.Path, Skipped{name, why}})
		}
	}
	for _, s := range m.File.Skipped {
		p.Skipped = append(p.Skipped, SkippedProbe{m.Path, s})
	}
	for _, f := range m.File.Found {
		if callsMallocBeside(f) {
			if !alignedNew(f.Name) {
				skip(f, "calls the malloc beside it, which is probed")
				continue
			}
			f.Op = Wrap
		}
		if isLoader(m.File) && f.Family != FamilyDeclared {
			skip(f, "the loader's own, used before libc is there; nothing of it is ever freed")
			continue
		}
		if slices.Contains(m.Patched, f.Address) {
			skip(f, "its code in memory is not the file's: another tool has patched it, and a probe would break that")
			p.Notes = append(p.Notes, fmt.Sprintf("%s: %s is patched in memory and not probed: its blocks are not seen", m.Path, f.Name))
			continue
		}
		p.Probes = append(p.Probes, Probe{ID: m.ID, Path: m.Path, OpenPath: m.OpenPath, BuildID: m.BuildID, AllocatorOnly: isAllocatorOnly(m.File), Found: f})
	}
}

// callsMallocBeside picks out operator new of programs that bring glibc and libstdc++ along. The proof of a forwarder is
// beyond its loop.
func callsMallocBeside(f Found) bool {
	return f.Family == FamilyGlibc && f.Op == Alloc && tableGroup(f.Name) == groupCxx
}

// guardExceptions looks for the unwinders that functions with return probes need where an exception may leave them.
// Without them such functions stay unprobed, or the target would end in std::terminate. Where no file has exceptions at
// all, a function that could throw has nothing to throw with.
func (p *Plan) guardExceptions(files []MappedFile) {
	if !slices.ContainsFunc(p.Probes, Probe.Throws) {
		return
	}
	exceptions, found := false, false
	seen := map[FileID]bool{}
	for _, m := range files {
		if m.File == nil || seen[m.ID] {
			continue
		}
		seen[m.ID] = true
		exceptions = exceptions || m.File.Exceptions
		for _, u := range m.File.Unwinders {
			p.Unwinders = append(p.Unwinders, UnwinderProbe{m.ID, m.Path, u})
			found = found || !u.Caught
		}
	}
	if exceptions && !found {
		p.WithoutThrowing("the unwinder was not found")
		return
	}
	for _, m := range files {
		// A runtime within, without symbols: the unwinders of other files are not its own.
		if m.File != nil && m.File.OwnRuntime && !slices.ContainsFunc(m.File.Unwinders, func(u Unwinder) bool { return !u.Caught }) {
			p.withoutThrowing("the unwinder within this file has no symbol", func(a Probe) bool { return a.ID == m.ID })
		}
	}
}

// WithoutThrowing takes the probes out of functions that an exception may leave.
func (p *Plan) WithoutThrowing(why string) {
	p.withoutThrowing(why, func(Probe) bool { return true })
}

// withoutThrowing does so with some of them. Without any that is left the unwinders are left alone too.
func (p *Plan) withoutThrowing(why string, match func(Probe) bool) {
	defer func() {
		if !slices.ContainsFunc(p.Probes, Probe.Throws) {
			p.Unwinders = nil
		}
	}()
	p.Probes = slices.DeleteFunc(p.Probes, func(a Probe) bool {
		if !a.Throws() || !match(a) {
			return false
		}
		for _, name := range a.Names() {
			p.Skipped = append(p.Skipped, SkippedProbe{a.Path, Skipped{name, "an exception that leaves a return probe would end the program"}})
		}
		p.Notes = append(p.Notes, fmt.Sprintf("%s: %s is not probed and its blocks are not seen: an exception that leaves a return probe "+
			"would end the program, and %s", a.Path, a.Name, why))
		return true
	})
}

// Throws reports whether an exception may leave the function while its return is probed.
func (p Probe) Throws() bool { return p.Flags&MayThrow != 0 && p.Op.NeedsReturn() }

// isAllocatorOnly picks out libjemalloc.so.2 and libmimalloc-secure.so.2: not programs and libraries that have such an
// allocator linked into them. libtcmalloc has a mmap in it that the program's own calls go through.
func isAllocatorOnly(f *File) bool {
	switch f.Family {
	case FamilyJemalloc, FamilyMimalloc:
		return strings.HasPrefix(f.SONAME, "lib"+string(f.Family))
	}
	return false
}

// isLoader: glibc's ld.so had a minimal malloc of its own up to 2.33. musl's loader is its libc.
func isLoader(f *File) bool {
	return strings.HasPrefix(f.SONAME, "ld-linux") || strings.HasPrefix(f.SONAME, "ld64.")
}

// inForce names the file that defines malloc for the process. Symbols are looked up in the executable, then in the
// preloaded and linked libraries in their order; libc comes last in practice, being what the others need.
func inForce(files []MappedFile) string {
	rank := func(m MappedFile) int {
		if m.File == nil || isLoader(m.File) || !definesMalloc(m.File) {
			return 0
		}
		switch {
		case m.File.Executable:
			return 3
		case m.File.Family == FamilyGlibc, m.File.Family == FamilyMusl:
			return 1
		}
		return 2
	}
	best, bestRank := "", 0
	for _, m := range files {
		if r := rank(m); r > bestRank {
			best, bestRank = fmt.Sprintf("%s (%s)", m.File.Family, m.Path), r
		}
	}
	return best
}

func definesMalloc(f *File) bool {
	return slices.ContainsFunc(f.Found, func(x Found) bool { return slices.Contains(x.Names(), "malloc") }) ||
		slices.ContainsFunc(f.Skipped, func(x Skipped) bool { return x.Name == "malloc" })
}
