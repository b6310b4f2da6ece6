package envs

import (
	"fmt"
	"strings"
)

// ignores are the patterns of a .dockerignore, with docker's rules: relative to
// its folder, a pattern that matches a folder matches what is in it, * and ? stop
// at a slash, ** does not, ! takes back, the last match wins.
type ignores struct {
	patterns []ignorePattern
	back     bool // one takes back: what is in an ignored folder may be wanted
}

const (
	maxIgnoreBytes  = 1 << 20
	maxPatternBytes = 4096
)

type ignorePattern struct {
	text string
	back bool
}

func parseIgnores(path string, data []byte) (*ignores, error) {
	ig := &ignores{}
	if len(data) > maxIgnoreBytes { // each file of the project is compared with each pattern
		return nil, fail("", "read %q: more than %d bytes", path, maxIgnoreBytes)
	}
	for i, line := range strings.Split(strings.ReplaceAll(string(data), "\r\n", "\n"), "\n") {
		if strings.HasPrefix(line, "#") {
			continue
		}
		p := ignorePattern{text: strings.TrimSpace(line)}
		if rest, ok := strings.CutPrefix(p.text, "!"); ok {
			p.back, p.text = true, strings.TrimSpace(rest)
			if p.text == "" {
				return nil, fail("", "%s:%d: a ! without a pattern", path, i+1)
			}
		}
		if p.text == "" {
			continue
		}
		if p.text = cleanPattern(p.text); len(p.text) > maxPatternBytes {
			return nil, fail("", "%s:%d: a pattern of more than %d bytes", path, i+1, maxPatternBytes)
		}
		if p.text == "." || p.text == "" {
			if !p.back {
				continue // docker's: "." names the whole context and ignores nothing
			}
			p.text = "**"
		}
		if _, ok := matchPattern(p.text, ""); !ok {
			return nil, fail("", "%s:%d: pattern %q has a [ or \\ without an end", path, i+1, p.text)
		}
		ig.patterns, ig.back = append(ig.patterns, p), ig.back || p.back
	}
	if len(ig.patterns) > 10000 {
		return nil, fmt.Errorf("read %q: more than 10000 patterns", path)
	}
	return ig, nil
}

// cleanPattern resolves dots and doubled slashes; patterns are relative.
func cleanPattern(s string) string {
	var out []string
	for _, part := range strings.Split(s, "/") {
		switch part {
		case "", ".":
		case "..":
			if len(out) > 0 {
				out = out[:len(out)-1]
			}
		default:
			out = append(out, part)
		}
	}
	if len(out) == 0 {
		return "."
	}
	return strings.Join(out, "/")
}

// match says whether a path is left out.
func (ig *ignores) match(p string) bool {
	out := false
	for _, pat := range ig.patterns {
		if pat.back != out { // it would change nothing
			continue
		}
		for i := 0; i <= len(p); i++ { // each folder it is in, and itself
			if i < len(p) && p[i] != '/' {
				continue
			}
			if ok, _ := matchPattern(pat.text, p[:i]); ok {
				out = !pat.back
				break
			}
		}
	}
	return out
}

// matchPattern matches a whole path; valid is false for a pattern that is none.
func matchPattern(pat, s string) (matched, valid bool) {
	toks, ok := ignoreTokens(pat)
	if !ok {
		return false, false
	}
	// reach[j]: the tokens so far match s[:j].
	reach := make([]bool, len(s)+1)
	reach[0] = true
	for _, t := range toks {
		next := make([]bool, len(s)+1)
		for j, on := range reach {
			if !on {
				continue
			}
			switch t.kind {
			case '*':
				for k := j; ; k++ {
					next[k] = true
					if k == len(s) || s[k] == '/' {
						break
					}
				}
			case 'A': // ** at the end
				for k := j; k <= len(s); k++ {
					next[k] = true
				}
			case 'D': // **, then more: whole folders, or none
				next[j] = true
				for k := j; k < len(s); k++ {
					if s[k] == '/' {
						next[k+1] = true
					}
				}
			default:
				if j < len(s) && t.has(s[j]) {
					next[j+1] = true
				}
			}
		}
		reach = next
	}
	return reach[len(s)], true
}

// ignoreToken is a part of a pattern: '*', 'A' and 'D' (see matchPattern), else
// one byte of a set.
type ignoreToken struct {
	kind byte
	set  string // pairs: from, to
	not  bool
}

func (t ignoreToken) has(c byte) bool {
	in := false
	for i := 0; i+1 < len(t.set); i += 2 {
		in = in || t.set[i] <= c && c <= t.set[i+1]
	}
	return in != t.not && (c != '/' || !t.not)
}

func ignoreTokens(p string) (out []ignoreToken, ok bool) {
	for i := 0; i < len(p); i++ {
		switch c := p[i]; c {
		case '*':
			if i+1 >= len(p) || p[i+1] != '*' {
				out = append(out, ignoreToken{kind: '*'})
				continue
			}
			i++
			if i+1 < len(p) && p[i+1] == '/' {
				i++
			}
			kind := byte('D')
			if i+1 >= len(p) {
				kind = 'A'
			}
			out = append(out, ignoreToken{kind: kind})
		case '?':
			out = append(out, ignoreToken{not: true})
		case '[':
			end := strings.IndexByte(p[i+1:], ']')
			if end < 1 {
				return nil, false
			}
			t, in := ignoreToken{}, p[i+1:i+1+end]
			if in[0] == '^' || in[0] == '!' {
				t.not, in = true, in[1:]
			}
			for len(in) > 0 {
				hi := in[0]
				n := 1
				if len(in) >= 3 && in[1] == '-' {
					hi, n = in[2], 3
				}
				t.set, in = t.set+string([]byte{in[0], hi}), in[n:]
			}
			out = append(out, t)
			i += end + 1
		case '\\':
			if i++; i >= len(p) {
				return nil, false
			}
			out = append(out, ignoreToken{set: string([]byte{p[i], p[i]})})
		default:
			out = append(out, ignoreToken{set: string([]byte{c, c})})
		}
	}
	return out, true
}
