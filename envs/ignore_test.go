package envs

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The expectations are those of docker's own matcher, by its documentation and
// its tests.
func TestIgnoresAreDockers(t *testing.T) {
	for _, c := range []struct {
		patterns   string
		out, stays string // paths
	}{
		{"*.log", "a.log", "a/b.log a.log.txt"},
		{"**/*.log", "a.log a/b.log a/b/c.log", "a.txt a.logs"},
		{"node_modules", "node_modules node_modules/x node_modules/x/y", "a/node_modules node_modules2"},
		{"/build/", "build build/x", "a/build"},
		{"a/*/c", "a/b/c a/b/c/d", "a/c a/b/b/c"},
		{"a/**", "a/b a/b/c", "a b"},
		{"a/**/z", "a/z a/b/z a/b/c/z a/z/q", "az a/bz z"},
		{"**", "a a/b", ""},
		{"**/", "a a/b", ""},
		{"a**", "a ab a/b/c", "b"},
		{"a?c", "abc", "ac a/c abbc"},
		{"[a-c].py", "a.py c.py", "d.py ab.py"},
		{"[^a]x", "bx", "ax /x"},
		{`\*`, "*", "a"},
		{"*\n!keep.txt", "a b/c", "keep.txt"},
		{"docs\n!docs/keep.md", "docs docs/a docs/x/y", "docs/keep.md"},
		{"*\n!a/b\n*.pyc", "x a a/c x.pyc", "a/b a/b/c"},
		{"!a\na", "a", "b"},
		{"# a\n\n  b  \n\r\nc\r\n", "b c", "a #"},
		{"./x/../y", "y", "x"},
		{".", "", "a"},
		{"../a", "a", "b"},
	} {
		ig, err := parseIgnores("f", []byte(c.patterns))
		require.NoError(t, err, c.patterns)
		for _, p := range strings.Fields(c.out) {
			require.True(t, ig.match(p), "%q ignores %q", c.patterns, p)
		}
		for _, p := range strings.Fields(c.stays) {
			require.False(t, ig.match(p), "%q leaves %q", c.patterns, p)
		}
	}
	for text, says := range map[string]string{"ok\n!": "f:2", "a[": "without an end", `a\`: "without an end", "[]": "without an end"} {
		_, err := parseIgnores("f", []byte(text))
		require.ErrorContains(t, err, says, text)
	}
}

func FuzzIgnores(f *testing.F) {
	f.Add("**/*.log\n!a/[b-d]*\\?", "a/b/c.log")
	f.Fuzz(func(t *testing.T, text, path string) {
		if ig, err := parseIgnores("f", []byte(text)); err == nil {
			ig.match(path)
		}
	})
}
