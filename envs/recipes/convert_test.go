package recipes

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/hinted"
)

const publicIndex = "https://index.example/simple/"

func target(python, arch string) envs.Target {
	short := strings.Join(strings.Split(python, ".")[:2], ".")
	return envs.Target{
		SOABI: "cpython-" + strings.ReplaceAll(short, ".", "") + "-" + arch + "-linux-gnu", Glibc: "2.36",
		Vars: map[string]string{
			"python_version": short, "python_full_version": python, "os_name": "posix", "sys_platform": "linux",
			"platform_release": "6.18.0", "platform_system": "Linux", "platform_version": "#1 SMP", "platform_machine": arch,
			"platform_python_implementation": "CPython", "implementation_name": "cpython", "implementation_version": python,
		},
	}
}

var targets = map[string]envs.Target{
	"3.11 amd64": target("3.11.2", "x86_64"),
	"3.9 amd64":  target("3.9.25", "x86_64"),
	"3.10 arm64": target("3.10.1", "aarch64"),
	"3.14 arm64": target("3.14.0", "aarch64"),
}

func sample(t *testing.T, lock string) Input {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", lock))
	require.NoError(t, err)
	in := Input{Lock: b}
	if b, err := os.ReadFile(filepath.Join("testdata", filepath.Dir(lock), "pyproject.toml")); err == nil {
		in.Project = b
	}
	return in
}

// exported is what a tool's own exporter says of a target: name==version, and
// the beginnings of the hashes.
func exported(t *testing.T, name string, at envs.Target) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	require.NoError(t, err)
	out := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, "-") {
			continue
		}
		spec, hashes, _ := strings.Cut(strings.TrimSpace(line), " --hash=")
		spec, mark, _ := strings.Cut(spec, ";")
		if mark != "" {
			m, err := parseMarker(mark)
			require.NoError(t, err)
			if !m(&Environment{Vars: at.Vars}) {
				continue
			}
		}
		spec = regexp.MustCompile(`\[.*\]`).ReplaceAllString(strings.TrimSpace(spec), "")
		out[strings.ToLower(spec)] = strings.Split(hashes, " --hash=")
	}
	return out
}

func TestALockIsWhatItsOwnToolExports(t *testing.T) {
	for _, c := range []struct {
		kind   envs.Kind
		lock   string
		export string
		q      envs.Conversion
		only   string // the one target that the lock is for
	}{
		{envs.KindUV, "uv/uv.lock", "uv/dev.txt", envs.Conversion{Groups: []string{"dev"}}, ""},
		{envs.KindUV, "uv/uv.lock", "uv/web-dev.txt", envs.Conversion{Extras: []string{"Web"}, Groups: []string{"dev"}}, ""},
		{envs.KindUV, "uv/uv.lock", "uv/all.txt", envs.Conversion{AllExtras: true}, ""},
		{envs.KindUV, "uv/uv.lock", "uv/test.txt", envs.Conversion{Groups: []string{"test"}}, ""},
		{envs.KindUV, "uv/uv.lock", "uv/only-test.txt", envs.Conversion{OnlyGroups: []string{"test"}}, ""},
		{envs.KindPylock, "pylock/pylock.toml", "uv/all-dev.txt", envs.Conversion{}, ""},
		{envs.KindPoetry, "poetry2/poetry.lock", "poetry2/main.txt", envs.Conversion{}, ""},
		{envs.KindPoetry, "poetry2/poetry.lock", "poetry2/web-test.txt", envs.Conversion{Extras: []string{"web"}, Groups: []string{"test"}}, ""},
		{envs.KindPoetry, "poetry1/poetry.lock", "poetry1/main.txt", envs.Conversion{}, ""},
		{envs.KindPoetry, "poetry1/poetry.lock", "poetry1/web-test.txt", envs.Conversion{Extras: []string{"web"}, Groups: []string{"test"}}, ""},
		{envs.KindPDM, "pdm/pdm.lock", "pdm/main.txt", envs.Conversion{}, ""},
		{envs.KindPDM, "pdm/pdm.lock", "pdm/web.txt", envs.Conversion{Extras: []string{"web"}}, ""},
		{envs.KindPDM, "pdm-static/pdm.lock", "pdm-static/main.txt", envs.Conversion{}, "3.11 amd64"},
		{envs.KindPipfile, "pipenv/Pipfile.lock", "pipenv/main.txt", envs.Conversion{}, "3.11 amd64"},
		{envs.KindPipfile, "pipenv/Pipfile.lock", "pipenv/dev.txt", envs.Conversion{Groups: []string{"dev"}}, "3.11 amd64"},
	} {
		for name, at := range targets {
			if c.only != "" && c.only != name {
				continue
			}
			t.Run(c.export+" "+name, func(t *testing.T) {
				q := c.q
				q.Kind, q.Target, q.PublicIndex, q.AllowBuild = c.kind, at, publicIndex, true
				text, out, err := Convert(q, sample(t, c.lock))
				require.NoError(t, err)
				want := exported(t, c.export, at)
				got := map[string][]string{}
				for line := range strings.Lines(string(text)) {
					spec, hashes, ok := strings.Cut(strings.TrimSpace(line), " --hash=")
					require.True(t, ok, "%q", line)
					for h := range strings.SplitSeq(hashes, " --hash=") {
						got[spec] = append(got[spec], h[:len("sha256:")+8])
					}
				}
				assert.ElementsMatch(t, sortedKeys(want), sortedKeys(got))
				assert.Equal(t, len(got), out.Packages)
				for spec, hashes := range got {
					assert.Subset(t, want[spec], hashes, spec)
				}
			})
		}
	}
}

