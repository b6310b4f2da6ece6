package envs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/need"
)

// onDisk runs f with a directory on a small file system of its own.
func onDisk(t *testing.T, bytes string, f func(dir string)) {
	t.Helper()
	need.Root(t)
	stage, err := os.MkdirTemp("/run", "sbxrun-test-")
	require.NoError(t, err)
	n, err := rootfs.NewNamespace(stage)
	require.NoError(t, err)
	defer func() {
		require.NoError(t, n.Close())
		require.NoError(t, os.Remove(stage))
	}()
	dir := filepath.Join(stage, "disk")
	require.NoError(t, n.Do(func() error {
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, unix.Mount("sbxrun", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "size="+bytes))
		f(dir)
		return nil
	}))
}

// managerAt is a manager over a store of its own in dir.
func managerAt(t *testing.T, s *script, dir string) *Manager {
	t.Helper()
	m, _ := testManager(t, s)
	b, err := os.ReadFile(m.store.Path("tools", "tool.json"))
	require.NoError(t, err)
	store, err := rootfs.OpenStore(dir)
	require.NoError(t, err)
	require.NoError(t, store.WriteFile(store.Path("tools", "tool.json"), b))
	return Open(store, Options{Runner: s})
}

// A bake that runs out of room, at whatever step: a clear error, nothing
// published, nothing left, and the next one works when there is room.
func TestABakeOnAFullDisk(t *testing.T) {
	onDisk(t, "4m", func(dir string) {
		failed, worked := 0, 0
		base := testBase(t)
		text := pin("six", "1.0") + pin("idna", "3.0")
		for free := int64(0); worked < 3; free += 4096 {
			s := &script{lock: text}
			root := filepath.Join(dir, "store")
			m := managerAt(t, s, root)
			ballast := filepath.Join(dir, "ballast")
			leave(t, dir, ballast, free)
			r := Recipe{File: writeInput(t, "six\nidna\n"), Base: base, Name: "n"}
			_, _, err := m.Ensure(t.Context(), r)
			if err == nil {
				worked++
			} else {
				failed++
				require.ErrorContains(t, err, "no space left", "with %d bytes", free)
				require.Contains(t, hinted.Of(err), "env prune", "with %d bytes: %v", free, err)
				all, err := m.List()
				require.NoError(t, err)
				if len(all) > 0 { // all but its name had room
					require.Empty(t, all[0].Names, "with %d bytes", free)
				}
				layers, err := m.store.Layers()
				require.NoError(t, err)
				for _, l := range layers { // whole, or none
					damage, err := m.store.VerifyLayer(t.Context(), l)
					require.NoError(t, err)
					require.Empty(t, damage)
				}
				left, err := os.ReadDir(m.store.Path("tmp"))
				require.NoError(t, err)
				require.Empty(t, left, "with %d bytes", free)
			}
			_, err = m.Prune(t.Context(), PruneOptions{}) // works without room
			require.NoError(t, err, "with %d bytes", free)
			require.NoError(t, os.Remove(ballast))
			e, _, err := m.Ensure(t.Context(), r)
			require.NoError(t, err)
			damage, err := m.store.VerifyLayer(t.Context(), e.Digest)
			require.NoError(t, err)
			require.Empty(t, damage)
			require.NoError(t, os.RemoveAll(root))
		}
		require.Greater(t, failed, 10, "it ran out at many places")
	})
}

// leave fills the disk but for some bytes.
func leave(t *testing.T, dir, ballast string, free int64) {
	t.Helper()
	var st unix.Statfs_t
	require.NoError(t, unix.Statfs(dir, &st))
	n := int64(st.Bavail)*st.Bsize - free
	f, err := os.Create(ballast)
	require.NoError(t, err)
	defer f.Close()
	require.NoError(t, unix.Fallocate(int(f.Fd()), 0, 0, n))
}

// What is baked runs from a read-only store; what would change it says so.
func TestAReadOnlyStoreOfEnvironments(t *testing.T) {
	onDisk(t, "8m", func(dir string) {
		s := &script{lock: pin("six", "1.0")}
		m := managerAt(t, s, filepath.Join(dir, "store"))
		r := Recipe{File: writeInput(t, "six\n"), Base: testBase(t), Name: "n"}
		e, _, err := m.Ensure(t.Context(), r)
		require.NoError(t, err)
		steps := len(s.steps())
		require.NoError(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		store, err := rootfs.OpenStore(filepath.Join(dir, "store"))
		require.NoError(t, err)
		m = Open(store, Options{Runner: s})

		for _, ref := range []string{"n", e.Key[:12], Short(e.Digest)} {
			got, err := m.Get(ref)
			require.NoError(t, err)
			require.Equal(t, e.Path, got.Path)
			m.Used(got)
		}
		found, err := m.Find(r)
		require.NoError(t, err)
		require.Equal(t, e.Key, found.Key)
		again, _, err := m.Ensure(t.Context(), r)
		require.NoError(t, err, "it is there, name and all")
		require.Equal(t, e.Key, again.Key)
		_, err = m.ListUsed(true)
		require.NoError(t, err)
		_, err = m.Usage()
		require.NoError(t, err)
		_, damage, err := m.Verify(t.Context(), "n")
		require.NoError(t, err)
		require.Empty(t, damage)

		readOnly := func(err error) {
			t.Helper()
			requireHint(t, err, "read-only", "--with NAME")
		}
		other := r
		other.File = writeInput(t, "idna\n")
		_, _, err = m.Ensure(t.Context(), other)
		readOnly(err)
		other.File = writeInput(t, pin("idna", "3.0"))
		_, _, err = m.Ensure(t.Context(), other)
		readOnly(err)
		r.Name = "another"
		_, _, err = m.Ensure(t.Context(), r)
		readOnly(err)
		_, err = m.Prune(t.Context(), PruneOptions{})
		readOnly(err)
		readOnly(m.Remove("n"))
		readOnly(m.Pack(t.Context(), "n", false))
		dry, err := m.Prune(t.Context(), PruneOptions{Named: true, DryRun: true})
		require.NoError(t, err)
		require.Len(t, dry.Removed, 1)
		require.Len(t, s.steps(), steps, "nothing was run")
	})
}
