package envs

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// A build that ran in a job's folder leaves a link where the next file goes.
func TestWhatIsHandedToAJobFollowsNoLinkThatAnEarlierOneLeft(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	victim := filepath.Join(outside, "victim")
	require.NoError(t, os.WriteFile(victim, []byte("kept"), 0o600))
	require.NoError(t, os.Symlink(victim, filepath.Join(dir, "modules")))
	require.NoError(t, handOver(dir, "modules", []byte("/opt/$(touch x).py\n")))
	b, err := os.ReadFile(victim)
	require.NoError(t, err)
	assert.Equal(t, "kept", string(b))
	st, err := os.Lstat(filepath.Join(dir, "modules"))
	require.NoError(t, err)
	assert.True(t, st.Mode().IsRegular())

	require.NoError(t, os.Symlink(outside, filepath.Join(dir, "in")))
	require.Error(t, handOver(dir, "in/new.txt", []byte("x")))
	require.Error(t, handOver(dir, "in/victim", []byte("x")))
	b, err = os.ReadFile(victim)
	require.NoError(t, err)
	assert.Equal(t, "kept", string(b))
	assert.NoFileExists(t, filepath.Join(outside, "new.txt"))
}

// The host's Python imports nothing from the folder that it is started in.
func TestTheHostsPythonImportsNothingOfTheProject(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "zipfile.py"), []byte("open('run', 'w')\n"), 0o600))
	t.Chdir(dir)
	cmd := hostPython(context.Background(), "-c", "import zipfile; zipfile.ZipFile")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	assert.NoFileExists(t, filepath.Join(dir, "run"))
}

// Who can write to a project names root's files in it by links.
func TestAProjectsFilesAreReadInTheProjectOnly(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secret, []byte("[hunter2\n"), 0o600))
	link := func(dir, name string) {
		require.NoError(t, os.Symlink(secret, filepath.Join(dir, name)))
	}
	dir := t.TempDir()
	link(dir, "c.txt")
	link(dir, ".dockerignore")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "requirements.txt"), []byte("a\n-r c.txt\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "environment.yml"), []byte("dependencies:\n- pip:\n  - -r c.txt\n"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "uv.lock"), []byte("version = 1\nrequires-python = \">=3.9\"\n[[package]]\nname = \"a\"\n"), 0o600))
	link(dir, "pyproject.toml")
	for _, name := range []string{"requirements.txt", "environment.yml", "uv.lock"} {
		_, err := readInput(filepath.Join(dir, name))
		require.ErrorContains(t, err, "leads out of", name)
		assert.NotContains(t, err.Error(), "hunter2")
	}
	_, err := openProject(dir)
	require.ErrorContains(t, err, "leads out of")
	assert.NotContains(t, err.Error(), "hunter2")

	// A link inside is as good as a file.
	require.NoError(t, os.Remove(filepath.Join(dir, "c.txt")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "d.txt"), []byte("b\n"), 0o600))
	require.NoError(t, os.Symlink("d.txt", filepath.Join(dir, "c.txt")))
	in, err := readInput(filepath.Join(dir, "requirements.txt"))
	require.NoError(t, err)
	assert.Len(t, in.reqs, 2)

	for _, key := range []string{"requirements", "conda"} {
		_, err := parseRecipe("sbxrun.toml", []byte("[env]\n"+key+" = \"../x\"\n"))
		require.ErrorContains(t, err, "leaves the recipe's folder")
	}
}

// A pipe in place of a file does not keep us waiting for its other end.
func TestAPipeIsNoFile(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"requirements.txt", ".dockerignore"} {
		require.NoError(t, unix.Mkfifo(filepath.Join(dir, name), 0o600))
	}
	done := make(chan [2]error, 1)
	go func() {
		_, a := readFile(filepath.Join(dir, "requirements.txt"))
		_, b := openProject(dir)
		done <- [2]error{a, b}
	}()
	select {
	case errs := <-done:
		require.ErrorContains(t, errs[0], "not a regular file")
		require.ErrorContains(t, errs[1], "not a regular file")
	case <-time.After(20 * time.Second):
		t.Fatal("it waits for the pipe")
	}
}

