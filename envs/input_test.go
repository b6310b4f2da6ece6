package envs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/rootfs"
)

func file(t *testing.T, name, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	return p
}

const hash1 = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

func TestKindIsDetectedByContent(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		kind Kind
		lock bool
	}{
		"unpinned":                {"requests\n", KindRequirements, false},
		"pinned":                  {"requests==2.0\n", KindRequirements, false},
		"hashed":                  {"requests==2.0 \\\n    --hash=" + hash1 + "\n", KindRequirements, true},
		"one of two hashed":       {"a==1 --hash=" + hash1 + "\nb==2\n", KindRequirements, false},
		"hashed but not pinned":   {"a>=1 --hash=" + hash1 + "\n", KindRequirements, false},
		"a wildcard is no pin":    {"a==1.* --hash=" + hash1 + "\n", KindRequirements, false},
		"comments and a BOM":      {"\xef\xbb\xbf# hello\n\n", KindRequirements, true},
		"pylock under other name": {"lock-version = \"1.0\"\n[[packages]]\nname = \"a\"\n", KindPylock, true},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := readInput(file(t, "x.txt", c.text))
			require.NoError(t, err)
			require.Equal(t, c.kind, in.kind)
			require.Equal(t, c.lock, in.isLock())
		})
	}
}

func TestBadInputIsRefusedWithItsLine(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"editable":         {"a\n-e .\n", ":2: \".\" must be built"},
		"version control":  {"a @ git+ssh://x/y\n", "version control"},
		"local path":       {"./pkg\n", "must be built"},
		"unknown option":   {"--frobnicate x\n", `unknown option "--frobnicate"`},
		"not one":          {"a\n\n!!!\n", ":3: not a requirement"},
		"missing include":  {"-r nothere.txt\n", "no such file"},
		"include of a URL": {"-r https://x/y.txt\n", "only files"},
		"include above":    {"-r ../../../../../../etc/hostname\n", "above the first"},
		"secret in option": {"--index-url https://${TOKEN}@x/\n", "not expanded"},
		"NUL":              {"a\x00b\n", "NUL"},
		"uv.lock":          {"version = 1\n[[package]]\nname = \"a\"\n", "uv.lock"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := new(Manager).read(&Recipe{File: file(t, "r.txt", c.text)})
			require.ErrorContains(t, err, c.want)
		})
	}
	_, err := readInput(t.TempDir())
	require.ErrorContains(t, err, "a folder with no pylock.toml")
	_, err = readInput(os.DevNull)
	require.ErrorContains(t, err, "not a regular file")
}

func TestIncludesAndConstraintsArePartOfTheInput(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	write("r.txt", "-r more.txt\n-c limits.txt\na\n")
	write("more.txt", "b\n-r r.txt\n") // a circle is no trouble
	write("limits.txt", "b<2\n")
	in, err := readInput(filepath.Join(dir, "r.txt"))
	require.NoError(t, err)
	require.Len(t, in.files, 3)
	before := in.text()
	write("limits.txt", "b<3\n")
	in, err = readInput(filepath.Join(dir, "r.txt"))
	require.NoError(t, err)
	require.NotEqual(t, before, in.text(), "a changed constraint must be another input")
}

func TestKeyDependsOnAllThatABakeDoes(t *testing.T) {
	m := Open(nil, Options{})
	base := rootfs.Base{Name: "host", Digest: "sha256:1"}
	l := &lock{kind: "requirements", text: []byte("a==1\n")}
	py := python{path: "/usr/bin/python3.11", stat: "1 2"}
	key := m.key(Recipe{Base: base}, l, py)
	require.Equal(t, key, m.key(Recipe{Base: base, Name: "n", Refresh: true}, l, py), "a name changes nothing")
	seen := map[string]string{key: "the first"}
	for what, k := range map[string]string{
		"lock":        m.key(Recipe{Base: base}, &lock{kind: "requirements", text: []byte("a==2\n")}, py),
		"base":        m.key(Recipe{Base: rootfs.Base{Digest: "sha256:2"}}, l, py),
		"interpreter": m.key(Recipe{Base: base}, l, python{path: py.path, stat: "1 3"}),
		"site":        m.key(Recipe{Base: base, SystemSitePackages: true}, l, py),
		"build":       m.key(Recipe{Base: base, AllowBuild: true}, l, py),
		"hook":        m.key(Recipe{Base: base, Hooks: []string{"x"}}, l, py),
		"variable":    m.key(Recipe{Base: base, Env: []string{"x"}}, l, py),
		"two hooks":   m.key(Recipe{Base: base, Hooks: []string{"x", "y"}}, l, py),
	} {
		require.NotContains(t, seen, k, what)
		seen[k] = what
	}
}

