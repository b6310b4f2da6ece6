package behaviour

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// A wheel of 6 kB with no dependencies, in two versions.
const (
	iniconfig231 = "iniconfig==2.3.1 --hash=sha256:9121e2c1fdb355232495be3194c8dfe87ccc2d5dee45947b78e68f499790d7a7 " +
		"--hash=sha256:67f4b9c50da0dedf52af349e7749a80a9057a5031199791b906c3bb3ae878960\n"
	iniconfig210 = "iniconfig==2.1.0 --hash=sha256:9deba5723312380e77435581c6bf4935c94cbfab9b1ed33ef8d238ea168eb760 " +
		"--hash=sha256:3abbd2e30b36733fee78f9c7f7308f2d0050e88f0087fd25c2645f63c773e1c7\n"
)

func newEnvs(t *testing.T) *harness.Sbx {
	t.Helper()
	need.Network(t)
	need.Python(t)
	return harness.New(t)
}

func requirements(t *testing.T, text string) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "requirements.txt")
	require.NoError(t, os.WriteFile(f, []byte(text), 0o600))
	return f
}

const printVersion = "import importlib.metadata as m; print(m.version('iniconfig'))"

func TestRequirementsAreBakedOnce(t *testing.T) {
	s := newEnvs(t)
	file := requirements(t, iniconfig231)
	o := s.Run("-r", file, "--", "python3", "-c", printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "2.3.1\n", string(o.Stdout))
	require.NotNil(t, o.Report.Env)
	first := *o.Report.Env

	// Without any program on PATH: the second run must start none on the host.
	t.Setenv("PATH", "/nonexistent")
	o = s.Run("-r", file, "--", "python3", "-c", printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "2.3.1\n", string(o.Stdout))
	assert.Equal(t, first, *o.Report.Env)
	assert.Empty(t, string(o.Stderr), "no phase of a bake is told")
}

func TestAChangedPinIsAnotherEnvironment(t *testing.T) {
	s := newEnvs(t)
	a := s.Run("-r", requirements(t, iniconfig231), "--", "python3", "-c", printVersion)
	b := s.Run("-r", requirements(t, iniconfig210), "--", "python3", "-c", printVersion)
	requireEnding(t, ending{0, "ok", "exit"}, a)
	requireEnding(t, ending{0, "ok", "exit"}, b)
	assert.Equal(t, "2.1.0\n", string(b.Stdout))
	assert.NotEqual(t, a.Report.Env.Digest, b.Report.Env.Digest)
}

// The environment is read-only to the command, and its own files at that.
func TestTheEnvironmentCannotBeChangedForOthers(t *testing.T) {
	need.Network(t)
	need.Python(t)
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		file := requirements(t, iniconfig231)
		spoil := "import iniconfig, os; p = iniconfig.__file__\ntry:\n open(p, 'w').write('raise SystemExit(9)')\nexcept OSError as e: print(e.errno)"
		s.Run("-r", file, "-u", "0:0", "--", "python3", "-c", spoil)
		s.Run("-r", file, "--", "python3", "-c", spoil)
		o := s.Run("-r", file, "--", "python3", "-c", printVersion+"; import iniconfig")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		assert.Equal(t, "2.3.1\n", string(o.Stdout))
	})
}

func TestBadRequirementsAreRefused(t *testing.T) {
	for _, c := range []struct{ name, text, says string }{
		{"hash that does not match", "iniconfig==2.3.1 --hash=sha256:" + strings.Repeat("0", 64) + "\n", "hash"},
		{"project that does not exist", "sbxrun-no-such-project-anywhere==1.0\n", "sbxrun-no-such-project-anywhere"},
		{"version that does not exist", "iniconfig==99.99\n", "iniconfig"},
		{"not requirements", "\x00\x01\x02", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newEnvs(t)
			o := s.Run("-r", requirements(t, c.text), "--", "true")
			requireEnding(t, ending{125, "setup-failed", "internal"}, o)
			assert.Contains(t, strings.ToLower(string(o.Stderr)), c.says)
			o = s.Run("-r", requirements(t, iniconfig231), "--", "python3", "-c", printVersion)
			requireEnding(t, ending{0, "ok", "exit"}, o)
		})
	}
}

// verify must find one flipped byte and name the file.
func TestVerifyFindsAFlippedByte(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	o := s.Do("env", "build", "--name", "t", "-r", requirements(t, iniconfig231))
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "verify", "t")
	require.Equal(t, 0, o.Code, "%v", o)

	var victim string
	require.NoError(t, filepath.WalkDir(filepath.Join(s.Root, "layers"), func(p string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(p, "/iniconfig/__init__.py") {
			victim = p
		}
		return err
	}))
	require.NotEmpty(t, victim, "no iniconfig/__init__.py below %s/layers", s.Root)
	b, err := os.ReadFile(victim)
	require.NoError(t, err)
	b[len(b)/2] ^= 1
	require.NoError(t, os.WriteFile(victim, b, 0o600)) // root writes through the mode
	o = s.Do("env", "verify", "t")
	require.Equal(t, 1, o.Code, "%v", o)
	assert.Contains(t, string(o.Stdout)+string(o.Stderr), "iniconfig/__init__.py")

	// What the hint promises: the damaged content is not used again.
	o = s.Do("env", "rm", "t")
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "build", "--name", "t", "-r", requirements(t, iniconfig231))
	require.Equal(t, 0, o.Code, "%v", o)
	o = s.Do("env", "verify", "t")
	require.Equal(t, 0, o.Code, "%v", o)
}
