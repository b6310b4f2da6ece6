package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

// Whatever ends sbxrun, sbxrun-oci stops and cleans up: a signal, which it is
// told of, or its death, which it sees.
func TestBaseAddLeavesNothingWhenItIsStopped(t *testing.T) {
	need.Root(t)
	bin := need.Binary(t)
	tree := t.TempDir()
	for i := range 4000 {
		require.NoError(t, os.WriteFile(filepath.Join(tree, fmt.Sprint(i)), fmt.Appendf(nil, "%70000d", i), 0o600))
	}
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL} {
		root := t.TempDir()
		cmd := exec.Command(bin, "base", "add", "--root", root, "b", tree)
		stderr, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		said := bufio.NewScanner(stderr)
		require.True(t, said.Scan(), "it says what it does")
		require.NoError(t, cmd.Process.Signal(sig))
		var rest []string
		for said.Scan() { // sbxrun-oci has the other end too: to its end
			rest = append(rest, said.Text())
		}
		_ = cmd.Wait()
		if sig != syscall.SIGKILL {
			assert.Equal(t, 1, cmd.ProcessState.ExitCode())
			assert.Contains(t, strings.Join(rest, "\n"), "context canceled")
		}
		assert.Eventually(t, func() bool {
			left, _ := filepath.Glob(filepath.Join(root, "tmp", "*"))
			layers, _ := filepath.Glob(filepath.Join(root, "layers", "*"))
			return len(left)+len(layers) == 0
		}, 20*time.Second, 10*time.Millisecond, "%v", sig)
		assert.NoFileExists(t, filepath.Join(root, "bases", "b.json"))
	}
}
