package content

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/allocsnoop/allocsnoop/profile"
)

// Redact makes text safe to show: every letter becomes x, every digit 9, and what is no printable character a dot.
func Redact(text []byte) string { return redactText(text) }

func redactText(text []byte) string {
	var b strings.Builder
	b.Grow(len(text))
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		b.WriteRune(redactRune(r))
		text = text[size:]
	}
	return b.String()
}

func redactRune(r rune) rune {
	switch {
	case r < 0x80 && isDigit(byte(r)):
		return '9'
	case r < 0x80 && isLetter(byte(r)), r >= 0x80 && r != utf8.RuneError && unicode.IsPrint(r):
		return 'x' // all of Unicode's letters, and what else could carry meaning
	case r == '\n', r == '\t', r == '\r':
		return ' '
	case r < ' ', r >= 0x7f:
		return '.'
	}
	return r
}

// sampleBytes is how much of a block a sample shows.
const sampleBytes = 200

// sample is one line that shows a block: redacted as its kind allows, or as it is.
func (c *Classifier) sample(f *finding, b []byte, noRedact bool) string {
	payload := b[min(f.header, len(b)):]
	payload = payload[:min(len(payload), f.length, sampleBytes)]
	kind := f.kind
	if kind == LuaString {
		kind = f.inner
	}
	switch kind {
	case JSON, HTTPRequest, HTTPResponse, XML, HTML, PEM, JWT, Base64, Hex, UUID, URL, Form, SQL, Text:
	case UTF16:
		payload = decodeWide(payload, f.name)
	case UTF32:
		payload = decode32(payload)
	default:
		return c.binarySample(b, noRedact)
	}
	if noRedact {
		return profile.Sanitize(oneLine(payload))
	}
	return profile.Sanitize(redactAs(kind, payload))
}

// oneLine folds line breaks and indentation, so that a sample stays a line.
func oneLine(b []byte) string {
	return strings.Join(strings.Fields(string(bytes.ToValidUTF8(b, []byte(".")))), " ")
}

func redactAs(kind Kind, b []byte) string {
	switch kind {
	case JSON:
		return oneLine([]byte(redactJSON(b)))
	case XML, HTML:
		return oneLine([]byte(redactMarkup(b)))
	case HTTPRequest, HTTPResponse:
		return redactHTTP(b)
	case PEM:
		if line, rest, ok := bytes.Cut(b, []byte("\n")); ok && pemLabel(bytes.TrimPrefix(line, []byte("-----BEGIN "))) != "" {
			return strings.TrimSpace(string(line)) + " " + oneLine([]byte(redactText(rest)))
		}
	case Form:
		return redactForm(b)
	case SQL:
		return redactSQL(b)
	}
	return oneLine([]byte(redactText(b)))
}

// redactJSON keeps keys that are names, and the punctuation.
func redactJSON(b []byte) string {
	var out strings.Builder
	p := jsonParser{b: b}
	for p.i < len(b) {
		if b[p.i] != '"' {
			r, size := utf8.DecodeRune(b[p.i:])
			out.WriteRune(redactRune(r))
			p.i += size
			continue
		}
		text, ok := p.str()
		if !ok {
			out.WriteString(redactText(b[min(len(b), lastQuote(b)):]))
			break
		}
		p.space()
		out.WriteByte('"')
		if p.i < len(b) && b[p.i] == ':' {
			out.WriteString(keyName(text))
		} else {
			out.WriteString(redactText(text))
		}
		out.WriteByte('"')
	}
	return out.String()
}

// lastQuote is where the string starts that the text breaks off in.
func lastQuote(b []byte) int {
	open := 0
	p := jsonParser{b: b}
	for p.i < len(b) {
		if b[p.i] != '"' {
			p.i++
			continue
		}
		open = p.i
		if _, ok := p.str(); !ok {
			return open
		}
	}
	return len(b)
}

// redactMarkup keeps the names of elements and attributes.
func redactMarkup(b []byte) string {
	var out strings.Builder
	inTag, quote := false, byte(0)
	for len(b) > 0 {
		c := b[0]
		r, size := utf8.DecodeRune(b)
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
			out.WriteRune(redactRune(r))
		case inTag && (c == '"' || c == '\''):
			quote = c
			out.WriteByte(c)
		case inTag && r < 0x80 && r >= ' ' && r != 0x7f:
			inTag = c != '>'
			out.WriteByte(c)
		case c == '<' && bytes.HasPrefix(b, []byte("<!--")), c == '<' && bytes.HasPrefix(b, []byte("<![")):
			out.WriteByte(c) // comments and CDATA are content
		default:
			inTag = c == '<'
			out.WriteRune(redactRune(r))
		}
		b = b[size:]
	}
	return out.String()
}

