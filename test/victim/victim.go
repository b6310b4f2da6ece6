// Package victim builds the program that misbehaves on purpose (c/victim.c).
package victim

import (
	"path/filepath"
	"testing"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// Build compiles the victim and returns the host path of the static program.
func Build(t testing.TB) string {
	t.Helper()
	return harness.BuildC(t, filepath.Join(need.Repo(), "test/victim/c/victim.c"))
}
