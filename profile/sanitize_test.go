package profile

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

func TestSanitize(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"plain text stays", "/usr/lib/libc.so.6 (x)", "/usr/lib/libc.so.6 (x)"},
		{"letters of other scripts stay", "/srv/données/数据", "/srv/données/数据"},
		{"an escape sequence shows", "a\x1b[2Jb", `a\x1b[2Jb`},
		{"a newline shows", "nginx\nroot", `nginx\nroot`},
		{"a one-byte CSI shows", "a\u009b2J", `a\u009b2J`},
		{"a byte that is no UTF-8 shows", "a\xffb", `a\xffb`},
		{"reversed text shows", "a\u202eb", `a\u202eb`},
		{"a zero-width space shows", "a\u200bb", `a\u200bb`},
		{"a line separator shows", "a\u2028b", `a\u2028b`},
		{"DEL shows", "a\x7fb", `a\x7fb`},
		{"a replacement character that was sent stays", "a\ufffdb", "a\ufffdb"},
		{"nothing stays nothing", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := Sanitize(tt.in); got != tt.want {
				t.Errorf("Sanitize(%q) = %q, want %q", tt.in, got, tt.want)
			}
		})
	}
}

func FuzzSanitize(f *testing.F) {
	f.Add("a\x1b]0;title\x07b")
	f.Add("\xff\xfe\u202e")
	f.Fuzz(func(t *testing.T, in string) {
		got := Sanitize(in)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("Sanitize(%q) = %q is not printable", in, got)
		}
		if Sanitize(got) != got {
			t.Errorf("Sanitize(%q) is not stable", in)
		}
	})
}

func TestJSONHoldsNothingThatATerminalObeys(t *testing.T) {
	names := []string{"plain ünïcode 日本 \U0001f600", "c1 \u009b31m", "del \x7f", "bidi \u202e\u2066", "tag \U000e0041", "esc \x1b\n\"", "bad \x9b", "\u2028"}
	want, err := json.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	for _, chunk := range []int{1, 2, 3, 7, len(want)} {
		var out bytes.Buffer
		w := JSONWriter(&out)
		for part := range slices.Chunk(want, chunk) {
			if n, err := w.Write(part); n != len(part) || err != nil {
				t.Fatal(n, err)
			}
		}
		for _, r := range out.String() {
			if !unicode.IsPrint(r) {
				t.Errorf("chunks of %d: %q holds %q", chunk, out.String(), r)
			}
		}
		var got []string
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		names[6] = "bad \ufffd" // what encoding/json makes of it
		if diff := cmp.Diff(names, got); diff != "" {
			t.Error(diff)
		}
	}
}

func TestLinesOfAnErrorStayLines(t *testing.T) {
	if got, want := SanitizeLines("open x\x1b[2J:\n\tno\r"), "open x\\x1b[2J:\n    no\\r"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
