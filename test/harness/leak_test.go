package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

// A leak check that finds nothing must be able to find something.
func TestLeaksAreFound(t *testing.T) {
	need.Root(t)
	need.Cgroup(t)
	dir := t.TempDir()
	s := newAt(t, "/bin/false", filepath.Join(dir, "root"))
	require.Empty(t, s.Leaks())
	id := filepath.Base(filepath.Dir(dir)) // unlikely to be anybody else's
	s.ids = []string{id}

	group := "/sys/fs/cgroup/pids/sbxrun"
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		group = "/sys/fs/cgroup/sbxrun"
	}
	require.NoError(t, os.MkdirAll(filepath.Join(group, id), 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(s.State, "slots", "7"), 0o700))
	mnt := filepath.Join(s.Root, "m")
	require.NoError(t, os.MkdirAll(mnt, 0o700))
	cmd := exec.Command("sleep", "100")
	cmd.Env = append(os.Environ(), "SBXRUN_STATE="+s.State)
	require.NoError(t, cmd.Start())
	found := strings.Join(s.Leaks(), "\n")
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	mountErr := unix.Mount("none", mnt, "tmpfs", 0, "size=4k")
	mounted := strings.Join(s.Leaks(), "\n")
	if mountErr == nil {
		mountErr = unix.Unmount(mnt, unix.MNT_DETACH)
	}
	require.NoError(t, os.Remove(filepath.Join(group, id)))
	require.NoError(t, os.RemoveAll(s.State))

	assert.Contains(t, found, "cgroup "+group)
	assert.Contains(t, found, "of sbxrun")
	assert.Contains(t, found, "state slots/7")
	require.NoError(t, mountErr)
	assert.Contains(t, mounted, "mount in /proc/self/mountinfo")
	require.Empty(t, s.Leaks())
}
