package behaviour

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/harness"
	"github.com/sbxrun/sbxrun/test/need"
)

// tomlProject writes the files of a project and gives its sbxrun.toml.
func tomlProject(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
	return filepath.Join(dir, "sbxrun.toml")
}

const stagesRecipe = `
memory = "256m"
[env]
copy = [{from = "src", to = "/opt/app"}, {stage = "build", from = "/opt/out", to = "/opt/env/lib/x"}]
run = [
  "rm -r /opt/app/old && mkdir /opt/app/old && echo new > /opt/app/old/new && ln -s old/new /opt/app/l",
  "cat /opt/app/old/new; ! cat /opt/app/old/gone; rm /opt/app/passing; echo lost > /tmp/x; id -u > /opt/uid",
]
env = {GREETING = "hello"}
[env.stages.build]
run = ["mkdir -p /opt/out/bin && printf '#!/bin/sh\\necho built\\n' > /opt/out/bin/tool && chmod +x /opt/out/bin/tool"]
`

func stagesProject(t *testing.T) string {
	return tomlProject(t, map[string]string{
		"sbxrun.toml": stagesRecipe, "src/a.txt": "a", "src/old/gone": "g", "src/passing": "p", "src/b.log": "l", "src/d/keep.log": "k",
		".dockerignore": "**/*.log\n!src/d/keep.log\n",
	})
}

func TestARecipeInStages(t *testing.T) {
	harness.PerEngine(t, func(t *testing.T, s *harness.Sbx) {
		file := stagesProject(t)
		look := []string{"-f", file, "--project", "none", "--", "sh", "-c", "cd /opt; find app uid -type f | sort; /opt/env/lib/x/bin/tool; cat app/l uid; echo $GREETING; ls /tmp; echo x > app/a.txt"}
		o := s.Run(look...)
		require.Equal(t, 1+1, o.Code, "the last command finds it read-only for another user: %v", o)
		require.Equal(t, "app/a.txt\napp/d/keep.log\napp/old/new\nuid\nbuilt\nnew\n1000\nhello\n", string(o.Stdout))
		require.NotNil(t, o.Report.Env)
		// By files only, from then on.
		t.Setenv("PATH", "/nonexistent")
		again := s.Run(append([]string{"-q"}, look...)...)
		require.Equal(t, o.Stdout, again.Stdout)
		require.Equal(t, o.Report.Env, again.Report.Env)
		require.Zero(t, again.Report.PhasesMS["bake"])
	})
}

// Steps have no network, no rights and no place to write but their own.
func TestStepsOfARecipeAreHeld(t *testing.T) {
	s := harness.New(t)
	for name, c := range map[string]struct{ run, says string }{
		"the last line":   {"echo one; echo two >&2; exit 3", "exit code 3: two"},
		"no word":         {"exit 4", "exit code 4: it printed nothing"},
		"the host's /usr": {"touch /usr/bin/x", "Read-only file system"},
		"the base's /etc": {"touch /etc/x", "Permission denied"},
		"a network":       {"exec 3<>/dev/tcp/127.0.0.1/1 || cat < /sys/class/net/eth0/address", "exit code"},
		"a set-id bit":    {"cp /bin/true /opt/x; chmod u+s /opt/x", "Operation not permitted"},
		"a pipe":          {"mkfifo /opt/x", "neither file, directory nor link"},
	} {
		t.Run(name, func(t *testing.T) {
			file := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nrun = '''" + c.run + "'''\n"})
			o := s.Do("env", "build", "-q", "-r", file)
			require.Equal(t, 1, o.Code, o)
			require.Contains(t, string(o.Stderr), c.says)
			require.NotContains(t, strings.TrimSuffix(strings.SplitN(string(o.Stderr), "\nhint: ", 2)[0], "\n"), "\n", "one line")
			o = s.Run("-q", "-r", file, "--", "true")
			require.Equal(t, 125, o.Code, o)
			require.Equal(t, "bake", o.Report.Stage)
		})
	}
}

// Tables of variables are what they were.
func TestATableOfVariablesIsNoRecipe(t *testing.T) {
	s := harness.New(t)
	file := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nSOME = 'thing'\n"})
	o := s.Run("-f", file, "--", "sh", "-c", "echo $SOME")
	require.Equal(t, "thing\n", string(o.Stdout), o)
	require.Nil(t, o.Report.Env)
	file = tomlProject(t, map[string]string{"sbxrun.toml": "requirements = 'x'\n[env]\nrun = 'true'\n"})
	o = s.Run("-f", file, "--", "true")
	require.Equal(t, 125, o.Code)
	require.Contains(t, string(o.Stderr), `sbxrun.toml:1: key "requirements"`)
}

