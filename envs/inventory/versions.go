package inventory

import (
	"strings"

	"github.com/sbxrun/sbxrun/envs/pep440"
)

// compareVersions orders two versions of an ecosystem; ok is false where one is
// none in its sense.
func compareVersions(kind, a, b string) (c int, ok bool) {
	switch kind {
	case PyPI:
		v, err := pep440.Parse(a)
		w, err2 := pep440.Parse(b)
		return v.Compare(w), err == nil && err2 == nil
	case Deb:
		return compareDebian(a, b), a != "" && b != ""
	case semver:
		v, okA := parseSemver(a)
		w, okB := parseSemver(b)
		return v.compare(w), okA && okB
	}
	return 0, false
}

const semver = "semver"

// compareDebian is dpkg's order: [epoch:]upstream[-revision].
func compareDebian(a, b string) int {
	ea, ua, ra := splitDebian(a)
	eb, ub, rb := splitDebian(b)
	if c := compareDigits(ea, eb); c != 0 {
		return c
	}
	if c := compareDebianPart(ua, ub); c != 0 {
		return c
	}
	return compareDebianPart(ra, rb)
}

func splitDebian(v string) (epoch, upstream, revision string) {
	epoch = "0"
	if i := strings.IndexByte(v, ':'); i >= 0 {
		epoch, v = v[:i], v[i+1:]
	}
	if i := strings.LastIndexByte(v, '-'); i >= 0 {
		return epoch, v[:i], v[i+1:]
	}
	return epoch, v, ""
}

func compareDebianPart(a, b string) int {
	for a != "" || b != "" {
		i, j := upToDigit(a), upToDigit(b)
		for k := range max(i, j) {
			if c := debianOrder(a[:i], k) - debianOrder(b[:j], k); c != 0 {
				return min(max(c, -1), 1)
			}
		}
		a, b = a[i:], b[j:]
		i, j = digits(a), digits(b)
		if c := compareDigits(a[:i], b[:j]); c != 0 {
			return c
		}
		a, b = a[i:], b[j:]
	}
	return 0
}

// debianOrder: ~ is before the end, the end before letters, letters before all else.
func debianOrder(s string, i int) int {
	if i >= len(s) {
		return 0
	}
	switch c := s[i]; {
	case c == '~':
		return -1
	case c|0x20 >= 'a' && c|0x20 <= 'z':
		return int(c)
	default:
		return int(c) + 256
	}
}

func upToDigit(s string) int {
	if i := strings.IndexAny(s, "0123456789"); i >= 0 {
		return i
	}
	return len(s)
}

func digits(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }

// compareDigits compares numbers of any size; "" is 0.
func compareDigits(a, b string) int {
	a, b = strings.TrimLeft(a, "0"), strings.TrimLeft(b, "0")
	if len(a) != len(b) {
		return min(max(len(a)-len(b), -1), 1)
	}
	return strings.Compare(a, b)
}

// semanticVersion is one of semver.org 2.0; missing numbers are 0.
type semanticVersion struct {
	numbers [3]string
	pre     []string
}

func parseSemver(s string) (v semanticVersion, ok bool) {
	s, _, _ = strings.Cut(strings.TrimPrefix(s, "v"), "+")
	s, pre, has := strings.Cut(s, "-")
	parts := strings.Split(s, ".")
	if len(parts) > 3 {
		return v, false
	}
	for i, p := range parts {
		if p == "" || digits(p) != len(p) {
			return v, false
		}
		v.numbers[i] = p
	}
	if has {
		v.pre = strings.Split(pre, ".")
	}
	return v, true
}

func (v semanticVersion) compare(w semanticVersion) int {
	for i := range v.numbers {
		if c := compareDigits(v.numbers[i], w.numbers[i]); c != 0 {
			return c
		}
	}
	if len(v.pre) == 0 || len(w.pre) == 0 {
		return min(max(len(w.pre)-len(v.pre), -1), 1)
	}
	for i := range min(len(v.pre), len(w.pre)) {
		a, b := v.pre[i], w.pre[i]
		an, bn := a != "" && digits(a) == len(a), b != "" && digits(b) == len(b)
		c := strings.Compare(a, b)
		switch {
		case an && bn:
			c = compareDigits(a, b)
		case an:
			c = -1
		case bn:
			c = 1
		}
		if c != 0 {
			return c
		}
	}
	return min(max(len(v.pre)-len(w.pre), -1), 1)
}
