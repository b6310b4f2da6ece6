package recipes

import (
	"fmt"
	"strings"

	"github.com/sbxrun/sbxrun/envs/pep440"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// Environment is what markers are evaluated in.
type Environment struct {
	// Vars are PEP 508's variables but extra.
	Vars map[string]string
	// Extras and Groups are those asked for, by their normalised names: the
	// values of extras, dependency_groups and, any of them, of extra.
	Extras, Groups map[string]bool
}

// marker is a parsed one: its evaluation.
type marker func(e *Environment) bool

const maxMarkerDepth = 64

// markerParser reads PEP 508's grammar.
type markerParser struct {
	text  string
	at    int
	depth int
}

func parseMarker(text string) (marker, error) {
	p := &markerParser{text: text}
	m, err := p.or()
	if err == nil && p.at < len(p.text) {
		err = p.fail("an operator")
	}
	return m, err
}

func (p *markerParser) fail(want string) error {
	return fmt.Errorf("marker %q: expected %s at character %d", shorten(p.text), want, p.at+1)
}

func shorten(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

func (p *markerParser) space() {
	p.at += span(p.text[p.at:], func(c byte) bool { return c == ' ' || c == '\t' })
}

// word takes a word that is followed by no other of its letters.
func (p *markerParser) word(w string) bool {
	p.space()
	rest, ok := strings.CutPrefix(p.text[p.at:], w)
	if !ok || rest != "" && (isAlnum(rest[0]) || rest[0] == '_') {
		return false
	}
	p.at += len(w)
	return true
}

func (p *markerParser) or() (marker, error) {
	m, err := p.and()
	for err == nil && p.word("or") {
		var r marker
		l := m
		if r, err = p.and(); err == nil {
			m = func(e *Environment) bool { return l(e) || r(e) }
		}
	}
	return m, err
}

func (p *markerParser) and() (marker, error) {
	m, err := p.atom()
	for err == nil && p.word("and") {
		var r marker
		l := m
		if r, err = p.atom(); err == nil {
			m = func(e *Environment) bool { return l(e) && r(e) }
		}
	}
	return m, err
}

func (p *markerParser) atom() (marker, error) {
	p.space()
	if p.at < len(p.text) && p.text[p.at] == '(' {
		if p.depth++; p.depth > maxMarkerDepth {
			return nil, p.fail("no deeper nesting")
		}
		p.at++
		m, err := p.or()
		if err != nil {
			return nil, err
		}
		p.space()
		if p.at >= len(p.text) || p.text[p.at] != ')' {
			return nil, p.fail("a closing parenthesis")
		}
		p.at++
		p.depth--
		p.space()
		return m, nil
	}
	return p.comparison()
}

// operand is a variable or a text.
type operand struct{ variable, text string }

var variables = map[string]string{
	"python_version": "", "python_full_version": "", "os_name": "", "sys_platform": "", "platform_release": "", "platform_system": "",
	"platform_version": "", "platform_machine": "", "platform_python_implementation": "", "implementation_name": "", "implementation_version": "",
	"extra": "", "extras": "", "dependency_groups": "",
	// As of setuptools' times.
	"os.name": "os_name", "sys.platform": "sys_platform", "platform.version": "platform_version", "platform.machine": "platform_machine",
	"platform.python_implementation": "platform_python_implementation", "python_implementation": "platform_python_implementation",
}

func (p *markerParser) operand() (o operand, err error) {
	p.space()
	rest := p.text[p.at:]
	if rest != "" && (rest[0] == '"' || rest[0] == '\'') {
		i := strings.IndexByte(rest[1:], rest[0])
		if i < 0 {
			return o, p.fail("a closing quote")
		}
		p.at += i + 2
		return operand{text: rest[1 : i+1]}, nil
	}
	n := span(rest, func(c byte) bool { return isAlnum(c) || c == '_' || c == '.' })
	canonical, known := variables[rest[:n]]
	if !known {
		return o, p.fail("a variable or a text in quotes")
	}
	p.at += n
	if canonical == "" {
		canonical = rest[:n]
	}
	return operand{variable: canonical}, nil
}

func (p *markerParser) operator() (string, error) {
	p.space()
	for _, op := range operators {
		if strings.HasPrefix(p.text[p.at:], op) {
			p.at += len(op)
			return op, nil
		}
	}
	if p.word("in") {
		return "in", nil
	}
	if p.word("not") {
		if p.word("in") {
			return "not in", nil
		}
		return "", p.fail(`"in"`)
	}
	return "", p.fail("an operator")
}

// ofVersions are the variables that are compared as versions.
var ofVersions = map[string]bool{"implementation_version": true, "platform_release": true, "python_full_version": true, "python_version": true}

func (p *markerParser) comparison() (marker, error) {
	l, err := p.operand()
	if err != nil {
		return nil, err
	}
	op, err := p.operator()
	if err != nil {
		return nil, err
	}
	r, err := p.operand()
	if err != nil {
		return nil, err
	}
	p.space()
	if (l.variable == "") == (r.variable == "") {
		return nil, p.fail("one variable and one text")
	}
	switch v := l.variable + r.variable; v {
	case "extras", "dependency_groups":
		if l.variable != "" || op != "in" && op != "not in" {
			return nil, p.fail(`"NAME" in ` + v)
		}
		name := pep503.Normalise(l.text)
		return func(e *Environment) bool {
			set := e.Extras
			if v == "dependency_groups" {
				set = e.Groups
			}
			return set[name] == (op == "in")
		}, nil
	case "extra":
		name := pep503.Normalise(l.text + r.text)
		switch op {
		case "==", "===":
			return func(e *Environment) bool { return e.Extras[name] }, nil
		case "!=":
			return func(e *Environment) bool { return !e.Extras[name] }, nil
		}
		return nil, p.fail("extra == or extra !=")
	}
	if ofVersions[l.variable+r.variable] && op != "in" && op != "not in" {
		if r.variable == "" {
			if s, err := pep440.ParseSpecifiers(op + r.text); err == nil && !strings.Contains(r.text, ",") {
				return func(e *Environment) bool { return allow(s, e.Vars[l.variable]) }, nil
			}
		} else {
			return func(e *Environment) bool {
				s, err := pep440.ParseSpecifiers(op + e.Vars[r.variable])
				if err != nil {
					return compareTexts(l.text, op, e.Vars[r.variable])
				}
				return allow(s, l.text)
			}, nil
		}
	}
	if op == "~=" || op == "===" {
		return nil, p.fail("a version for " + op)
	}
	return func(e *Environment) bool {
		x, y := l.text, r.text
		if l.variable != "" {
			x = e.Vars[l.variable]
		} else {
			y = e.Vars[r.variable]
		}
		return compareTexts(x, op, y)
	}, nil
}

// compareTexts: texts have no order.
func compareTexts(x, op, y string) bool {
	switch op {
	case "in":
		return strings.Contains(y, x)
	case "not in":
		return !strings.Contains(y, x)
	case "==", "<=", ">=", "===":
		return x == y
	case "!=":
		return x != y
	}
	return false
}
