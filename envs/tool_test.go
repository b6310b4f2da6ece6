package envs

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The process is this test's binary started anew; its client is a shim whose
// child sleeps. The child's number is the host's: /proc is.
func TestTheHostsClientDiesWithUs(t *testing.T) {
	if dir := os.Getenv("ENVS_TEST_CLIENT"); dir != "" {
		_ = onThread(hostPython(t.Context(), "x").Run)
		return
	}
	dir := t.TempDir()
	pidFile := filepath.Join(dir, "pid")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "python3"), []byte("#!/bin/sh\nsh -c 'read -r p rest </proc/self/stat; echo $p > "+pidFile+".new; mv "+pidFile+".new "+pidFile+"; exec sleep 60'\nexit 0\n"), 0o755))
	cmd := exec.Command(os.Args[0], "-test.run=^TestTheHostsClientDiesWithUs$")
	cmd.Env = append(os.Environ(), "ENVS_TEST_CLIENT="+dir, "PATH="+dir+":/usr/bin:/bin")
	require.NoError(t, cmd.Start())
	var pid int
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(pidFile)
		if err == nil {
			pid, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		}
		return pid > 0
	}, 10*time.Second, 10*time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait()
	require.Eventually(t, func() bool {
		b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat") // a zombie waits for init only
		return err != nil || strings.Contains(string(b), ") Z ") || syscall.Kill(pid, 0) != nil
	}, 5*time.Second, 10*time.Millisecond)
}
