package rootfs

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/test/need"
)

// needErofs needs a kernel and a program that know the file system.
func needErofs(t testing.TB) {
	t.Helper()
	need.Root(t)
	if _, err := exec.LookPath("mkfs.erofs"); err != nil {
		t.Skip("needs mkfs.erofs (erofs-utils)")
	}
	fd, err := unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Skipf("needs EROFS in the kernel: %v", err)
	}
	unix.Close(fd)
}

// packable publishes a layer of all that a layer can hold, below a directory that
// a sandbox's root can pass.
func packable(t testing.TB, s *Store) (m *Manifest, tree string) {
	t.Helper()
	d := t.TempDir()
	for p, text := range map[string]string{"bin/run": "#!/bin/sh\n", "lib/a": "same", "lib/b": "same", "lib/empty": "", "lib/big": strings.Repeat("0123456789", 5000), "n\xff\n": "raw"} {
		require.NoError(t, os.MkdirAll(filepath.Join(d, filepath.Dir(p)), 0o755))
		mode := os.FileMode(0o644)
		if p == "bin/run" {
			mode = 0o755
		}
		require.NoError(t, os.WriteFile(filepath.Join(d, p), []byte(text), mode))
	}
	require.NoError(t, os.Symlink("../lib/a", filepath.Join(d, "bin/link")))
	f, err := os.Open(d)
	require.NoError(t, err)
	defer f.Close()
	m, err = s.AddTree(context.Background(), f, nil)
	require.NoError(t, err)
	m.Entries = append(m.Entries, Entry{Path: "lib/gone", Type: 'w'})
	tree, err = s.PublishLayer(context.Background(), m)
	require.NoError(t, err)
	return m, tree
}

func requireWhole(t testing.TB, s *Store, digest string) {
	t.Helper()
	damage, err := s.VerifyLayer(context.Background(), digest)
	require.NoError(t, err)
	require.Empty(t, damage)
}