// redactHTTP keeps the method, the protocol and the names of headers.
func redactHTTP(b []byte) string {
	var out strings.Builder
	body := false
	for n := 0; len(b) > 0; n++ {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		line = bytes.TrimRight(line, "\r")
		name, value, header := bytes.Cut(line, []byte(":"))
		if n > 0 {
			out.WriteByte(' ')
		}
		switch {
		case n == 0:
			out.WriteString(redactStartLine(line))
		case !body && header && isIdentifier(name):
			out.Write(name)
			out.WriteByte(':')
			out.WriteString(redactText(value))
		default:
			body = body || len(line) == 0
			out.WriteString(redactText(line))
		}
		b = rest
	}
	return out.String()
}

func redactStartLine(line []byte) string {
	words := strings.Split(string(line), " ")
	for i, w := range words {
		method := i == 0 && isMethod(w)
		if !method && !isProtocol(w) {
			words[i] = redactText([]byte(w))
		}
	}
	return strings.Join(words, " ")
}

func isProtocol(w string) bool {
	version, ok := strings.CutPrefix(w, "HTTP/")
	return ok && len(version) <= 3 && strings.Trim(version, "0123456789.") == ""
}

func isMethod(w string) bool {
	for _, m := range httpMethods {
		if w == m {
			return true
		}
	}
	return w == "PRI"
}

func redactForm(b []byte) string {
	pairs := strings.Split(string(b), "&")
	for i, pair := range pairs {
		name, value, ok := strings.Cut(pair, "=")
		if !ok {
			pairs[i] = redactText([]byte(pair)) // the last one may be cut inside its name
			continue
		}
		pairs[i] = keyName([]byte(name)) + "=" + redactText([]byte(value))
	}
	return strings.Join(pairs, "&")
}

var sqlWords = map[string]bool{}

func init() {
	for w := range strings.FieldsSeq(`select insert update delete create alter with replace into from where and or not null is in
		set values table index join left right inner outer on order group by having limit offset as distinct like between`) {
		sqlWords[w] = true
	}
}

// redactSQL keeps the language's own words.
func redactSQL(b []byte) string {
	words := strings.Fields(string(bytes.ToValidUTF8(b, []byte("."))))
	for i, w := range words {
		if !sqlWords[strings.ToLower(w)] {
			words[i] = redactText([]byte(w))
		}
	}
	return strings.Join(words, " ")
}

// binarySample shows a block that is no text: what its words are or, unredacted, its bytes.
func (c *Classifier) binarySample(b []byte, noRedact bool) string {
	if noRedact {
		return hex.EncodeToString(b[:min(len(b), 32)])
	}
	const shown = 24
	var out strings.Builder
	for i := 0; i+8 <= len(b) && i < shown*8; i += 8 {
		if i > 0 {
			out.WriteByte(' ')
		}
		out.WriteString(c.wordClass(b[i : i+8]))
	}
	return out.String()
}

// wordClass is p for a pointer, 0, 9 for a number, x for text, ? for anything else.
func (c *Classifier) wordClass(b []byte) string {
	word := binary.LittleEndian.Uint64(b)
	switch {
	case word == 0:
		return "0"
	case c.isPointer(word):
		return "p"
	case isSmall(word):
		return "9"
	case textRun(b) >= 4:
		return "x"
	}
	return "?"
}

func decodeWide(b []byte, order string) []byte {
	units := make([]uint16, len(b)/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(b[i*2:])
		if order == "BE" {
			units[i] = binary.BigEndian.Uint16(b[i*2:])
		}
	}
	if len(units) > 0 && units[0] == 0xfeff {
		units = units[1:]
	}
	return []byte(string(utf16.Decode(units)))
}

func decode32(b []byte) []byte {
	var out []byte
	for ; len(b) >= 4; b = b[4:] {
		out = utf8.AppendRune(out, rune(binary.LittleEndian.Uint32(b)))
	}
	return out
}
