package envs

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

func TestCredentialsInALockAreSeen(t *testing.T) {
	for text, want := range map[string]bool{
		"six==1.16.0 --hash=sha256:aa\n":                             false,
		"--index-url https://index.example/simple\nsix==1":           false,
		"--index-url https://me:pw@index.example/simple\n":           true,
		"--find-links=https://token@index.example/x":                 true,
		"x @ https://h.example/a@1.whl":                              false,
		"see https://a.example and b@c.example, or ftp://u@h":        true,
		"https://conda.example/t/tk-123/channel/linux-64/a.conda#aa": true,
		"https://conda.example/channel/t/linux-64/a.conda#aa":        false,
		`{"url":"https://u:p@h/x"}`:                                  true,
		"a://b://c@d":                                                true,
		"://":                                                        false,
	} {
		require.Equal(t, want, hasUserinfo(text), text)
	}
}

func importOne(t *testing.T, s *rootfs.Store, m *Manager, from string, vars ...string) *Env {
	t.Helper()
	g, err := s.Stage(context.Background())
	require.NoError(t, err)
	defer g.Close()
	d, n, err := g.Put(strings.NewReader("pass"), false)
	require.NoError(t, err)
	man := &rootfs.Manifest{Entries: []rootfs.Entry{{Path: "a.py", Type: 'f', Mode: 0o444, Size: n, Digest: d}}}
	e, _, err := m.Import(context.Background(), g, Imported{
		Env: Env{Digest: man.Digest(), Kind: "files", Base: "host", Lock: "sha256:" + strings.Repeat("1", 64), Vars: vars}, From: from, Layers: []*rootfs.Manifest{man},
	})
	require.NoError(t, err)
	return e
}

// What is imported has a key of its own: no recipe finds it in place of a bake.
func TestTheSameImportIsTheSameEnvironmentAndNoOther(t *testing.T) {
	s, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	m := Open(s, Options{})
	a := importOne(t, s, m, "one", "A=1")
	b := importOne(t, s, m, "two", "A=1")
	require.Equal(t, a.Key, b.Key)
	require.Equal(t, "two", b.Origin.From, "the last that was let in")
	c := importOne(t, s, m, "one", "A=2")
	require.NotEqual(t, a.Key, c.Key, "another record is another environment")
	_, err = m.Get(a.Digest)
	require.ErrorContains(t, err, "several match")

	// A bake of the same content is what its digest means.
	own := *a
	own.Key, own.Origin = digestOf("a recipe"), nil
	require.NoError(t, m.save(&own))
	got, err := m.Get(a.Digest)
	require.NoError(t, err)
	require.Equal(t, own.Key, got.Key)
}
