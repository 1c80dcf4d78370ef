package content

import "bytes"

// jsonList is what a top-level array holds, judged by its first element.
type jsonList uint8

const (
	noList jsonList = iota
	listOfObjects
	listOfNumbers
	listOfStrings
	listOfLists
	listOfOthers
	emptyList
)

// String names the array by its elements.
func (l jsonList) String() string {
	return [...]string{"", "[{}]", "[numbers]", "[strings]", "[[]]", "[true, false, null]", "[]"}[l]
}

// maxDepth bounds how deep values may nest; deeper ones count as cut off.
const maxDepth = 128

// jsonParser checks that text is JSON and collects the keys of the outermost object, or of the first object of the
// outermost array. It works on memory, so that the text may end anywhere: cut tells.
type jsonParser struct {
	b     []byte
	i     int
	cut   bool // the text ended inside a value
	keys  [][]byte
	pairs int // complete members of the object whose keys are collected
	list  jsonList
	depth int // at which keys are collected
	first bool
}

// parseJSON reads one value from the start of b. ok means JSON: complete, or right up to where the text breaks off and
// long enough not to be chance.
func (c *Classifier) parseJSON(b []byte) (f finding, ok bool) {
	p := jsonParser{b: b, keys: c.keys[:0], first: true}
	p.space()
	if p.i >= len(b) || b[p.i] != '{' && b[p.i] != '[' {
		return f, false
	}
	if b[p.i] == '[' {
		p.depth = 1
		p.list = listKind(b[p.i+1:])
	}
	complete := p.value(0)
	c.keys = p.keys
	if !complete && p.pairs == 0 {
		return f, false
	}
	if !complete && !p.cut && p.pairs < 2 {
		return f, false // an error so early is more likely other text
	}
	f = finding{kind: JSON, length: p.i, keys: p.keys, list: p.list}
	for _, k := range p.keys {
		f.hash += hashKey(k) // a sum: the order of keys makes no difference
	}
	return f, true
}

func listKind(b []byte) jsonList {
	b = bytes.TrimLeft(b, " \t\r\n")
	switch {
	case len(b) == 0:
		return listOfOthers
	case b[0] == '{':
		return listOfObjects
	case b[0] == '[':
		return listOfLists
	case b[0] == '"':
		return listOfStrings
	case b[0] == ']':
		return emptyList
	case isDigit(b[0]), b[0] == '-':
		return listOfNumbers
	}
	return listOfOthers
}

func (p *jsonParser) space() {
	for p.i < len(p.b) && (p.b[p.i] == ' ' || p.b[p.i] == '\n' || p.b[p.i] == '\t' || p.b[p.i] == '\r') {
		p.i++
	}
}

// more skips space and says whether text is left.
func (p *jsonParser) more() bool {
	p.space()
	if p.i >= len(p.b) {
		p.cut = true
		return false
	}
	return true
}

func (p *jsonParser) value(depth int) bool {
	if !p.more() {
		return false
	}
	if depth > maxDepth {
		p.cut = true
		return false
	}
	switch c := p.b[p.i]; {
	case c == '{':
		return p.object(depth)
	case c == '[':
		return p.array(depth)
	case c == '"':
		_, ok := p.str()
		return ok
	case c == '-' || isDigit(c):
		return p.number()
	}
	return p.literal("true") || p.literal("false") || p.literal("null")
}

func (p *jsonParser) object(depth int) bool {
	collect := depth == p.depth && p.first
	p.i++
	if !p.more() {
		return false
	}
	if p.b[p.i] == '}' {
		p.i++
		return true
	}
	for {
		if !p.more() {
			return false
		}
		key, ok := p.str()
		if !ok || !p.more() {
			return false
		}
		if p.b[p.i] != ':' {
			return false
		}
		p.i++
		if collect {
			p.addKey(key)
		}
		if !p.value(depth + 1) {
			return false
		}
		if collect {
			p.pairs++
		}
		if !p.more() {
			return false
		}
		p.i++
		switch p.b[p.i-1] {
		case ',':
		case '}':
			p.first = p.first && !collect
			return true
		default:
			p.i--
			return false
		}
	}
}

func (p *jsonParser) addKey(key []byte) {
	if len(p.keys) >= maxKeys {
		return
	}
	for _, k := range p.keys {
		if bytes.Equal(k, key) || isID(k) && isID(key) {
			return
		}
	}
	p.keys = append(p.keys, key)
}

func (p *jsonParser) array(depth int) bool {
	p.i++
	if !p.more() {
		return false
	}
	if p.b[p.i] == ']' {
		p.i++
		return true
	}
	for {
		if !p.value(depth + 1) {
			return false
		}
		if p.list > listOfObjects && depth == 0 {
			p.pairs++
		}
		if !p.more() {
			return false
		}
		p.i++
		switch p.b[p.i-1] {
		case ',':
		case ']':
			return true
		default:
			p.i--
			return false
		}
	}
}

// str reads a string and returns what stands between the quotes, escapes as they are.
func (p *jsonParser) str() ([]byte, bool) {
	if p.b[p.i] != '"' {
		return nil, false
	}
	start := p.i + 1
	for i := start; i < len(p.b); i++ {
		switch c := p.b[i]; {
		case c == '"':
			p.i = i + 1
			return p.b[start:i], true
		case c == '\\':
			i++
		case c < ' ':
			p.i = i
			return nil, false
		}
	}
	p.i, p.cut = len(p.b), true
	return nil, false
}

func (p *jsonParser) number() bool {
	for p.i < len(p.b) {
		c := p.b[p.i]
		if !isDigit(c) && c != '-' && c != '+' && c != '.' && c != 'e' && c != 'E' {
			return true
		}
		p.i++
	}
	p.cut = true
	return false
}

func (p *jsonParser) literal(word string) bool {
	rest := p.b[p.i:]
	if len(rest) < len(word) {
		p.cut = p.cut || string(rest) == word[:len(rest)]
		return false
	}
	if string(rest[:len(word)]) != word {
		return false
	}
	p.i += len(word)
	return true
}
