package envs

import (
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

var (
	reqExpr     = regexp.MustCompile(`^([A-Za-z0-9][A-Za-z0-9._-]*)\s*(\[[^\]]*\])?\s*(.*)$`)
	pinExpr     = regexp.MustCompile(`^={2,3}\s*([^\s,;*]+)\s*(;.*)?$`)
	hashExpr    = regexp.MustCompile(`\s--hash[= ]([a-z0-9]+:[0-9a-fA-F]+)`)
	varExpr     = regexp.MustCompile(`\$\{[A-Z0-9_]+\}`)
	sepExpr     = regexp.MustCompile(`[-_.]+`)
	urlExpr     = regexp.MustCompile(`https?://[^\s"'#;]+`)
	userExpr    = regexp.MustCompile(`(?m)^(--[a-z-]*(?:index-url|find-links)[ =]\S*?://)[^/\s]*@`)
	ansiExpr    = regexp.MustCompile(`\x1b\[[0-9;]*m`)
	missingExpr = regexp.MustCompile(`([A-Za-z0-9._-]+) was not found in the (?:package registry|provided)`)
	versionExpr = regexp.MustCompile(`there is no version of ([^ ,]+)|[Oo]nly .{0,80} available|No matching distribution found for ([^\s]+)`)
)

// first is a match's first group, "" where there is none.
func first(e *regexp.Regexp, s string) string {
	if m := e.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}

func sameAsExpressions(t *testing.T, s string) {
	t.Helper()
	if !strings.Contains(s, "\n") { // they are given one line
		m := reqExpr.FindStringSubmatch(s)
		name, rest, ok := splitRequirement(s)
		require.Equal(t, m != nil, ok, "%q", s)
		if m != nil {
			require.Equal(t, []string{m[1], m[3]}, []string{name, rest}, "%q", s)
		}
		if exactPin(s) != "" || !strings.HasPrefix(s, "===") { // of which the expression may take "=" for the version
			require.Equal(t, first(pinExpr, s), exactPin(s), "%q", s)
		}
		rest2, hashes := cutHashes(s)
		var want []string
		for _, m := range hashExpr.FindAllStringSubmatch(s, -1) {
			want = append(want, m[1])
		}
		require.Equal(t, want, hashes, "%q", s)
		require.Equal(t, hashExpr.ReplaceAllString(s, ""), rest2, "%q", s)
		require.Equal(t, first(missingExpr, s), noPackage(s), "%q", s)
		require.Equal(t, versionExpr.MatchString(s), noVersion(s), "%q", s)
	}
	require.Equal(t, varExpr.MatchString(s), hasVariable(s), "%q", s)
	require.Equal(t, strings.ToLower(sepExpr.ReplaceAllString(s, "-")), pep503.Normalise(s), "%q", s)
	require.Equal(t, urlExpr.FindAllString(s, -1), urlsIn(s), "%q", s)
	require.Equal(t, string(userExpr.ReplaceAll([]byte(s), []byte("$1"))), string(withoutUserinfo([]byte(s))), "%q", s)
	require.Equal(t, ansiExpr.ReplaceAllString(s, ""), withoutColours(s), "%q", s)
}

var texts = []string{
	"six==1.17.0 --hash=sha256:00ff --hash=sha256:AB", "a[b , c] >= 1", "a[b", "Foo.Bar__baz", "== 1.0 ; python_version<'3'", "==1.*", "===1", "==1,", "== ",
	"x --hash sha256:0g --hash=: --hash=a:", "a ${X} ${} ${x}", "http://a https://b#c 'https://d' httphttps://e;f", "--extra-index-url https://u:p@h/s@x",
	"--find-links=x://y/z://u@v", "--index-url u@h", "-index-url https://u@h", "--index-url\thttps://u@h", "--index-url https://u:p@h/\n--index-url https://v@w", "\x1b[1;31mx\x1b[0m\x1b[x",
	"Because a.b was not found in the package registry", " was not found in the provided", "x was not found in the y was not found in the provided z",
	"there is no version of ", "there is no version of a", "only a is available", "Only  available", "only " + strings.Repeat("ä", 81) + " available", "No matching distribution found for \t", "No matching distribution found for ,",
}

func TestTextIsReadAsTheExpressionsDo(t *testing.T) {
	for _, s := range texts {
		sameAsExpressions(t, s)
	}
}

func FuzzText(f *testing.F) {
	for _, s := range texts {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if slices.Contains([]byte(s), '\v') || strings.ToValidUTF8(s, "") != s {
			return
		}
		sameAsExpressions(t, s)
		_, _ = sdistOnly(s), hashMismatch(s) // must not panic
	})
}

func TestDistributionsWithoutAWheelAreNamed(t *testing.T) {
	for in, want := range map[string]string{
		"docopt==0.6.2 has no usable wheels":                                                           "docopt",
		"Because docopt has no wheels, we":                                                             "docopt",
		"Distribution `a==1` can't be installed because it is marked as `--no-build` but":              "a==1",
		"Distribution `a==1 @ registry+x` can't be installed because it is marked as `--no-build` but": "a==1 @ registry+x",
		"`x` is a source distribution":                                                                 "x",
		"Building `x` failed: `y` needs building":                                                      "y",
		"nothing of that": "",
		"has no wheels":   "",
		"`":               "",
	} {
		require.Equal(t, want, sdistOnly(in), in)
	}
	require.Equal(t, "six==1.0", hashMismatch("Caused by: Hash mismatch for `six==1.0` Expected"))
}

// net/url is the oracle.
func TestHostsOfURLs(t *testing.T) {
	for _, s := range []string{
		"https://a.test/simple", "http://a.test", "HTTPS://A.test:8443", "https://u:p@a.test/x@y", "https://[::1]:3/x", "https://[::1]", "https://a.test?x=@b", "https://a.test#@b", "https://u@v@w/",
		"a.test/simple", "https://", "https:///x", "https://a b/", "https://a:b/", "",
	} {
		want := ""
		if u, err := url.Parse(s); err == nil && u.Host != "" {
			want = u.Host
			if u.Port() == "" {
				want += map[bool]string{true: ":80", false: ":443"}[u.Scheme == "http"]
			}
		}
		require.Equal(t, want, hostPort(s), s)
	}
}
