package content

import (
	"bytes"
	"compress/gzip"
	"compress/zlib"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"
	"math"
	"math/big"
	mrand "math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/ulikunitz/xz"
)

// payload is one kind of content, made afresh for every variant.
type payload struct {
	name string
	want string // Shape.String()
	make func(r *mrand.Rand) []byte
}

const testVtable = 0x7f1234567010

func testClass(word uint64) string {
	switch word {
	case testVtable:
		return "Session"
	case testVtable + 0x100:
		return "PyUnicode_Type"
	}
	return ""
}

var wordList = strings.Fields(`the quick brown fox jumps over a lazy dog while memory grows and nobody knows which library
	holds it until someone looks at what is inside of the blocks themselves again`)

func sentence(r *mrand.Rand, words int) string {
	var w []string
	for range words {
		w = append(w, wordList[r.IntN(len(wordList))])
	}
	return strings.ToUpper(w[0][:1]) + strings.Join(w, " ")[1:] + "."
}

func random(r *mrand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

func wordsOf(w ...uint64) []byte {
	var b []byte
	for _, x := range w {
		b = binary.LittleEndian.AppendUint64(b, x)
	}
	return b
}

func pointer(r *mrand.Rand) uint64 { return 0x7f0000000000 | uint64(r.Uint32())<<4 }

func compressed(r *mrand.Rand, w func(*bytes.Buffer) interface {
	Write([]byte) (int, error)
	Close() error
}) []byte {
	var b bytes.Buffer
	z := w(&b)
	z.Write([]byte(sentence(r, 300)))
	z.Close()
	return b.Bytes()
}

type writeCloser = interface {
	Write([]byte) (int, error)
	Close() error
}

func picture(r *mrand.Rand) image.Image {
	m := image.NewPaletted(image.Rect(0, 0, 20+r.IntN(20), 17), color.Palette{color.Black, color.White})
	for i := range m.Pix {
		m.Pix[i] = uint8(r.IntN(2))
	}
	return m
}

var testKey, testCert = func() ([]byte, []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		panic(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1009), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now()}
	c, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		panic(err)
	}
	return der, c
}()

func session(r *mrand.Rand) []byte {
	return fmt.Appendf(nil, `{"uid":%d,"token":"%x","payload":"%s"}`, r.IntN(1e6), random(r, 16), sentence(r, 5))
}

func utf16Bytes(s string, order binary.AppendByteOrder) (b []byte) {
	for _, u := range utf16.Encode([]rune(s)) {
		b = order.AppendUint16(b, u)
	}
	return b
}

func lua51(text []byte, r *mrand.Rand) []byte {
	b := wordsOf(pointer(r), 4|uint64(r.Uint32())<<32, uint64(len(text)))
	return append(append(b, text...), 0)
}

func luajit(text []byte, r *mrand.Rand) []byte {
	b := wordsOf(pointer(r), 0x0400|uint64(r.Uint32())<<32, uint64(r.Uint32())|uint64(len(text))<<32)
	return append(append(b, text...), 0)
}

