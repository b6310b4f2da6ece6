package rootfs

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func testStore(t testing.TB) *Store {
	t.Helper()
	s, err := OpenStore(filepath.Join(t.TempDir(), "store"))
	require.NoError(t, err)
	return s
}

// addDirectory adds a base from a directory as it is.
func addDirectory(t testing.TB, s *Store, name, dir string) Base {
	t.Helper()
	b, err := s.AddBase(context.Background(), name, dir, func(string) {}, func(string) (string, []string, error) { return dir, nil, nil })
	require.NoError(t, err)
	return b
}

func TestBaseNames(t *testing.T) {
	s := testStore(t)
	for _, n := range []string{"", "host", "..", "../x", "a/b", "-x", ".x", "a b", "a\x00"} {
		_, err := s.AddBase(context.Background(), n, t.TempDir(), nil, nil)
		require.Error(t, err, "%q", n)
	}
}

func TestHostBase(t *testing.T) {
	s := testStore(t)
	b, err := s.HostBase(context.Background())
	require.NoError(t, err)
	again, err := s.Base("")
	require.NoError(t, err)
	require.Equal(t, b, again)
	for _, p := range []string{"usr", "etc/ssl", "proc", "dev", "tmp", "run", "home", "opt/env", "root", "var/tmp", "work", "mnt", "srv"} {
		require.DirExists(t, filepath.Join(b.Lowers[0], p))
	}
	pw, err := os.ReadFile(filepath.Join(b.Lowers[0], "etc/passwd"))
	require.NoError(t, err)
	require.Equal(t, generated["etc/passwd"], string(pw))
	for _, bind := range b.Binds {
		require.Contains(t, append(hostBinds, "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"), bind.Source)
		require.DirExists(t, filepath.Join(b.Lowers[0], bind.Target))
	}
	for _, p := range []string{"etc/shadow", "etc/ssl/private", "etc/hostname", "etc/machine-id", "etc/ssh", "etc/environment"} {
		require.NoFileExists(t, filepath.Join(b.Lowers[0], p))
		require.NoDirExists(t, filepath.Join(b.Lowers[0], p))
	}
	// A skeleton that is gone is made again.
	require.NoError(t, s.RemoveLayer("sha256:"+filepath.Base(filepath.Dir(b.Lowers[0]))))
	again, err = s.HostBase(context.Background())
	require.NoError(t, err)
	require.Equal(t, b, again)
}

func BenchmarkHostBase(b *testing.B) {
	s := testStore(b)
	for b.Loop() {
		_, err := s.HostBase(context.Background())
		require.NoError(b, err)
	}
}

// An upgrade on the host that has nothing to do with an environment must not
// make it another one.
func TestHostBaseKeepsItsDigestWhenTheSkeletonIsMadeAnew(t *testing.T) {
	s, err := OpenStore(t.TempDir())
	require.NoError(t, err)
	a, err := s.HostBase(context.Background())
	require.NoError(t, err)
	old := hostCopies
	hostCopies = append(append([]string{}, old...), "debian_version", "shells")[1:] // without ld.so.cache
	defer func() { hostCopies = old }()
	require.NoError(t, os.Remove(s.Path("bases", "host.json")))
	b, err := s.HostBase(context.Background())
	require.NoError(t, err)
	require.NotEqual(t, a.Lowers, b.Lowers, "the skeleton is another")
	require.Equal(t, a.Digest, b.Digest)
}
