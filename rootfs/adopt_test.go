package rootfs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

// stage makes a file of the store's own tmp/, as a bake's sandbox does.
func stage(t testing.TB, s *Store, files map[string]string) *os.File {
	t.Helper()
	dir, done, err := s.TempDir("stage")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, done()) })
	for p, text := range files {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(p)), 0o755))
		require.NoError(t, os.WriteFile(filepath.Join(dir, p), []byte(text), 0o755))
	}
	f, err := os.Open(dir)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func inodeOf(t testing.TB, path string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	require.NoError(t, unix.Lstat(path, &st), path)
	return st
}

// What a bake staged is taken over where a copy would be the same, and copied
// where it would not.
func TestStagedFilesBecomeObjects(t *testing.T) {
	need.Root(t)
	for name, c := range map[string]struct {
		spoil func(p string) (func(), error)
		taken bool
	}{
		"as it is":          {func(string) (func(), error) { return nil, nil }, true},
		"another's":         {func(p string) (func(), error) { return nil, os.Chown(p, 1000, 0) }, false},
		"another group's":   {func(p string) (func(), error) { return nil, os.Chown(p, 0, 1000) }, false},
		"two names":         {func(p string) (func(), error) { return nil, os.Link(p, p+".cache") }, false},
		"with an attribute": {func(p string) (func(), error) { return nil, unix.Setxattr(p, "user.x", []byte("1"), 0) }, false},
		"open for writing": {func(p string) (func(), error) {
			f, err := os.OpenFile(p, os.O_WRONLY, 0)
			return func() { f.Close() }, err
		}, false},
		"mapped for writing": {func(p string) (func(), error) {
			f, err := os.OpenFile(p, os.O_RDWR, 0)
			if err != nil {
				return nil, err
			}
			defer f.Close() // the mapping holds it open
			m, err := unix.Mmap(int(f.Fd()), 0, 4, unix.PROT_WRITE, unix.MAP_SHARED)
			return func() { _ = unix.Munmap(m) }, err
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := testStore(t)
			dir := stage(t, s, map[string]string{"f": "text"})
			p := filepath.Join(dir.Name(), "f")
			undo, err := c.spoil(p)
			require.NoError(t, err)
			if undo != nil {
				defer undo()
			}
			before := inodeOf(t, p)
			m, err := s.AddTree(context.Background(), dir, func(p string) bool { return p == "f.cache" })
			require.NoError(t, err)
			root, err := s.PublishLayer(context.Background(), m)
			require.NoError(t, err)
			got := inodeOf(t, filepath.Join(root, "f"))
			require.Equal(t, c.taken, got.Ino == before.Ino)
			require.EqualValues(t, unix.S_IFREG|0o555, got.Mode)
			require.EqualValues(t, layerTime.Unix(), got.Mtim.Sec)
			require.Zero(t, got.Uid+got.Gid)
			damage, err := s.VerifyLayer(context.Background(), m.Digest())
			require.NoError(t, err)
			require.Empty(t, damage)
		})
	}
}

// A tree that is the user's is never touched, whatever is done with a staged one.
func TestForeignTreesAreCopied(t *testing.T) {
	s := testStore(t)
	dir := t.TempDir()
	p := filepath.Join(dir, "f")
	require.NoError(t, os.WriteFile(p, []byte("text"), 0o640))
	before := inodeOf(t, p)
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	_, err = s.AddTree(context.Background(), f, nil)
	require.NoError(t, err)
	after := inodeOf(t, p)
	after.Atim = before.Atim
	require.Equal(t, before, after)
}

// Content that is there already keeps its inode: layers link to it.
func TestStagedFilesDoNotReplaceObjects(t *testing.T) {
	s := testStore(t)
	m := addFiles(t, s, map[string]string{"a": "text"})
	root, err := s.PublishLayer(context.Background(), m)
	require.NoError(t, err)
	require.NoError(t, os.Chmod(stage(t, s, map[string]string{"x": "1"}).Name(), 0o700))
	dir := stage(t, s, map[string]string{"b": "text", "c": "text"})
	require.NoError(t, os.Chmod(filepath.Join(dir.Name(), "b"), 0o644))
	require.NoError(t, os.Chmod(filepath.Join(dir.Name(), "c"), 0o644))
	m2, err := s.AddTree(context.Background(), dir, nil)
	require.NoError(t, err)
	other, err := s.PublishLayer(context.Background(), m2)
	require.NoError(t, err)
	require.Equal(t, inodeOf(t, filepath.Join(root, "a")).Ino, inodeOf(t, filepath.Join(other, "b")).Ino)
	require.Equal(t, inodeOf(t, filepath.Join(root, "a")).Ino, inodeOf(t, filepath.Join(other, "c")).Ino)
}

// BenchmarkAddTree stores a tree of 6,400 files and 150 MB, as of numpy, pandas
// and pytest with their bytecode.
func BenchmarkAddTree(b *testing.B) {
	text := make([]byte, 2*150<<20/6400)
	for _, how := range []string{"copied", "taken over"} {
		b.Run(how, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				s := testStore(b)
				dir, done, err := s.TempDir("stage")
				require.NoError(b, err)
				for i := range 6400 {
					copy(text, fmt.Sprint(i))
					p := filepath.Join(dir, fmt.Sprint(i%80), fmt.Sprint(i))
					require.NoError(b, os.MkdirAll(filepath.Dir(p), 0o755))
					require.NoError(b, os.WriteFile(p, text[:1+(i*7919)%len(text)], 0o644))
				}
				f, err := os.Open(dir)
				require.NoError(b, err)
				b.StartTimer()
				m := &Manifest{}
				require.NoError(b, s.addDir(context.Background(), f, "", addOptions{adopt: how != "copied"}, m))
				stored := b.Elapsed()
				_, err = s.PublishLayer(context.Background(), m)
				require.NoError(b, err)
				b.StopTimer()
				b.ReportMetric(float64((b.Elapsed() - stored).Milliseconds()), "publish-ms")
				f.Close()
				require.NoError(b, done())
				require.NoError(b, os.RemoveAll(s.root))
				b.StartTimer()
			}
		})
	}
}