var payloads = []payload{
	{"JSON object", "JSON {uid, token, payload}", session},
	{"JSON object behind spaces", "JSON {id, name}", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "\n  { \"id\" : %d ,\n \"name\" : \"%s\" }\n", r.IntN(99999), sentence(r, 2))
	}},
	{"nested JSON", "JSON {user, tags, ok, score}", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, `{"user":{"id":%d,"roles":["a","b"]},"tags":[],"ok":true,"score":-%d.5e-3}`, r.IntN(1e6), r.IntN(99))
	}},
	{"JSON list of objects", "JSON [{sku, qty}]", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, `[{"sku":"%x","qty":%d},{"sku":"b","qty":1}]`, random(r, 4), r.IntN(99))
	}},
	{"JSON list of numbers", "JSON [numbers]", func(r *mrand.Rand) []byte {
		b, _ := json.Marshal(r.Perm(20 + r.IntN(100)))
		return b
	}},
	{"JSON list of strings", "JSON [strings]", func(r *mrand.Rand) []byte {
		b, _ := json.Marshal(strings.Fields(sentence(r, 3+r.IntN(10))))
		return b
	}},
	{"JSON with ids as keys", "JSON {<id>}", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, `{"%d":{"a":1},"%d":{"a":2}}`, r.IntN(1e9), r.IntN(1e9))
	}},
	{"JSON cut off", "JSON {uid, token, payload}", func(r *mrand.Rand) []byte {
		b := session(r)
		return b[:len(b)-2-r.IntN(8)]
	}},
	{"JSON behind a reference count and a length", "JSON {uid, token, payload}", func(r *mrand.Rand) []byte {
		b := session(r)
		return append(wordsOf(1, uint64(len(b))), b...)
	}},
	{"JSON in a Redis string", "JSON {uid, token, payload}", func(r *mrand.Rand) []byte {
		b := session(r)
		return append([]byte{byte(len(b)), byte(len(b)), 1}, b...)
	}},
	{"HTTP GET", "HTTP request GET", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "GET /item/%d?q=%d HTTP/1.1\r\nHost: example.test\r\nAccept: */*\r\n\r\n", r.IntN(1e6), r.IntN(99))
	}},
	{"HTTP POST with a body", "HTTP request POST", func(r *mrand.Rand) []byte {
		body := session(r)
		return fmt.Appendf(nil, "POST /login HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	}},
	{"HTTP response", "HTTP response", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "HTTP/1.1 %d OK\r\nServer: x\r\nContent-Length: 3\r\n\r\nabc", 200+r.IntN(300))
	}},
	{"English text", "text", func(r *mrand.Rand) []byte { return []byte(sentence(r, 3+r.IntN(40))) }},
	{"log lines", "text", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "2026/11/24 10:00:%02d [error] %d#0: *%d upstream timed out, client: 10.0.0.%d\n%s\n",
			r.IntN(60), r.IntN(9999), r.IntN(9999), r.IntN(255), sentence(r, 8))
	}},
	{"log line with braces", "text", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "[warn] {%s} took %d ms", sentence(r, 4), r.IntN(999))
	}},
	{"CSV", "text", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "id,name,amount\n%d,Ada,%d.50\n%d,Bob,17.00\n", r.IntN(999), r.IntN(99), r.IntN(999))
	}},
	{"Cyrillic text in UTF-8", "text", func(r *mrand.Rand) []byte { return []byte(strings.Repeat("память растёт ", 2+r.IntN(5))) }},
	{"Chinese text in UTF-8", "text", func(r *mrand.Rand) []byte { return []byte(strings.Repeat("内存泄漏了。", 2+r.IntN(5))) }},
	{"a file's path", "text", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "/usr/lib/x86_64-linux-gnu/lib%s.so.%d", wordList[r.IntN(len(wordList))], r.IntN(9))
	}},
	{"a camel-case name", "text", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "getSessionTokenForUser%s", strings.Repeat("Again", r.IntN(3)))
	}},
	{"text behind a length", "text", func(r *mrand.Rand) []byte {
		s := sentence(r, 12)
		return append(wordsOf(uint64(len(s)), 255), s...)
	}},
	{"UTF-16LE", "UTF-16 text LE", func(r *mrand.Rand) []byte { return utf16Bytes(sentence(r, 5), binary.LittleEndian) }},
	{"UTF-16BE", "UTF-16 text BE", func(r *mrand.Rand) []byte { return utf16Bytes(sentence(r, 5), binary.BigEndian) }},
	{"UTF-16LE Cyrillic", "UTF-16 text LE", func(r *mrand.Rand) []byte {
		return utf16Bytes(strings.Repeat("память растёт ", 1+r.IntN(4)), binary.LittleEndian)
	}},
	{"UTF-16 Chinese with a mark", "UTF-16 text LE", func(r *mrand.Rand) []byte {
		return utf16Bytes("\ufeff"+strings.Repeat("内存泄漏了", 1+r.IntN(5)), binary.LittleEndian)
	}},
	{"UTF-32", "UTF-32 text", func(r *mrand.Rand) (b []byte) {
		for _, c := range sentence(r, 4) {
			b = binary.LittleEndian.AppendUint32(b, uint32(c))
		}
		return b
	}},
	{"XML with a declaration", "XML <order>", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, `<?xml version="1.0"?><order id="%d"><item>%s</item></order>`, r.IntN(1e6), sentence(r, 3))
	}},
	{"XML without one", "XML <soap:Envelope>", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, `<soap:Envelope><soap:Body>%d</soap:Body></soap:Envelope>`, r.IntN(1e6))
	}},
	{"HTML", "HTML <html>", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "<!DOCTYPE html>\n<html><body><p>%s</p></body></html>", sentence(r, 6))
	}},
	{"PEM certificate", "PEM CERTIFICATE", func(*mrand.Rand) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: testCert})
	}},
	{"PEM key", "PEM EC PRIVATE KEY", func(*mrand.Rand) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: testKey})
	}},
	{"DER certificate", "DER", func(*mrand.Rand) []byte { return testCert }},
	{"DER key", "DER", func(*mrand.Rand) []byte { return testKey }},
	{"base64", "base64", func(r *mrand.Rand) []byte {
		return []byte(base64.StdEncoding.EncodeToString(random(r, 20+r.IntN(200))))
	}},
	{"base64 for URLs", "base64", func(r *mrand.Rand) []byte {
		return []byte(base64.RawURLEncoding.EncodeToString(random(r, 30+r.IntN(20)*3)))
	}},
	{"wrapped base64", "base64", func(r *mrand.Rand) (b []byte) {
		s := base64.StdEncoding.EncodeToString(random(r, 150+r.IntN(100)))
		for ; len(s) > 64; s = s[64:] {
			b = append(append(b, s[:64]...), '\n')
		}
		return append(append(b, s...), '\n')
	}},
	{"JSON web token", "JWT", func(r *mrand.Rand) []byte {
		e := base64.RawURLEncoding
		return []byte(e.EncodeToString([]byte(`{"alg":"HS256"}`)) + "." + e.EncodeToString(session(r)) + "." + e.EncodeToString(random(r, 32)))
	}},
	{"hexadecimal digest", "hex", func(r *mrand.Rand) []byte { return []byte(hex.EncodeToString(random(r, 16+r.IntN(17)))) }},
	{"UUID", "UUID", func(r *mrand.Rand) []byte {
		b := random(r, 16)
		return fmt.Appendf(nil, "%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	}},
	{"URL", "URL https", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "https://example.test/%s/%d?a=b&c=%d", wordList[r.IntN(len(wordList))], r.IntN(1e6), r.IntN(9))
	}},
	{"form data", "form data", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "user=%s&password=%x&remember=1", wordList[r.IntN(len(wordList))], random(r, 5))
	}},
	{"SQL query", "SQL SELECT", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "select id, name from users where id = %d and name = '%s'", r.IntN(999), wordList[r.IntN(9)])
	}},
	{"SQL insert", "SQL INSERT", func(r *mrand.Rand) []byte {
		return fmt.Appendf(nil, "INSERT INTO t (a, b) VALUES (%d, '%s')", r.IntN(999), sentence(r, 3))
	}},
	{"gzip", "gzip", func(r *mrand.Rand) []byte {
		return compressed(r, func(b *bytes.Buffer) writeCloser { return gzip.NewWriter(b) })
	}},
	{"zlib", "zlib", func(r *mrand.Rand) []byte {
		return compressed(r, func(b *bytes.Buffer) writeCloser { return zlib.NewWriter(b) })
	}},
	{"zlib, best", "zlib", func(r *mrand.Rand) []byte {
		return compressed(r, func(b *bytes.Buffer) writeCloser {
			w, _ := zlib.NewWriterLevel(b, 9)
			return w
		})
	}},
	{"xz", "xz", func(r *mrand.Rand) []byte {
		return compressed(r, func(b *bytes.Buffer) writeCloser {
			w, _ := xz.NewWriter(b)
			return w
		})
	}},
	{"zstd", "zstd", func(r *mrand.Rand) []byte { // one raw block
		return append([]byte("\x28\xb5\x2f\xfd\x04\x00\x01\x06\x00"), random(r, 192)...)
	}},
	{"LZ4 frame", "LZ4", func(r *mrand.Rand) []byte { return append([]byte("\x04\x22\x4d\x18\x64\x40\xa7"), random(r, 99)...) }},
	{"bzip2", "bzip2", func(r *mrand.Rand) []byte { return append([]byte("BZh91AY&SY"), random(r, 99)...) }},
	{"zip", "zip", func(r *mrand.Rand) []byte { return append([]byte("PK\x03\x04\x14\x00\x08\x00"), random(r, 99)...) }},
	{"ELF", "ELF", func(r *mrand.Rand) []byte {
		f, err := os.Open("/proc/self/exe")
		if err != nil {
			panic(err)
		}
		defer f.Close()
		b := make([]byte, 1000+r.IntN(4000))
		f.Read(b)
		return b
	}},
	{"PNG", "image PNG", func(r *mrand.Rand) []byte {
		var b bytes.Buffer
		png.Encode(&b, picture(r))
		return b.Bytes()
	}},
	{"JPEG", "image JPEG", func(r *mrand.Rand) []byte {
		var b bytes.Buffer
		jpeg.Encode(&b, picture(r), nil)
		return b.Bytes()
	}},
	{"GIF", "image GIF", func(r *mrand.Rand) []byte {
		var b bytes.Buffer
		gif.Encode(&b, picture(r), nil)
		return b.Bytes()
	}},
	{"WebP", "image WebP", func(r *mrand.Rand) []byte {
		return append([]byte("RIFF\x64\x00\x00\x00WEBPVP8 "), random(r, 100)...)
	}},
	{"PDF", "PDF", func(r *mrand.Rand) []byte {
		return append([]byte("%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n"), random(r, 99)...)
	}},
	{"SQLite page", "SQLite", func(r *mrand.Rand) []byte {
		return append([]byte("SQLite format 3\x00\x10\x00\x01\x01"), random(r, 99)...)
	}},
	{"WebAssembly", "WebAssembly", func(r *mrand.Rand) []byte { return append([]byte("\x00asm\x01\x00\x00\x00"), random(r, 99)...) }},
	{"LuaJIT bytecode", "Lua bytecode LuaJIT", func(r *mrand.Rand) []byte { return append([]byte("\x1bLJ\x02"), random(r, 99)...) }},
	{"Lua 5.1 string", "Lua string", func(r *mrand.Rand) []byte { return lua51([]byte(sentence(r, 4)), r) }},
	{"Lua 5.1 string with JSON", "Lua string JSON {uid, token, payload}", func(r *mrand.Rand) []byte { return lua51(session(r), r) }},
	{"Lua 5.1 binary string", "Lua string binary", func(r *mrand.Rand) []byte { return lua51(random(r, 50), r) }},
	{"LuaJIT string", "Lua string", func(r *mrand.Rand) []byte { return luajit([]byte(sentence(r, 4)), r) }},
	{"C++ object", "object Session", func(r *mrand.Rand) []byte {
		return wordsOf(testVtable, pointer(r), uint64(r.IntN(99)), 0, pointer(r), 7)
	}},
	{"Python object", "object PyUnicode_Type", func(r *mrand.Rand) []byte {
		return append(wordsOf(uint64(1+r.IntN(50)), testVtable+0x100, 5), "hello\x00\x00\x00"...)
	}},
	{"array of pointers", "pointers", func(r *mrand.Rand) (b []byte) {
		for range 4 + r.IntN(100) {
			b = append(b, wordsOf(pointer(r))...)
		}
		return b
	}},
	{"hash table, half empty", "pointers", func(r *mrand.Rand) (b []byte) {
		for range 64 + r.IntN(100) {
			b = append(b, wordsOf(pointer(r)*uint64(r.IntN(2)))...)
		}
		return append(b, wordsOf(pointer(r))...)
	}},
	{"list node", "structure", func(r *mrand.Rand) []byte {
		return wordsOf(pointer(r), uint64(r.IntN(1000))+1, uint64(r.Uint32())<<32|9, 0x4045000000000001)
	}},
	{"integers of 32 bits", "integers", func(r *mrand.Rand) (b []byte) {
		for range 30 + r.IntN(200) {
			b = binary.LittleEndian.AppendUint32(b, uint32(r.IntN(60000)))
		}
		return b
	}},
	{"integers of 64 bits", "integers", func(r *mrand.Rand) (b []byte) {
		for range 10 + r.IntN(100) {
			b = append(b, wordsOf(uint64(r.IntN(1e9)))...)
		}
		return b
	}},
	{"doubles", "floats", func(r *mrand.Rand) (b []byte) {
		for range 40 + r.IntN(100) {
			b = append(b, wordsOf(floatBits(r.NormFloat64()*1000))...)
		}
		return b
	}},
	{"zeros", "zeros", func(r *mrand.Rand) []byte { return make([]byte, 24+r.IntN(4000)) }},
	{"random bytes", "high entropy", func(r *mrand.Rand) []byte { return random(r, 64+r.IntN(4000)) }},
	{"a key of 32 bytes", "high entropy", func(r *mrand.Rand) []byte { return random(r, 32) }},
	{"a machine's code", "binary", func(r *mrand.Rand) []byte {
		return bytes.Repeat([]byte("\x55\x48\x89\xe5\x48\x83\xec\x10\x89\x7d\xfc\xe8\x12\x34\xff\xff\xc9\xc3\x0f\x1f\x00"), 5+r.IntN(40))
	}},
}

