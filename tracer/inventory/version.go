package inventory

import (
	"bufio"
	"io"
	"path"
	"regexp"
	"strings"
)

const (
	maxScan   = 64 << 20 // bytes of a file that are searched for versions
	maxString = 120      // longer strings are texts
	minString = 5
)

// Version finds the string by which a program or library names its version ("OpenSSL 3.0.11 19 Sep 2023", "nginx/1.22.1");
// empty when there is none. Files carry the versions of others too (their compiler's, their symbols'), so a string counts
// that has the file's own name or the word version in it.
func Version(r io.ReaderAt, file string) string {
	in := bufio.NewReaderSize(io.NewSectionReader(r, 0, maxScan), 256<<10)
	best, bestScore := "", 0
	stem := nameStem(file)
	eachString(in, func(s []byte) {
		if !hasVersion(s) {
			return
		}
		if score := versionScore(string(s), stem); score > bestScore {
			best, bestScore = strings.TrimSpace(string(s)), score
		}
	})
	return best
}

// eachString calls back for each printable string of a file. The slice is valid during the call.
func eachString(in *bufio.Reader, each func([]byte)) {
	buf := make([]byte, 0, maxString+1)
	for {
		c, err := in.ReadByte()
		if err == nil && c >= ' ' && c <= '~' {
			if len(buf) <= maxString {
				buf = append(buf, c)
			}
			continue
		}
		if len(buf) >= minString && len(buf) <= maxString && (c == 0 || c == '\n' || err != nil) {
			each(buf)
		}
		buf = buf[:0]
		if err != nil {
			return
		}
	}
}

// hasVersion is the cheap test that nearly all strings fail: a digit, a dot and a digit.
func hasVersion(s []byte) bool {
	for i := 1; i+1 < len(s); i++ {
		if s[i] == '.' && isDigit(s[i-1]) && isDigit(s[i+1]) {
			return true
		}
	}
	return false
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

var (
	versionText = regexp.MustCompile(`(?:^|[^\w.])[vV]?\d+\.\d+(?:\.\d+)*`)
	// notItsOwn are versions of symbols, compilers, formats and protocols, and strings that are paths or printf formats.
	notItsOwn   = regexp.MustCompile(`GLIBC_|GLIBCXX_|GCC_|CXXABI_|^GCC:|Compiled by|GOST|clang version|GNU C\d|HTTP/|TLSv|SSLv|://|%[a-z*.\d]|\.so|\.c(c|pp)?\b|^/|[{}<>]|[\d.]+\.[\d.]+\.[\d.]+\.[\d.]+\.`)
	versionWord = regexp.MustCompile(`(?i)\bversion\b|\bCopyright\b`)
	// aRelease is a product, its version and a date, "OpenSSL 3.0.11 19 Sep 2023", "10.42 2022-12-11". A bare version is none: it
	// may be that of a library the file was built with.
	aRelease = regexp.MustCompile(`^([A-Za-z][\w+-]* )?v?\d+\.\d+(\.\d+)?[-\w]* .*\b(19|20)\d\d\b`)
)

// versionScore is 0 for a string that does not name the file's own version.
func versionScore(s, stem string) int {
	if notItsOwn.MatchString(s) || !versionText.MatchString(" "+strings.ReplaceAll(s, "/", " ")) {
		return 0
	}
	score := 0
	if stem != "" && strings.Contains(strings.ToLower(s), stem) {
		score += 6
	}
	if versionWord.MatchString(s) {
		score += 4
	}
	if aRelease.MatchString(s) {
		score += 5
	}
	if score == 0 {
		return 0
	}
	if strings.Count(s, ".") == 2 {
		score++
	}
	if len(s) < 50 {
		score += 2
	}
	return score
}

var nameNumbers = regexp.MustCompile(`[-_.]?\d[\d.]*$`)

// nameStem is the name that a library's version string would carry: "ssl" of libssl.so.3, "nginx" of nginx.
func nameStem(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".so")
	name = strings.TrimPrefix(nameNumbers.ReplaceAllString(name, ""), "lib")
	if len(name) < 2 {
		return "" // libm, libc: a letter is in every string
	}
	return strings.ToLower(name)
}
