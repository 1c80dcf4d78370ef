package allocator

import (
	"bufio"
	"bytes"
	"embed"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Limits of what is read from a definition.
const (
	maxDefinition  = 1024
	maxDefinitions = 1024
	maxPosition    = 6 // arguments in registers
	maxKind        = 32
)

// Definition is a function of one's own that hands out or takes back blocks, in the files that Library names.
type Definition struct {
	Library string
	Function
}

// SyntaxError says where a definition is wrong. Columns count from 1.
type SyntaxError struct {
	File    string // empty for a flag
	Line    int    // 0 for a flag
	Column  int
	Text    string
	Message string
}

func (e *SyntaxError) Error() string {
	if e.File == "" {
		return fmt.Sprintf("%q, column %d: %s", e.Text, e.Column, e.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.Message)
}

//go:embed functions
var shippedFiles embed.FS

// Shipped returns the names of the sets of definitions that are built in.
func Shipped() []string {
	entries, _ := shippedFiles.ReadDir("functions") // embedded: cannot fail
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// ShippedDefinitions returns a built-in set.
func ShippedDefinitions(name string) ([]Definition, error) {
	data, err := shippedFiles.ReadFile("functions/" + name)
	if err != nil {
		return nil, fmt.Errorf("no built-in functions named %q; there are %s", name, strings.Join(Shipped(), ", "))
	}
	return ParseFunctions(name, bytes.NewReader(data))
}

// ParseAlloc reads a definition such as "libfoo.so:foo_new(size=1)" of a function that hands out blocks.
func ParseAlloc(text string) (Definition, error) { return parseFlag(text, true) }

// ParseFree reads a definition such as "libfoo.so:foo_delete(ptr=1)" of a function that takes blocks back.
func ParseFree(text string) (Definition, error) { return parseFlag(text, false) }

func parseFlag(text string, alloc bool) (Definition, error) {
	p := &parser{text: text}
	d, err := p.definition(alloc)
	if err != nil {
		return Definition{}, err
	}
	return d, nil
}

// ParseFunctions reads a file of definitions, one a line: "alloc LIB:FUNC(...)" or "free LIB:FUNC(...)". A # starts a
// comment. Name is for error messages.
func ParseFunctions(name string, r io.Reader) ([]Definition, error) {
	var definitions []Definition
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxDefinition)
	number := 0
	for lines.Scan() {
		number++
		line, _, _ := strings.Cut(lines.Text(), "#")
		if strings.TrimSpace(line) == "" {
			continue
		}
		p := &parser{text: strings.TrimRight(line, " \t\r"), file: name, line: number}
		d, err := p.fileLine()
		if err != nil {
			return nil, err
		}
		if len(definitions) == maxDefinitions {
			return nil, p.fail(0, "more than %d definitions", maxDefinitions)
		}
		definitions = append(definitions, d)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s:%d: %w", name, number+1, err)
	}
	return definitions, nil
}

// parser reads one definition; at is the next byte.
type parser struct {
	text, file string
	line, at   int
}

func (p *parser) fail(at int, format string, args ...any) error {
	return &SyntaxError{File: p.file, Line: p.line, Column: at + 1, Text: p.text, Message: fmt.Sprintf(format, args...)}
}

func (p *parser) space() {
	for p.at < len(p.text) && (p.text[p.at] == ' ' || p.text[p.at] == '\t') {
		p.at++
	}
}

// word reads up to one of the stop bytes or white space.
func (p *parser) word(stop string) string {
	start := p.at
	for p.at < len(p.text) && !strings.ContainsRune(stop+" \t", rune(p.text[p.at])) {
		p.at++
	}
	return p.text[start:p.at]
}

func (p *parser) fileLine() (Definition, error) {
	p.space()
	start := p.at
	switch verb := p.word(""); verb {
	case "alloc":
		return p.definition(true)
	case "free":
		return p.definition(false)
	default:
		return Definition{}, p.fail(start, "%q is neither alloc nor free; a line is: alloc LIB:FUNC(size=1)", verb)
	}
}

func (p *parser) definition(alloc bool) (Definition, error) {
	var d Definition
	if len(p.text) > maxDefinition {
		return d, p.fail(0, "longer than %d bytes", maxDefinition)
	}
	if i := strings.IndexFunc(p.text, func(r rune) bool { return r < ' ' && r != '\t' || r > '~' }); i >= 0 {
		return d, p.fail(i, "a character that is not printable ASCII")
	}
	p.space()
	start := p.at
	if d.Library = p.word(":("); d.Library == "" {
		return d, p.fail(start, "the file is missing; write LIB:FUNC(size=1), * for any file")
	}
	if p.at == len(p.text) || p.text[p.at] != ':' {
		return d, p.fail(p.at, "a colon is missing between the file and the function")
	}
	p.at++
	start = p.at
	if d.Name = p.word(":("); d.Name == "" {
		return d, p.fail(start, "the function's name is missing")
	}
	if p.at < len(p.text) && p.text[p.at] == ':' {
		return d, p.fail(p.at, "a second colon; C++ functions are given by their mangled name (_ZN...)")
	}
	if p.at == len(p.text) || p.text[p.at] != '(' {
		return d, p.fail(p.at, "the arguments are missing; write %s(%s)", d.Name, example(alloc))
	}
	p.at++
	attributes, err := p.attributes()
	if err != nil {
		return d, err
	}
	p.space()
	if p.at != len(p.text) {
		return d, p.fail(p.at, "something follows the closing parenthesis")
	}
	return d, p.apply(&d, attributes, alloc)
}

func example(alloc bool) string {
	if alloc {
		return "size=1"
	}
	return "ptr=1"
}

type attribute struct {
	key, value string
	at         int
}

func (p *parser) attributes() (map[string]attribute, error) {
	found := map[string]attribute{}
	for {
		p.space()
		start := p.at
		key := p.word("=,)(")
		if key == "" {
			return nil, p.fail(start, "an argument is missing, such as size=1")
		}
		if p.at == len(p.text) || p.text[p.at] != '=' {
			return nil, p.fail(p.at, "%s needs a value, as in %s=1", key, key)
		}
		p.at++
		valueAt := p.at
		value := p.word(",)(=")
		if value == "" {
			return nil, p.fail(valueAt, "%s needs a value, as in %s=1", key, key)
		}
		if _, twice := found[key]; twice {
			return nil, p.fail(start, "%s is given twice", key)
		}
		found[key] = attribute{key, value, start}
		p.space()
		if p.at == len(p.text) {
			return nil, p.fail(p.at, "the closing parenthesis is missing")
		}
		p.at++
		switch p.text[p.at-1] {
		case ',':
		case ')':
			return found, nil
		default:
			return nil, p.fail(p.at-1, "a comma or the closing parenthesis is missing")
		}
	}
}

// apply turns attributes into a function.
func (p *parser) apply(d *Definition, attributes map[string]attribute, alloc bool) error {
	f := &d.Function
	poolReturned := false
	for _, key := range slices.Sorted(maps.Keys(attributes)) {
		a := attributes[key]
		position := func(to *int) error {
			n, err := strconv.Atoi(a.value)
			if err != nil || n < 1 || n > maxPosition {
				return p.fail(a.at, "%s=%s: a position of an argument is 1 to %d", a.key, a.value, maxPosition)
			}
			*to = n
			return nil
		}
		var err error
		switch {
		case key == "kind":
			err = p.kind(f, a)
		case key == "ptr":
			err = position(&f.Ptr)
		case key == "pool" && a.value == "ret" && alloc:
			poolReturned = true
		case key == "pool":
			err = position(&f.Pool)
		case key == "size" && alloc:
			err = position(&f.Size)
		case key == "count" && alloc:
			err = position(&f.Count)
		case key == "out" && alloc && a.value == "ret":
		case key == "out" && alloc:
			err = position(&f.Out)
			f.Flags |= StatusZero
		case key == "status" && alloc:
			err = p.choose(f, a, map[string]Flags{"zero": StatusZero, "nonzero": StatusNonZero})
		case key == "zero" && alloc:
			err = p.choose(f, a, map[string]Flags{"frees": ZeroSizeFrees, "fails": 0})
		case key == "failure" && alloc:
			err = p.choose(f, a, map[string]Flags{"frees": FreesOnFailure, "keeps": 0})
		case key == "width" && alloc:
			err = p.choose(f, a, map[string]Flags{"int": IntSize, "long": 0})
		case alloc:
			err = p.fail(a.at, "unknown argument %q; there are size, count, ptr, out, pool, kind, status, zero, failure, width", key)
		default:
			err = p.fail(a.at, "unknown argument %q of a free; there are ptr, pool, kind", key)
		}
		if err != nil {
			return err
		}
	}
	if f.Kind == "" {
		kind := attribute{"kind", stem(d.Library), 0}
		if err := p.kind(f, kind); err != nil {
			return p.fail(0, "no name for the blocks follows from the file %q: add kind=NAME", d.Library)
		}
	}
	return p.operation(f, attributes, alloc, poolReturned)
}

func (p *parser) choose(f *Function, a attribute, values map[string]Flags) error {
	flag, ok := values[a.value]
	if !ok {
		return p.fail(a.at, "%s=%s: it is one of %s", a.key, a.value, strings.Join(slices.Sorted(maps.Keys(values)), ", "))
	}
	if a.key == "status" {
		f.Flags &^= StatusZero | StatusNonZero
	}
	f.Flags |= flag
	return nil
}

// kind names the blocks. The kinds that mean something else already are refused: a declared pair is a second view of
// the same bytes and must not be added to them.
func (p *parser) kind(f *Function, a attribute) error {
	for _, r := range a.value {
		if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.+", r) {
			return p.fail(a.at, "kind=%s: a name is made of letters, digits and _-.+", a.value)
		}
	}
	if a.value == "" || len(a.value) > maxKind {
		return p.fail(a.at, "kind=%s: a name has 1 to %d characters", a.value, maxKind)
	}
	switch k := profile.Kind(a.value); k {
	case profile.KindMalloc, profile.KindMmap, profile.KindBrk, profile.KindLuaJIT, profile.KindUnfollowed:
		return p.fail(a.at, "kind=%s is taken: blocks of one's own functions may be the same bytes seen twice", k)
	default:
		f.Kind = k
	}
	return nil
}

// operation decides what the function does from what it was given.
func (p *parser) operation(f *Function, attributes map[string]attribute, alloc, poolReturned bool) error {
	has := func(key string) bool { _, ok := attributes[key]; return ok }
	wrong := func(key, format string, args ...any) error { return p.fail(attributes[key].at, format, args...) }
	if !alloc {
		switch {
		case f.Ptr != 0: // with or without its pool
			f.Op = Free
		case f.Pool != 0:
			f.Op = PoolDestroy
		default:
			return p.fail(0, "a free needs ptr=N, the block, or pool=N, the pool that dies")
		}
		return nil
	}
	switch {
	case has("status") && f.Out == 0:
		return wrong("status", "status says what the result means when out=N holds the address: give out=N")
	case f.Count != 0 && f.Size == 0:
		return wrong("count", "count=N needs size=N, the size of one element")
	case (has("zero") || has("failure")) && f.Ptr == 0:
		return p.fail(0, "zero and failure are about changing a block: give ptr=N, the old block")
	case poolReturned && f.Pool != 0, poolReturned && f.Ptr != 0:
		return wrong("pool", "a pool that is returned has no other pool and no old block")
	case poolReturned:
		f.Op = PoolCreate
		return nil
	case f.Size == 0:
		return p.fail(0, "an alloc needs size=N (or pool=ret for a function that makes a pool)")
	case f.Ptr != 0 && f.Pool != 0:
		return wrong("ptr", "changing a block of a pool is not supported")
	case f.Ptr != 0:
		f.Op = Realloc
	case f.Pool != 0:
		f.Op = PoolAlloc
	default:
		f.Op = Alloc
	}
	return nil
}

// stem is the name of a library without version and suffix: "libfoo.so.3" is libfoo.
func stem(library string) string {
	base := filepath.Base(library)
	if i := strings.Index(base, ".so"); i > 0 {
		base = base[:i]
	}
	return base
}

// Matches reports whether the definition is for a file: by its full path when the definition has one, else by its name
// with or without the version ("libfoo" and "libfoo.so" match libfoo.so.3), * for any file.
func (d Definition) Matches(path string) bool {
	if strings.Contains(d.Library, "/") {
		return d.Library == path
	}
	base := filepath.Base(path)
	if d.Library == "*" || base == d.Library {
		return true
	}
	rest, ok := strings.CutPrefix(base, d.Library)
	return ok && (strings.HasPrefix(rest, ".so") || (strings.HasSuffix(d.Library, ".so") && strings.HasPrefix(rest, ".")))
}

// DeclaredFor returns the functions to look for in a file.
func DeclaredFor(definitions []Definition, path string) []Function {
	var fs []Function
	for _, d := range definitions {
		if d.Matches(path) {
			fs = append(fs, d.Function)
		}
	}
	return fs
}

// CheckPairs makes sure that the blocks of every kind can be freed and made: half a pair tells nothing.
func CheckPairs(definitions []Definition) error {
	makes, ends := map[profile.Kind]string{}, map[profile.Kind]string{}
	for _, d := range definitions {
		switch d.Op {
		case Free, PoolDestroy:
			ends[d.Kind] = d.Name
		default:
			makes[d.Kind] = d.Name
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(makes)) {
		if ends[kind] == "" {
			return fmt.Errorf("%s makes blocks of kind %s and no function frees them: add --free (with kind=%s if its file differs)",
				makes[kind], kind, kind)
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(ends)) {
		if makes[kind] == "" {
			return fmt.Errorf("%s frees blocks of kind %s and no function makes them: add --alloc (with kind=%s if its file differs)",
				ends[kind], kind, kind)
		}
	}
	return nil
}

// String writes the definition as it can be read back.
func (d Definition) String() string {
	var parts []string
	number := func(key string, n int) {
		if n != 0 {
			parts = append(parts, fmt.Sprintf("%s=%d", key, n))
		}
	}
	verb := "alloc"
	if d.Op == Free || d.Op == PoolDestroy {
		verb = "free"
	}
	if d.Op == PoolCreate {
		parts = append(parts, "pool=ret")
	}
	number("pool", d.Pool)
	number("ptr", d.Ptr)
	number("count", d.Count)
	number("size", d.Size)
	number("out", d.Out)
	flag := func(f Flags, text string) {
		if d.Flags&f != 0 {
			parts = append(parts, text)
		}
	}
	flag(StatusNonZero, "status=nonzero")
	flag(ZeroSizeFrees, "zero=frees")
	flag(FreesOnFailure, "failure=frees")
	flag(IntSize, "width=int")
	parts = append(parts, "kind="+string(d.Kind))
	return fmt.Sprintf("%s %s:%s(%s)", verb, d.Library, d.Name, strings.Join(parts, ", "))
}
