package share

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
)

func testStore(t testing.TB) (*rootfs.Store, *envs.Manager) {
	t.Helper()
	s, err := rootfs.OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	return s, envs.Open(s, envs.Options{})
}

// tree is a manifest as people write it: "path=content", "path/" a directory,
// "path>target" a link, "path-" a whiteout, "path*content" a program.
func tree(t testing.TB, put func(r *strings.Reader, exec bool) (string, int64, error), lines ...string) *rootfs.Manifest {
	t.Helper()
	m := &rootfs.Manifest{}
	for _, l := range lines {
		i := strings.IndexAny(l, "=*>")
		e := rootfs.Entry{}
		switch {
		case strings.HasSuffix(l, "/"):
			e = rootfs.Entry{Path: strings.TrimSuffix(l, "/"), Type: 'd', Mode: 0o755}
		case strings.HasSuffix(l, "-") && i < 0:
			e = rootfs.Entry{Path: strings.TrimSuffix(l, "-"), Type: 'w'}
		case l[i] == '>':
			e = rootfs.Entry{Path: l[:i], Type: 'l', Mode: 0o777, Link: l[i+1:]}
		default:
			e = rootfs.Entry{Path: l[:i], Type: 'f', Mode: 0o444}
			if l[i] == '*' {
				e.Mode = 0o555
			}
			var err error
			e.Digest, e.Size, err = put(strings.NewReader(l[i+1:]), l[i] == '*')
			require.NoError(t, err)
		}
		m.Entries = append(m.Entries, e)
	}
	return m
}

const requirements = "six==1.16.0 --hash=sha256:aa\n"

// addEnv puts an environment of two layers into a store, upon a base.
func addEnv(t testing.TB, s *rootfs.Store, m *envs.Manager) *envs.Env {
	t.Helper()
	ctx := context.Background()
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "usr/bin/python3"), []byte("an interpreter"), 0o755))
	base, err := s.AddBase(ctx, "small", dir, func(string) {}, func(string) (string, []string, error) { return dir, []string{"LANG=C.UTF-8"}, nil })
	require.NoError(t, err)
	g, err := s.Stage(ctx)
	require.NoError(t, err)
	defer g.Close()
	put := func(r *strings.Reader, exec bool) (string, int64, error) { return g.Put(r, exec) }
	below := tree(t, put, "opt/", "opt/env/", "opt/env/bin/", "opt/env/bin/python>/usr/bin/python3", "opt/env/lib/", "opt/env/lib/old.py=old", "opt/env/lib/six.py=import this", "opt/env/lib/same.py=")
	own := tree(t, put, "opt/", "opt/env/", "opt/env/bin/", "opt/env/bin/tool*#!/opt/env/bin/python", "opt/env/lib/", "opt/env/lib/ünï "+strings.Repeat("long", 60)+".py=x", "opt/env/lib/old.py-", "opt/env/lib/\xff.py=not UTF-8")
	e, notes, err := m.Import(ctx, g, envs.Imported{
		Env: envs.Env{
			Digest: own.Digest(), Below: []string{below.Digest()}, Kind: "venv", Base: "small", BaseDigest: base.Digest, Python: "/usr/bin/python3", Tool: "uv 1",
			Lock: envs.LockDigest("requirements", []byte(requirements)), Vars: []string{"VIRTUAL_ENV=/opt/env"}, Packages: []envs.Package{{Name: "six", Version: "1.16.0"}},
		},
		LockKind: "requirements", Lock: []byte(requirements), From: "test", Name: "web", Layers: []*rootfs.Manifest{own, below},
	})
	require.NoError(t, err)
	require.Empty(t, notes)
	e.Names = []string{"web"}
	return e
}

// clean says that a store holds nothing but what was there: no layers, no
// content, no names, nothing unfinished.
func clean(t testing.TB, s *rootfs.Store) {
	t.Helper()
	for _, d := range []string{"layers", "objects", "tmp", "bases", "envs"} {
		var left []string
		_ = filepath.WalkDir(s.Path(d), func(p string, de os.DirEntry, err error) error {
			if err == nil && !de.IsDir() && filepath.Base(p) != "host.json" {
				left = append(left, p)
			}
			return nil
		})
		require.Empty(t, left, "left in %s", d)
	}
}