func TestInterpreterIsFoundInsideTheBaseOnly(t *testing.T) {
	root := t.TempDir()
	require.NoError(t, os.MkdirAll(root+"/usr/bin", 0o755))
	require.NoError(t, os.Symlink("usr/bin", root+"/bin"))
	require.NoError(t, os.Symlink("/bin/python3.9", root+"/usr/bin/python3")) // absolute: inside
	require.NoError(t, os.WriteFile(root+"/usr/bin/python3.9", []byte("x"), 0o755))
	base := rootfs.Base{Name: "b", Lowers: []string{root}}
	py, err := findPython(base, "")
	require.NoError(t, err)
	require.Equal(t, "/usr/bin/python3.9", py.path)
	_, err = findPython(base, "3.12")
	require.ErrorContains(t, err, "python3.12")
	_, err = findPython(rootfs.Base{Name: "empty", Lowers: []string{t.TempDir()}}, "")
	require.ErrorContains(t, err, `find interpreter in base "empty"`)
	require.NoError(t, os.Remove(root+"/usr/bin/python3.9"))
	require.NoError(t, os.Symlink("/usr/bin/python3.9", root+"/usr/bin/python3.9"))
	_, err = findPython(base, "")
	require.Error(t, err, "a circle of links")
}

func TestWheelsArePutTogetherAndConflictsAreSeen(t *testing.T) {
	f := func(path, digest string) rootfs.Entry {
		return rootfs.Entry{Path: path, Type: 'f', Mode: 0o444, Digest: digest}
	}
	d := func(path string) rootfs.Entry { return rootfs.Entry{Path: path, Type: 'd', Mode: 0o755} }
	a := &rootfs.Manifest{Entries: []rootfs.Entry{d("opt"), f("opt/a", "1")}}
	b := &rootfs.Manifest{Entries: []rootfs.Entry{d("opt"), f("opt/b", "2")}}
	m, err := merge([]*rootfs.Manifest{a, b})
	require.NoError(t, err)
	require.Len(t, m.Entries, 3)
	_, err = merge([]*rootfs.Manifest{a, {Entries: []rootfs.Entry{d("opt"), f("opt/a", "3")}}})
	require.ErrorIs(t, err, errConflict)
	_, err = merge([]*rootfs.Manifest{{Entries: []rootfs.Entry{f("opt/x", "3")}}})
	require.ErrorIs(t, err, errConflict, "a file without its directory")
}

func TestToolErrorsBecomeOneLineWithAHint(t *testing.T) {
	for name, c := range map[string]struct{ out, want string }{
		"sdist only": {"  × No solution found when resolving dependencies:\n  ╰─▶ Because docopt==0.6.2 has no usable wheels and you require docopt==0.6.2, we can conclude", "docopt has only a source distribution"},
		"unknown":    {"  × No solution found when resolving dependencies:\n  ╰─▶ Because nosuch was not found in the package registry and you require nosuch", "nosuch is not on the index"},
		"hash":       {"error: Failed to download `six==1.16.0`\n  Caused by: Hash mismatch for `six==1.16.0`\n", "hash mismatch for six==1.16.0"},
		"network":    {"error: Failed to fetch: `x`\n  Caused by: error sending request\n  Caused by: dns error", "cannot be reached"},
		"full disk":  {"error: write\n  Caused by: No space left on device (os error 28)", "no space left"},
	} {
		t.Run(name, func(t *testing.T) {
			err := explain("resolve", "r.txt", JobResult{ExitCode: 1}, c.out)
			require.ErrorContains(t, err, c.want)
			require.NotContains(t, err.Error(), "\n")
			require.NotEmpty(t, hintOf(err))
		})
	}
}

func FuzzRequirements(f *testing.F) {
	for _, s := range []string{"a==1 --hash=" + hash1, "-r x\n", "a[b]>=1; python_version<'3'\\\n", "--index-url=https://x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		in := &input{kind: KindRequirements}
		_ = in.add("/nonexistent/r.txt", []byte(s), "/nonexistent", false, map[string]bool{}, 0) // must not panic
	})
}

func hintOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Hint()
	}
	return ""
}
