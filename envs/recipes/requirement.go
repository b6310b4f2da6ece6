package recipes

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/envs/pep440"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// requirement is a dependency as PEP 508 writes it.
type requirement struct {
	name   string // normalised
	extras []string
	specs  pep440.Specifiers
	url    string
	marker marker // nil is none
}

// validName: what may stand in a line of a requirements.txt.
func validName(s string) bool {
	return s != "" && isAlnum(s[0]) && isAlnum(s[len(s)-1]) &&
		span(s, func(c byte) bool { return isAlnum(c) || c == '-' || c == '_' || c == '.' }) == len(s)
}

func parseRequirement(text string) (r requirement, err error) {
	bad := func(why string) (requirement, error) {
		return requirement{}, fmt.Errorf("requirement %q: %s", shorten(text), why)
	}
	s := strings.TrimSpace(text)
	n := span(s, func(c byte) bool { return isAlnum(c) || c == '-' || c == '_' || c == '.' })
	if !validName(s[:n]) {
		return bad("no name")
	}
	r.name, s = pep503.Normalise(s[:n]), strings.TrimSpace(s[n:])
	if strings.HasPrefix(s, "[") {
		in, rest, ok := strings.Cut(s[1:], "]")
		if !ok {
			return bad("its extras have no end")
		}
		for e := range strings.SplitSeq(in, ",") {
			if e = strings.TrimSpace(e); e == "" && strings.TrimSpace(in) == "" {
				continue
			}
			if !validName(e) {
				return bad("an extra is no name")
			}
			r.extras = append(r.extras, pep503.Normalise(e))
		}
		s = strings.TrimSpace(rest)
	}
	if url, ok := strings.CutPrefix(s, "@"); ok {
		url = strings.TrimSpace(url)
		end := strings.IndexAny(url, " \t")
		if end < 0 {
			end = len(url)
		}
		r.url, s = url[:end], strings.TrimSpace(url[end:])
		if r.url == "" {
			return bad("no URL")
		}
	}
	spec, mark, has := strings.Cut(s, ";")
	if has {
		if r.marker, err = parseMarker(mark); err != nil {
			return bad(err.Error())
		}
	}
	spec = strings.TrimSpace(spec)
	if in, ok := strings.CutPrefix(spec, "("); ok {
		if spec, ok = strings.CutSuffix(in, ")"); !ok {
			return bad("its parenthesis has no end")
		}
	}
	if spec != "" && r.url != "" {
		return bad("what follows its URL is no marker")
	}
	if r.specs, err = pep440.ParseSpecifiers(spec); err != nil {
		return bad(err.Error())
	}
	return r, nil
}

// applies says whether the requirement counts in an environment.
func (r requirement) applies(e *Environment) bool { return r.marker == nil || r.marker(e) }

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
