package envs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

func TestWhatIsNotFromAnIndexIsTakenOutOfTheResolversList(t *testing.T) {
	commit := strings.Repeat("0a", 20)
	text, err := takeSources([]byte("--index-url https://i.test/s\n\n-e ./pkg\na==1 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n./w-1-py3-none-any.whl \\\n    --hash=sha256:cc\n" +
		"g @ git+https://h.test/g.git@" + commit + "#subdirectory=py\nf @ file:///opt/in/libs/f\nlibs/k\n--find-links ./x\nu @ https://h.test/u-1-py3-none-any.whl \\\n    --hash=sha256:dd\n"))
	require.NoError(t, err)
	m := &Manager{}
	l, err := m.parseLock(text, "kept")
	require.NoError(t, err)
	assert.Equal(t, []Source{
		{Path: "pkg", Editable: true},
		{Path: "w-1-py3-none-any.whl", Hash: "sha256:cc"},
		{Name: "g", URL: "https://h.test/g.git", Rev: commit, Subdirectory: "py"},
		{Name: "f", Path: "libs/f"},
		{Path: "libs/k"},
	}, l.sources)
	var names []string
	for _, q := range l.in.reqs {
		names = append(names, q.name)
	}
	assert.Equal(t, []string{"a", "u"}, names)
	assert.Equal(t, []string{"sha256:aa", "sha256:bb"}, l.in.reqs[0].hashes)

	for _, bad := range []string{"g @ git+https://h.test/g.git@main\n", "f @ file:///etc\n", "-e ../x\n"} {
		_, err := takeSources([]byte(bad))
		require.Error(t, err, bad)
	}
}

// Hosts that a converted lock's files are at may be reached, also where some of
// the packages are installed only.
func TestHostsOfAConvertedLocksFilesMayBeReached(t *testing.T) {
	l, err := new(Manager).parseLock([]byte(filesMark+"https://files.test\n--index-url https://i.test/s\na==1 --hash=sha256:aa\n"), "kept")
	require.NoError(t, err)
	for _, in := range []*input{l.in, subset(l, l.in.reqs).in} {
		ix := (&tool{}).index(Recipe{}, in)
		assert.Subset(t, ix.hosts, []string{"files.test:443", "i.test:443"})
	}
}

func TestLocalSourcesAreReadFromLines(t *testing.T) {
	for _, c := range []struct {
		line, says string // what is refused where building is off
		source     Source
	}{
		{"-e .", "must be built", Source{Path: ".", Editable: true}},
		{"--editable=./pkg[x,y] ; python_version > '3'", "must be built", Source{Path: "pkg", Editable: true}},
		{"./libs/../pkg", "must be built", Source{Path: "pkg"}},
		{"My_Pkg @ ./pkg", "must be built", Source{Name: "my-pkg", Path: "pkg"}},
		{"./w-1-py3-none-any.whl", "", Source{Path: "w-1-py3-none-any.whl"}},
	} {
		in, err := readInput(file(t, "r.txt", c.line+"\n"))
		require.NoError(t, err, c.line)
		require.Equal(t, []Source{c.source}, in.sources, c.line)
		assert.False(t, in.isLock(), c.line)
		_, err = new(Manager).read(&Recipe{File: file(t, "r.txt", c.line+"\n")})
		if c.says == "" {
			require.NoError(t, err)
		} else {
			require.ErrorContains(t, err, c.says)
		}
	}
	for line, says := range map[string]string{
		"-e ../x": "not below that folder", "/abs": "not below that folder", "x @ file:///abs": "not below that folder",
		"git+ssh://git@h/x":                   "only git over https",
		"x @ hg+https://h/x":                  "only git over https",
		"x @ git+https://u:secret@h.test/x@v": "",
	} {
		_, err := new(Manager).read(&Recipe{File: file(t, "r.txt", line+"\n"), AllowBuild: true})
		if says == "" {
			require.NoError(t, err, line)
			_, err = new(Manager).read(&Recipe{File: file(t, "r.txt", line+"\n")})
			require.ErrorContains(t, err, "must be built")
			require.NotContains(t, err.Error(), "secret")
			continue
		}
		require.ErrorContains(t, err, says, line)
	}
}

// A tree with links is laid where another one made links: nothing is written
// through them.
func TestATreeIsLaidWithinItsFolder(t *testing.T) {
	store, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	m := Open(store, Options{})
	project, outside, to := t.TempDir(), t.TempDir(), t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(project, "pkg", "__pycache__"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(project, "pkg", "a.py"), []byte("a"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(project, "pkg", "__pycache__", "a.pyc"), nil, 0o600))
	require.NoError(t, os.Symlink("/etc", filepath.Join(project, "pkg", "link")))
	trees, err := m.trees(context.Background(), &input{path: filepath.Join(project, "r.txt")}, []Source{{Path: "pkg"}}, false)
	require.NoError(t, err)

	require.NoError(t, m.lay(trees[0], to, "in/pkg"))
	require.NoError(t, m.lay(trees[0], to, "in/pkg"), "over itself")
	got, err := os.ReadFile(filepath.Join(to, "in/pkg/a.py"))
	require.NoError(t, err)
	assert.Equal(t, "a", string(got))
	st, err := os.Stat(filepath.Join(to, "in/pkg/a.py"))
	require.NoError(t, err)
	assert.Equal(t, os.FileMode(0o755), st.Mode().Perm())
	link, err := os.Readlink(filepath.Join(to, "in/pkg/link"))
	require.NoError(t, err)
	assert.Equal(t, "/etc", link)
	assert.NoDirExists(t, filepath.Join(to, "in/pkg/__pycache__"))

	require.NoError(t, os.Symlink(outside, filepath.Join(to, "out")))
	require.Error(t, m.lay(trees[0], to, "out/pkg"), "a parent that is a link")
	require.NoError(t, os.MkdirAll(filepath.Join(to, "f", "pkg"), 0o755))
	require.NoError(t, os.Symlink(filepath.Join(outside, "a.py"), filepath.Join(to, "f", "pkg", "a.py")))
	require.NoError(t, m.lay(trees[0], to, "f/pkg"), "a file that is a link is replaced")
	ents, err := os.ReadDir(outside)
	require.NoError(t, err)
	assert.Empty(t, ents)

	_, err = m.trees(context.Background(), &input{path: filepath.Join(project, "r.txt")}, []Source{{Path: "pkg/a.py", Name: "a", Hash: "sha256:00"}}, false)
	require.ErrorContains(t, err, "hash mismatch for a")
}
