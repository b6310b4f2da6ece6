package behaviour

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
)

// The report goes where its path led before the command ran: a job that can
// write there must not lead root anywhere else.
func TestReportIsNotLookedUpAgain(t *testing.T) {
	for name, script := range map[string]string{
		"a link in its place":         `ln -s TARGET /out/r.json`,
		"a pipe in its place":         `mkfifo /out/r.json`,
		"another folder in its place": `mv /out/sub /out/old; ln -s DIR /out/sub`,
	} {
		t.Run(name, func(t *testing.T) {
			s := harness.New(t)
			dir, out := t.TempDir(), t.TempDir()
			target := filepath.Join(dir, "target")
			require.NoError(t, os.WriteFile(target, []byte("precious"), 0o600))
			require.NoError(t, os.Mkdir(filepath.Join(out, "sub"), 0o755))
			report := filepath.Join(out, "r.json")
			if name == "another folder in its place" {
				report = filepath.Join(out, "sub", "r.json")
			}
			o := s.Do("run", "-v", out+":/out", "--report", report, "--", "sh", "-c", strings.NewReplacer("TARGET", target, "DIR", dir).Replace(script))
			assert.Equal(t, 0, o.Code, "%v", o)
			b, err := os.ReadFile(target)
			require.NoError(t, err)
			assert.Equal(t, "precious", string(b))
			ents, err := os.ReadDir(dir)
			require.NoError(t, err)
			assert.Len(t, ents, 1, "something was made in the other folder")
		})
	}
}

func TestNameThatWouldForgeAJournal(t *testing.T) {
	s := harness.New(t)
	file := filepath.Join(t.TempDir(), "sbxrun.toml")
	require.NoError(t, os.WriteFile(file, []byte("name = \"x\\u00001\\u0000/etc\"\n"), 0o600))
	o := s.Run("-f", file, "--", "true")
	assert.Equal(t, 125, o.Code, "%v", o)
	assert.Contains(t, o.Report.Message, "control character")
}