func exportTo(t testing.TB, s *rootfs.Store, m *envs.Manager, e *envs.Env, o ExportOptions) (string, *Exported) {
	t.Helper()
	if o.Output == "" {
		o.Output = filepath.Join(t.TempDir(), "out"+map[string]string{"oci": "", "oci-archive": ".tar", "tar.zst": ".tar.zst"}[o.Format])
	}
	x, err := Export(context.Background(), s, m, e, o)
	require.NoError(t, err)
	return o.Output, x
}

func TestRoundTrip(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	ctx := context.Background()
	for _, o := range []ExportOptions{
		{Format: "oci"},
		{Format: "oci", Compression: "zstd", WithBase: true},
		{Format: "oci-archive"},
		{Format: "oci-archive", WithBase: true},
		{Format: "tar.zst"},
		{Format: "tar.zst", WithBase: true},
	} {
		t.Run(o.Format, func(t *testing.T) {
			o.Bundles = [][]byte{[]byte("a signature"), []byte("another")}
			path, x := exportTo(t, s, m, e, o)
			require.Equal(t, e.Digest, x.Digest)
			again, y := exportTo(t, s, m, e, o)
			require.Equal(t, x, y)
			if o.Format != "oci" {
				a, err := os.ReadFile(path)
				require.NoError(t, err)
				b, err := os.ReadFile(again)
				require.NoError(t, err)
				require.True(t, bytes.Equal(a, b), "the same bytes")
			}

			s2, m2 := testStore(t)
			var kept [][]byte
			var judged *envs.Env
			taken, err := Import(ctx, s2, m2, ImportOptions{
				Source: path, Digest: e.Digest,
				Verify: func(_ context.Context, e *envs.Env, bundles [][]byte) error {
					judged = e
					require.Equal(t, o.Bundles, bundles)
					layers, err := s2.Layers()
					require.NoError(t, err)
					require.Empty(t, layers, "judged before anything is published")
					return nil
				},
				Keep: func(digest string, b []byte) error {
					require.Equal(t, e.Digest, digest)
					kept = append(kept, b)
					return nil
				},
			})
			require.NoError(t, err)
			require.Equal(t, o.Bundles, kept)
			require.Equal(t, "file:"+path, judged.Origin.From)
			require.Equal(t, e.Digest, judged.Digest)
			if o.WithBase {
				require.Equal(t, []string{"LANG=C.UTF-8"}, judged.BaseVars)
			} else {
				require.Nil(t, judged.BaseVars)
			}
			got, err := m2.Get("web")
			require.NoError(t, err)
			require.Equal(t, taken.Key, got.Key)
			require.Equal(t, e.Portable(), got.Portable())
			require.Equal(t, "file:"+path, got.Origin.From)
			kind, lock, err := m2.LockText(got)
			require.NoError(t, err)
			require.Equal(t, "requirements", kind)
			require.Equal(t, requirements, string(lock))
			_, damage, err := m2.Verify(ctx, "web")
			require.NoError(t, err)
			require.Empty(t, damage)
			b, err := s2.Base("small")
			if !o.WithBase {
				require.Error(t, err)
				require.Contains(t, strings.Join(taken.Remarks, "; "), `baked on base "small"`)
			} else {
				require.NoError(t, err)
				require.Equal(t, e.BaseDigest, b.Digest)
				require.Equal(t, []string{"LANG=C.UTF-8"}, b.Env)
			}
			// Once more: nothing changes, and it still is one environment.
			_, err = Import(ctx, s2, m2, ImportOptions{Source: path})
			require.NoError(t, err)
			all, err := m2.List()
			require.NoError(t, err)
			require.Len(t, all, 1)
			// And out again: the same image, from another store.
			_, z := exportTo(t, s2, m2, got, ExportOptions{Format: o.Format, Compression: o.Compression, WithBase: o.WithBase, Bundles: o.Bundles})
			require.Equal(t, x.Image, z.Image)
		})
	}
}

func TestNamesAreNotTakenAway(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	path, _ := exportTo(t, s, m, e, ExportOptions{Format: "tar.zst"})
	e.Vars = append(e.Vars, "A=b")
	other, _ := exportTo(t, s, m, e, ExportOptions{Format: "tar.zst"})
	ctx := context.Background()
	s2, m2 := testStore(t)
	_, err := Import(ctx, s2, m2, ImportOptions{Source: path})
	require.NoError(t, err)
	taken, err := Import(ctx, s2, m2, ImportOptions{Source: other})
	require.NoError(t, err)
	require.Contains(t, strings.Join(taken.Remarks, "; "), "the name web is another environment's here")
	got, err := m2.Get("web")
	require.NoError(t, err)
	require.Equal(t, []string{"VIRTUAL_ENV=/opt/env"}, got.Vars)
	_, err = Import(ctx, s2, m2, ImportOptions{Source: other, Name: "web"})
	require.NoError(t, err)
	got, err = m2.Get("web")
	require.NoError(t, err)
	require.Contains(t, got.Vars, "A=b")
}

