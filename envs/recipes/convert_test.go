package recipes

import (
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

var _ = hinted.Of
