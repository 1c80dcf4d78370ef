package content

import (
	"fmt"
	mrand "math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestClassifyIsNotFooledBy(t *testing.T) {
	for _, tt := range []struct {
		name, block, want string
	}{
		{"nothing", "", "empty"},
		{"a lone brace", "{\x00\x00\x00\x00\x00\x00\x00", "integers"},
		{"braces that are no JSON", "{not: json, at: all}", "text"},
		{"an empty object", "{}\x00\x00\x00\x00\x00\x00", "integers"},
		{"an integer made of letters", "AB\x00\x00\x00\x00\x00\x00CD\x00\x00\x00\x00\x00\x00", "integers"},
		{"markup that is an address", "<ada@example.test> wrote to somebody", "text"},
		{"a method without a protocol", "GET lost, said the fox to the dog", "text"},
		{"two bytes of zlib in text", "x\x9c is how it starts", "text"},
		{"a sentence that selects", "Select one of the following options", "text"},
		{"a pointer made of letters", " OnMxU\x00\x00\x10\x00\x00\x00\x00\x00\x00\x00" + `{"a":1234}`, "JSON {a}"},
		{"the same key twice", `{"a":1,"a":2}`, "JSON {a}"},
		{"keys in another order", `{"payload":"","uid":1,"token":""}`, "JSON {payload, uid, token}"},
		{"keys that are secrets", `{"ada@example.test":1,"b":2}`, "JSON {xxx@xxxxxxx.xxxx, b}"},
		{"an escaped quote", `{"a\"b":"c\\","d":1}`, `JSON {x\"x, d}`},
		{"a very deep list", strings.Repeat("[", 4000), "text"},
		{"JSON in a pool", strings.Repeat("\x10\x20\x30\x40\xf1\x7f\x00\x00", 30) + `{"uid":1,"ok":true}` + strings.Repeat("\x00", 99),
			"pointers holding JSON {uid, ok}"},
		{"JSON with a rest behind it", "{\"a\":1}\x00\"}garbage", "JSON {a}"},
	} {
		if got := Classify([]byte(tt.block)).String(); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestSamplesAreRedacted(t *testing.T) {
	for _, tt := range []struct {
		name, block, want string
	}{
		{"JSON keeps keys", `{"uid":942,"token":"s3cr3t","ok":true,"n":null,"list":["ab",-1.5]}`,
			`{"uid":999,"token":"x9xx9x","ok":xxxx,"n":xxxx,"list":["xx",-9.9]}`},
		{"JSON does not keep keys that are no names", `{"Ada Lovelace":1,"12345":{"a":2}}`, `{"xxx xxxxxxxx":9,"<id>":{"a":9}}`},
		{"JSON cut inside a string", `{"uid":942,"token":"s3cr`, `{"uid":999,"token":"x9xx`},
		{"JSON cut inside a key", `{"uid":942,"tok`, `{"uid":999,"xxx`},
		{"HTTP keeps method and headers", "GET /u/ada?t=s3 HTTP/1.1\r\nCookie: id=77\r\n\r\nbody: x1",
			"GET /x/xxx?x=x9 HTTP/1.1 Cookie: xx=99  xxxx: x9"},
		{"XML keeps tags", `<a secret="p4ss">word<!-- n0te --></a>`, `<a secret="x9xx">xxxx<!-- x9xx --></a>`},
		{"form data keeps names", "user=ada&password=h3llo!", "user=xxx&password=x9xxx!"},
		{"SQL keeps its own words", "SELECT name FROM users WHERE id = 942", "SELECT xxxx FROM xxxxx WHERE xx = 999"},
		{"text", "Call Ada: 555-0100", "xxxx xxx: 999-9999"},
		{"letters of all scripts", "Привет, 世界 42", "xxxxxx, xx 99"},
		{"escape sequences", "\x1b[31mred alert\x1b[0m", ".[99xxxx xxxxx.[9x"},
		{"PEM keeps its label", "-----BEGIN PRIVATE KEY-----\nMIIB9\n", "-----BEGIN PRIVATE KEY----- XXXX9"},
		{"UTF-16", "p\x00a\x00s\x00s\x001\x002\x00", "xxxx99"},
		{"words", "\x00\x10\x34\x12\xf0\x7f\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00abcdefgh", "p 9 0 x"},
	} {
		g := NewGrouper(Options{})
		g.Add(0, 1, uint64(len(tt.block)), []byte(tt.block))
		got := g.Groups()[0].Samples[0]
		if strings.ToLower(got) != strings.ToLower(tt.want) {
			t.Errorf("%s:\n got %s\nwant %s", tt.name, got, tt.want)
		}
	}
}

func TestNoRedactShowsBytesButNoEscapes(t *testing.T) {
	g := NewGrouper(Options{NoRedact: true})
	g.Add(0, 1, 24, []byte("\x1b[31msecret 42\x00"))
	if got, want := g.Groups()[0].Samples[0], `\x1b[31msecret 42`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestGroupsByKeyAndShape(t *testing.T) {
	a, b := NewGrouper(Options{}), NewGrouper(Options{})
	for i := range 1009 {
		g := a
		if i%2 == 1 {
			g = b
		}
		g.Add(uint64(i%3), uint64(i)*32, 48, fmt.Appendf(nil, `{"uid":%d,"name":"Bob"}`, i))
		g.Add(7, uint64(i)*32+8, 32, fmt.Appendf(nil, `{"name":"Bob","uid":%d}`, i))
		if i < 101 {
			g.Add(7, uint64(i), 24, make([]byte, 24))
		}
	}
	a.Merge(b)
	type row struct {
		Key          uint64
		Shape        string
		Count, Bytes uint64
		Strings      string
	}
	var got []row
	for _, g := range a.Groups() {
		strs := ""
		if len(g.Strings) > 0 {
			strs = g.Strings[0].Text
		}
		got = append(got, row{g.Key, g.String(), g.Count, g.Bytes, strs})
	}
	want := []row{
		{7, "JSON {name, uid}", 1009, 1009 * 32, "xxx"},
		{0, "JSON {uid, name}", 337, 337 * 48, "xxx"},
		{1, "JSON {uid, name}", 336, 336 * 48, "xxx"},
		{2, "JSON {uid, name}", 336, 336 * 48, "xxx"},
		{7, "zeros", 101, 101 * 24, ""},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestGroupsAreTheSameInAnyOrder(t *testing.T) {
	var blocks [][]byte
	r := mrand.New(mrand.NewPCG(1, 2))
	for range 503 {
		blocks = append(blocks, payloads[r.IntN(len(payloads))].make(r))
	}
	one, two := NewGrouper(Options{}), NewGrouper(Options{})
	for i, b := range blocks {
		one.Add(0, uint64(i)*64, uint64(len(b)), b)
	}
	for _, i := range r.Perm(len(blocks)) {
		two.Add(0, uint64(i)*64, uint64(len(blocks[i])), blocks[i])
	}
	if d := cmp.Diff(one.Groups(), two.Groups(), cmp.FilterPath(func(p cmp.Path) bool {
		return p.Last().String() == ".Detail"
	}, cmp.Ignore())); d != "" {
		t.Error(d)
	}
}

func TestGrouperMemoryIsBounded(t *testing.T) {
	g := NewGrouper(Options{MaxGroups: 100})
	for i := range 20011 {
		g.Add(uint64(i), uint64(i), 32, fmt.Appendf(nil, `{"k%c%c%c":1}`, 'a'+i%26, 'a'+i/26%26, 'a'+i/676%26))
	}
	if len(g.groups) > 201 {
		t.Errorf("%d groups, want 201 at most", len(g.groups))
	}
	var total uint64
	for _, group := range g.Groups() {
		total += group.Count
	}
	if total != 20011 {
		t.Errorf("%d blocks in groups, want 20011", total)
	}
}

func TestFrequentStringsAreFound(t *testing.T) {
	g := NewGrouper(Options{NoRedact: true})
	for i := range 1000 {
		text := fmt.Sprintf("line %d of many", i)
		if i%4 == 0 {
			text = "connection refused"
		}
		g.Add(0, uint64(i), 64, []byte(text))
	}
	got := g.Groups()[0]
	if len(got.Strings) == 0 || got.Strings[0].Text != "connection refused" {
		t.Errorf("got %v of %d", got.Strings, got.Looked)
	}
}

func FuzzClassify(f *testing.F) {
	r := mrand.New(mrand.NewPCG(3, 4))
	for _, p := range payloads {
		f.Add(p.make(r))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		g := NewGrouper(Options{Class: testClass})
		g.Add(0, 1, uint64(len(b)), b)
		group := g.Groups()[0]
		if strings.ContainsFunc(group.Samples[0]+group.Detail, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("control character in %q", group.Samples[0])
		}
		if len(group.Samples[0]) > 4*sampleBytes {
			t.Errorf("sample of %d bytes", len(group.Samples[0]))
		}
	})
}

// FuzzRedact: no digit but 9 and no run of letters of the input survives in a value.
func FuzzRedact(f *testing.F) {
	f.Add("s3cr3t")
	f.Add(`\" quote`)
	f.Fuzz(func(t *testing.T, secret string) {
		for _, c := range secret {
			if c < ' ' || c == '"' || c == '\\' {
				t.Skip()
			}
		}
		got := redactJSON([]byte(`{"key":"` + secret + `","n":[1,"` + secret + `"]}`))
		got = strings.ReplaceAll(strings.Replace(got, `"key":`, "", 1), `"n":`, "")
		for _, c := range got {
			if isDigit(byte(c)) && c < 0x80 && c != '9' || c < 0x80 && isLetter(byte(c)) && c != 'x' {
				t.Fatalf("%q shows %q", secret, got)
			}
		}
	})
}

func benchmarkBlocks() (blocks [][]byte, bytes int) {
	r := mrand.New(mrand.NewPCG(5, 6))
	for range 4096 {
		b := inBlock(r, payloads[r.IntN(len(payloads))].make(r), true)
		b = b[:min(len(b), 512)]
		blocks = append(blocks, b)
		bytes += len(b)
	}
	return blocks, bytes
}

func BenchmarkAdd(b *testing.B) {
	blocks, bytes := benchmarkBlocks()
	g := NewGrouper(Options{})
	b.SetBytes(int64(bytes / len(blocks)))
	b.ReportAllocs()
	i := uint64(0)
	for b.Loop() {
		g.Add(0, i*64, 128, blocks[i%4096])
		i++
	}
	runtime.KeepAlive(g)
}

func BenchmarkAddJSON(b *testing.B) {
	block := inBlock(mrand.New(mrand.NewPCG(5, 6)), session(mrand.New(mrand.NewPCG(7, 8))), true)
	g := NewGrouper(Options{})
	b.SetBytes(int64(len(block)))
	i := uint64(0)
	for b.Loop() {
		g.Add(0, i*64, 128, block)
		i++
	}
}

func TestPrintableWordsAreJudgedLikeTheirBytes(t *testing.T) {
	for c := range 256 {
		for at := range 8 {
			w := uint64(0x6120417e20397a23)&^(0xff<<(8*at)) | uint64(c)<<(8*at)
			if got, want := allPrintable(w), c >= ' ' && c <= '~'; got != want {
				t.Errorf("%#x: got %v, want %v", w, got, want)
			}
		}
	}
}