func TestABaseOfAnotherContentGetsAnotherName(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	path, _ := exportTo(t, s, m, e, ExportOptions{Format: "oci", WithBase: true})
	s2, m2 := testStore(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "x"), []byte("another"), 0o644))
	_, err := s2.AddBase(context.Background(), "small", dir, func(string) {}, func(string) (string, []string, error) { return dir, nil, nil })
	require.NoError(t, err)
	taken, err := Import(context.Background(), s2, m2, ImportOptions{Source: path})
	require.NoError(t, err)
	require.Equal(t, "small-"+e.BaseDigest[7:19], taken.Base)
	got, err := m2.Get("web")
	require.NoError(t, err)
	require.Equal(t, taken.Base, got.Base)
	require.NoError(t, envs.CheckPython(got, mustBase(t, s2, got.Base)))
}

func mustBase(t testing.TB, s *rootfs.Store, name string) rootfs.Base {
	t.Helper()
	b, err := s.Base(name)
	require.NoError(t, err)
	return b
}

func TestTheHostIsNoBaseToSend(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	e.Base = "host"
	_, err := Export(context.Background(), s, m, e, ExportOptions{Output: filepath.Join(t.TempDir(), "x"), WithBase: true})
	require.ErrorContains(t, err, "the base is this host itself")
}

func TestCredentialsStayHere(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	lock := "--index-url https://me:s3cret@index.example/simple\n" + requirements
	g, err := s.Stage(context.Background())
	require.NoError(t, err)
	defer g.Close()
	p := e.Portable()
	p.Lock, p.Recipe.IndexURL = envs.LockDigest("requirements", []byte(lock)), "https://me:s3cret@index.example/simple"
	e, _, err = m.Import(context.Background(), g, envs.Imported{Env: p, LockKind: "requirements", Lock: []byte(lock), Name: "secret"})
	require.NoError(t, err)
	for _, f := range []string{"oci", "tar.zst"} {
		path, x := exportTo(t, s, m, e, ExportOptions{Format: f})
		require.Contains(t, strings.Join(x.Remarks, ";"), "its lock stays here")
		s2, m2 := testStore(t)
		_, err = Import(context.Background(), s2, m2, ImportOptions{Source: path, Name: "x"})
		require.NoError(t, err)
		_ = filepath.WalkDir(s2.Path(), func(p string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				b, err := os.ReadFile(p)
				require.NoError(t, err)
				require.NotContains(t, string(b), "s3cret", p)
			}
			return nil
		})
	}
}

func TestAVerifierThatRefusesLeavesNothing(t *testing.T) {
	s, m := testStore(t)
	e := addEnv(t, s, m)
	path, _ := exportTo(t, s, m, e, ExportOptions{Format: "oci-archive", WithBase: true})
	s2, m2 := testStore(t)
	_, err := Import(context.Background(), s2, m2, ImportOptions{Source: path, Verify: func(context.Context, *envs.Env, [][]byte) error { return errors.New("no") }})
	require.EqualError(t, err, `import "`+path+`": no`)
	clean(t, s2)
	_, err = Import(context.Background(), s2, m2, ImportOptions{Source: path, Digest: "sha256:" + strings.Repeat("0", 64)})
	require.ErrorContains(t, err, "it is environment "+e.Digest)
	clean(t, s2)
}

func TestReferences(t *testing.T) {
	e := &envs.Env{Names: []string{"Web_1"}, Digest: "sha256:" + strings.Repeat("a", 64)}
	for in, want := range map[string]string{
		"": "web_1:latest", "a": "a:latest", "r.example:5000/a/b": "r.example:5000/a/b:latest", "a:1": "a:1",
		"A:1": "", "a:": "", "a b": "", "a:-x": "", "//a": "", "a\n": "",
	} {
		got, err := refOf(in, e)
		if want == "" {
			require.Error(t, err, in)
			continue
		}
		require.NoError(t, err, in)
		require.Equal(t, want, got)
	}
}
