package inventory

import (
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/envs/pep440"
)

// requirement is one of PEP 508, as far as a graph needs it.
type requirement struct {
	name   string
	extras []string
	marker string
}

// parseRequirement reads "name[extra,…] (>=1); marker"; ok is false for what has no name.
func parseRequirement(s string) (r requirement, ok bool) {
	s = strings.TrimSpace(s)
	i := 0
	for i < len(s) && (s[i] >= '0' && s[i] <= '9' || s[i]|0x20 >= 'a' && s[i]|0x20 <= 'z' || strings.IndexByte("._-", s[i]) >= 0) {
		i++
	}
	if i == 0 {
		return r, false
	}
	r.name = normalise(s[:i])
	s = strings.TrimSpace(s[i:])
	if strings.HasPrefix(s, "[") {
		in, rest, closed := strings.Cut(s[1:], "]")
		if !closed {
			return r, false
		}
		for x := range strings.SplitSeq(in, ",") {
			if x = normalise(strings.TrimSpace(x)); x != "" {
				r.extras = append(r.extras, x)
			}
		}
		s = rest
	}
	// A URL may hold a semicolon; the marker of one comes after a space.
	sep := ";"
	if strings.HasPrefix(strings.TrimSpace(s), "@") {
		sep = " ;"
	}
	if _, m, has := strings.Cut(s, sep); has {
		r.marker = strings.TrimSpace(m)
	}
	return r, true
}

// markerEnv is what markers of PEP 508 ask for; "extra" is given separately.
type markerEnv map[string]string

func newMarkerEnv(python, machine string) markerEnv {
	short := python
	if parts := strings.SplitN(python, ".", 3); len(parts) > 1 {
		short = parts[0] + "." + parts[1]
	}
	return markerEnv{
		"python_version": short, "python_full_version": python, "implementation_version": python, "implementation_name": "cpython",
		"platform_python_implementation": "CPython", "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine,
		"platform_release": "", "platform_version": "",
	}
}

// holds evaluates a marker with the given extras. What cannot be read holds: an
// edge too many is better than a dependency that nobody sees.
func (m markerEnv) holds(marker string, extras []string) bool {
	if marker == "" {
		return true
	}
	p := &markerParser{env: m, extras: extras, tokens: markerTokens(marker)}
	v := p.or(0)
	if p.bad || p.i != len(p.tokens) {
		return true
	}
	return v
}

type markerParser struct {
	env    markerEnv
	extras []string
	tokens []string
	i      int
	bad    bool
}

// markerTokens splits into words, quoted strings (with the quote in front),
// operators and parentheses.
func markerTokens(s string) []string {
	var out []string
	for s != "" && len(out) < 1000 {
		switch c := s[0]; {
		case c == ' ' || c == '\t' || c == '\n':
			s = s[1:]
		case c == '\'' || c == '"':
			j := strings.IndexByte(s[1:], c)
			if j < 0 {
				return append(out, "?")
			}
			out, s = append(out, "'"+s[1:1+j]), s[j+2:]
		case c == '(' || c == ')':
			out, s = append(out, s[:1]), s[1:]
		case strings.IndexByte("<>=!~", c) >= 0:
			j := 1
			for j < len(s) && strings.IndexByte("<>=!~", s[j]) >= 0 {
				j++
			}
			out, s = append(out, s[:j]), s[j:]
		default:
			j := strings.IndexAny(s, " \t\n'\"()<>=!~")
			if j < 0 {
				j = len(s)
			}
			out, s = append(out, s[:j]), s[j:]
		}
	}
	return out
}

func (p *markerParser) peek() string {
	if p.i < len(p.tokens) {
		return p.tokens[p.i]
	}
	return ""
}

func (p *markerParser) next() string {
	t := p.peek()
	p.i++
	return t
}

const maxMarkerDepth = 50

func (p *markerParser) or(depth int) bool {
	v := p.and(depth)
	for p.peek() == "or" {
		p.i++
		w := p.and(depth)
		v = v || w
	}
	return v
}

func (p *markerParser) and(depth int) bool {
	v := p.term(depth)
	for p.peek() == "and" {
		p.i++
		w := p.term(depth)
		v = v && w
	}
	return v
}

func (p *markerParser) term(depth int) bool {
	if p.bad || depth > maxMarkerDepth {
		p.bad = true
		return true
	}
	if p.peek() == "(" {
		p.i++
		v := p.or(depth + 1)
		if p.next() != ")" {
			p.bad = true
		}
		return v
	}
	left, op := p.next(), p.next()
	if op == "not" {
		if p.next() != "in" {
			p.bad = true
		}
		op = "not in"
	}
	right := p.next()
	if left == "extra" || right == "extra" {
		if left == "extra" {
			left = right
		}
		has := slices.Contains(p.extras, normalise(strings.TrimPrefix(left, "'")))
		switch op {
		case "==":
			return has
		case "!=":
			return !has
		}
		p.bad = true
		return true
	}
	return p.compare(p.value(left), op, p.value(right), left == "platform_release" || right == "platform_release")
}

func (p *markerParser) value(t string) string {
	if v, ok := strings.CutPrefix(t, "'"); ok {
		return v
	}
	v, ok := p.env[strings.ReplaceAll(t, ".", "_")] // os.name is an old spelling
	if !ok {
		p.bad = true
	}
	return v
}

func (p *markerParser) compare(a, op, b string, unknown bool) bool {
	if unknown { // the kernel that it will run on
		return true
	}
	switch op {
	case "in":
		return strings.Contains(b, a)
	case "not in":
		return !strings.Contains(b, a)
	}
	if v, err := pep440.Parse(a); err == nil {
		if s, err := pep440.ParseSpecifiers(op + b); err == nil && len(s) > 0 {
			return s.Contains(v)
		}
	}
	switch op {
	case "==", "===":
		return a == b
	case "!=":
		return a != b
	case "<", "<=", ">", ">=":
		c := strings.Compare(a, b)
		return c < 0 && op[0] == '<' || c > 0 && op[0] == '>' || c == 0 && len(op) == 2
	}
	p.bad = true
	return true
}