// list gives what env list --json says.
func list(t *testing.T, s *harness.Sbx) (out []struct {
	Digest, Kind string
	Names, Below []string
},
) {
	t.Helper()
	o := s.Do("env", "list", "--json")
	require.Equal(t, 0, o.Code, o)
	require.NoError(t, json.Unmarshal(o.Stdout, &out))
	return out
}

// kill -9 in the middle of a stage: nothing is published, and the next bake takes
// up what was done before.
func TestARecipeThatIsKilledIsTakenUp(t *testing.T) {
	s := harness.NewEmpty(t)
	file := tomlProject(t, map[string]string{
		"sbxrun.toml": "[env]\ncopy = [{from = 'wait', to = '/opt/wait'}]\nrun = ['echo 1 > /opt/first', 'echo 2 > /opt/second; sleep $(cat /opt/wait)']\n", "wait": "100",
	})
	cmd := s.Cmd("env", "build", "--name", "n", "-r", file)
	require.NoError(t, cmd.Start())
	steps := filepath.Join(s.Root, "envs/steps")
	require.Eventually(t, func() bool { ents, _ := os.ReadDir(steps); return len(ents) == 2 }, time.Minute, 10*time.Millisecond, "the copy and the first run")
	time.Sleep(50 * time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	require.Equal(t, unix.SIGKILL, s.Wait(cmd).Signal)
	require.Empty(t, list(t, s))

	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(file), "wait"), []byte("0"), 0o644))
	o := s.Do("env", "build", "--name", "n", "-r", file)
	require.Equal(t, 0, o.Code, o)
	require.Len(t, list(t, s), 1)
	o = s.Run("-q", "--with", "n", "--", "cat", "/opt/first", "/opt/second")
	require.Equal(t, "1\n2\n", string(o.Stdout), o)
	require.Equal(t, 0, s.Do("gc").Code)
	left, err := filepath.Glob(filepath.Join(s.Root, "tmp/*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestTwoBakesOfARecipeAreOne(t *testing.T) {
	s := harness.NewEmpty(t)
	file := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nrun = ['head -c 16 /dev/urandom > /opt/random', 'sleep 0.2; cp /opt/random /opt/copy']\n"})
	var group sync.WaitGroup
	said := make([]string, 3)
	for i := range said {
		group.Add(1)
		go func() {
			defer group.Done()
			o := s.Do("env", "build", "-q", "-r", file)
			said[i] = string(o.Stdout) + string(o.Stderr)
		}()
	}
	group.Wait()
	require.Contains(t, said[0], "sha256:")
	require.Equal(t, said[0], said[1])
	require.Equal(t, said[0], said[2])
	require.Len(t, list(t, s), 1)
	require.Equal(t, 0, s.Do("env", "verify").Code)
}

// A child's packages are a layer upon the parent's: pins stay where they may.
func TestAnEnvironmentIsExtended(t *testing.T) {
	newEnvs(t)
	s := harness.NewEmpty(t)
	parent := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nrequirements = ['iniconfig==2.1.0', 'six==1.16.0']\nenv = {FROM = 'parent'}\n"})
	o := s.Do("env", "build", "-q", "--name", "parent", "-r", parent)
	require.Equal(t, 0, o.Code, o)
	child := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'parent'\nrequirements = ['iniconfig']\nrun = 'rm /opt/env/lib/python3*/site-packages/six.py'\n"})
	const versions = "import importlib.metadata as m, importlib.util as u, os; print(m.version('iniconfig'), m.version('six'), u.find_spec('six'), os.environ['FROM'])"
	o = s.Run("-q", "-r", child, "--", "python", "-c", versions)
	require.Equal(t, "2.1.0 1.16.0 None parent\n", string(o.Stdout), "what the parent pins stays, what is removed is gone: %v", o)
	other := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'parent'\nrequirements = ['iniconfig==2.3.1']\n"})
	o = s.Run("-q", "-r", other, "--", "python", "-c", "import iniconfig; "+versions)
	require.Contains(t, string(o.Stdout), "2.3.1 1.16.0 ModuleSpec", o)
	o = s.Run("-q", "--with", "parent", "--", "python", "-c", versions)
	require.Contains(t, string(o.Stdout), "2.1.0 1.16.0 ModuleSpec", "the parent is as it was: %v", o)
	o = s.Do("env", "verify")
	require.Equal(t, 0, o.Code, o)
	require.NotContains(t, string(o.Stdout), "problem")

	o = s.Do("env", "rm", "parent")
	require.Equal(t, 1, o.Code, o)
	require.Contains(t, string(o.Stderr), "extends it")
	o = s.Do("env", "prune", "--all")
	require.Equal(t, 0, o.Code, o)
	require.Empty(t, list(t, s))
}

// Upon a conda environment there are copies and runs, but no packages of pip's.
func TestACondaEnvironmentIsExtended(t *testing.T) {
	s, channel := newConda(t)
	o := s.Do("env", "build", "-q", "--name", "conda-parent", "-r", environment(t, channel, "sounds", "greet", "python"))
	require.Equal(t, 0, o.Code, o)
	t.Cleanup(func() { s.Do("env", "rm", "conda-parent") })
	child := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'conda-parent'\nrun = 'greet > /opt/said; rm /opt/env/bin/greet'\nenv = {A = 'b'}\n"})
	o = s.Run("-q", "-r", child, "--", "sh", "-c", "cat /opt/said; echo $A $SOUNDS_HOME; ls /opt/env/bin/greet; ls /opt/env/conda-meta | grep -c sounds")
	require.Equal(t, "hello\nb /opt/env/share/sounds\n1\n", string(o.Stdout), o)
	o = s.Run("-q", "--with", "conda-parent", "--", "greet")
	require.Equal(t, "hello\n", string(o.Stdout), o)
	o = s.Do("env", "build", "-q", "-r", tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'conda-parent'\nrequirements = ['iniconfig']\n"}))
	require.Equal(t, 1, o.Code, o)
	require.Contains(t, string(o.Stderr), `sbxrun.toml:3: extends an environment with a lock of kind "conda"`)
}

// debianBase makes a small base with a package database out of what this
// machine's own packages installed.
func debianBase(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for _, d := range []string{"usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "etc", "var/lib/dpkg"} {
		require.NoError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, l := range []string{"bin", "sbin", "lib", "lib64"} {
		require.NoError(t, os.Symlink("usr/"+l, filepath.Join(dir, l)))
	}
	const script = `set -e
for p in libc6 libgcc-s1 gcc-12-base libcrypt1; do dpkg-query -s $p; echo; done >"$1/var/lib/dpkg/status"
cp /etc/os-release "$1/etc/os-release"
for p in libc6 libgcc-s1 dash; do dpkg -L $p; done | grep -v /share/ | while read -r f; do
	[ -d "$f" ] && continue # also the links /lib and /bin
	case $f in /usr/*) ;; *) f=/usr$f ;; esac
	[ ! -e "$f" ] || echo "${f#/}"
done | tar -C / -c --no-recursion -T - | tar -C "$1" -x`
	out, err := exec.Command("sh", "-c", script, "sh", dir).CombinedOutput()
	require.NoError(t, err, string(out))
	return dir
}

func TestSystemPackagesAreALayer(t *testing.T) {
	need.Network(t)
	for _, p := range []string{"apt-get", "dpkg-query"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skip("needs a machine of Debian's kind: no " + p)
		}
	}
	if b, err := os.ReadFile("/etc/os-release"); err != nil || !strings.Contains(string(b), "VERSION_ID=\"12\"") {
		t.Skip("the packages of the base are those of Debian 12")
	}
	s := harness.NewEmpty(t)
	o := s.Do("base", "add", "-q", "small", debianBase(t))
	require.Equal(t, 0, o.Code, o)
	file := tomlProject(t, map[string]string{"sbxrun.toml": "[env]\nbase = 'small'\napt = ['libjq1', 'jq']\nrun = ['jq -n 6*7 > /usr/local/answer']\n"})
	o = s.Run("-q", "-f", file, "--", "/bin/sh", "-c", "jq -n 1+1; read a < /usr/local/answer; echo $a; [ -L /lib ] && echo link")
	if strings.Contains(string(o.Stderr), "Failed to fetch") || strings.Contains(string(o.Stderr), "Temporary failure") {
		t.Skip("needs Debian's archive: " + string(o.Stderr))
	}
	require.Equal(t, "2\n42\nlink\n", string(o.Stdout), o)
	o = s.Do("env", "inspect", list(t, s)[0].Digest)
	require.Equal(t, 0, o.Code, o)
	var env struct {
		System []struct{ Name, Version, SHA256 string } `json:"system_packages"`
		Below  []string
	}
	require.NoError(t, json.Unmarshal(o.Stdout, &env))
	var names []string
	for _, p := range env.System {
		names = append(names, p.Name)
		require.Len(t, p.SHA256, 64)
		require.NotEmpty(t, p.Version)
	}
	require.Equal(t, []string{"jq", "libjq1", "libonig5"}, names)
	require.Len(t, env.Below, 1)

	for text, c := range map[string][2]string{
		"base = 'small'\napt = 'no-such-package-anywhere'": {"Unable to locate package no-such-package-anywhere", "in the base's distribution"},
		"apt = 'jq'": {"sbxrun.toml:2: apt: the host's own /usr", "base add"},
	} {
		o = s.Do("env", "build", "-q", "-r", tomlProject(t, map[string]string{"sbxrun.toml": "[env]\n" + text + "\n"}))
		require.Equal(t, 1, o.Code, o)
		require.Contains(t, string(o.Stderr), c[0])
		require.Contains(t, string(o.Stderr), c[1])
	}
}

// An interpreter of pyenv's is copied, works at another path, carries
// environments, and is missed with one clear line where it is gone.
func TestAnInterpreterOfOnesOwn(t *testing.T) {
	newEnvs(t)
	home, _ := os.UserHomeDir()
	found, _ := filepath.Glob(filepath.Join(home, ".pyenv/versions/3.12.*/bin/python3.12"))
	if len(found) == 0 {
		t.Skip("needs a Python 3.12 of pyenv's")
	}
	prefix := filepath.Dir(filepath.Dir(found[0]))
	version := filepath.Base(prefix)
	s := harness.NewEmpty(t)
	file := requirements(t, iniconfig231)
	o := s.Run("-q", "-r", file, "--python", "3.12", "--", "true")
	require.Equal(t, 125, o.Code, o)
	require.Contains(t, string(o.Stderr), "env python add DIR")

	o = s.Do("env", "python", "add", "-q", prefix)
	require.Equal(t, 0, o.Code, o)
	require.Contains(t, string(s.Do("env", "python", "list").Stdout), "/opt/python/"+version+"/bin/python3.12")
	o = s.Run("-q", "-r", file, "--python", "3.12", "--", "python", "-c", "import sys, ssl, sqlite3, iniconfig; print(sys.base_prefix, sys.prefix)")
	require.Equal(t, "/opt/python/"+version+" /opt/env\n", string(o.Stdout), o)
	o = s.Do("env", "build", "-q", "--name", "n", "-r", tomlProject(t, map[string]string{"sbxrun.toml": "[env]\npython = '" + version + "'\nrequirements = ['iniconfig==2.3.1']\nrun = 'python -V > /opt/version'\n"}))
	require.Equal(t, 0, o.Code, o)
	o = s.Do("env", "python", "rm", version)
	require.Equal(t, 0, o.Code, o)
	o = s.Run("--with", "n", "--", "sh", "-c", "cat /opt/version; python -c 'import sys, iniconfig; print(sys.version.split()[0])'")
	require.Equal(t, "Python "+version+"\n"+version+"\n", string(o.Stdout), "environments keep it: %v", o)

	// The host's is gone: told before the run, not as 127.
	o = s.Do("env", "build", "-q", "--name", "host", "-r", file)
	require.Equal(t, 0, o.Code, o)
	spoilPython(t, s, "host")
	o = s.Run("-q", "--with", "host", "--", "python", "-V")
	require.Equal(t, 125, o.Code, o)
	require.Contains(t, string(o.Stderr), "its interpreter /usr/bin/python3.99 is gone from base \"host\"")

	for what, says := range map[string]string{"/nonexistent": "not a folder", t.TempDir(): "not the prefix of a CPython"} {
		o = s.Do("env", "python", "add", "-q", what)
		assert.Equal(t, 1, o.Code, o)
		assert.Contains(t, string(o.Stderr), says)
	}
}

// spoilPython makes an environment's record name an interpreter that is not there.
func spoilPython(t *testing.T, s *harness.Sbx, name string) {
	t.Helper()
	key, err := os.ReadFile(filepath.Join(s.Root, "envs/names", name))
	require.NoError(t, err)
	p := filepath.Join(s.Root, "envs", strings.TrimSpace(string(key))+".json")
	b, err := os.ReadFile(p)
	require.NoError(t, err)
	var rec map[string]any
	require.NoError(t, json.Unmarshal(b, &rec))
	rec["python"] = "/usr/bin/python3.99"
	b, err = json.Marshal(rec)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(p, b, 0o600))
}
