package content

import (
	"bytes"
	"encoding/binary"
	"strings"
	"unicode/utf8"
)

// maxLook is how much of a block is looked at.
const maxLook = 64 << 10

// slack is how many bytes of a block may lie behind what the program asked for: glibc's smallest chunk has 24.
const slack = 24

// find recognizes a block. The order matters: what has a mark of its own comes before what is judged by statistics.
func (c *Classifier) find(b []byte) finding {
	b = b[:min(len(b), maxLook)]
	if len(b) == 0 {
		return finding{kind: Empty}
	}
	if len(b) >= 8 {
		if f, ok := c.object(b); ok {
			return f
		}
	}
	// The bytes of a pointer may all be letters: 0x55784d6e4f20 reads " OnMxU".
	pointer := len(b) >= 8 && c.isPointer(binary.LittleEndian.Uint64(b))
	if f, ok := magic(b); ok && !pointer {
		return f
	}
	if allZero(b) {
		return finding{kind: Zeros, length: len(b)}
	}
	if n := textRun(b); !pointer && isTextBlock(b, n) {
		f := c.text(b[:n])
		f.length = n
		return f
	}
	if f, ok := c.luaString(b); ok {
		return f
	}
	if f, ok := wideText(b); ok {
		return f
	}
	if f, ok := c.behindHeader(b); ok {
		return f
	}
	return c.statistics(b)
}

// object recognizes C++ objects, whose first word points to their class's vtable, and the like: Python's have it second,
// behind a reference count.
func (c *Classifier) object(b []byte) (finding, bool) {
	if c.Class == nil {
		return finding{}, false
	}
	word := binary.LittleEndian.Uint64(b)
	name := ""
	switch {
	case word>>56 != 0 || word == 0:
	case word >= 1<<16:
		name = c.Class(word)
	}
	if name == "" && len(b) >= 16 && word-1 < 1<<32 {
		name = c.Class(binary.LittleEndian.Uint64(b[8:]))
	}
	return finding{kind: Object, name: name, length: len(b)}, name != ""
}

// signature is a mark at the front of a file format. Formats with short marks get a check of their own.
type signature struct {
	mark  string
	kind  Kind
	name  string
	check func(b []byte) bool
}

var signatures = []signature{
	{"\x7fELF", ELF, "", func(b []byte) bool { return len(b) > 6 && b[4]-1 < 2 && b[5]-1 < 2 }},
	{"\x89PNG\r\n\x1a\n", Image, "PNG", nil},
	{"\xff\xd8\xff", Image, "JPEG", func(b []byte) bool { return len(b) > 3 && b[3] >= 0xc0 && b[3] != 0xff }},
	{"GIF87a", Image, "GIF", nil},
	{"GIF89a", Image, "GIF", nil},
	{"RIFF", Image, "WebP", func(b []byte) bool { return len(b) > 12 && string(b[8:12]) == "WEBP" }},
	{"II*\x00", Image, "TIFF", func(b []byte) bool { return len(b) > 8 && b[7] == 0 }},
	{"MM\x00*", Image, "TIFF", func(b []byte) bool { return len(b) > 8 && b[4] == 0 }},
	{"BM", Image, "BMP", isBMP},
	{"\x1f\x8b\x08", Gzip, "", func(b []byte) bool { return len(b) > 10 && b[3] < 0x20 }},
	{"\x28\xb5\x2f\xfd", Zstd, "", nil},
	{"\x04\x22\x4d\x18", LZ4, "", nil},
	{"BZh", Bzip2, "", func(b []byte) bool { return len(b) > 10 && isDigit(b[3]) && string(b[4:7]) == "1AY" }},
	{"\xfd7zXZ\x00", XZ, "", nil},
	{"PK\x03\x04", Zip, "", nil},
	{"%PDF-", PDF, "", nil},
	{"SQLite format 3\x00", SQLite, "", nil},
	{"\x00asm", Wasm, "", func(b []byte) bool { return len(b) > 8 && b[5] == 0 && b[6] == 0 && b[7] == 0 }},
	{"\x1bLua", LuaBytecode, "", nil},
	{"\x1bLJ", LuaBytecode, "LuaJIT", nil},
	{"x", Zlib, "", isZlib},
	{"\x30", DER, "", isDER},
}

