package heap

import (
	"bytes"
	"strings"

	"github.com/ianlancetaylor/demangle"
)

// Pointers tells whether words are addresses of the space. It is for one goroutine.
type Pointers struct {
	space *Space
	last  Range // most words of a block point to the same few ranges
}

// NewPointers makes a Pointers.
func (s *Space) NewPointers() *Pointers { return &Pointers{space: s} }

// Is says whether word is an address with memory behind it.
func (p *Pointers) Is(word uint64) bool {
	if p.last.has(word) {
		return true
	}
	r, ok := p.space.find(word)
	if !ok || r.Perms[0] != 'r' {
		return false
	}
	p.last = r
	return true
}

// Classes names the classes of C++ objects by their run-time type information, which needs no symbols but the pages of the
// libraries: a dump of the heap alone does not have them. It is for one goroutine.
type Classes struct {
	space *Space
	ptr   *Pointers
	names map[uint64]string // by vtable address; empty for what is no vtable
}

// maxClasses bounds the cache: words that are no vtables come in any number.
const maxClasses = 1 << 16

// NewClasses makes a Classes.
func (s *Space) NewClasses() *Classes {
	return &Classes{space: s, ptr: s.NewPointers(), names: map[uint64]string{}}
}

// Name returns the class whose vtable a block's first word points to; empty when it points to none.
func (c *Classes) Name(word uint64) string {
	if word%8 != 0 || !c.ptr.Is(word) || !c.ptr.last.file() {
		return ""
	}
	name, ok := c.names[word]
	if ok {
		return name
	}
	name = c.read(word)
	if len(c.names) < maxClasses {
		c.names[word] = name
	}
	return name
}

// read follows vtable[-1] to the type_info and its second word to the mangled name.
func (c *Classes) read(vtable uint64) string {
	w := words(c.space.Mem, vtable-8, 2)
	if w == nil || !c.isCode(w[1]) {
		return ""
	}
	info := words(c.space.Mem, w[0], 2)
	if info == nil || !c.ptr.Is(info[1]) || c.ptr.last.writable() && !c.ptr.last.file() {
		return ""
	}
	text := make([]byte, 512)
	n, _ := c.space.Mem.ReadAt(text, int64(info[1]))
	mangled, _, ok := bytes.Cut(text[:n], []byte{0})
	if !ok || len(mangled) < 2 {
		return ""
	}
	name := string(bytes.TrimPrefix(mangled, []byte("*"))) // a star marks names that are local to a file
	plain, err := demangle.ToString("_ZTI" + name)
	if err != nil {
		return ""
	}
	return strings.TrimPrefix(plain, "typeinfo for ")
}

func (c *Classes) isCode(a uint64) bool {
	if a == 0 { // a deleted or pure function
		return true
	}
	r, ok := c.space.find(a)
	return ok && strings.Contains(r.Perms, "x")
}
