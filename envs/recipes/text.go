package recipes

import "github.com/sbxrun/sbxrun/envs/pep440"

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isAlnum(c byte) bool {
	return isDigit(c) || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// span is the length of the longest prefix whose bytes are all in.
func span(s string, in func(byte) bool) int {
	for i := range len(s) {
		if !in(s[i]) {
			return i
		}
	}
	return len(s)
}

// allow says whether a version, as it is written, is in; what is no version
// never is.
func allow(s pep440.Specifiers, version string) bool {
	if len(s) == 0 {
		return true
	}
	v, err := pep440.Parse(version)
	return err == nil && s.Contains(v)
}

// operators of versions, longer ones first.
var operators = []string{"===", "==", "~=", "!=", "<=", ">=", "<", ">"}
