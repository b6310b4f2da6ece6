package rootfs

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

// tree reads "path" (a folder), "path=content" or "path>link", "!path" is a whiteout.
func tree(t *testing.T, s *Store, lines ...string) *Manifest {
	t.Helper()
	m := &Manifest{}
	for _, l := range lines {
		switch i := strings.IndexAny(l, "=>"); {
		case strings.HasPrefix(l, "!"):
			m.Entries = append(m.Entries, Entry{Path: l[1:], Type: 'w'})
		case i < 0:
			m.Entries = append(m.Entries, Entry{Path: l, Type: 'd', Mode: 0o755})
		case l[i] == '>':
			m.Entries = append(m.Entries, Entry{Path: l[:i], Type: 'l', Mode: 0o777, Link: l[i+1:]})
		default:
			d, n, err := s.PutObject(strings.NewReader(l[i+1:]), false)
			require.NoError(t, err)
			m.Entries = append(m.Entries, Entry{Path: l[:i], Type: 'f', Mode: 0o444, Size: n, Digest: d})
		}
	}
	m.Encode()
	return m
}

func paths(m *Manifest) (out []string) {
	for _, e := range m.Entries {
		mark := map[byte]string{'w': "!", 'd': "", 'f': "", 'l': ""}[e.Type]
		out = append(out, mark+e.Path)
	}
	return out
}

func TestStackShowsWhatTheUppermostSays(t *testing.T) {
	s, err := OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	bottom := tree(t, s, "a", "a/x=1", "a/y=1", "b", "b/c", "b/c/d=1", "f=1", "l>a", "z", "z/q=1")
	middle := tree(t, s, "a", "!a/x", "a/n=2", "!b", "f=2", "!nothing", "z=file")
	top := tree(t, s, "a", "a/x=3", "b", "b/new=3", "l", "l/in=3")
	got := Stack(top, middle, bottom)
	require.Equal(t, []string{"a", "a/n", "a/x", "a/y", "b", "b/new", "f", "l", "l/in", "z"}, paths(got))
	require.Equal(t, byte('f'), got.Type("z"), "a file hides the folder below it")

	// A whiteout between two folders keeps them apart, and so does a diff.
	diff := Diff(got, bottom)
	require.Equal(t, paths(got), paths(Stack(diff, bottom)))
	require.Equal(t, []string{"a", "a/n", "a/x", "b", "!b/c", "b/new", "f", "l", "l/in", "z"}, paths(diff))
	require.Empty(t, Diff(bottom, bottom).Entries)
}

