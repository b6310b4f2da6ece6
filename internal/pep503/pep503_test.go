package pep503

import (
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestNormalise(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "six": "six", "Zope.Interface": "zope-interface", "a-_.b": "a-b", "_x_": "-x-", "Ä.B": "ä-b", "..": "-",
	} {
		require.Equal(t, want, Normalise(in), "%q", in)
	}
}

// It is what the specification's own expression does.
func FuzzNormalise(f *testing.F) {
	expr := regexp.MustCompile(`[-_.]+`)
	f.Add("Zope.Interface")
	f.Add("a-_.b\xff")
	f.Fuzz(func(t *testing.T, s string) {
		s = strings.ToValidUTF8(s, "?")
		require.Equal(t, strings.ToLower(expr.ReplaceAllString(s, "-")), Normalise(s))
	})
}
