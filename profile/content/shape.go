package content

import "strings"

// Kind is the family of a block's shape.
type Kind uint8

// The kinds of shape.
const (
	Empty Kind = iota
	JSON
	HTTPRequest
	HTTPResponse
	XML
	HTML
	PEM
	DER
	JWT
	Base64
	Hex
	UUID
	URL
	Form
	SQL
	Text
	UTF16
	UTF32
	Gzip
	Zlib
	Zstd
	LZ4
	Bzip2
	XZ
	Zip
	ELF
	Image
	PDF
	SQLite
	Wasm
	LuaBytecode
	LuaString
	Object
	Pointers
	Structure
	Integers
	Floats
	Zeros
	Entropy
	Binary
	Other
	kindCount
)

var kindNames = [kindCount]string{
	Empty: "empty", JSON: "JSON", HTTPRequest: "HTTP request", HTTPResponse: "HTTP response", XML: "XML", HTML: "HTML",
	PEM: "PEM", DER: "DER", JWT: "JWT", Base64: "base64", Hex: "hex", UUID: "UUID", URL: "URL", Form: "form data", SQL: "SQL",
	Text: "text", UTF16: "UTF-16 text", UTF32: "UTF-32 text", Gzip: "gzip", Zlib: "zlib", Zstd: "zstd", LZ4: "LZ4",
	Bzip2: "bzip2", XZ: "xz", Zip: "zip", ELF: "ELF", Image: "image", PDF: "PDF", SQLite: "SQLite", Wasm: "WebAssembly",
	LuaBytecode: "Lua bytecode", LuaString: "Lua string", Object: "object", Pointers: "pointers", Structure: "structure",
	Integers: "integers", Floats: "floats", Zeros: "zeros", Entropy: "high entropy", Binary: "binary", Other: "other",
}

// String is the kind's name in output; it is stable.
func (k Kind) String() string {
	if k < kindCount {
		return kindNames[k]
	}
	return "unknown"
}

// MarshalText makes JSON documents carry the name.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads the name; a name of another version becomes Other.
func (k *Kind) UnmarshalText(text []byte) error {
	*k = Other
	for i, name := range kindNames {
		if name == string(text) {
			*k = Kind(i)
		}
	}
	return nil
}

// sizeTells says whether blocks of the kind belong together only when they have the same size: a structure's size is the
// best name that it has.
func (k Kind) sizeTells() bool {
	return k == Pointers || k == Structure || k == Integers || k == Binary
}

// Shape is what a block was recognized as.
type Shape struct {
	Kind   Kind   `json:"kind"`
	Detail string `json:"detail,omitempty"` // "{uid, token, payload}", "GET", "PNG", "Session"; never content but names
	Header int    `json:"header,omitempty"` // bytes before the payload: a reference count, a length, Lua's header
}

// String is kind and detail: "JSON {uid, token, payload}".
func (s Shape) String() string {
	if s.Detail == "" {
		return s.Kind.String()
	}
	return s.Kind.String() + " " + s.Detail
}

// Classifier recognizes shapes. The zero value is ready; the functions make it see more. It is for one goroutine.
type Classifier struct {
	// Pointer says whether a word is an address of the process. Without it, words that look like one count.
	Pointer func(word uint64) bool
	// Class names the class or type object that an address is, as a block's first word ("Session" for its vtable); empty
	// when it is none.
	Class func(word uint64) string

	keys [][]byte
}

// Classify recognizes the shape of a block by its bytes.
func Classify(block []byte) Shape { return new(Classifier).Classify(block) }

// Classify recognizes the shape of a block by its bytes.
func (c *Classifier) Classify(block []byte) Shape {
	f := c.find(block)
	return Shape{Kind: f.kind, Detail: f.detail(), Header: f.header}
}

// finding is a shape before its name is spelled out, which is done once a group, not once a block. Slices point into the
// block and into the classifier.
type finding struct {
	kind   Kind
	header int // bytes before the payload
	length int // of the payload
	hash   uint64
	name   string   // PNG, GET, a class
	keys   [][]byte // JSON
	list   jsonList
	inner  Kind // what a Lua string, or a structure as a pool's block, holds
}

// identity tells shapes apart: equal for JSON with the same keys in any order.
func (f *finding) identity() uint64 {
	h := f.hash ^ uint64(f.inner)<<56 ^ uint64(f.list)<<48
	for i := range len(f.name) {
		h = (h ^ uint64(f.name[i])) * 0x100000001b3
	}
	return h
}

func (f *finding) detail() string {
	switch {
	case f.kind == JSON:
		return keySet(f.keys, f.list)
	case f.kind != LuaString && f.inner == JSON:
		return "holding JSON " + keySet(f.keys, f.list)
	case f.kind == LuaString && f.inner == JSON:
		return "JSON " + keySet(f.keys, f.list)
	case f.kind == LuaString && f.inner != Text && f.inner != Empty:
		return strings.TrimSpace(f.inner.String() + " " + f.name)
	}
	return f.name
}

const maxKeys = 32

// keySet spells out {uid, token, payload}, in the order of the block.
func keySet(keys [][]byte, list jsonList) string {
	if list != listOfObjects && list != noList {
		return list.String()
	}
	var b strings.Builder
	b.WriteByte('{')
	for i, k := range keys {
		if i > 0 {
			b.WriteString(", ")
		}
		if i == maxKeys-1 {
			b.WriteString("...")
			break
		}
		b.WriteString(keyName(k))
	}
	b.WriteByte('}')
	if list == listOfObjects {
		return "[" + b.String() + "]"
	}
	return b.String()
}

// keyName returns a key as it is shown. Keys are names by right, but some programs use user names and ids as keys: whatever
// does not look like an identifier is redacted, and ids are all shown alike.
func keyName(k []byte) string {
	if isID(k) {
		return "<id>"
	}
	if isIdentifier(k) {
		return string(k)
	}
	return redactText(k[:min(len(k), 64)])
}

func isIdentifier(k []byte) bool {
	if len(k) == 0 || len(k) > 64 {
		return false
	}
	for _, c := range k {
		if !isAlnum(c) && c != '_' && c != '-' && c != '.' && c != '$' && c != ':' {
			return false
		}
	}
	return true
}

// isID: numbers, and hexadecimal strings of 8 or more with a digit in them.
func isID(k []byte) bool {
	digits, hex := 0, 0
	for _, c := range k {
		switch {
		case c >= '0' && c <= '9':
			digits++
		case isHexLetter(c), c == '-':
			hex++
		default:
			return false
		}
	}
	return digits > 0 && (hex == 0 || len(k) >= 8)
}

// hashKey maps equal keys, and all ids, to one hash.
func hashKey(k []byte) uint64 {
	if isID(k) {
		return 0x9e3779b97f4a7c15
	}
	h := uint64(0xcbf29ce484222325)
	for _, c := range k {
		h = (h ^ uint64(c)) * 0x100000001b3
	}
	return mix(h)
}

// mix spreads a value over all bits (the finalizer of splitmix64).
func mix(h uint64) uint64 {
	h ^= h >> 30
	h *= 0xbf58476d1ce4e5b9
	h ^= h >> 27
	h *= 0x94d049bb133111eb
	return h ^ h>>31
}

func isDigit(c byte) bool     { return c >= '0' && c <= '9' }
func isLetter(c byte) bool    { c |= 0x20; return c >= 'a' && c <= 'z' }
func isHexLetter(c byte) bool { c |= 0x20; return c >= 'a' && c <= 'f' }
func isAlnum(c byte) bool     { return isDigit(c) || isLetter(c) }
