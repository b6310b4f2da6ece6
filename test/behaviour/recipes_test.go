package behaviour

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// Hashes of iniconfig's wheel and of sniffio's.
const (
	iniconfigWheel = "9121e2c1fdb355232495be3194c8dfe87ccc2d5dee45947b78e68f499790d7a7"
	sniffioWheel   = "2f6da418d1f1e0fddd844478f41680e794e6051915791a034ff65e5f100525a2"
)

// publicIndex is where pip looks: its name is not ours to know.
func publicIndex(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("python3", "-c", "from pip._internal.models.index import PyPI as p; print(p.simple_url)").Output()
	if err != nil {
		t.Skipf("needs python3 with pip: %v", err)
	}
	return strings.TrimRight(strings.TrimSpace(string(out)), "/")
}

// projects are one project as each tool writes it: iniconfig, and sniffio with
// the extra or group "more".
func projects(t *testing.T) map[string]map[string]string {
	index := publicIndex(t)
	pyproject := "[project]\nname = \"p\"\nversion = \"1\"\nrequires-python = \">=3.9\"\ndependencies = [\"iniconfig==2.3.1\"]\n" +
		"[project.optional-dependencies]\nmore = [\"sniffio==1.3.1\"]\n[dependency-groups]\nmore = [\"sniffio==1.3.1\"]\n"
	file := func(name, hash string) string {
		return "{file = \"" + name + "-py3-none-any.whl\", hash = \"sha256:" + hash + "\"}"
	}
	uv := func(name, version, hash string) string {
		return "\n[[package]]\nname = \"" + name + "\"\nversion = \"" + version + "\"\nsource = { registry = \"" + index + "\" }\nwheels = [\n" +
			"    { url = \"" + index + "/" + name + "-" + version + "-py3-none-any.whl\", hash = \"sha256:" + hash + "\", size = 1 },\n]\n"
	}
	return map[string]map[string]string{
		"pyproject.toml": {"pyproject.toml": pyproject},
		"uv.lock": {"pyproject.toml": pyproject, "uv.lock": "version = 1\nrevision = 3\nrequires-python = \">=3.9\"\n" +
			uv("iniconfig", "2.3.1", iniconfigWheel) +
			"\n[[package]]\nname = \"p\"\nversion = \"1\"\nsource = { virtual = \".\" }\ndependencies = [\n    { name = \"iniconfig\" },\n]\n" +
			"\n[package.optional-dependencies]\nmore = [\n    { name = \"sniffio\" },\n]\n\n[package.dev-dependencies]\nmore = [\n    { name = \"sniffio\" },\n]\n" +
			uv("sniffio", "1.3.1", sniffioWheel)},
		"poetry.lock": {"pyproject.toml": pyproject, "poetry.lock": "[[package]]\nname = \"iniconfig\"\nversion = \"2.3.1\"\noptional = false\npython-versions = \">=3.9\"\ngroups = [\"main\"]\nfiles = [\n    " +
			file("iniconfig-2.3.1", iniconfigWheel) + ",\n]\n\n[[package]]\nname = \"sniffio\"\nversion = \"1.3.1\"\noptional = true\npython-versions = \">=3.7\"\ngroups = [\"main\", \"more\"]\nmarkers = {main = \"extra == \\\"more\\\"\"}\nfiles = [\n    " +
			file("sniffio-1.3.1", sniffioWheel) + ",\n]\n\n[extras]\nmore = [\"sniffio\"]\n\n[metadata]\nlock-version = \"2.1\"\npython-versions = \">=3.9\"\ncontent-hash = \"0\"\n"},
		"pdm.lock": {"pdm.lock": "[metadata]\ngroups = [\"default\", \"more\"]\nstrategy = [\"inherit_metadata\"]\nlock_version = \"4.5.0\"\ncontent_hash = \"sha256:0\"\n\n[[package]]\nname = \"iniconfig\"\nversion = \"2.3.1\"\ngroups = [\"default\"]\nfiles = [\n    " +
			file("iniconfig-2.3.1", iniconfigWheel) + ",\n]\n\n[[package]]\nname = \"sniffio\"\nversion = \"1.3.1\"\ngroups = [\"more\"]\nfiles = [\n    " + file("sniffio-1.3.1", sniffioWheel) + ",\n]\n"},
		"Pipfile.lock": {"Pipfile.lock": "{\"_meta\": {\"pipfile-spec\": 6, \"sources\": [{\"name\": \"x\", \"url\": \"" + index + "\", \"verify_ssl\": true}]},\n\"default\": {\"iniconfig\": {\"hashes\": [\"sha256:" + iniconfigWheel +
			"\"], \"version\": \"==2.3.1\"}},\n\"more\": {\"sniffio\": {\"hashes\": [\"sha256:" + sniffioWheel + "\"], \"markers\": \"python_version >= '3.7'\", \"version\": \"==1.3.1\"}}}\n"},
		"pylock.toml": {"pylock.toml": "lock-version = \"1.0\"\ncreated-by = \"test\"\nextras = [\"more\"]\ndependency-groups = [\"more\"]\n\n[[packages]]\nname = \"iniconfig\"\nversion = \"2.3.1\"\nindex = \"" + index +
			"\"\nwheels = [{name = \"iniconfig-2.3.1-py3-none-any.whl\", url = \"" + index + "/x\", hashes = {sha256 = \"" + iniconfigWheel + "\"}}]\n\n[[packages]]\nname = \"sniffio\"\nversion = \"1.3.1\"\nmarker = \"'more' in extras or 'more' in dependency_groups\"\nindex = \"" + index +
			"\"\nwheels = [{name = \"sniffio-1.3.1-py3-none-any.whl\", url = \"" + index + "/x\", hashes = {sha256 = \"" + sniffioWheel + "\"}}]\n"},
	}
}

