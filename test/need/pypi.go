package need

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Packages gives a Python of the host's that has those pinned packages from the
// index, for tests that compare with another's implementation. It skips where
// the index does not have them.
func Packages(t testing.TB, pins ...string) string {
	t.Helper()
	Network(t)
	dir := filepath.Join(t.TempDir(), "venv")
	if out, err := exec.Command("python3", "-m", "venv", dir).CombinedOutput(); err != nil {
		promised(t, "python3 -m venv", reason(err.Error()+": "+lastLine(out)))
	}
	python := filepath.Join(dir, "bin", "python")
	pip := exec.Command(python, append([]string{"-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary", ":all:"}, pins...)...)
	pip.Env = append(os.Environ(), "PIP_NO_INPUT=1")
	out, err := pip.CombinedOutput()
	if err != nil && strings.Contains(string(out), "No matching distribution") {
		t.Skipf("needs %s from the index: %s", strings.Join(pins, " "), lastLine(out))
	}
	if err != nil {
		t.Fatalf("pip install: %v: %s", err, out)
	}
	return python
}
