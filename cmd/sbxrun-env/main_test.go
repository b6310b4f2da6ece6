package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestStartedByHandItSaysSo(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "sbxrun-env")
	require.NoError(t, exec.Command("go", "build", "-o", bin, ".").Run())
	for _, args := range [][]string{nil, {"--help"}, {"inside"}, {"inside", "x"}, {"x"}} {
		out, err := exec.Command(bin, args...).CombinedOutput()
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit, "%v", args)
		require.Equal(t, 125, exit.ExitCode(), "%v", args)
		require.True(t, strings.Contains(string(out), "started by sbxrun, not by hand"), "%v: %s", args, out)
	}
}