func project(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return dir
}

const printAll = "from importlib.metadata import distributions as d; print(*sorted(x.name + '==' + x.version for x in d()))"

// The same project in every form is the same environment, and a second run of
// it starts nothing on the host.
func TestEveryFormOfAProjectIsBaked(t *testing.T) {
	s := newEnvs(t)
	path := os.Getenv("PATH")
	digests := map[string]bool{}
	for name, files := range projects(t) {
		dir := project(t, files)
		wanted := [][]string{{"--extra", "more"}, {"--group", "more"}}
		switch name {
		case "pdm.lock": // without its pyproject.toml, a lock of pdm does not tell groups from extras
			wanted = wanted[:1]
		case "Pipfile.lock": // has no extras
			wanted = wanted[1:]
		}
		if name != "pylock.toml" { // whole, that one is uv's own to install
			wanted = append(wanted, nil)
		}
		for _, select1 := range wanted {
			args := append(append([]string{"-r", dir}, select1...), "--", "python3", "-c", printAll)
			want := "iniconfig==2.3.1 sniffio==1.3.1\n"
			if select1 == nil {
				want = "iniconfig==2.3.1\n"
			}
			o := s.Run(args...)
			requireEnding(t, ending{0, "ok", "exit"}, o)
			assert.Equal(t, want, string(o.Stdout), "%s %v", name, select1)
			digests[o.Report.Env.Digest] = true

			t.Setenv("PATH", "/nonexistent")
			o = s.Run(args...)
			requireEnding(t, ending{0, "ok", "exit"}, o)
			assert.Equal(t, want, string(o.Stdout), "%s %v", name, select1)
			assert.Empty(t, string(o.Stderr), "no phase of a bake is told")
			t.Setenv("PATH", path)
		}
	}
	assert.Len(t, digests, 2, "with the extra and without it")
}

func TestTheLockBesideAProjectIsTakenUnlessItIsOlder(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	files := projects(t)["uv.lock"]
	dir := project(t, files)
	o := s.Run("-r", filepath.Join(dir, "pyproject.toml"), "--", "python3", "-c", printAll)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Contains(t, string(o.Stderr), "uv.lock")

	newer := strings.Replace(files["pyproject.toml"], "\"iniconfig==2.3.1\"", "\"iniconfig==2.3.1\", \"six==1.17.0\"", 1)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pyproject.toml"), []byte(newer), 0o600))
	o = s.Run("-r", filepath.Join(dir, "pyproject.toml"), "--", "python3", "-c", printAll)
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Contains(t, string(o.Stderr), "the uv.lock beside it is older, it lacks six")
	assert.Equal(t, "iniconfig==2.3.1 six==1.17.0\n", string(o.Stdout))

	o = s.Run("-r", dir, "--", "true") // the lock is meant: of two answers none is guessed
	requireEnding(t, ending{125, "setup-failed", "internal"}, o)
	assert.Contains(t, string(o.Stderr), "the lock is older than its pyproject.toml, which needs six")
	assert.Contains(t, string(o.Stderr), "hint: uv lock")
}

