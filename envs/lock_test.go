package envs

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestFailuresOfTheToolAreOneLine(t *testing.T) {
	for name, c := range map[string]struct {
		res             JobResult
		out, text, hint string
	}{
		"no package":     {JobResult{ExitCode: 1}, "  × No solution found when resolving dependencies:\n  ╰─▶ Because nosuch was not found in the package registry and you require nosuch,\n      we can conclude that your requirements are unsatisfiable.\n", "nosuch is not on the index", "name right"},
		"no version":     {JobResult{ExitCode: 1}, "  × No solution found when resolving dependencies:\n  ╰─▶ Because there is no version of six==99 and you require six==99, we can conclude that your\n      requirements are unsatisfiable.\n", "Because there is no version of six==99", "loosen"},
		"hash":           {JobResult{ExitCode: 1}, "error: Failed to install\n  Caused by: Hash mismatch for `six==1.0`\n\nExpected:\n  sha256:00\n", "hash mismatch for six==1.0", "locked"},
		"sdist":          {JobResult{ExitCode: 1}, "  × No solution found when resolving dependencies:\n  ╰─▶ Because only docopt==0.6.2 is available and docopt==0.6.2 has no usable wheels, we can conclude\n", "docopt has only a source distribution", "--allow-build"},
		"unreachable":    {JobResult{ExitCode: 1}, "error: Failed to fetch: `https://index.test/six/`\n  Caused by: dns error\n", "cannot be reached", "network"},
		"refused host":   {JobResult{ExitCode: 1, Denied: []string{"other.test"}}, "error: tunnel", "other.test", "--index-url"},
		"disk":           {JobResult{ExitCode: 1}, "error: write: No space left on device (os error 28)", "no space left", "--root"},
		"out of memory":  {JobResult{ExitCode: 137, Reason: "memory", Message: "over 4 GiB"}, "", "over 4 GiB", ""},
		"without a word": {JobResult{ExitCode: 3}, "", "without a word", ""},
	} {
		err := explain("bake", "r.txt", c.res, c.out)
		t.Log(name, "→", err)
		requireHint(t, err, c.text, c.hint)
	}
}

func TestAFailedResolveKeepsNoLock(t *testing.T) {
	s := &script{fails: map[string]string{"resolve": "Because nosuch was not found in the package registry"}}
	m, base := testManager(t, s)
	r := Recipe{File: writeInput(t, "nosuch"), Base: base}
	_, err := m.Lock(t.Context(), r)
	requireHint(t, err, "nosuch is not on the index", "")
	s.fails, s.lock = nil, pin("nosuch", "1")
	b, err := m.Lock(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, s.lock, string(b))

	s.lock = "--index-url https://user:secret@index.test/s@x\n--extra-index-url https://extra.test/s\n" + pin("nosuch", "1")
	r.Refresh = true
	b, err = m.Lock(t.Context(), r)
	require.NoError(t, err)
	require.Equal(t, "--index-url https://index.test/s@x\n--extra-index-url https://extra.test/s\n"+pin("nosuch", "1"), string(b), "no credentials")
}

func TestHostsAJobMayReach(t *testing.T) {
	for _, k := range []string{"UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONFIG_FILE"} {
		t.Setenv(k, "")
	}
	t.Setenv("HOME", t.TempDir())
	tl := &tool{IndexURL: "https://index.test/simple", FileHost: "files.test"}
	in, err := readInput(writeInput(t, "--extra-index-url http://extra.test:8080/s\nsix\nw @ https://direct.test/w-1-py3-none-any.whl # https://comment.test\n"))
	require.NoError(t, err)
	hosts := tl.index(Recipe{}, in).hosts
	require.Subset(t, hosts, []string{"extra.test:8080", "index.test:443", "files.test:443", "direct.test:443"})
	require.NotContains(t, hosts, "comment.test:443")
	require.Contains(t, tl.index(Recipe{IndexURL: "https://mine.test/s"}, in).hosts, "mine.test:443")
}

func TestVersionsAreComparedAsNumbers(t *testing.T) {
	require.True(t, olderThan("0.9.1", "0.10.0"))
	require.False(t, olderThan("0.10.0", "0.10.0"))
	require.False(t, olderThan("1.0", "0.10.9"))
}