func convert(kind envs.Kind, lock string, change ...func(*envs.Conversion)) (string, *envs.Converted, error) {
	q := envs.Conversion{Kind: kind, Target: targets["3.11 amd64"], PublicIndex: publicIndex}
	for _, f := range change {
		f(&q)
	}
	text, out, err := Convert(q, Input{Lock: []byte(lock)})
	return string(text), out, err
}

func building(q *envs.Conversion) { q.AllowBuild = true }

const (
	sumA = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	sumB = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// uvOf is a uv.lock of a project that needs a package.
func uvOf(pkg string) string {
	return "version = 1\nrequires-python = \">=3.9\"\n[[package]]\nname = \"p\"\nversion = \"1\"\nsource = { virtual = \".\" }\n" +
		"dependencies = [{ name = \"a\" }]\n[[package]]\nname = \"a\"\nversion = \"1.0\"\n" + pkg
}

func wheel(file string) string {
	return "wheels = [{ url = \"https://files.example/" + file + "\", hash = \"" + sumA + "\" }]\n"
}

const public = "source = { registry = \"https://index.example/simple\" }\n"

func TestBadLocksAreRefusedByPackage(t *testing.T) {
	for name, c := range map[string]struct {
		kind       envs.Kind
		lock, says string
		hint       string
	}{
		"truncated":             {envs.KindUV, uvOf(public)[:150], "line", "cut off"},
		"truncated JSON":        {envs.KindPipfile, "{\"_meta\": {\n\"pipfile-spec\": 6", "line 2", "cut off"},
		"nested":                {envs.KindUV, "version = 1\na = " + strings.Repeat("[", 1<<20), "line 2: nested", ""},
		"nested JSON":           {envs.KindPipfile, strings.Repeat("[", 1<<20), "line 1: nested", ""},
		"later version of uv":   {envs.KindUV, "version = 2\nrequires-python = '>=3.9'\n", "version 2", "uv export"},
		"later version":         {envs.KindPoetry, "package = []\n[metadata]\nlock-version = '3.0'\n", "lock-version 3.0", "poetry export"},
		"old poetry":            {envs.KindPoetry, "[metadata]\ncontent-hash = 'x'\n[metadata.hashes]\na = ['b']\n", "too old", "poetry export"},
		"poetry 1, no project":  {envs.KindPoetry, "package = []\n[metadata]\nlock-version = '2.0'\npython-versions = '*'\n", "no pyproject.toml", "poetry export"},
		"later pylock":          {envs.KindPylock, "lock-version = '2.0'\npackages = []\n", "lock-version", ""},
		"later pdm":             {envs.KindPDM, "[metadata]\nlock_version = '5.0'\n", "lock_version", "pdm export"},
		"later pipfile":         {envs.KindPipfile, "{\"_meta\":{\"pipfile-spec\":7}}", "pipfile-spec 7", "pipenv requirements"},
		"without a hash":        {envs.KindUV, uvOf(public), "a 1.0: the lock holds no hash", "lock again"},
		"tampered hash":         {envs.KindUV, uvOf(public + strings.Replace(wheel("a-1.0-py3-none-any.whl"), sumA, "sha256:zz", 1)), "a 1.0: \"a-1.0-py3-none-any.whl\"", "lock again"},
		"weak hash":             {envs.KindPipfile, `{"_meta":{"pipfile-spec":6},"default":{"a":{"version":"==1","hashes":["md5:d41d8cd98f00b204e9800998ecf8427e"]}}}`, "a 1:", "lock again"},
		"another platform":      {envs.KindUV, uvOf(public + wheel("a-1.0-cp311-cp311-win_amd64.whl")), "a 1.0 has no wheel for this target (cp311-cp311-manylinux_2_36_x86_64), only for cp311-cp311-win_amd64", "--python"},
		"another architecture":  {envs.KindUV, uvOf(public + wheel("a-1.0-cp311-cp311-manylinux_2_17_aarch64.whl")), "only for cp311-cp311-manylinux_2_17_aarch64", ""},
		"later libc":            {envs.KindUV, uvOf(public + wheel("a-1.0-cp311-cp311-manylinux_2_40_x86_64.whl")), "only for cp311-cp311-manylinux_2_40_x86_64", ""},
		"source only":           {envs.KindUV, uvOf(public + "sdist = { url = \"https://files.example/a-1.0.tar.gz\", hash = \"" + sumA + "\" }\n"), "a 1.0 has only a source distribution", "--allow-build"},
		"local index":           {envs.KindUV, uvOf("source = { registry = \"../wheels\" }\n" + wheel("a-1.0-py3-none-any.whl")), "its index is", "export"},
		"index with a line":     {envs.KindUV, uvOf("source = { registry = \"https://x\\n--trusted-host x\" }\n" + wheel("a-1.0-py3-none-any.whl")), "its index is", ""},
		"URL with a line":       {envs.KindUV, uvOf("source = { url = \"https://x/a.whl\\n-r /etc/passwd\" }\n" + wheel("a-1.0-py3-none-any.whl")), "not a URL", ""},
		"version with a line":   {envs.KindUV, strings.Replace(uvOf(public+wheel("a-1.0-py3-none-any.whl")), "\"1.0\"", "\"1.0\\n\"", 1), "is no version", ""},
		"name with a line":      {envs.KindPipfile, `{"_meta":{"pipfile-spec":6},"default":{"a\n-r x":{"version":"==1","hashes":["` + sumA + `"]}}}`, "not a name", ""},
		"dependency not there":  {envs.KindUV, strings.Replace(uvOf(public), "{ name = \"a\" }", "{ name = \"b\" }", 1), "p needs b", "lock again"},
		"marker":                {envs.KindUV, strings.Replace(uvOf(public), "{ name = \"a\" }", "{ name = \"a\", marker = \"os_name =\" }", 1), "dependency a: marker", ""},
		"python":                {envs.KindUV, strings.Replace(uvOf(public), ">=3.9", ">=3.12", 1), "needs Python >=3.12, and the interpreter is 3.11.2", "--python"},
		"two of one name":       {envs.KindPylock, "lock-version = '1.0'\n" + pylockOf("a", "1") + pylockOf("a", "2"), "a: both 1 and 2", "lock again"},
		"other environments":    {envs.KindPylock, "lock-version = '1.0'\nenvironments = [\"sys_platform == 'win32'\"]\n" + pylockOf("a", "1"), "other environments only", "this platform"},
		"package for another":   {envs.KindPylock, "lock-version = '1.0'\n" + pylockOf("a", "1") + "requires-python = '>=3.12'\n", "package a needs Python", "--python"},
		"unlocked in Pipfile":   {envs.KindPipfile, `{"_meta":{"pipfile-spec":6},"default":{"a":{"version":"*"}}}`, "a: \"*\" is no pin", "pipenv lock"},
		"secret in Pipfile":     {envs.KindPipfile, `{"_meta":{"pipfile-spec":6,"sources":[{"name":"x","url":"https://${TOKEN}@h/s"}]},"default":{"a":{"version":"==1","hashes":["` + sumA + `"]}}}`, "variables are not expanded", "netrc"},
		"pdm without hashes":    {envs.KindPDM, "[metadata]\nlock_version = '4.5.0'\nstrategy = ['no_hashes']\n", "no_hashes", "pdm lock"},
		"pdm for another":       {envs.KindPDM, "[metadata]\nlock_version = '4.5.0'\nstrategy = ['inherit_metadata']\n[[metadata.targets]]\nrequires_python = '>=3.9'\nplatform = 'windows_amd64'\n", "locked for >=3.9 windows_amd64", "pdm lock"},
		"directory outside":     {envs.KindUV, uvOf("source = { directory = \"../../etc\" }\n"), "not below the lock's folder", "outside"},
		"absolute directory":    {envs.KindUV, uvOf("source = { editable = \"/etc\" }\n"), "not below the lock's folder", ""},
		"wheel outside":         {envs.KindPylock, "lock-version = '1.0'\n[[packages]]\nname = 'a'\nversion = '1'\n[packages.archive]\npath = '../a-1-py3-none-any.whl'\nhashes = {sha256 = '" + sumA[7:] + "'}\n", "not below the lock's folder", ""},
		"git over ssh":          {envs.KindUV, uvOf("source = { git = \"ssh://git@h/x#" + strings.Repeat("a", 40) + "\" }\n"), "comes from", "over https"},
		"git without a commit":  {envs.KindUV, uvOf("source = { git = \"https://h/x?branch=main\" }\n"), "full commit hash", "lock again"},
		"git, building allowed": {envs.KindUV, uvOf("source = { git = \"https://h/x?subdirectory=..%2F..#" + strings.Repeat("a", 40) + "\" }\n"), "leaves its repository", ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := convert(c.kind, c.lock)
			require.ErrorContains(t, err, c.says)
			assert.Contains(t, hinted.Of(err), c.hint)
			assert.NotContains(t, err.Error(), "\n")
		})
	}
}