func magic(b []byte) (finding, bool) {
	for i := range signatures {
		s := &signatures[i]
		if b[0] != s.mark[0] || len(b) < len(s.mark) || string(b[:len(s.mark)]) != s.mark {
			continue
		}
		if s.check == nil || s.check(b) {
			return finding{kind: s.kind, name: s.name, length: len(b)}, true
		}
	}
	return finding{}, false
}

func isBMP(b []byte) bool {
	return len(b) > 30 && b[6]|b[7]|b[8]|b[9] == 0 && binary.LittleEndian.Uint32(b[14:]) <= 124 && b[26] == 1 && b[27] == 0
}

// isZlib: two bytes are little, so the flags' check sum and the first block's type must fit and the data be no text.
func isZlib(b []byte) bool {
	if len(b) < 10 || (uint(b[0])<<8|uint(b[1]))%31 != 0 || b[1]&0x20 != 0 || b[2]>>1&3 == 3 {
		return false
	}
	n := textRun(b[2:])
	return n < 8 && !looksLikePointer(binary.LittleEndian.Uint64(b)) && !allZero(b[3:10])
}

// isDER: an ASN.1 sequence whose length fits the block and whose first element is an integer, a sequence or an object id
// that fits too. Short ones would be chance.
func isDER(b []byte) bool {
	n, head := derLength(b)
	if n < 32 || head+n > len(b) && len(b) < maxLook {
		return false
	}
	inner := b[head:]
	if inner[0] != 0x02 && inner[0] != 0x30 && inner[0] != 0x06 {
		return false
	}
	m, innerHead := derLength(inner)
	return m > 0 && innerHead+m <= n
}

