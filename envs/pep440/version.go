// Package pep440 owns the versions of Python distributions: how they are
// written, which of two is the later, and which a specifier takes. It must
// never know where they come from.
package pep440

import (
	"fmt"
	"strings"
)

// maxBytes bounds a version; the longest on an index have some 60.
const maxBytes = 256

// Version is a version in the sense of PEP 440. The zero value is none.
type Version struct {
	epoch   string
	release []string // numbers without leading zeros: they may be of any size
	pre     string   // "a", "b", "rc"; "" is none
	preNum  string
	post    string // "" is none
	dev     string // "" is none
	local   []string
}

// Parse reads a version as liberally as PEP 440 says.
func Parse(s string) (Version, error) {
	v, rest, ok := parse(strings.ToLower(strings.TrimSpace(s)))
	if !ok || rest != "" {
		if len(s) > 64 {
			s = s[:64] + "…"
		}
		return Version{}, fmt.Errorf("version %q: not a version of PEP 440", s)
	}
	return v, nil
}

func parse(s string) (v Version, rest string, ok bool) {
	if len(s) > maxBytes {
		return v, s, false
	}
	s = strings.TrimPrefix(s, "v")
	n, s := number(s)
	if n == "" {
		return v, s, false
	}
	v.epoch = "0"
	if r, isEpoch := strings.CutPrefix(s, "!"); isEpoch {
		v.epoch = n
		if n, s = number(r); n == "" {
			return v, s, false
		}
	}
	v.release = []string{n}
	for len(s) > 1 && s[0] == '.' && isDigit(s[1]) {
		n, s = number(s[1:])
		v.release = append(v.release, n)
	}
	if w, n, r, found := suffix(s, "alpha", "a", "beta", "b", "preview", "pre", "rc", "c"); found {
		v.pre, v.preNum, s = map[string]string{"alpha": "a", "a": "a", "beta": "b", "b": "b"}[w], n, r
		if v.pre == "" {
			v.pre = "rc"
		}
	}
	if w, n, r, found := suffix(s, "post", "rev", "r"); found && w != "" {
		v.post, s = n, r
	} else if len(s) > 1 && s[0] == '-' && isDigit(s[1]) { // 1.0-1
		v.post, s = number(s[1:])
	}
	if _, n, r, found := suffix(s, "dev"); found {
		v.dev, s = n, r
	}
	if strings.HasPrefix(s, "+") {
		for part := true; part; {
			i := 1
			for i < len(s) && (isDigit(s[i]) || s[i] >= 'a' && s[i] <= 'z') {
				i++
			}
			if i == 1 {
				return v, s, false
			}
			p := s[1:i]
			if strings.Trim(p, "0123456789") == "" {
				p = trimZeros(p)
			}
			v.local, s = append(v.local, p), s[i:]
			part = s != "" && strings.IndexByte("._-", s[0]) >= 0
		}
	}
	return v, s, true
}

// suffix reads [._-]?WORD[._-]?NUMBER?; without a number it is 0.
func suffix(s string, words ...string) (word, num, rest string, ok bool) {
	t := s
	if t != "" && strings.IndexByte("._-", t[0]) >= 0 {
		t = t[1:]
	}
	for _, w := range words {
		r, found := strings.CutPrefix(t, w)
		if !found {
			continue
		}
		if len(r) > 1 && strings.IndexByte("._-", r[0]) >= 0 && isDigit(r[1]) {
			r = r[1:]
		}
		n, r := number(r)
		if n == "" {
			n = "0"
		}
		return w, n, r, true
	}
	return "", "", s, false
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// number reads digits and gives them without leading zeros, "" if there are none.
func number(s string) (n, rest string) {
	i := 0
	for i < len(s) && isDigit(s[i]) {
		i++
	}
	if i == 0 {
		return "", s
	}
	return trimZeros(s[:i]), s[i:]
}

func trimZeros(s string) string {
	if s = strings.TrimLeft(s, "0"); s == "" {
		return "0"
	}
	return s
}

func compareNumbers(a, b string) int {
	if len(a) != len(b) {
		return sign(len(a) - len(b))
	}
	return strings.Compare(a, b)
}

func sign(n int) int { return min(max(n, -1), 1) }

// IsPrerelease says whether it is an alpha, beta, candidate or development version.
func (v Version) IsPrerelease() bool { return v.pre != "" || v.dev != "" }

// String gives the normal form; equal versions may differ in trailing zeros.
func (v Version) String() string {
	var b strings.Builder
	if v.epoch != "0" && v.epoch != "" {
		b.WriteString(v.epoch + "!")
	}
	b.WriteString(strings.Join(v.release, "."))
	if v.pre != "" {
		b.WriteString(v.pre + v.preNum)
	}
	if v.post != "" {
		b.WriteString(".post" + v.post)
	}
	if v.dev != "" {
		b.WriteString(".dev" + v.dev)
	}
	if len(v.local) > 0 {
		b.WriteString("+" + strings.Join(v.local, "."))
	}
	return b.String()
}

// Compare gives -1, 0 or 1: v is before, equal to or after w.
func (v Version) Compare(w Version) int {
	if c := v.comparePublic(w); c != 0 {
		return c
	}
	return compareLocal(v.local, w.local)
}

func (v Version) comparePublic(w Version) int {
	if c := compareNumbers(v.epoch, w.epoch); c != 0 {
		return c
	}
	for i := range max(len(v.release), len(w.release)) {
		if c := compareNumbers(at(v.release, i), at(w.release, i)); c != 0 {
			return c
		}
	}
	if c := sign(v.preRank() - w.preRank()); c != 0 {
		return c
	}
	if v.pre != "" {
		if c := compareNumbers(v.preNum, w.preNum); c != 0 {
			return c
		}
	}
	// No post is before any; no dev is after any.
	if c := optional(v.post, w.post); c != 0 {
		return c
	}
	return -optionalLast(v.dev, w.dev)
}

func at(release []string, i int) string {
	if i < len(release) {
		return release[i]
	}
	return "0"
}

// preRank orders the kinds of releases: 1.0.dev1 < 1.0a1 < 1.0b1 < 1.0rc1 < 1.0.
func (v Version) preRank() int {
	switch v.pre {
	case "a":
		return 1
	case "b":
		return 2
	case "rc":
		return 3
	}
	if v.post == "" && v.dev != "" {
		return 0
	}
	return 4
}

func optional(a, b string) int {
	switch {
	case a == "" || b == "":
		return sign(len(a)) - sign(len(b))
	}
	return compareNumbers(a, b)
}

// optionalLast is the reverse of an order in which none is the greatest.
func optionalLast(a, b string) int {
	if a == "" || b == "" {
		return sign(len(a)) - sign(len(b))
	}
	return -compareNumbers(a, b)
}

func compareLocal(a, b []string) int {
	for i := range min(len(a), len(b)) {
		an, bn := isDigit(a[i][0]) && strings.Trim(a[i], "0123456789") == "", isDigit(b[i][0]) && strings.Trim(b[i], "0123456789") == ""
		c := 0
		switch {
		case an && bn:
			c = compareNumbers(a[i], b[i])
		case an:
			c = 1 // numbers are after words
		case bn:
			c = -1
		default:
			c = strings.Compare(a[i], b[i])
		}
		if c != 0 {
			return c
		}
	}
	return sign(len(a) - len(b))
}
