package recipes

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// version is one of PEP 440.
type version struct {
	epoch     uint64
	release   []uint64
	preLetter string // a, b, rc; "" is none
	pre       uint64
	post, dev *uint64
	local     []string
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }
func isLower(c byte) bool { return c >= 'a' && c <= 'z' }
func isAlnum(c byte) bool { return isDigit(c) || isLower(c) || c >= 'A' && c <= 'Z' }

// span is the length of the longest prefix whose bytes are all in.
func span(s string, in func(byte) bool) int {
	for i := range len(s) {
		if !in(s[i]) {
			return i
		}
	}
	return len(s)
}

// number takes digits off the front; ok is false where there are none, or too many.
func number(s string) (n uint64, rest string, ok bool) {
	i := span(s, isDigit)
	n, err := strconv.ParseUint(s[:i], 10, 64)
	return n, s[i:], err == nil
}

// label takes [._-]?(one of names)[._-]?([0-9]+)? off the front; names are tried in order.
func label(s string, names ...string) (name string, n uint64, rest string, ok bool) {
	t := s
	if t != "" && strings.IndexByte("._-", t[0]) >= 0 {
		t = t[1:]
	}
	for _, name := range names {
		u, found := strings.CutPrefix(t, name)
		if !found {
			continue
		}
		v := u
		if v != "" && strings.IndexByte("._-", v[0]) >= 0 {
			v = v[1:]
		}
		if n, after, ok := number(v); ok {
			return name, n, after, true
		}
		return name, 0, u, true
	}
	return "", 0, s, false
}

func parseVersion(text string) (v version, err error) {
	bad := func() (version, error) { return version{}, fmt.Errorf("%q is no version", text) }
	s := strings.TrimPrefix(strings.ToLower(strings.TrimSpace(text)), "v")
	n, rest, ok := number(s)
	if !ok {
		return bad()
	}
	if after, is := strings.CutPrefix(rest, "!"); is {
		v.epoch = n
		if n, rest, ok = number(after); !ok {
			return bad()
		}
	}
	v.release = []uint64{n}
	for len(rest) > 1 && rest[0] == '.' && isDigit(rest[1]) {
		if n, rest, ok = number(rest[1:]); !ok {
			return bad()
		}
		v.release = append(v.release, n)
	}
	if name, n, after, ok := label(rest, "alpha", "a", "beta", "b", "preview", "pre", "c", "rc"); ok {
		switch name {
		case "alpha":
			name = "a"
		case "beta":
			name = "b"
		case "preview", "pre", "c":
			name = "rc"
		}
		v.preLetter, v.pre, rest = name, n, after
	}
	if len(rest) > 1 && rest[0] == '-' && isDigit(rest[1]) {
		if n, rest, ok = number(rest[1:]); !ok {
			return bad()
		}
		v.post = &n
	} else if _, n, after, ok := label(rest, "post", "rev", "r"); ok {
		v.post, rest = &n, after
	}
	if _, n, after, ok := label(rest, "dev"); ok {
		v.dev, rest = &n, after
	}
	if after, is := strings.CutPrefix(rest, "+"); is {
		v.local = strings.FieldsFunc(after, func(r rune) bool { return r == '.' || r == '-' || r == '_' })
		want := len(v.local) - 1
		for _, p := range v.local {
			want += len(p)
			if span(p, isAlnum) != len(p) {
				return bad()
			}
		}
		if len(v.local) == 0 || want != len(after) {
			return bad()
		}
		rest = ""
	}
	if rest != "" {
		return bad()
	}
	return v, nil
}

func (v version) isPre() bool { return v.preLetter != "" || v.dev != nil }

// public is the version without its local part.
func (v version) public() version {
	v.local = nil
	return v
}

// at gives a component of the release, 0 beyond its end.
func (v version) at(i int) uint64 {
	if i < len(v.release) {
		return v.release[i]
	}
	return 0
}

func (v version) compareBase(o version) int {
	if c := cmp.Compare(v.epoch, o.epoch); c != 0 {
		return c
	}
	for i := range max(len(v.release), len(o.release)) {
		if c := cmp.Compare(v.at(i), o.at(i)); c != 0 {
			return c
		}
	}
	return 0
}

// preRank orders 1.dev1 < 1a1.dev1 < 1a1 < 1.
func (v version) preRank() (rank int, n uint64) {
	switch {
	case v.preLetter != "":
		return int(v.preLetter[0]), v.pre // a, b, r
	case v.post == nil && v.dev != nil:
		return 0, 0
	}
	return 1 << 8, 0
}