// inBlock puts a payload into a block as an allocator would: sizes in steps of 16, the rest zero or from earlier.
func inBlock(r *mrand.Rand, payload []byte, text bool) []byte {
	size := (max(len(payload), 24)+8+15)&^15 - 8
	b := make([]byte, size)
	if r.IntN(2) == 0 {
		copy(b, random(r, size))
	}
	n := copy(b, payload)
	if text && n < size {
		b[n] = 0
	}
	return b
}

const variants = 20

func TestClassifyLabelledPayloads(t *testing.T) {
	if len(payloads) < 40 {
		t.Fatalf("%d kinds, want 40 at least", len(payloads))
	}
	total, wrong := 0, 0
	for n, p := range payloads {
		r := mrand.New(mrand.NewPCG(uint64(n), 1009))
		misses := map[string]int{}
		for v := range variants {
			b := p.make(r)
			if v%2 == 0 && p.name != "zeros" {
				first, _, _ := strings.Cut(p.want, " ")
				binaryKind := strings.Contains("object pointers structure integers floats high", first)
				if !binaryKind {
					b = inBlock(r, b, v%4 == 0)
				}
			}
			c := &Classifier{Class: testClass}
			got := c.Classify(b).String()
			total++
			if got != p.want {
				wrong++
				misses[got]++
			}
		}
		if len(misses) > 0 {
			t.Logf("%s: want %q, got %v of %d", p.name, p.want, misses, variants)
		}
	}
	accuracy := 1 - float64(wrong)/float64(total)
	t.Logf("%d kinds, %d blocks, accuracy %.2f %%", len(payloads), total, accuracy*100)
	if accuracy < 0.98 {
		t.Errorf("accuracy %.2f %%, want 98 %%", accuracy*100)
	}
}

func floatBits(f float64) uint64 { return math.Float64bits(f) }
