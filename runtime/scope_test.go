package runtime

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSlicesNestByTheirNames(t *testing.T) {
	for in, want := range map[string]string{
		"":                "/sbxrun.slice",
		"machine.slice":   "/machine.slice",
		"a-b-cd.slice":    "/a.slice/a-b.slice/a-b-cd.slice",
		"user-1000.slice": "/user.slice/user-1000.slice",
	} {
		got, err := slicePath(in)
		require.NoError(t, err, in)
		require.Equal(t, want, got)
	}
	for _, bad := range []string{"/x", "x", "x.scope", ".slice", "-.slice", "-a.slice", "a-.slice", "a--b.slice", "a/b.slice", "../a.slice"} {
		_, err := slicePath(bad)
		require.Error(t, err, bad)
	}
	p, err := scopePath("a-b.slice", "0123")
	require.NoError(t, err)
	require.Equal(t, "/a.slice/a-b.slice/sbxrun-0123.scope", p)
}
