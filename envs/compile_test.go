package envs

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/need"
)

// What a module compiles to does not depend on what was compiled before it.
func TestBytecodeDoesNotDependOnItsNeighbours(t *testing.T) {
	need.Python(t)
	compiled := func(neighbours int, asList bool) string {
		t.Helper()
		dir := t.TempDir()
		write := func(name, text string) string {
			p := filepath.Join(dir, name)
			require.NoError(t, os.WriteFile(p, []byte(text), 0o600))
			return p
		}
		list := ""
		for i := range neighbours {
			list += write(fmt.Sprintf("a%d.py", i), "Ø = 1\n") + "\n"
		}
		list += write("z.py", "entities = {'Oslash': 'Ø'}\n") + "\n"
		what := []string{dir}
		if asList {
			what = []string{"-i", write("list", list)}
		}
		// -p and -s: the path is in the bytecode.
		out, err := exec.Command("/usr/bin/python3", compileArgs(append([]string{"-s", dir, "-p", "/x"}, what...)...)...).CombinedOutput()
		require.NoError(t, err, "%s", out)
		found, err := filepath.Glob(filepath.Join(dir, "__pycache__", "z.*.pyc"))
		require.NoError(t, err)
		require.Len(t, found, 1)
		b, err := os.ReadFile(found[0])
		require.NoError(t, err)
		return string(b)
	}
	alone := compiled(0, false)
	for _, asList := range []bool{false, true} {
		require.Equal(t, alone, compiled(50, asList))
	}
}