func pylockOf(name, ver string) string {
	return "[[packages]]\nname = '" + name + "'\nversion = '" + ver + "'\nindex = 'https://index.example/simple'\n" +
		"wheels = [{name = '" + name + "-" + ver + "-py3-none-any.whl', url = 'https://files.example/x.whl', hashes = {sha256 = '" + sumA[7:] + "'}}]\n"
}

func TestWhatIsNotFromTheIndex(t *testing.T) {
	one := func(t *testing.T, source string) (string, *envs.Converted) {
		text, out, err := convert(envs.KindUV, uvOf(source), building)
		require.NoError(t, err)
		return text, out
	}
	_, out := one(t, "source = { editable = \"libs/a\" }\n")
	assert.Equal(t, []envs.Source{{Name: "a", Path: "libs/a", Editable: true}}, out.Sources)
	commit := strings.Repeat("0a", 20)
	_, out = one(t, "source = { git = \"https://h/x.git?tag=v1&subdirectory=py%2Fa#"+commit+"\" }\n")
	assert.Equal(t, []envs.Source{{Name: "a", URL: "https://h/x.git", Rev: commit, Subdirectory: "py/a"}}, out.Sources)
	_, _, err := convert(envs.KindUV, uvOf("source = { git = \"https://h/x.git#"+commit+"\" }\n"))
	require.ErrorContains(t, err, "must be built")

	text, out := one(t, "source = { url = \"https://h/a-1.0-py3-none-any.whl\" }\n"+wheel("a-1.0-py3-none-any.whl"))
	assert.Empty(t, out.Sources)
	assert.Equal(t, "a @ https://h/a-1.0-py3-none-any.whl --hash="+sumA+"\n", text)

	// Another index than the public one, with credentials that stay out.
	text, out = one(t, "source = { registry = \"https://me:secret@other.example/simple/\" }\n"+wheel("a-1.0-py3-none-any.whl"))
	assert.Equal(t, "--index-url https://other.example/simple\na==1.0 --hash="+sumA+"\n", text)
	assert.Equal(t, []string{"https://files.example"}, out.Hosts)

	// A source distribution counts where it may be built, and beside a wheel that fits.
	text, _ = one(t, public+strings.Replace(wheel("a-1.0-py3-none-any.whl"), sumA, sumB, 1)+"sdist = { url = \"https://files.example/a-1.0.tar.gz\", hash = \""+sumA+"\" }\n")
	assert.Equal(t, "a==1.0 --hash="+sumA+" --hash="+sumB+"\n", text)

	// A pylock.toml without an index: the best file by its URL.
	text, _, err = convert(envs.KindPylock, "lock-version = '1.0'\n[[packages]]\nname = 'a'\nversion = '1'\nwheels = ["+
		"{url = 'https://h/a-1-py3-none-any.whl', hashes = {sha256 = '"+sumA[7:]+"'}},"+
		"{url = 'https://h/a-1-cp311-cp311-manylinux_2_17_x86_64.whl', hashes = {md5 = '0', sha256 = '"+sumB[7:]+"'}}]\n")
	require.NoError(t, err)
	assert.Equal(t, "a @ https://h/a-1-cp311-cp311-manylinux_2_17_x86_64.whl --hash="+sumB+"\n", text)
}

