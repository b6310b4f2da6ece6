package rootfs

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// fill writes to a file until the disk has no block left.
func fill(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	require.NoError(t, err)
	defer f.Close()
	for _, n := range []int{1 << 20, 4096, 1} {
		b := make([]byte, n)
		for err == nil {
			_, err = f.Write(b)
		}
		require.ErrorIs(t, err, unix.ENOSPC)
		err = nil
	}
	_ = f.Sync() // what ext4 keeps for data without a place
}

// On a full ext4 every step says what to do and leaves nothing, and removing
// works all the same.
func TestAFullStore(t *testing.T) {
	n := inNamespace(t)
	up := Upper{Kind: "disk", SizeBytes: 24 << 20, Inodes: 2000, ScratchDir: t.TempDir()}
	m, _, err := up.mount()
	require.NoError(t, err)
	dir := filepath.Join(n.stage, "disk")
	require.NoError(t, n.Do(func() error {
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, moveTo(int(m.Fd()), dir))
		s, err := OpenStore(filepath.Join(dir, "store"))
		require.NoError(t, err)
		gone := addFiles(t, s, map[string]string{"a": strings.Repeat("a", 1<<20), "b": "b"})
		_, err = s.PublishLayer(t.Context(), gone)
		require.NoError(t, err)
		next := addFiles(t, s, map[string]string{"a": strings.Repeat("c", 1<<20)})
		ballast := filepath.Join(dir, "ballast")
		fill(t, ballast)

		explained := func(err error) {
			t.Helper()
			require.ErrorIs(t, err, unix.ENOSPC)
			require.Contains(t, hinted.Of(err), "env prune")
		}
		_, _, err = s.PutObject(io.LimitReader(zeros{}, 1<<20), false)
		explained(err)
		explained(s.WriteFile(s.Path("envs", "x"), make([]byte, 8192)))
		_, err = s.PublishLayer(t.Context(), next)
		explained(err)
		layers, err := s.Layers()
		require.NoError(t, err)
		require.Len(t, layers, 1)
		left, err := os.ReadDir(s.Path("tmp"))
		require.NoError(t, err)
		require.Empty(t, left)
		requireWhole(t, s, gone.Digest())

		require.NoError(t, s.RemoveLayer(gone.Digest()), "removing needs no room")
		freed, _, err := s.PruneObjects(func(d string, _ bool) bool { return d == next.Entries[0].Digest })
		require.NoError(t, err)
		require.GreaterOrEqual(t, freed, int64(1<<20))
		require.NoError(t, os.Truncate(ballast, 1<<20))
		_, err = s.PublishLayer(t.Context(), next)
		require.NoError(t, err)
		requireWhole(t, s, next.Digest())
		return nil
	}))
	require.NoError(t, m.Close())
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// A store on a read-only mount: what is there can be used, and is held against
// those who have it writable; what must be written says why it cannot be.
func TestAReadOnlyStore(t *testing.T) {
	n := inNamespace(t)
	rw := testStore(t)
	m := addFiles(t, rw, map[string]string{"a": "1"})
	_, err := rw.PublishLayer(t.Context(), m)
	require.NoError(t, err)
	spare := filepath.Join(t.TempDir(), "spare")
	require.NoError(t, n.Do(func() error {
		dir := filepath.Join(n.stage, "ro")
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, unix.Mount(rw.root, dir, "", unix.MS_BIND, ""))
		require.NoError(t, unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		s, err := OpenStore(dir)
		require.NoError(t, err)
		path, err := s.LayerPath(m.Digest())
		require.NoError(t, err)
		release, err := s.Use(t.Context(), path)
		require.NoError(t, err)
		require.ErrorIs(t, rw.RemoveLayer(m.Digest()), ErrBusy)
		release()
		requireWhole(t, s, m.Digest())

		readOnly := func(err error) {
			t.Helper()
			require.ErrorIs(t, err, unix.EROFS)
			require.Contains(t, hinted.Of(err), "read-only")
		}
		readOnly(s.Writable())
		_, err = s.Lock(t.Context(), "new", true)
		readOnly(err)
		_, _, err = s.TempDir("x")
		readOnly(err)
		readOnly(s.RemoveLayer(m.Digest()))
		readOnly(s.WriteFile(s.Path("x"), nil))
		_, err = s.HostBase(t.Context())
		readOnly(err)
		s.Spare = spare
		b, err := s.HostBase(t.Context())
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(b.Lowers[0], spare))
		again, err := s.Base("host")
		require.NoError(t, err)
		require.Equal(t, b, again)

		// A lock whose file is there is a lock for both.
		held, err := rw.Lock(t.Context(), "x", false)
		require.NoError(t, err)
		_, err = s.Lock(expired(), "x", true)
		require.ErrorIs(t, err, context.Canceled)
		held()
		return nil
	}))
	require.NoError(t, rw.RemoveLayer(m.Digest()))
	require.NoError(t, errors.Join(rw.Writable()))
}

// A lock file that was removed beside a waiter is not what the waiter holds.
func TestLockFilesCanBeRemoved(t *testing.T) {
	s := testStore(t)
	held, err := s.Lock(t.Context(), "x", true)
	require.NoError(t, err)
	n, err := s.PruneLocks()
	require.NoError(t, err)
	require.Zero(t, n, "it is held")
	held()
	stop := make(chan struct{})
	done := make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
				if _, err := s.PruneLocks(); err != nil {
					done <- err
					return
				}
			}
		}
	}()
	inside := make(chan struct{}, 1) // one at a time
	errs := make(chan error, 4)
	for range 4 {
		go func() {
			for range 300 {
				release, err := s.Lock(context.Background(), "x", true)
				if err != nil {
					errs <- err
					return
				}
				select {
				case inside <- struct{}{}:
				default:
					release()
					errs <- errors.New("two hold it")
					return
				}
				<-inside
				release()
			}
			errs <- nil
		}()
	}
	for range 4 {
		require.NoError(t, <-errs)
	}
	close(stop)
	require.NoError(t, <-done)
}