// derLength returns the length of the value of an ASN.1 element and of the head before it; 0 when it has none.
func derLength(b []byte) (n, head int) {
	if len(b) < 6 {
		return 0, 0
	}
	switch c := b[1]; {
	case c < 0x80:
		return int(c), 2
	case c == 0x81:
		return int(b[2]), 3
	case c == 0x82:
		return int(binary.BigEndian.Uint16(b[2:])), 4
	case c == 0x83:
		return int(b[2])<<16 | int(binary.BigEndian.Uint16(b[3:])), 5
	}
	return 0, 0
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.LittleEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// textBytes marks the ASCII characters of text: printable ones, tab, newline, carriage return, and escape, which colours
// log lines.
var textBytes = func() (t [256]bool) {
	for c := ' '; c <= '~'; c++ {
		t[c] = true
	}
	t['\t'], t['\n'], t['\r'], t['\x1b'] = true, true, true, true
	return t
}()

// textRun returns how many bytes from the start are text: ASCII or UTF-8 without control characters.
func textRun(b []byte) int {
	for i := 0; i < len(b); {
		for i+8 <= len(b) && allPrintable(binary.LittleEndian.Uint64(b[i:])) {
			i += 8
		}
		if i == len(b) {
			break
		}
		if textBytes[b[i]] {
			i++
			continue
		}
		if b[i] < 0xc2 || b[i] > 0xf4 {
			return i
		}
		r, size := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError || r < 0xa0 {
			return i
		}
		i += size
	}
	return len(b)
}

// allPrintable says whether all eight bytes lie between the space and the tilde.
func allPrintable(w uint64) bool {
	const each = 0x0101010101010101
	return (w|(w-each*' ')|(w+each))&(each*0x80) == 0 // above 0x7f, below the space, 0x7f itself
}

// isTextBlock decides whether a run of n text bytes at the front makes the block text. A zero after it is the best sign; a
// buffer without one must be text nearly to its end, or for long.
func isTextBlock(b []byte, n int) bool {
	switch {
	case n < 4:
		return false
	case n == len(b):
		return true
	case b[n] == 0:
		return n >= 6 || restIsQuiet(b[n:])
	case n >= 64:
		return true
	}
	return n >= 8 && n >= len(b)-slack
}

// restIsQuiet tells a short string from an integer or pointer whose low bytes happen to be letters: behind the string the
// rest of its word is zero too, and few further words hold anything.
func restIsQuiet(b []byte) bool {
	return len(b) <= slack || allZero(b[:16])
}

// text tells apart kinds of text.
func (c *Classifier) text(b []byte) finding {
	t := bytes.TrimLeft(b, " \t\r\n\ufeff")
	if len(t) == 0 {
		return finding{kind: Text}
	}
	switch t[0] {
	case '{', '[':
		if f, ok := c.parseJSON(t); ok {
			f.header = len(b) - len(t)
			return f
		}
	case '<':
		if kind, ok := markup(t); ok {
			return finding{kind: kind, name: markupName(t)}
		}
	case '-':
		if rest, ok := bytes.CutPrefix(t, []byte("-----BEGIN ")); ok {
			return finding{kind: PEM, name: pemLabel(rest)}
		}
	}
	if f, ok := http(t); ok {
		return f
	}
	if f, ok := token(bytes.TrimRight(t, "\r\n")); ok {
		return f
	}
	if verb := sqlVerb(t); verb != "" {
		return finding{kind: SQL, name: verb}
	}
	return finding{kind: Text}
}

func markup(t []byte) (Kind, bool) {
	if len(t) < 4 || !(isLetter(t[1]) || t[1] == '?' || t[1] == '!') {
		return 0, false
	}
	end := bytes.IndexByte(t, '>')
	if end < 0 && len(t) < 200 || bytes.IndexByte(t[1:], '<') < 0 && !bytes.Contains(t, []byte("/>")) {
		return 0, false
	}
	start := strings.ToLower(string(t[:min(len(t), 15)]))
	if strings.HasPrefix(start, "<!doctype html") || strings.HasPrefix(start, "<html") {
		return HTML, true
	}
	return XML, true
}

// markupName is the outermost element, <order>.
func markupName(t []byte) string {
	for range 8 { // <?xml?>, <!DOCTYPE>, comments
		i := bytes.IndexByte(t, '<')
		if i < 0 || i+1 >= len(t) {
			return ""
		}
		t = t[i+1:]
		if isLetter(t[0]) {
			n := 0
			for n < len(t) && n < 48 && (isAlnum(t[n]) || strings.IndexByte("_-:.", t[n]) >= 0) {
				n++
			}
			return "<" + string(t[:n]) + ">"
		}
	}
	return ""
}

func pemLabel(rest []byte) string {
	label, _, ok := bytes.Cut(rest[:min(len(rest), 64)], []byte("-----"))
	for _, c := range label {
		if c != ' ' && !isAlnum(c) {
			return ""
		}
	}
	if !ok {
		return ""
	}
	return string(label)
}

var httpMethods = []string{"GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS", "CONNECT", "TRACE", "PROPFIND"}

func http(t []byte) (finding, bool) {
	if bytes.HasPrefix(t, []byte("HTTP/1.")) || bytes.HasPrefix(t, []byte("HTTP/2 ")) {
		return finding{kind: HTTPResponse}, true
	}
	if bytes.HasPrefix(t, []byte("PRI * HTTP/2.0")) {
		return finding{kind: HTTPRequest, name: "HTTP/2 preface"}, true
	}
	if t[0] < 'A' || t[0] > 'Z' {
		return finding{}, false
	}
	for _, m := range httpMethods {
		if len(t) < len(m)+2 || string(t[:len(m)]) != m || t[len(m)] != ' ' {
			continue
		}
		line, _, _ := bytes.Cut(t[:min(len(t), 16<<10)], []byte("\n"))
		if bytes.Contains(line, []byte(" HTTP/")) {
			return finding{kind: HTTPRequest, name: m}, true
		}
	}
	return finding{}, false
}

var sqlVerbs = []struct{ verb, second string }{
	{"SELECT", " FROM "}, {"INSERT", " INTO "}, {"UPDATE", " SET "}, {"DELETE", " FROM "}, {"CREATE", " TABLE "},
	{"ALTER", " TABLE "}, {"WITH", "SELECT"}, {"REPLACE", " INTO "},
}

// sqlVerb returns the statement's first word when a second keyword confirms it.
func sqlVerb(t []byte) string {
	if len(t) < 12 || !isLetter(t[0]) {
		return ""
	}
	for _, v := range sqlVerbs {
		n := len(v.verb)
		if !equalFold(t[:min(n, len(t))], v.verb) || t[n] != ' ' {
			continue
		}
		head := strings.ToUpper(string(t[:min(len(t), 4096)]))
		if strings.Contains(head, v.second) {
			return v.verb
		}
	}
	return ""
}

// equalFold compares with an upper-case ASCII word, without the cost of Unicode.
func equalFold(b []byte, word string) bool {
	if len(b) != len(word) {
		return false
	}
	for i, c := range b {
		if c != word[i] && (c < 'a' || c-0x20 != word[i]) {
			return false
		}
	}
	return true
}

// alphabet counts what a word without spaces is made of.
type alphabet struct {
	upper, lower, digit, hex   int
	plus, minus, dots, equals  int // + and /, - and _
	others, pads, colon, slash int
}

func countAlphabet(t []byte) (a alphabet) {
	for _, c := range t {
		switch {
		case isDigit(c):
			a.digit++
			a.hex++
		case isLetter(c):
			if c >= 'a' {
				a.lower++
			} else {
				a.upper++
			}
			if isHexLetter(c) {
				a.hex++
			}
		case c == '+' || c == '/':
			a.plus++
		case c == '-' || c == '_':
			a.minus++
		case c == '.':
			a.dots++
		case c == '=':
			a.equals++
		default:
			a.others++
		}
	}
	return a
}

// token recognizes words in some encoding. Wrapped base64 has line breaks; everything else has no spaces at all.
func token(t []byte) (finding, bool) {
	if len(t) < 8 {
		return finding{}, false
	}
	if scheme, _, ok := bytes.Cut(t[:min(len(t), 24)], []byte("://")); ok && isScheme(scheme) && bytes.IndexByte(t, ' ') < 0 {
		return finding{kind: URL, name: string(scheme)}, true
	}
	// Most text gives itself away early.
	if bytes.IndexByte(t[:min(len(t), 64)], ' ') >= 0 {
		return finding{}, false
	}
	a := countAlphabet(t)
	breaks := 0
	if a.others > 0 {
		breaks = bytes.Count(t, []byte("\n")) + bytes.Count(t, []byte("\r"))
	}
	n := len(t)
	switch {
	case isUUID(t):
		return finding{kind: UUID}, true
	case a.hex == n && n >= 16 && n%2 == 0 && a.digit > 0 && a.digit < n:
		return finding{kind: Hex}, true
	case a.dots == 2 && bytes.HasPrefix(t, []byte("eyJ")) && a.others+a.plus+a.equals == 0:
		return finding{kind: JWT}, true
	case a.dots == 0 && a.others == breaks && isBase64(t, a, n-breaks):
		return finding{kind: Base64}, true
	case a.equals > 0 && isForm(t):
		return finding{kind: Form}, true
	}
	return finding{}, false
}

func isScheme(s []byte) bool {
	for _, c := range s {
		if !isAlnum(c) && c != '+' {
			return false
		}
	}
	return len(s) >= 2
}

func isUUID(t []byte) bool {
	if len(t) != 36 || t[8] != '-' || t[13] != '-' || t[18] != '-' || t[23] != '-' {
		return false
	}
	for i, c := range t {
		if !isDigit(c) && !isHexLetter(c) && i != 8 && i != 13 && i != 18 && i != 23 {
			return false
		}
	}
	return true
}

// isBase64 wants padding or length to fit, and the mix of a code: plain words and paths have few capitals and digits.
func isBase64(t []byte, a alphabet, n int) bool {
	if n < 16 || a.plus > 0 && a.minus > 0 || a.equals > 2 || a.equals > 0 && t[len(t)-1] != '=' {
		return false
	}
	if a.minus == 0 && n%4 != 0 || n%4 == 1 {
		return false
	}
	if a.equals > 0 && n%4 != 0 {
		return false
	}
	letters := a.upper + a.lower
	switch {
	case a.upper*8 < letters || a.lower*8 < letters:
		return false
	case a.plus*6 > n || a.minus*6 > n: // a path
		return false
	case a.digit == 0 && a.equals == 0:
		return false // CamelCase
	}
	return mixes(t) > n/4
}

// mixes counts how often upper case, lower case and digits follow one another: in every second place in a code, at word
// boundaries in names.
func mixes(t []byte) int {
	count, last := 0, 0
	for _, c := range t {
		class := 0
		switch {
		case isDigit(c):
			class = 1
		case c >= 'a' && c <= 'z':
			class = 2
		case c >= 'A' && c <= 'Z':
			class = 3
		}
		if class != last && class != 0 && last != 0 {
			count++
		}
		last = class
	}
	return count
}

// isForm: name=value&name=value.
func isForm(t []byte) bool {
	pairs := 0
	for len(t) > 0 {
		pair, rest, more := bytes.Cut(t, []byte("&"))
		name, _, ok := bytes.Cut(pair, []byte("="))
		if !ok || len(name) == 0 || len(name) > 64 || !isIdentifier(bytes.ReplaceAll(bytes.ReplaceAll(name, []byte("["), nil), []byte("]"), nil)) {
			return false
		}
		pairs++
		if t = rest; !more || pairs > 16 {
			break
		}
	}
	return pairs >= 2
}