// Extras that exclude each other are told apart by uv's own names in markers.
func TestConflictingExtrasOfUV(t *testing.T) {
	lock := "version = 1\nrequires-python = \">=3.9\"\nconflicts = [[{ package = \"p\", extra = \"cpu\" }, { package = \"p\", extra = \"gpu\" }]]\n" +
		"[[package]]\nname = \"p\"\nversion = \"1\"\nsource = { editable = \".\" }\n[package.optional-dependencies]\n" +
		"cpu = [{ name = \"a\", version = \"1\" }]\ngpu = [{ name = \"a\", version = \"2\" }]\n" +
		"[[package]]\nname = \"a\"\nversion = \"1\"\n" + public + "dependencies = [{ name = \"b\", marker = \"extra == 'extra-1-p-cpu'\" }]\n" + wheel("a-1-py3-none-any.whl") +
		"[[package]]\nname = \"a\"\nversion = \"2\"\n" + public + "dependencies = [{ name = \"b\", marker = \"extra == 'extra-1-p-cpu'\" }]\n" + wheel("a-2-py3-none-any.whl") +
		"[[package]]\nname = \"b\"\nversion = \"1\"\n" + public + wheel("b-1-py3-none-any.whl")
	for extra, want := range map[string]string{"": "", "cpu": "a==1 --hash=" + sumA + "\nb==1 --hash=" + sumA + "\n", "gpu": "a==2 --hash=" + sumA + "\n"} {
		text, _, err := convert(envs.KindUV, lock, func(q *envs.Conversion) {
			if extra != "" {
				q.Extras = []string{extra}
			}
		})
		require.NoError(t, err)
		assert.Equal(t, want, text, extra)
	}
}