// What overlayfs leaves in an upper, and what it then shows of the layer made of
// that, is the same to everybody who looks.
func TestAddUpperIsWhatTheOverlayShowed(t *testing.T) {
	need.Overlay(t)
	s, err := OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	ctx := context.Background()
	below := tree(t, s, "opt", "opt/env", "opt/env/keep=1", "opt/env/gone=1", "opt/env/same=1", "opt/env/file=1", "opt/env/l>keep",
		"opt/env/dir", "opt/env/dir/a=1", "opt/env/dir/sub", "opt/env/dir/sub/b=1", "opt/env/old", "opt/env/old/c=1", "opt/env/old/d", "opt/env/old/d/e=1")
	lower, err := s.PublishLayer(ctx, below)
	require.NoError(t, err)

	show := func(t *testing.T, lowers []string, change func(dir string)) (*Manifest, string) {
		up := t.TempDir()
		require.NoError(t, MakeUpper(up))
		fd, err := fsmountOverlay("test", lowers, up+"/upper", up+"/work")
		if errors.Is(err, errOldOverlay) { // before Linux 6.5
			at := t.TempDir()
			require.NoError(t, inNamespace(t).Do(func() (err error) {
				if err = unix.Mount("test", at, "overlay", 0, "lowerdir="+strings.Join(lowers, ":")+",upperdir="+up+"/upper,workdir="+up+"/work,redirect_dir=off,metacopy=off,index=off"); err == nil {
					fd, err = unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
				}
				return err
			}))
		} else {
			require.NoError(t, err)
		}
		dir := fdPath(fd) + "/."
		if change != nil {
			change(dir)
		}
		f, err := os.Open(dir)
		require.NoError(t, err)
		seen, err := s.AddTree(ctx, f, nil)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.NoError(t, unix.Close(fd))
		return seen, up
	}
	seen, up := show(t, []string{lower + "/opt"}, func(dir string) {
		do := func(err error) { require.NoError(t, err) }
		env := dir + "/env/"
		do(os.Remove(env + "gone"))
		do(os.Chmod(env+"same", 0o600)) // copied up, the same content
		do(os.Chmod(env+"same", 0o444))
		do(os.Remove(env + "file"))
		do(os.Mkdir(env+"file", 0o755))
		do(os.WriteFile(env+"file/in", []byte("2"), 0o644))
		do(os.RemoveAll(env + "dir"))
		do(os.MkdirAll(env+"dir/sub/deep", 0o755)) // opaque
		do(os.WriteFile(env+"dir/sub/b", []byte("1"), 0o644))
		do(os.RemoveAll(env + "old"))
		do(os.WriteFile(env+"old", []byte("a file now"), 0o755))
		do(os.Remove(env + "l"))
		do(os.Symlink("elsewhere", env+"l"))
		do(os.WriteFile(env+"passing", nil, 0o644))
		do(os.Remove(env + "passing"))
	})
	f, err := OpenUpper(up)
	require.NoError(t, err)
	defer f.Close()
	layer, err := s.AddUpper(ctx, f, "/opt", below, nil)
	require.NoError(t, err)
	require.Equal(t, []string{
		"opt", "opt/env", "opt/env/dir", "!opt/env/dir/a", "opt/env/dir/sub", "opt/env/dir/sub/deep",
		"opt/env/file", "opt/env/file/in", "!opt/env/gone", "opt/env/l", "opt/env/old",
	}, paths(layer))

	for i := range seen.Entries {
		seen.Entries[i].Path = "opt/" + seen.Entries[i].Path
	}
	require.Equal(t, seen.Entries, Stack(layer, below).Entries[1:], "without opt itself")
	dir, err := s.PublishLayer(ctx, layer)
	require.NoError(t, err)
	again, _ := show(t, []string{dir + "/opt", lower + "/opt"}, nil)
	for i := range again.Entries {
		again.Entries[i].Path = "opt/" + again.Entries[i].Path
	}
	require.Equal(t, seen.Entries, again.Entries)

	bad, err := s.VerifyLayer(ctx, layer.Digest())
	require.NoError(t, err)
	require.Empty(t, bad)
	require.NoError(t, os.Remove(filepath.Join(dir, "opt/env/gone")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "opt/env/gone"), nil, 0o444))
	bad, err = s.VerifyLayer(ctx, layer.Digest())
	require.NoError(t, err)
	require.Equal(t, []Damage{{"opt/env/gone", "is another kind of file now"}}, bad)

	decoded, err := DecodeManifest(layer.Encode())
	require.NoError(t, err)
	require.Equal(t, layer, decoded)
}

func TestAddUpperRefusesWhatIsNoFile(t *testing.T) {
	s, err := OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	_, err = s.AddUpper(context.Background(), f, "/opt", &Manifest{}, nil)
	require.ErrorContains(t, err, `"opt/pipe"`)
}

func FuzzDiff(f *testing.F) {
	f.Add("a/b c !a/b", "a a/b")
	f.Fuzz(func(t *testing.T, x, y string) {
		view, below := fuzzTree(x), fuzzTree(y)
		d := Diff(view, below)
		if d.checkTree() != nil && view.checkTree() == nil && below.checkTree() == nil {
			t.Fatalf("%q over %q: no tree: %v", x, y, d.checkTree())
		}
		if got := Stack(d, below); strings.Join(paths(got), " ") != strings.Join(paths(view), " ") {
			t.Fatalf("%q over %q: %v gives %v", x, y, paths(d), paths(got))
		}
	})
}

// fuzzTree makes a tree of folders out of words.
func fuzzTree(s string) *Manifest {
	dirs := map[string]bool{}
	for _, p := range strings.Fields(s) {
		if p = filepath.Clean(p); !filepath.IsLocal(p) || strings.IndexByte(p, 0) >= 0 {
			continue
		}
		for ; p != "."; p = filepath.Dir(p) {
			dirs[p] = true
		}
	}
	m := &Manifest{}
	for p := range dirs {
		m.Entries = append(m.Entries, Entry{Path: p, Type: 'd', Mode: 0o755})
	}
	sort.Slice(m.Entries, func(i, j int) bool { return m.Entries[i].Path < m.Entries[j].Path })
	return m
}
