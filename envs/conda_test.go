package envs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExplainSolver(t *testing.T) {
	for _, c := range []struct{ kind, text, says, hint string }{
		{
			"SolverError", "Cannot solve the request because of: No candidates were found for nothere *.\n",
			`solve "f": no channel has nothere (https://c.example)`, "name",
		},
		{
			"SolverError", "Cannot solve the request because of: No candidates were found for liba 3.*.\n",
			`solve "f": no channel has liba 3.* (https://c.example)`, "name",
		},
		{
			"SolverError",
			"Cannot solve the request because of: The following packages are incompatible\n├─ b * can be installed with any of the following options:\n│  └─ b 1.0 would require\n│     └─ a >=2\n└─ c * cannot be installed because there are no viable options:\n   └─ c 1.0 would require\n      └─ a <2, which conflicts with the versions reported above.\n",
			`solve "f": the packages do not fit together: b * can be installed with any of the following options: b 1.0 would require a >=2; c * cannot be installed because there are no viable options: c 1.0 would require a <2, which conflicts with the versions reported above.`, "loosen",
		},
		{"InvalidMatchSpecError", "unable to parse version spec: >>x", `solve "f": a dependency cannot be read: unable to parse version spec: >>x`, "numpy"},
	} {
		requireHint(t, explainSolver("f", c.text, c.kind, []string{"https://c.example"}), c.says, c.hint)
	}
}

func TestDropPinned(t *testing.T) {
	const text = "--index-url https://u:secret@mirror.example/simple\n\nnumpy==2.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nsix==1.0 \\\n    --hash=sha256:cc\n"
	require.Equal(t, "six==1.0 \\\n    --hash=sha256:cc\n", dropPinned([]byte(text), map[string]string{"numpy": "2.0"}, nil))
	require.Equal(t, "--extra-index-url https://x.example/simple\nnumpy==2.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nsix==1.0 \\\n    --hash=sha256:cc\n",
		dropPinned([]byte(text), map[string]string{"numpy": "2.1"}, []string{"--extra-index-url https://u:secret@x.example/simple"}), "another version is pip's to install")
}

// What a pip section includes is part of the recipe.
func TestAnIncludeOfAPipSectionIsPartOfTheKey(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "environment.yml")
	require.NoError(t, os.WriteFile(file, []byte("dependencies:\n- python\n- pip:\n  - -r sub/more.txt\n  - six\n"), 0o600))
	_, err := readInput(file)
	requireHint(t, err, "sub/more.txt", "")
	require.NoError(t, os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	texts := map[string]bool{}
	for _, text := range []string{"six\n", "idna\n"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "sub", "more.txt"), []byte(text), 0o600))
		in, err := readInput(file)
		require.NoError(t, err)
		require.Equal(t, KindEnvironment, in.conda)
		texts[in.text()] = true
	}
	require.Len(t, texts, 2)
	require.NoError(t, os.WriteFile(file, []byte("dependencies:\n- pip: [x]\n- pip:\n  - -r ../above.txt\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(dir), "above.txt"), nil, 0o600))
	_, err = readInput(file)
	require.ErrorContains(t, err, "above")
}

func TestALockWithoutAHashIsRefused(t *testing.T) {
	for text, says := range map[string]string{
		`{"conda":{"packages":[{"name":"x"}]}}`:                             "no hash",
		`{"conda":{"packages":[{"name":"x","sha256":"../../etc/passwd"}]}}`: "no hash",
		`{"conda":[]}`: "read stored lock",
		`{`:            "read stored lock",
	} {
		_, err := parseCondaLock([]byte(text))
		require.ErrorContains(t, err, says, text)
	}
	l, err := parseCondaLock([]byte(`{"conda":{"platform":"linux-64","packages":[{"name":"python","version":"3.12.1","url":"https://u.example/c/linux-64/p.conda","sha256":"ab"},{"name":"y","url":"file:///c/noarch/y.conda","md5":"cd"}]},"variables":["A=b"]}`))
	require.NoError(t, err)
	require.Equal(t, "3.12", l.python())
	require.Equal(t, "# platform: linux-64\n@EXPLICIT\nhttps://u.example/c/linux-64/p.conda#sha256:ab\nfile:///c/noarch/y.conda#cd\n# variable: A=b\n", string(l.explicit()))
	require.Equal(t, []string{"https://u.example/c/linux-64/p.conda", "file:///c"}, origins(l.view.Packages))
}

func TestVariablesIn(t *testing.T) {
	require.Equal(t, []string{"A", "B_1", "C"}, variablesIn("x: $A\ny: ${B_1}/$ $$C ${}\n"))
	require.Empty(t, variablesIn("no: variables"))
}