func TestBadProjectsAreRefused(t *testing.T) {
	need.Network(t)
	need.Python(t)
	s := harness.NewEmpty(t)
	all := projects(t)
	uv := all["uv.lock"]["uv.lock"]
	for _, c := range []struct{ name, text, says string }{
		{"uv.lock", uv[:len(uv)-20], "as uv.lock: line"},
		{"uv.lock", strings.Replace(uv, "iniconfig-2.3.1-py3-none-any.whl", "iniconfig-2.3.1-cp39-cp39-win_amd64.whl", 1), "iniconfig 2.3.1 has no wheel for this target"},
		{"uv.lock", strings.Replace(uv, iniconfigWheel, strings.Repeat("0", 64), 1), "hash mismatch for iniconfig"},
		{"uv.lock", strings.Replace(uv, "version = 1\n", "version = 9\n", 1), "version 9 of the format is not known"},
		{"uv.lock", strings.Replace(uv, "requires-python = \">=3.9\"", "requires-python = \">=3.99\"", 1), "needs Python >=3.99"},
		{"pyproject.toml", strings.Replace(all["pyproject.toml"]["pyproject.toml"], ">=3.9", ">=3.99", 1), "needs Python >=3.99"},
		{"pyproject.toml", "[project]\nname = \"p\"\nversion = \"1\"\ndynamic = [\"dependencies\"]\n[build-system]\nrequires = [\"setuptools\"]\nbuild-backend = \"setuptools.build_meta\"\n", "dependencies are dynamic"},
		{"Pipfile", "[packages]\na = \"*\"\n[dev-packages]\n", "looks like a Pipfile"},
	} {
		t.Run(c.says, func(t *testing.T) {
			o := s.Do("env", "build", "-q", "-r", filepath.Join(project(t, map[string]string{c.name: c.text}), c.name))
			assert.Equal(t, 1, o.Code, "%v", o)
			assert.Contains(t, string(o.Stderr), c.says)
		})
	}
	o := s.Do("env", "list", "--json")
	assert.Equal(t, "[]\n", string(o.Stdout))
	o = s.Do("env", "build", "-q", "-r", requirements(t, iniconfig231), "--extra", "x")
	assert.Equal(t, 1, o.Code)
	assert.Contains(t, string(o.Stderr), "has no extras and groups to choose from")
}

// A package of the project's own is built only where that is allowed, is
// installed as a copy, and is built anew when its files change.
func TestAFolderOfTheProjectIsBuiltWhereItIsAllowed(t *testing.T) {
	s := newEnvs(t)
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "pkg", "mine"), 0o755))
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	write("requirements.txt", "-e ./pkg\n")
	write("pkg/pyproject.toml", "[project]\nname = \"mine\"\nversion = \"1\"\ndescription = \"Mine\"\ndependencies = [\"iniconfig==2.3.1\"]\n[build-system]\nrequires = [\"flit_core==3.12.0\"]\nbuild-backend = \"flit_core.buildapi\"\n[tool.flit.module]\nname = \"mine\"\n")
	write("pkg/mine/__init__.py", "\"\"\"Mine.\"\"\"\nV = 1\n")
	run := func() string {
		o := s.Run("-r", dir, "--allow-build", "--", "python3", "-c", "import mine, iniconfig; print(mine.V, mine.__file__)")
		requireEnding(t, ending{0, "ok", "exit"}, o)
		where := strings.Fields(string(o.Stdout))
		require.Len(t, where, 2)
		assert.True(t, strings.HasPrefix(where[1], "/opt/env/lib/"), "a copy, not %q", where[1])
		return where[0]
	}
	o := s.Run("-r", dir, "--", "true")
	requireEnding(t, ending{125, "setup-failed", "internal"}, o)
	assert.Contains(t, string(o.Stderr), "requirements.txt:1: \"./pkg\" must be built, and building is off")
	assert.Contains(t, string(o.Stderr), "hint: --allow-build")

	assert.Equal(t, "1", run())

	// Its lock, beside it, is as good.
	lock := filepath.Join(dir, "lock.txt")
	l := s.Do("env", "lock", "-q", "-r", dir, "--allow-build", "-o", lock)
	require.Equal(t, 0, l.Code, "%v", l)
	o = s.Run("-r", lock, "--allow-build", "--", "python3", "-c", "import mine, iniconfig; print(mine.V)")
	requireEnding(t, ending{0, "ok", "exit"}, o)
	assert.Equal(t, "1\n", string(o.Stdout))
	o = s.Run("-r", lock, "--", "true")
	assert.Contains(t, string(o.Stderr), "\"pkg\" must be built, and building is off")

	write("pkg/mine/__init__.py", "\"\"\"Mine.\"\"\"\nV = 2\n")
	assert.Equal(t, "2", run())
	write("pkg/mine/__init__.py", "\"\"\"Mine.\"\"\"\nV = 1\n")
	assert.Equal(t, "1", run())

	require.NoError(t, os.Symlink("/etc", filepath.Join(dir, "link")))
	write("requirements.txt", "./link\n")
	o = s.Run("-r", dir, "--allow-build", "--", "true")
	requireEnding(t, ending{125, "setup-failed", "internal"}, o)
	assert.Contains(t, string(o.Stderr), "it lies outside of")
}
