package symbolize

import (
	"strings"
)

// demangleD returns the source form of a D name: qualified names, template arguments and parameter types, as c++filt prints
// them. What it does not know is no D name: the caller keeps the mangled one.
func demangleD(name string) (string, bool) {
	if name == "_Dmain" {
		return "D main", true
	}
	rest, ok := strings.CutPrefix(name, "_D")
	if !ok || len(name) > maxDName {
		return "", false
	}
	d := dName{s: name, p: len(name) - len(rest)}
	out := d.qualified(true)
	if d.bad || d.p != len(d.s) && !d.skipType() {
		return "", false
	}
	return out, true
}

const (
	maxDName  = 16 << 10
	maxDDepth = 64
	maxDOut   = 64 << 10 // back references repeat their targets
)

// dName parses a mangled name; bad is sticky.
type dName struct {
	s     string
	p     int
	depth int
	out   int // bytes made
	bad   bool
}

func (d *dName) fail() string {
	d.bad = true
	return ""
}

func (d *dName) peek() byte {
	if d.p < len(d.s) {
		return d.s[d.p]
	}
	return 0
}

func (d *dName) accept(prefix string) bool {
	if strings.HasPrefix(d.s[d.p:], prefix) {
		d.p += len(prefix)
		return true
	}
	return false
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func (d *dName) number() int {
	n, start := 0, d.p
	for isDigit(d.peek()) && n < len(d.s) {
		n = n*10 + int(d.s[d.p]-'0')
		d.p++
	}
	if d.p == start || n > len(d.s) {
		d.bad = true
	}
	return n
}

// digits returns a number of any size as it is written.
func (d *dName) digits() string {
	start := d.p
	for isDigit(d.peek()) {
		d.p++
	}
	if d.p == start {
		return d.fail()
	}
	return d.s[start:d.p]
}

// enter guards recursion; each call is paired with a leave.
func (d *dName) enter() bool {
	d.depth++
	if d.depth > maxDDepth || d.out > maxDOut {
		d.bad = true
	}
	return !d.bad
}

func (d *dName) leave(s string) string {
	d.depth--
	d.out += len(s)
	return s
}

// symbolAhead tells whether a symbol name comes next.
func (d *dName) symbolAhead() bool {
	switch c := d.peek(); {
	case isDigit(c):
		return true
	case c == '_':
		return strings.HasPrefix(d.s[d.p:], "__T") || strings.HasPrefix(d.s[d.p:], "__U")
	case c == 'Q':
		target, _, ok := d.backReference()
		return ok && isDigit(d.s[target])
	}
	return false
}

// qualified parses the parts of a name with dots between them. A part that is a function has its type behind it; only
// that of the last one, the symbol's own, is shown.
func (d *dName) qualified(top bool) string {
	var out strings.Builder
	if !d.enter() {
		return d.fail()
	}
	for n := 0; n == 0 || d.symbolAhead(); n++ {
		for d.peek() == '0' { // anonymous
			d.p++
		}
		if n > 0 {
			out.WriteByte('.')
		}
		out.WriteString(d.symbol())
		if d.bad {
			return d.fail()
		}
		start := d.p
		method := d.accept("M")
		for method && d.modifier() != "" {
		}
		if !strings.ContainsRune("FUVWRY", rune(d.peek())) || d.peek() == 0 {
			d.p = start
			continue
		}
		params, _, ok := d.parameters()
		if !ok {
			d.bad = false
			d.p = start
			continue
		}
		if d.symbolAhead() || top {
			out.WriteString(params)
		}
	}
	return d.leave(out.String())
}

// backReference decodes Q and a base-26 distance, and returns the place it means and the place after it.
func (d *dName) backReference() (target, next int, ok bool) {
	n := 0
	for i := d.p + 1; i < len(d.s); i++ {
		c := d.s[i]
		switch {
		case c >= 'A' && c <= 'Z':
			n = n*26 + int(c-'A')
		case c >= 'a' && c <= 'z':
			n = n*26 + int(c-'a')
			return d.p - n, i + 1, n > 0 && n <= d.p
		default:
			return 0, 0, false
		}
		if n > len(d.s) {
			return 0, 0, false
		}
	}
	return 0, 0, false
}

// at parses something at another place and comes back.
func (d *dName) at(target, next int, parse func() string) string {
	if !d.enter() {
		return d.fail()
	}
	d.p = target
	s := parse()
	d.p = next
	return d.leave(s)
}

func (d *dName) symbol() string {
	if d.peek() == 'Q' {
		target, next, ok := d.backReference()
		if !ok || !isDigit(d.s[target]) {
			return d.fail()
		}
		return d.at(target, next, d.symbol)
	}
	if d.accept("__T") || d.accept("__U") {
		return d.template()
	}
	n := d.number()
	if d.bad || n == 0 || n > len(d.s)-d.p {
		return d.fail()
	}
	name := d.s[d.p : d.p+n]
	if strings.HasPrefix(name, "__T") || strings.HasPrefix(name, "__U") { // the old form, with its length before it
		end := d.p + n
		d.p += 3
		out := d.template()
		if d.p != end {
			return d.fail()
		}
		return out
	}
	d.p += n
	switch name {
	case "__ctor":
		return "this"
	case "__dtor":
		return "~this"
	case "__postblit":
		return "this(this)"
	}
	return name
}

// template parses a template's name and arguments.
func (d *dName) template() string {
	if !d.enter() {
		return d.fail()
	}
	name := d.symbol()
	var args []string
	for !d.accept("Z") {
		if d.bad || d.p >= len(d.s) {
			return d.fail()
		}
		d.accept("H") // specialized
		switch {
		case d.accept("T"):
			args = append(args, d.typ())
		case d.accept("S"):
			args = append(args, d.qualified(false))
		case d.accept("V"):
			args = append(args, d.value())
		case d.accept("X"):
			n := d.number()
			if d.bad || n > len(d.s)-d.p {
				return d.fail()
			}
			args = append(args, d.s[d.p:d.p+n])
			d.p += n
		default:
			return d.fail()
		}
	}
	return d.leave(name + "!(" + strings.Join(args, ", ") + ")")
}

// value parses a template's value argument: integers, booleans and null; others are rare in the names of functions.
func (d *dName) value() string {
	kind := d.peek()
	d.typ()
	if d.accept("n") {
		return "null"
	}
	sign := ""
	if d.accept("N") {
		sign = "-"
	} else {
		d.accept("i")
	}
	text := d.digits()
	suffix := map[byte]string{'h': "u", 't': "u", 'k': "u", 'l': "L", 'm': "uL"}[kind]
	switch {
	case kind == 'b' && text == "0":
		return "false"
	case kind == 'b':
		return "true"
	case strings.IndexByte("auw", kind) >= 0:
		return d.fail()
	}
	return sign + text + suffix
}

var dBasic = map[byte]string{
	'v': "void", 'g': "byte", 'h': "ubyte", 's': "short", 't': "ushort", 'i': "int", 'k': "uint", 'l': "long", 'm': "ulong",
	'f': "float", 'd': "double", 'e': "real", 'o': "ifloat", 'p': "idouble", 'j': "ireal", 'q': "cfloat", 'r': "cdouble",
	'c': "creal", 'b': "bool", 'a': "char", 'u': "wchar", 'w': "dchar", 'n': "typeof(null)",
}

// modifier parses a qualifier of a method's this.
func (d *dName) modifier() string {
	for _, m := range [][2]string{{"Ng", "inout"}, {"x", "const"}, {"y", "immutable"}, {"O", "shared"}} {
		if d.accept(m[0]) {
			return m[1]
		}
	}
	return ""
}

func (d *dName) typ() string {
	if !d.enter() {
		return d.fail()
	}
	return d.leave(d.typInner())
}

func (d *dName) typInner() string {
	if d.peek() == 'Q' {
		target, next, ok := d.backReference()
		if !ok {
			return d.fail()
		}
		return d.at(target, next, d.typ)
	}
	if m := d.modifier(); m != "" {
		return m + "(" + d.typ() + ")"
	}
	c := d.peek()
	if basic := dBasic[c]; basic != "" {
		d.p++
		return basic
	}
	if strings.IndexByte("FUVWRY", c) >= 0 && c != 0 {
		return d.function("function")
	}
	if c == 0 {
		return d.fail()
	}
	d.p++
	switch c {
	case 'A':
		return d.typ() + "[]"
	case 'G':
		n := d.digits()
		return d.typ() + "[" + n + "]"
	case 'H':
		key := d.typ()
		return d.typ() + "[" + key + "]"
	case 'P':
		if p := d.peek(); p != 0 && strings.IndexByte("FUVWRY", p) >= 0 {
			return d.function("function")
		}
		return d.typ() + "*"
	case 'D':
		for d.modifier() != "" {
		}
		return d.function("delegate")
	case 'I', 'C', 'S', 'E', 'T':
		return d.qualified(false)
	case 'B':
		n := d.number()
		var parts []string
		for range n {
			if d.bad {
				break
			}
			parts = append(parts, d.typ())
		}
		return "tuple(" + strings.Join(parts, ", ") + ")"
	case 'z':
		switch d.peek() {
		case 'i':
			d.p++
			return "cent"
		case 'k':
			d.p++
			return "ucent"
		}
	}
	return d.fail()
}

func (d *dName) function(kind string) string {
	params, attributes, ok := d.parameters()
	if !ok {
		return d.fail()
	}
	return d.typ() + params + " " + attributes + kind
}

var dAttributes = map[byte]string{
	'a': "pure ", 'b': "nothrow ", 'c': "ref ", 'd': "@property ", 'e': "@trusted ", 'f': "@safe ", 'i': "@nogc ", 'j': "return ",
	'l': "scope ", 'm': "@live ",
}

// parameters parses a function's calling convention, attributes and parameters; the return type follows.
func (d *dName) parameters() (params, attributes string, ok bool) {
	if d.p >= len(d.s) {
		return "", "", false
	}
	d.p++ // the convention
	for d.peek() == 'N' && d.p+1 < len(d.s) {
		a := dAttributes[d.s[d.p+1]]
		if a == "" {
			break // a type: inout or a vector
		}
		attributes += a
		d.p += 2
	}
	params, ok = d.parameterList()
	return params, attributes, ok
}

func (d *dName) parameterList() (string, bool) {
	var params []string
	for {
		switch {
		case d.accept("Z"):
			return "(" + strings.Join(params, ", ") + ")", !d.bad
		case d.accept("X"):
			return "(" + strings.Join(params, ", ") + "...)", !d.bad
		case d.accept("Y"):
			return "(" + strings.Join(append(params, "..."), ", ") + ")", !d.bad
		case d.bad || d.p >= len(d.s):
			return "", false
		}
		storage := ""
		for more := true; more; {
			switch {
			case d.accept("M"):
				storage += "scope "
			case d.accept("Nk"):
				storage += "return "
			case d.accept("I"):
				storage += "in "
			case d.accept("J"):
				storage += "out "
			case d.accept("K"):
				storage += "ref "
			case d.accept("L"):
				storage += "lazy "
			default:
				more = false
			}
		}
		params = append(params, storage+d.typ())
	}
}

// skipType passes the symbol's type and reports whether the name ends with it.
func (d *dName) skipType() bool {
	if d.accept("Z") { // an artificial symbol has none
		return d.p == len(d.s)
	}
	d.typ()
	return !d.bad && d.p == len(d.s)
}