// poetry 1's locks name the files of all versions in one table.
func TestPoetryLocksOfTheOldForm(t *testing.T) {
	lock := "[[package]]\nname = \"A.b\"\nversion = \"1.0\"\ncategory = \"main\"\noptional = false\npython-versions = \"*\"\n" +
		"[package.dependencies]\nc = {version = \"^2.1\", markers = \"python_version >= '3.8'\"}\nd = {version = \"*\", optional = true, markers = \"extra == 'x'\"}\n[package.extras]\nx = [\"d (>=1)\"]\n" +
		"[[package]]\nname = \"c\"\nversion = \"2.2\"\npython-versions = \">=3.6\"\n[[package]]\nname = \"c\"\nversion = \"3.0\"\npython-versions = \">=3.6\"\n" +
		"[[package]]\nname = \"d\"\nversion = \"1\"\npython-versions = \"*\"\n[[package]]\nname = \"e\"\nversion = \"1\"\npython-versions = \"*\"\n" +
		"[metadata]\nlock-version = \"1.1\"\npython-versions = \"^3.7\"\n[metadata.files]\n" +
		"\"A.b\" = [{file = \"A.b-1.0-py3-none-any.whl\", hash = \"" + sumA + "\"}]\nc = [{file = \"c-2.2-py3-none-any.whl\", hash = \"" + sumA + "\"}, {file = \"c-3.0-py3-none-any.whl\", hash = \"" + sumB + "\"}]\n" +
		"d = [{file = \"d-1-py3-none-any.whl\", hash = \"" + sumA + "\"}]\ne = [{file = \"e-1-py3-none-any.whl\", hash = \"" + sumA + "\"}]\n"
	for extra, want := range map[string]string{"": "a-b==1.0 c==2.2", "[\"x\"]": "a-b==1.0 c==2.2 d==1"} {
		dep := "\"1.0\""
		if extra != "" {
			dep = "{version = \"1.0\", extras = " + extra + "}"
		}
		q := envs.Conversion{Kind: envs.KindPoetry, Target: targets["3.11 amd64"]}
		text, _, err := Convert(q, Input{Lock: []byte(lock), Project: []byte("[tool.poetry.dependencies]\npython = \"^3.7\"\n\"a.b\" = " + dep + "\n[tool.poetry.dev-dependencies]\ne = \"*\"\n")})
		require.NoError(t, err)
		var got []string
		for line := range strings.Lines(string(text)) {
			got = append(got, strings.Fields(line)[0])
		}
		assert.Equal(t, want, strings.Join(got, " "))
	}
}