// Parts are found by what made them: layers of a recipe's steps are anybody's.
func TestWhatStepsPutUponABaseIsInAllKeys(t *testing.T) {
	plain := rootfs.Base{Digest: "sha256:b"}
	upon := plain.With("sha256:evil", "/nowhere")
	m := &Manager{store: newStore(t)}
	py, q, in := python{path: "/usr/bin/python3", stat: "s"}, requirement{name: "a", version: "1"}, &input{kind: KindRequirements, path: m.store.Path("envs", "inline", "x", "requirements.txt")}
	keys := func(b rootfs.Base) []string {
		r := Recipe{Base: b, File: in.path}
		return []string{
			wheelKey(q, r, &tool{}, py), skeletonKey(r, &tool{}, py), m.targetPath(b, py), m.lockPath(r, in, py), m.condaLockPath(r, in), m.lastPath(r, in),
		}
	}
	for i, k := range keys(plain) {
		assert.NotEqual(t, k, keys(upon)[i], i)
	}
}

func newStore(t *testing.T) *rootfs.Store {
	t.Helper()
	s, err := rootfs.OpenStore(t.TempDir())
	require.NoError(t, err)
	return s
}

// A wheel that brings bytecode of another's module, another's RECORD or what is the
// virtual environment's own makes no parts: others would get them.
func TestAWheelPutsNothingIntoWhatOthersGet(t *testing.T) {
	const site = "opt/env/lib/python3.11/site-packages"
	build := func(t *testing.T, good, evil string, more ...string) error {
		m := &Manager{store: newStore(t)}
		dir := t.TempDir()
		put := func(name, text string) {
			p := filepath.Join(dir, name)
			require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
			require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
		}
		put(site+"/good/api.py", "y = 1\n")
		put(site+"/good/__pycache__/api.cpython-311.pyc", "ours")
		put(site+"/evil/__init__.py", "")
		put(site+"/good-1.dist-info/RECORD", good)
		put(site+"/evil-1.dist-info/RECORD", evil)
		put("opt/env/pyvenv.cfg", "home = /usr/bin\n")
		for _, name := range more {
			put(name, "evil")
		}
		top, err := os.Open(dir)
		require.NoError(t, err)
		defer top.Close()
		man, err := m.store.AddTree(context.Background(), top, nil)
		require.NoError(t, err)
		parts, rest, err := m.split(man, []requirement{{name: "good"}, {name: "evil"}})
		if err == nil {
			parts[0].Encode() // sorts
			rest.Encode()
			assert.Equal(t, byte('f'), rest.Type("opt/env/pyvenv.cfg"))
			assert.Equal(t, byte('f'), parts[0].Type(site+"/good/__pycache__/api.cpython-311.pyc"))
		}
		return err
	}
	good, evil := "good/api.py,,\ngood-1.dist-info/RECORD,,\n", "evil/__init__.py,,\nevil-1.dist-info/RECORD,,\n"
	require.NoError(t, build(t, good, evil))
	require.NoError(t, build(t, good, evil+"virtualenv/_virtualenv.py,,\n../../../bin/activate-completion,,\n", site+"/virtualenv/_virtualenv.py", "opt/env/bin/activate-completion"))
	opt := site + "/good/__pycache__/api.cpython-311.opt-1.pyc"
	for name, err := range map[string]error{
		"bytecode":            build(t, good, evil+strings.TrimPrefix(opt, site+"/")+",,\n", opt),
		"bytecode of ours":    build(t, good, evil+"good/__pycache__/api.cpython-311.pyc,,\n"),
		"a RECORD":            build(t, "good/api.py,,\n", evil+"good-1.dist-info/RECORD,,\n"),
		"the configuration":   build(t, good, evil+"../../../pyvenv.cfg,,\n"),
		"the interpreter":     build(t, good, evil+"../../../bin/python3,,\n", "opt/env/bin/python3"),
		"what starts with it": build(t, good, evil+"_virtualenv.pth,,\n", site+"/_virtualenv.pth"),
	} {
		require.ErrorIs(t, err, errConflict, name)
	}
}

