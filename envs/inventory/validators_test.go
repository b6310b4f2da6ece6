package inventory

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

// validators gives a Python that has those packages, from the index.
func validators(t *testing.T, pins ...string) string {
	t.Helper()
	need.Network(t)
	dir := filepath.Join(t.TempDir(), "venv")
	out, err := exec.Command("python3", "-m", "venv", dir).CombinedOutput()
	require.NoError(t, err, "%s", out)
	pip := exec.Command(filepath.Join(dir, "bin", "python"), append([]string{"-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:"}, pins...)...)
	pip.Env = append(os.Environ(), "PIP_NO_INPUT=1")
	out, err = pip.CombinedOutput()
	if err != nil && strings.Contains(string(out), "No matching distribution") {
		t.Skipf("needs %s from the index: %s", strings.Join(pins, " "), out)
	}
	require.NoError(t, err, "%s", out)
	return filepath.Join(dir, "bin", "python")
}
