package conda

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// By hand as by the kernel.
func TestWhereLinksLead(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "root/a/b"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "root/file"), nil, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "beside"), nil, 0o600))
	want := map[string]bool{}
	for name, c := range map[string]struct {
		to      string
		outside bool
	}{
		"in": {"file", false}, "a/b/up": {"../../file", false}, "out": {"../beside", true}, "a/out": {"../../beside", true},
		"abs": {"/etc", true}, "dangling": {"nowhere", false}, "loop": {"loop", false}, "through": {"in/x", false},
		"dir": {"a", false}, "a/b/via": {"../../dir/../../beside", true}, "two": {"out", true}, "round": {"a/b/../../a/../file", false}, "root": {".", false},
		"gone-and-out": {"nowhere/../../beside", false},
	} {
		require.NoError(t, os.Symlink(c.to, filepath.Join(dir, "root", name)))
		want[name] = c.outside
	}
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	tr, err := openTree(fd, "root")
	require.NoError(t, err)
	defer tr.close()
	for name, outside := range want {
		for way, leads := range map[string]func(string) (bool, error){"kernel": tr.leads, "by hand": tr.leadsByHand} {
			got, err := leads(name)
			require.NoError(t, err, name)
			assert.Equal(t, outside, got, "%s, %s", name, way)
		}
	}
}
