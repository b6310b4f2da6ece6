package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A workload makes folders in folders, deeper than we may open files.
func TestWhatLiesDeeperThanDescriptorsGoIsRemoved(t *testing.T) {
	var was unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 400, Max: was.Max}))
	defer func() { require.NoError(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &was)) }()

	s, err := OpenStore(t.TempDir())
	require.NoError(t, err)
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "kept"), []byte("x"), 0o600))
	dir, done, err := s.TempDir("deep")
	require.NoError(t, err)
	at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	require.NoError(t, err)
	for range 2000 {
		require.NoError(t, unix.Mkdirat(at, "d", 0o755))
		require.NoError(t, unix.Symlinkat(outside, at, "link"))
		next, err := unix.Openat(at, "d", unix.O_PATH|unix.O_DIRECTORY, 0)
		require.NoError(t, err)
		require.NoError(t, unix.Close(at))
		at = next
	}
	require.NoError(t, unix.Close(at))
	require.ErrorIs(t, os.RemoveAll(dir), unix.EMFILE, "this test tests nothing")
	require.NoError(t, done())
	assert.NoDirExists(t, dir)
	assert.FileExists(t, filepath.Join(outside, "kept"))
}

// A file without content says that it has any size.
func TestATreeIsBounded(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	require.NoError(t, err)
	dir := t.TempDir()
	for _, name := range []string{"a", "b"} { // neither alone is too much
		f, err := os.Create(filepath.Join(dir, name))
		require.NoError(t, err)
		require.NoError(t, f.Truncate(map[string]int64{"a": 1 << 10, "b": maxTreeBytes - 512}[name]))
		require.NoError(t, f.Close())
	}
	open := func() *os.File {
		d, err := os.Open(dir)
		require.NoError(t, err)
		t.Cleanup(func() { d.Close() })
		return d
	}
	_, err = s.AddTree(context.Background(), open(), nil)
	require.ErrorContains(t, err, "more than 64 GiB")
	_, err = s.AddUpper(context.Background(), open(), "/opt", &Manifest{}, nil)
	require.ErrorContains(t, err, "more than 64 GiB")
}

// Who is done with a directory removes its lock while a collection may have it open.
func TestGarbageIsCollectedBesideWhoIsDone(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	require.NoError(t, err)
	end := make(chan error, 1)
	go func() {
		for range 500 {
			_, done, err := s.TempDir("short")
			if err == nil {
				err = done()
			}
			if err != nil {
				end <- err
				return
			}
		}
		end <- nil
	}()
	for {
		select {
		case err := <-end:
			require.NoError(t, err)
			return
		default:
			_, err := s.GC(context.Background())
			require.NoError(t, err)
		}
	}
}

func TestATreeIsBoundedInDepth(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, strings.Repeat("d/", maxDepth+1)), 0o755))
	for name, add := range map[string]func(*os.File) error{
		"a tree": func(d *os.File) error { _, err := s.AddTree(context.Background(), d, nil); return err },
		"an upper": func(d *os.File) error {
			_, err := s.AddUpper(context.Background(), d, "/opt", &Manifest{}, nil)
			return err
		},
	} {
		d, err := os.Open(dir)
		require.NoError(t, err)
		err = add(d)
		d.Close()
		require.ErrorContains(t, err, "folders deep", name)
		assert.Less(t, len(err.Error()), 300)
	}
}