func TestALockOlderThanItsProjectIsTold(t *testing.T) {
	in := sample(t, "uv/uv.lock")
	in.Project = []byte(strings.Replace(string(in.Project), "dependencies = [", "dependencies = [\n    \"sniffio\", \"winonly; sys_platform == 'win32'\",", 1))
	_, out, err := Convert(envs.Conversion{Kind: envs.KindUV, Target: targets["3.11 amd64"]}, in)
	require.NoError(t, err)
	assert.Equal(t, &envs.Converted{Stale: "sniffio", StaleHint: "uv lock"}, out)
}

func TestExtrasAndGroupsThatAreNotThereAreTold(t *testing.T) {
	for kind, lock := range map[envs.Kind]string{
		envs.KindUV: "uv/uv.lock", envs.KindPoetry: "poetry2/poetry.lock", envs.KindPDM: "pdm/pdm.lock", envs.KindPipfile: "pipenv/Pipfile.lock", envs.KindPylock: "pylock/pylock.toml",
	} {
		_, _, err := Convert(envs.Conversion{Kind: kind, Target: targets["3.11 amd64"], Extras: []string{"nope"}}, sample(t, lock))
		require.ErrorContains(t, err, `--extra "nope": the project has no such extra`, kind)
		_, _, err = Convert(envs.Conversion{Kind: kind, Target: targets["3.11 amd64"], Groups: []string{"nope"}}, sample(t, lock))
		require.ErrorContains(t, err, `--group "nope": the project has no such dependency group`, kind)
	}
}