// A name from an archive becomes a path when it is a name.
func TestNamesOfAnImportLeadNowhere(t *testing.T) {
	m := &Manager{store: newStore(t)}
	g, err := m.store.Stage(context.Background())
	require.NoError(t, err)
	defer g.Close()
	pipe := filepath.Join(t.TempDir(), "pipe") // who opens it waits
	require.NoError(t, unix.Mkfifo(pipe, 0o600))
	rel, err := filepath.Rel(m.store.Path("envs", "names"), pipe)
	require.NoError(t, err)
	man := &rootfs.Manifest{Entries: []rootfs.Entry{{Path: "opt", Type: 'd', Mode: 0o755}}}
	done := make(chan error, 1)
	go func() {
		_, _, err := m.Import(context.Background(), g, Imported{Env: Env{Kind: KindFiles, Digest: man.Digest()}, Offered: []string{rel, "ok"}, Layers: []*rootfs.Manifest{man}})
		done <- err
	}()
	select {
	case err := <-done:
		require.NoError(t, err)
	case <-time.After(20 * time.Second):
		t.Fatal("it opened what the name leads to")
	}
	_, err = m.Get("ok")
	require.NoError(t, err)
}

// Patterns are compared with every file: neither they nor their file may be anything.
func TestPatternsAreBounded(t *testing.T) {
	for what, text := range map[string]string{
		"a pattern": strings.Repeat("*a", maxPatternBytes), "a file": strings.Repeat("a\n", maxIgnoreBytes),
	} {
		_, err := parseIgnores("f", []byte(text))
		require.ErrorContains(t, err, "more than", what)
	}
}

// apt and dpkg are those of the base, which says what it likes of its packages.
func TestWhatABaseSaysOfPackagesIsBounded(t *testing.T) {
	b, dir := &recipeBake{Manager: &Manager{store: newStore(t)}}, t.TempDir()
	d := deb{path: filepath.Join(dir, "a.deb")}
	require.NoError(t, os.WriteFile(d.path+".control", []byte("Package: a\nVersion: 1\nArchitecture: all\nX: "+strings.Repeat("x", maxControlBytes)), 0o600))
	_, err := b.debTree(context.Background(), dir, rootfs.Base{}, &built{}, nil, []deb{d})
	require.ErrorContains(t, err, "more is said")
}

func TestALineThatIsRefusedTellsNoCredentials(t *testing.T) {
	for _, line := range []string{"https://me:hunter2@h.test/x-1-py3-none-any.whl", "a b https://me:hunter2@h.test/", "-e git+https://me:hunter2@h.test/x", "git+ssh://me:hunter2@h.test/x"} {
		_, err := readInput(file(t, "requirements.txt", line+"\n"))
		if err != nil {
			assert.NotContains(t, err.Error(), "hunter2", line)
		}
	}
}

// A recipe has its packages built, but not with what this host's indexes are opened by.
func TestARecipeDoesNotGiveBuildsTheHostsCredentials(t *testing.T) {
	file, err := parseRecipe("sbxrun.toml", []byte("[env]\nrequirements = [\"a\"]\nallow_build = true\n"))
	require.NoError(t, err)
	b := &recipeBake{Manager: &Manager{store: newStore(t)}, file: file}
	for _, v := range []string{"UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} {
		t.Setenv(v, "")
	}
	t.Setenv("HOME", t.TempDir())
	t.Setenv("PIP_CONFIG_FILE", "")
	if hostIndexesHaveCredentials() {
		t.Skip("/etc/pip.conf has some")
	}
	r, _, err := b.packageRecipe(file.final, &built{})
	require.NoError(t, err)
	assert.True(t, r.AllowBuild)
	t.Setenv("UV_INDEX", "https://me:hunter2@h.test/simple")
	_, _, err = b.packageRecipe(file.final, &built{})
	require.ErrorContains(t, err, "sbxrun.toml:3: allow_build")
	assert.NotContains(t, err.Error(), "hunter2")
	b.r.AllowBuild = true // the user's word
	_, _, err = b.packageRecipe(file.final, &built{})
	require.NoError(t, err)
}