func optional(a, b *uint64, none int) int {
	switch {
	case a == nil && b == nil:
		return 0
	case a == nil:
		return none
	case b == nil:
		return -none
	}
	return cmp.Compare(*a, *b)
}

func (v version) compare(o version) int {
	if c := v.compareBase(o); c != 0 {
		return c
	}
	vr, vn := v.preRank()
	or, on := o.preRank()
	return cmp.Or(cmp.Compare(vr, or), cmp.Compare(vn, on), optional(v.post, o.post, -1), optional(v.dev, o.dev, 1), compareLocal(v.local, o.local))
}

// compareLocal: numbers come after words, and the longer one after its prefix.
func compareLocal(a, b []string) int {
	return slices.CompareFunc(a, b, func(x, y string) int {
		xn, xr, xok := number(x)
		yn, yr, yok := number(y)
		xok, yok = xok && xr == "", yok && yr == ""
		switch {
		case xok && yok:
			return cmp.Compare(xn, yn)
		case xok:
			return 1
		case yok:
			return -1
		}
		return strings.Compare(x, y)
	})
}

// ---- specifiers ------------------------------------------------------------

// specifier is one comparison: >=1.2.
type specifier struct {
	op   string
	text string // of ===
	v    version
	wild bool // ==1.2.*
}

var operators = []string{"===", "==", "~=", "!=", "<=", ">=", "<", ">"}

func parseSpecifier(s string) (specifier, error) {
	text := strings.TrimSpace(s)
	for _, op := range operators {
		rest, ok := strings.CutPrefix(text, op)
		if !ok {
			continue
		}
		rest = strings.TrimSpace(rest)
		if op == "===" {
			if strings.ContainsAny(rest, " \t;)") {
				break
			}
			return specifier{op: op, text: rest}, nil
		}
		c := specifier{op: op}
		if op == "==" || op == "!=" {
			rest, c.wild = strings.CutSuffix(rest, ".*")
		}
		var err error
		if c.v, err = parseVersion(rest); err != nil {
			break
		}
		exact := op == "==" || op == "!="
		if c.v.local != nil && (!exact || c.wild) || op == "~=" && len(c.v.release) < 2 ||
			c.wild && (c.v.isPre() || c.v.post != nil) {
			break
		}
		return c, nil
	}
	return specifier{}, fmt.Errorf("%q is no version specifier", s)
}

// samePrefix says whether v begins with the first n components of p's release.
func samePrefix(v, p version, n int) bool {
	if v.epoch != p.epoch {
		return false
	}
	for i := range n {
		if v.at(i) != p.at(i) {
			return false
		}
	}
	return true
}

// allows compares as PEP 440 does; pre-releases count as any other version.
func (c specifier) allows(v version, text string) bool {
	switch c.op {
	case "===":
		return strings.EqualFold(text, c.text)
	case "==", "!=":
		var same bool
		switch {
		case c.wild:
			same = samePrefix(v, c.v, len(c.v.release))
		case c.v.local == nil:
			same = v.public().compare(c.v) == 0
		default:
			same = v.compare(c.v) == 0
		}
		return same == (c.op == "==")
	case "~=":
		return v.public().compare(c.v) >= 0 && samePrefix(v, c.v, len(c.v.release)-1)
	case "<=":
		return v.public().compare(c.v) <= 0
	case ">=":
		return v.public().compare(c.v) >= 0
	case "<":
		end := c.v
		if !end.isPre() { // nor a pre-release of it
			end.dev = new(uint64)
		}
		return v.compare(end) < 0
	default: // >
		own := v.public()
		if c.v.post == nil && v.post != nil { // nor a post-release of it
			own.post, own.dev = nil, nil
		}
		return v.compare(c.v) > 0 && own.compare(c.v) != 0
	}
}

// specifiers is a list of which all must hold; empty allows everything.
type specifiers []specifier

func parseSpecifiers(s string) (specifiers, error) {
	var out specifiers
	for part := range strings.SplitSeq(s, ",") {
		if strings.TrimSpace(part) == "" {
			continue
		}
		c, err := parseSpecifier(part)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	return out, nil
}

func (l specifiers) allow(text string) bool {
	v, err := parseVersion(text)
	for _, c := range l {
		if err != nil && c.op != "===" || !c.allows(v, text) {
			return false
		}
	}
	return true
}