func TestPoetrysConstraints(t *testing.T) {
	for _, c := range []struct {
		text    string
		yes, no string
	}{
		{"*", "1 0.1", ""},
		{"", "1", ""},
		{"^1.2", "1.2 1.9.9 1.2.0.1", "2 1.1 2.0a1"},
		{"^0.2.3", "0.2.3 0.2.9", "0.3 0.2.2"},
		{"^0.0.3", "0.0.3", "0.0.4"},
		{"^0", "0.9", "1"},
		{"~1.2.3", "1.2.3 1.2.9", "1.3"},
		{"~1", "1 1.9", "2"},
		{"~=1.2", "1.2 1.9", "2 1.1"},
		{"1.2.*", "1.2 1.2.7", "1.3"},
		{"1.2", "1.2 1.2.0", "1.2.1"},
		{">=1,<2", "1 1.9", "2 0.9"},
		{">= 1, < 2 || >=3", "1 3.1", "2.5"},
		{">=2.7,!=3.0.*,!=3.1.*", "3.2 2.7", "3.0.1 3.1"},
		{"=1.0", "1.0", "1.1"},
	} {
		match, err := parseConstraint(c.text)
		require.NoError(t, err, c.text)
		for _, v := range strings.Fields(c.yes) {
			assert.True(t, match(v), "%q takes %q", c.text, v)
		}
		for _, v := range strings.Fields(c.no) {
			assert.False(t, match(v), "%q takes %q", c.text, v)
		}
	}
	for _, bad := range []string{"^", "^x", "~", "<=>1", "1.2.x"} {
		_, err := parseConstraint(bad)
		assert.Error(t, err, bad)
	}
}

func TestWheelTags(t *testing.T) {
	for _, c := range []struct {
		target envs.Target
		yes    string
		no     string
	}{
		{
			targets["3.11 amd64"], "a-1-py3-none-any.whl a-1-py2.py3-none-any.whl a-1-cp311-cp311-manylinux1_x86_64.whl a-1-cp36-abi3-manylinux_2_5_x86_64.manylinux1_x86_64.whl " +
				"a-1-1build-cp311-none-linux_x86_64.whl a-1-cp311-abi3-manylinux2014_x86_64.whl a-1-py310-none-any.whl",
			"a-1-cp312-cp312-manylinux1_x86_64.whl a-1-cp310-cp310-manylinux1_x86_64.whl a-1-cp312-abi3-manylinux1_x86_64.whl a-1-cp311-cp311-musllinux_1_1_x86_64.whl a-1-py312-none-any.whl a.whl a-1-cp311-cp311t-linux_x86_64.whl",
		},
		{
			envs.Target{SOABI: "cpython-313t-aarch64-linux-gnu", Glibc: "2.36", Vars: target("3.13.0", "aarch64").Vars},
			"a-1-cp313-cp313t-manylinux2014_aarch64.whl a-1-py3-none-any.whl",
			"a-1-cp313-cp313-manylinux2014_aarch64.whl a-1-cp38-abi3-manylinux2014_aarch64.whl a-1-cp313-cp313t-manylinux2010_aarch64.whl",
		},
		{envs.Target{SOABI: "cpython-312-x86_64-linux-musl", Musl: "1.2", Vars: target("3.12.0", "x86_64").Vars}, "a-1-cp312-cp312-musllinux_1_1_x86_64.whl", "a-1-cp312-cp312-manylinux_2_17_x86_64.whl a-1-cp312-cp312-musllinux_1_3_x86_64.whl"},
		{
			envs.Target{SOABI: "pypy310-pp73", Glibc: "2.36", Vars: map[string]string{"implementation_name": "pypy", "python_version": "3.10", "platform_machine": "x86_64"}},
			"a-1-pp310-pypy310_pp73-manylinux_2_17_x86_64.whl a-1-py3-none-any.whl", "a-1-cp310-cp310-manylinux_2_17_x86_64.whl a-1-cp36-abi3-manylinux_2_17_x86_64.whl",
		},
	} {
		tags, err := targetTags(c.target)
		require.NoError(t, err)
		for _, f := range strings.Fields(c.yes) {
			_, ok := tags.rank(f)
			assert.True(t, ok, "%s takes %s", c.target.SOABI, f)
		}
		for _, f := range strings.Fields(c.no) {
			_, ok := tags.rank(f)
			assert.False(t, ok, "%s takes %s", c.target.SOABI, f)
		}
	}
	_, err := targetTags(envs.Target{})
	require.Error(t, err)
}