func TestAnImageIsALayer(t *testing.T) {
	needErofs(t)
	for _, how := range []string{"from the file", "by a loop device"} {
		t.Run(how, func(t *testing.T) {
			n := inNamespace(t)
			fileBacked = how == "from the file"
			defer func() { fileBacked = true }()
			s := testStore(t)
			m, tree := packable(t, s)
			require.NoError(t, s.Pack(t.Context(), m.Digest()))
			require.NoDirExists(t, tree)
			image, err := s.LayerPath(m.Digest())
			require.NoError(t, err)
			require.Equal(t, imageName, filepath.Base(image))
			requireWhole(t, s, m.Digest())

			r, err := assembleIn(n, assembly(image, lower(t, map[string]string{"below": "2", "lib/gone": "3"})))
			require.NoError(t, err)
			require.True(t, r.IDMapped)
			require.NoError(t, n.Do(func() error {
				for name, want := range map[string]string{"lib/a": "same", "lib/b": "same", "lib/empty": "", "bin/link": "same", "n\xff\n": "raw", "below": "2"} {
					b, err := os.ReadFile(filepath.Join(r.Path, name))
					require.NoError(t, err, name)
					require.Equal(t, want, string(b), name)
				}
				require.NoFileExists(t, filepath.Join(r.Path, "lib/gone"), "taken away")
				var st unix.Stat_t
				require.NoError(t, unix.Lstat(filepath.Join(r.Path, "bin/run"), &st))
				require.EqualValues(t, testIDs, st.Uid)
				require.EqualValues(t, unix.S_IFREG|0o555, st.Mode)
				require.EqualValues(t, layerTime.Unix(), st.Mtim.Sec, "pycs compare it")
				require.NoError(t, os.WriteFile(filepath.Join(r.Path, "lib/a"), []byte("mine"), 0o644), "into the upper")
				return nil
			}))
			require.NoError(t, r.Close())
			requireWhole(t, s, m.Digest())

			require.NoError(t, s.Unpack(t.Context(), m.Digest()))
			back, err := s.LayerPath(m.Digest())
			require.NoError(t, err)
			require.Equal(t, tree, back)
			require.NoFileExists(t, image)
			requireWhole(t, s, m.Digest())
			require.Equal(t, inodeOf(t, filepath.Join(tree, "lib/a")).Ino, inodeOf(t, filepath.Join(tree, "lib/b")).Ino, "links again")
			left, err := os.ReadDir(s.Path("tmp"))
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// The same layer gives the same image, whatever store and order it was made in.
func TestImagesAreReproducible(t *testing.T) {
	needErofs(t)
	var images [2][]byte
	for i := range images {
		s := testStore(t)
		if i == 1 {
			addFiles(t, s, map[string]string{"other": "same", "x": "y"})
		}
		m, _ := packable(t, s)
		dst := filepath.Join(t.TempDir(), "image")
		require.NoError(t, s.WriteEROFS(t.Context(), m.Digest(), dst))
		require.ErrorIs(t, s.WriteEROFS(t.Context(), m.Digest(), dst), os.ErrExist)
		var err error
		images[i], err = os.ReadFile(dst)
		require.NoError(t, err)
		require.NoError(t, s.Pack(t.Context(), m.Digest()))
		again := filepath.Join(t.TempDir(), "image")
		require.NoError(t, s.WriteEROFS(t.Context(), m.Digest(), again), "of an image")
		b, err := os.ReadFile(again)
		require.NoError(t, err)
		require.True(t, bytes.Equal(images[i], b))
	}
	require.True(t, bytes.Equal(images[0], images[1]))
}

func TestADamagedImageIsFound(t *testing.T) {
	needErofs(t)
	s := testStore(t)
	m, tree := packable(t, s)
	require.NoError(t, s.Pack(t.Context(), m.Digest()))
	image := filepath.Join(filepath.Dir(tree), imageName)
	whole, err := os.ReadFile(image)
	require.NoError(t, err)
	for name, c := range map[string]struct {
		spoil func(b []byte) []byte
		path  string
	}{
		"content":    {func(b []byte) []byte { b[bytes.LastIndex(b, []byte("0123456789"))]++; return b }, "lib/big"},
		"superblock": {func(b []byte) []byte { clear(b[1024:1100]); return b }, imageName},
		"cut off":    {func(b []byte) []byte { return b[:1000] }, imageName},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.Remove(image)) // its pages go with the inode
			require.NoError(t, os.WriteFile(image, c.spoil(bytes.Clone(whole)), 0o600))
			damage, err := s.VerifyLayer(t.Context(), m.Digest())
			require.NoError(t, err)
			require.NotEmpty(t, damage)
			require.Equal(t, c.path, damage[0].Path)
			require.Error(t, s.Unpack(t.Context(), m.Digest()))
			require.Error(t, s.WriteEROFS(t.Context(), m.Digest(), filepath.Join(t.TempDir(), "x")))
			require.FileExists(t, image)
			require.NoDirExists(t, tree)
		})
	}
}

// A layer that is damaged does not become an image that looks whole.
func TestADamagedLayerIsNotPacked(t *testing.T) {
	needErofs(t)
	s := testStore(t)
	m, tree := packable(t, s)
	require.NoError(t, os.WriteFile(filepath.Join(tree, "lib/big"), []byte("x"), 0o600))
	err := s.Pack(t.Context(), m.Digest())
	require.ErrorContains(t, err, "lib/big")
	require.Contains(t, hinted.Of(err), "bake it again")
	require.DirExists(t, tree)
	require.NoFileExists(t, filepath.Join(filepath.Dir(tree), imageName))
}

// Packing waits for nobody and takes nothing from who runs; what a kill leaves
// between its steps is finished by the next.
func TestPackBesideRunsAndAfterAKill(t *testing.T) {
	needErofs(t)
	s := testStore(t)
	m, tree := packable(t, s)
	image := filepath.Join(filepath.Dir(tree), imageName)
	live, err := s.Use(t.Context(), tree)
	require.NoError(t, err)
	require.ErrorIs(t, s.Pack(t.Context(), m.Digest()), ErrBusy)
	require.DirExists(t, tree)
	require.NoFileExists(t, image)
	live()
	// Killed when the image was there and the tree still too.
	require.NoError(t, s.WriteEROFS(t.Context(), m.Digest(), image))
	requireWhole(t, s, m.Digest())
	require.NoError(t, s.Pack(t.Context(), m.Digest()))
	require.NoDirExists(t, tree)
	live, err = s.Use(t.Context(), image)
	require.NoError(t, err)
	require.ErrorIs(t, s.Unpack(t.Context(), m.Digest()), ErrBusy)
	require.ErrorIs(t, s.RemoveLayer(m.Digest()), ErrBusy)
	live()
	require.NoError(t, s.Unpack(t.Context(), m.Digest()))
	require.NoFileExists(t, image)
	requireWhole(t, s, m.Digest())
	_, err = s.Use(t.Context(), image)
	require.ErrorIs(t, err, os.ErrNotExist, "what was found before is not what is there")
}

// BenchmarkMountLayer compares the mount of a tree with that of an image.
func BenchmarkMountLayer(b *testing.B) {
	needErofs(b)
	s := testStore(b)
	m, tree := packable(b, s)
	image := filepath.Join(b.TempDir(), imageName)
	require.NoError(b, s.WriteEROFS(b.Context(), m.Digest(), image))
	a := assembly()
	ns, err := userns(pairs(0, a.IDs), pairs(0, a.IDs))
	require.NoError(b, err)
	defer ns.Close()
	for _, c := range []struct{ name, path string }{{"tree", tree}, {"image", image}, {"image by loop device", image}} {
		b.Run(c.name, func(b *testing.B) {
			fileBacked = !strings.HasSuffix(c.name, "device")
			defer func() { fileBacked = true }()
			bu := &builder{a: a, r: &Root{}, userns: ns}
			for b.Loop() {
				fd, err := bu.lower(c.path)
				require.NoError(b, err)
				unix.Close(fd)
			}
		})
	}
}

// What is in an image can be read when its objects are pruned.
func TestFilesOfAnImage(t *testing.T) {
	needErofs(t)
	s := testStore(t)
	m, _ := packable(t, s)
	require.NoError(t, s.Pack(t.Context(), m.Digest()))
	_, n, err := s.PruneObjects(nil)
	require.NoError(t, err)
	require.Positive(t, n)
	for _, e := range m.Entries {
		if e.Type != 'f' {
			continue
		}
		f, err := s.OpenFile(e, m.Digest())
		require.NoError(t, err, e.Path)
		sum, err := FileDigest(fdPath(int(f.Fd())))
		f.Close()
		if e.Size > 0 { // of nothing, /dev/null is what is read
			require.NoError(t, err)
			require.Equal(t, e.Digest, sum)
			_, err = s.OpenFile(e)
			require.ErrorIs(t, err, os.ErrNotExist)
		}
	}
	evil := m.Entries[0]
	evil.Path, evil.Digest = "../manifest", strings.Repeat("0", 64)
	_, err = s.OpenFile(evil, m.Digest())
	require.ErrorIs(t, err, os.ErrNotExist)
}
