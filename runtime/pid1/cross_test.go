package pid1

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

// The program is built for both architectures, warnings being errors, and
// calls nothing that it does not bring along.
func TestCompilesForBothArchitectures(t *testing.T) {
	for arch, cc := range map[string]string{"amd64": "x86_64-linux-gnu-gcc", "arm64": "aarch64-linux-gnu-gcc"} {
		t.Run(arch, func(t *testing.T) {
			need.CrossCompiler(t, cc)
			out := filepath.Join(t.TempDir(), "init")
			cmd := exec.Command("make", "-C", "../..", "--no-print-directory", "-B", "init", "CC="+cc, "init="+out)
			b, err := cmd.CombinedOutput()
			require.NoError(t, err, string(b))
			st, err := os.Stat(out)
			require.NoError(t, err)
			require.Less(t, st.Size(), int64(64<<10), "to be read in one sitting")
		})
	}
}