func FuzzConvert(f *testing.F) {
	kinds := []envs.Kind{envs.KindUV, envs.KindPoetry, envs.KindPDM, envs.KindPipfile, envs.KindPylock}
	f.Add(0, []byte(uvOf(public+wheel("a-1.0-py3-none-any.whl"))), []byte("[project]\ndependencies = ['a[x]>=1; os_name != \"nt\"']"))
	f.Add(1, []byte("[[package]]\nname='a'\nversion='1'\ngroups=['main']\nmarkers={main=\"os_name=='posix'\"}\nfiles=[{file='a-1-py3-none-any.whl',hash='"+sumA+"'}]\n[metadata]\nlock-version='2.1'\n"), []byte("[tool.poetry.dependencies]\na='^1'"))
	f.Add(2, []byte("[[package]]\nname='a'\nversion='1'\ngroups=['default']\nfiles=[{url='https://h/a-1-py3-none-any.whl',hash='"+sumA+"'}]\n[metadata]\nlock_version='4.5'\nstrategy=['inherit_metadata']"), []byte(nil))
	f.Add(3, []byte(`{"_meta":{"pipfile-spec":6},"default":{"a":{"version":"==1","hashes":["`+sumA+`"]}}}`), []byte(nil))
	f.Add(4, []byte("lock-version='1.0'\n"+pylockOf("a", "1")), []byte(nil))
	f.Fuzz(func(t *testing.T, kind int, lock, project []byte) {
		q := envs.Conversion{Kind: kinds[uint(kind)%uint(len(kinds))], Target: targets["3.11 amd64"], AllowBuild: true}
		text, out, err := Convert(q, Input{Lock: lock, Project: project})
		if err != nil || out.Stale != "" {
			return
		}
		// Whatever a lock says, it can only make lines of these forms.
		for line := range strings.Lines(string(text)) {
			if !regexp.MustCompile(`^(--(extra-)?index-url https?://[^\s"'$#;]+|[a-z0-9]([a-z0-9-]*[a-z0-9])?(==[^\s;$]+| @ https?://[^\s"'$#;]+)( --hash=sha(256|384|512):[0-9a-f]+)+)\n$`).MatchString(line) {
				t.Fatalf("%q", line)
			}
		}
		for _, s := range out.Sources {
			if s.Path != "" && !filepath.IsLocal(s.Path) {
				t.Fatalf("%q", s.Path)
			}
		}
	})
}

func BenchmarkTenThousandPackages(b *testing.B) {
	var l strings.Builder
	l.WriteString("version = 1\nrequires-python = \">=3.9\"\n[[package]]\nname = \"p\"\nversion = \"1\"\nsource = { virtual = \".\" }\ndependencies = [\n")
	for i := range 10000 {
		fmt.Fprintf(&l, "    { name = \"a%d\", marker = \"python_full_version < '3.14' or sys_platform == 'win32'\" },\n", i)
	}
	l.WriteString("]\n")
	for i := range 10000 {
		fmt.Fprintf(&l, "[[package]]\nname = \"a%d\"\nversion = \"1.0\"\n%sdependencies = [{ name = \"a%d\" }]\n", i, public, (i+1)%10000)
		fmt.Fprintf(&l, "wheels = [\n")
		for _, tag := range []string{"cp310-cp310-manylinux_2_17_x86_64", "cp311-cp311-manylinux_2_17_x86_64", "cp311-cp311-win_amd64", "cp312-cp312-manylinux_2_17_x86_64", "py3-none-any"} {
			fmt.Fprintf(&l, "    { url = \"https://files.example/a%d-1.0-%s.whl\", hash = \"%s\", size = 1 },\n", i, tag, sumA)
		}
		l.WriteString("]\n")
	}
	b.SetBytes(int64(l.Len()))
	for b.Loop() {
		if _, out, err := convert(envs.KindUV, l.String()); err != nil || out.Packages != 10000 {
			b.Fatal(out, err)
		}
	}
}
