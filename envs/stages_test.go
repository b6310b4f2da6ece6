package envs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// shell is a Runner that does what a run step says in words: "write PATH TEXT",
// "remove PATH", "fail TEXT". What it writes goes where an overlay's upper would
// have it.
type shell struct {
	script
	commands []string
	m        *Manager
}

func (s *shell) Run(ctx context.Context, j Job) (JobResult, error) {
	if len(j.Trees) == 0 || j.Argv[0] != "/bin/sh" {
		return s.script.Run(ctx, j)
	}
	cmd := j.Argv[2]
	s.commands = append(s.commands, cmd)
	f := strings.Fields(cmd)
	p := func() string {
		for _, t := range j.Trees {
			if rel, ok := strings.CutPrefix(f[1], t.Target+"/"); ok {
				return filepath.Join(t.Dir, "upper", rel)
			}
		}
		return "/proc/none/" + f[1]
	}
	switch f[0] {
	case "write":
		if err := os.MkdirAll(filepath.Dir(p()), 0o755); err != nil {
			return JobResult{}, err
		}
		return JobResult{Reason: "exit"}, os.WriteFile(p(), []byte(f[2]), 0o644)
	case "prune":
		if _, err := s.m.sweep(ctx, PruneOptions{}); err != nil {
			return JobResult{}, err
		}
		return JobResult{Reason: "exit"}, s.m.pruneSteps()
	case "fail":
		fmt.Fprintf(j.Stderr, "first\n%s\n", f[1])
		return JobResult{ExitCode: 3, Reason: "exit", Denied: []string{"x.test:443"}}, nil
	}
	return JobResult{}, fmt.Errorf("unknown command %q", cmd)
}

func stageManager(t *testing.T) (*Manager, *shell, rootfs.Base) {
	s := &shell{}
	m, base := testManager(t, &s.script)
	m.runner, s.m = s, m
	return m, s, base
}

// recipe writes files of a project, "old" ones so that their times are believed.
func recipe(t *testing.T, files map[string]string) string {
	dir := t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(p), 0o755))
		require.NoError(t, os.WriteFile(p, []byte(text), 0o644))
	}
	return filepath.Join(dir, "sbxrun.toml")
}

func files(t *testing.T, m *Manager, e *Env) map[string]string {
	t.Helper()
	out := map[string]string{}
	var all []*rootfs.Manifest
	for _, l := range e.layers() {
		_, man, err := m.store.Layer(l)
		require.NoError(t, err)
		all = append(all, man)
	}
	for _, f := range rootfs.Stack(all...).Entries {
		if f.Type == 'f' {
			o, err := m.store.OpenObject(f.Digest, f.Mode&0o111 != 0)
			require.NoError(t, err)
			b := make([]byte, f.Size)
			_, err = o.Read(b)
			if f.Size > 0 {
				require.NoError(t, err)
			}
			require.NoError(t, o.Close())
			out[f.Path] = string(b)
		}
	}
	return out
}

func TestStagesBakeOnlyWhatComesAfterAChange(t *testing.T) {
	m, s, base := stageManager(t)
	file := recipe(t, map[string]string{
		"src/a": "one", "src/skip.log": "no", ".dockerignore": "**/*.log\n", "conf": "c",
		"sbxrun.toml": `
[env]
copy = [{from = "conf", to = "/opt/etc/"}, {from = "src", to = "/opt/app"}, {stage = "build", from = "/opt/out", to = "/opt/built"}]
run = ["write /opt/after 1"]
hooks = ["write /opt/before 1"]
env = {K = "V"}
[env.stages.build]
run = ["write /opt/out/x built"]
`,
	})
	ctx := context.Background()
	e, _, err := m.Ensure(ctx, Recipe{File: file, Base: base, Name: "one"})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"opt/app/a": "one", "opt/etc/conf": "c", "opt/built/x": "built", "opt/after": "1", "opt/before": "1"}, files(t, m, e))
	require.Equal(t, []string{"write /opt/before 1", "write /opt/out/x built", "write /opt/after 1"}, s.commands)
	require.Equal(t, []string{"K=V"}, e.Vars)
	require.Equal(t, KindFiles, e.Kind)
	require.Empty(t, e.Below, "its steps are one layer")
	require.True(t, e.Recipe.Staged)

	s.commands = nil
	again, err := m.Find(Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.Equal(t, e.Key, again.Key)
	require.Empty(t, s.commands)

	// The same content under new times is the same.
	require.NoError(t, os.Chtimes(filepath.Join(filepath.Dir(file), "src/a"), time.Now(), time.Now()))
	again, err = m.Find(Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.Equal(t, e.Key, again.Key)

	// A file that is left out changes nothing; one that is copied, what comes after.
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(file), "src/skip.log"), []byte("other"), 0o644))
	again, err = m.Find(Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.NotNil(t, again)
	require.NoError(t, os.WriteFile(filepath.Join(filepath.Dir(file), "src/a"), []byte("two"), 0o644))
	none, err := m.Find(Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.Nil(t, none)
	other, _, err := m.Ensure(ctx, Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.Equal(t, "two", files(t, m, other)["opt/app/a"])
	require.Equal(t, []string{"write /opt/after 1"}, s.commands, "neither the hook nor the stage")
}

// Extending puts a layer on top; the parent stays for as long as it is needed.
func TestAChildIsALayerUponItsParent(t *testing.T) {
	m, _, base := stageManager(t)
	ctx := context.Background()
	// By its name a base is found again: the parent's must be in the store.
	b, err := m.store.AddBase(ctx, "small", base.Lowers[0], func(string) {}, func(string) (string, []string, error) { return base.Lowers[0], nil, nil })
	require.NoError(t, err)
	parent, _, err := m.Ensure(ctx, Recipe{File: recipe(t, map[string]string{"sbxrun.toml": "[env]\nrun = ['write /opt/a 1', 'write /opt/b 1']\n"}), Base: b, Name: "parent"})
	require.NoError(t, err)
	child, _, err := m.Ensure(ctx, Recipe{
		File: recipe(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'parent'\nrun = 'write /opt/a 2'\n"}), Name: "child", Base: rootfs.Base{Name: "host"},
	})
	require.NoError(t, err)
	require.Equal(t, "small", child.Base)
	require.Equal(t, []string{parent.Digest}, child.Below)
	require.Equal(t, map[string]string{"opt/a": "2", "opt/b": "1"}, files(t, m, child))
	_, own, err := m.store.Layer(child.Digest)
	require.NoError(t, err)
	require.Len(t, own.Entries, 2, "/opt and the one file")

	requireHint(t, m.Remove("parent"), `"child" extends it`, "env rm child")
	require.NoError(t, m.Remove("child"))
	require.NoError(t, m.Remove("parent"))
	_, _, err = m.Ensure(ctx, Recipe{File: recipe(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'parent'\nrun = 'write /opt/a 2'\n"}), Base: base})
	requireHint(t, err, `sbxrun.toml:2: extends "parent"`, "--name parent")
}

func TestStepsThatFailSayWhere(t *testing.T) {
	m, _, base := stageManager(t)
	outside := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(outside, []byte("s"), 0o600))
	for name, c := range map[string]struct{ text, says, hint string }{
		"a run":           {"run = ['write /opt/a 1', 'fail because']", `sbxrun.toml:2: run "fail because": exit code 3: because`, "x.test:443"},
		"no such file":    {"copy = [{from = 'gone', to = '/opt/x'}]", `copy "gone": no such file`, ""},
		"a link out":      {"copy = [{from = 'out', to = '/opt/x'}]", "lies outside of", "recipe's folder"},
		"through a link":  {"copy = [{from = 'outdir/secret', to = '/opt/x'}]", "lies outside of", ""},
		"no such in":      {"copy = [{stage = 's', from = '/opt/none', to = '/opt/x'}]\n[env.stages.s]\nrun = 'write /opt/a 1'", `stage "s" has no "/opt/none"`, ""},
		"into a file":     {"copy = [{from = 'f', to = '/opt/x'}, {from = 'f', to = '/opt/x/y'}]", "/opt/x is no folder", ""},
		"a pipe":          {"copy = [{from = 'dir', to = '/opt/x'}]", "neither file, directory nor link", ".dockerignore"},
		"nothing":         {"python = '3.11'", "puts nothing into the environment", ""},
		"no such base":    {"base = 'nowhere'\nrun = 'write /opt/a 1'", "nowhere", "base list"},
		"no requirements": {"requirements = 'gone.txt'", "gone.txt", ""},
		"bad requirement": {"requirements = ['a b c']", "sbxrun.toml:2: requirements:1: not a requirement", ""},
		"apt on no dpkg":  {"apt = 'x'", "no /var/lib/dpkg/status", ""},
	} {
		t.Run(name, func(t *testing.T) {
			file := recipe(t, map[string]string{"sbxrun.toml": "[env]\n" + c.text + "\n", "f": "1", "dir/f": "1"})
			dir := filepath.Dir(file)
			require.NoError(t, os.Symlink(outside, filepath.Join(dir, "out")))
			require.NoError(t, os.Symlink(filepath.Dir(outside), filepath.Join(dir, "outdir")))
			if name == "a pipe" {
				mkfifo(t, filepath.Join(dir, "dir/pipe"))
			}
			r := Recipe{File: file, Base: base}
			if name == "no such base" {
				r.Base.Name = "host"
			}
			_, _, err := m.Ensure(context.Background(), r)
			require.ErrorContains(t, err, c.says)
			if c.hint != "" {
				requireHint(t, err, c.says, c.hint)
			}
			all, err := m.List()
			require.NoError(t, err)
			require.Empty(t, all, "nothing is published")
		})
	}
	left, err := filepath.Glob(m.store.Path("tmp", "*"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestLocksAreUnited(t *testing.T) {
	old := "--index-url https://a.test/simple\nA==1 \\\n    --hash=sha256:aa \\\n    --hash=sha256:ab\nb==1 --hash=sha256:bb # why\n"
	require.Equal(t, "--index-url https://a.test/simple\na==2 --hash=sha256:cc\nb==1 --hash=sha256:bb\nc==1 ; python_version > '3' --hash=sha256:dd\n",
		string(uniteLocks([]byte(old), []byte("a==2 --hash=sha256:cc\n--index-url https://a.test/simple\nc==1 ; python_version > '3' --hash=sha256:dd"))))
}

func TestPackagesGoThroughTheLinksOfTheBase(t *testing.T) {
	man := &rootfs.Manifest{Entries: []rootfs.Entry{
		{Path: "lib", Type: 'd'}, {Path: "lib/x", Type: 'd'}, {Path: "lib/x/f", Type: 'f'}, {Path: "usr", Type: 'd'}, {Path: "usr/lib", Type: 'd'}, {Path: "usr/lib/x", Type: 'd'}, {Path: "usr/lib/x/g", Type: 'f'},
	}}
	throughLinks(man, func(dir string) string {
		if rest, ok := strings.CutPrefix(dir, "lib"); ok {
			return "usr/lib" + rest
		}
		return dir
	})
	var got []string
	for _, e := range withParents(man).Entries {
		got = append(got, e.Path)
	}
	require.Equal(t, []string{"usr", "usr/lib", "usr/lib/x", "usr/lib/x/f", "usr/lib/x/g"}, got)
}

func TestDpkgsListHasOneEntryAPackage(t *testing.T) {
	status := []byte("Package: a\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\n\nPackage: b\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n")
	got := string(withPackage(status, "a", "amd64", []byte("Package: a\nVersion: 2\nArchitecture: amd64\n")))
	require.Equal(t, "Package: b\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n\nPackage: a\nStatus: install ok unpacked\nVersion: 2\nArchitecture: amd64\n", got)
}

func mkfifo(t *testing.T, p string) {
	t.Helper()
	require.NoError(t, unix.Mkfifo(p, 0o600))
}

// A prune beside a bake takes none of its steps; later ones forget them.
func TestAPruneLeavesTheStepsOfABake(t *testing.T) {
	m, s, base := stageManager(t)
	file := recipe(t, map[string]string{"sbxrun.toml": "[env]\nrun = ['write /opt/a 1', 'prune', 'write /opt/b 1']\n"})
	e, _, err := m.Ensure(context.Background(), Recipe{File: file, Base: base, Name: "n"})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"opt/a": "1", "opt/b": "1"}, files(t, m, e))
	_, err = m.Prune(context.Background(), PruneOptions{})
	require.NoError(t, err)
	require.Equal(t, map[string]string{"opt/a": "1", "opt/b": "1"}, files(t, m, e), "what has a name stays")
	ents, err := os.ReadDir(m.store.Path("envs", "steps"))
	require.NoError(t, err)
	require.Len(t, ents, 1, "the layer of all steps")
	s.commands = nil
	again, _, err := m.Ensure(context.Background(), Recipe{File: file, Base: base})
	require.NoError(t, err)
	require.Equal(t, e.Digest, again.Digest)
	require.Len(t, s.commands, 3, "baked anew, to the same")
}

// A base whose folder is a link must not lead to the host's, whatever lies upon it.
func TestNoLinkOfALayerLeadsToTheHost(t *testing.T) {
	host, bad, top := t.TempDir(), t.TempDir(), t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(host, "python3"), []byte("host's"), 0o755))
	require.NoError(t, os.Symlink(host, filepath.Join(bad, "opt")))
	require.NoError(t, os.MkdirAll(filepath.Join(top, "opt/env"), 0o755))
	for _, lowers := range [][]string{{bad}, {top, bad}} {
		_, _, ok := resolveInBase(rootfs.Base{Lowers: lowers}, "/opt/python3")
		require.False(t, ok, lowers)
	}
	require.NoError(t, os.MkdirAll(filepath.Join(host, "opt"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(host, "opt/f"), nil, 0o644))
	_, at, ok := resolveInBase(rootfs.Base{Lowers: []string{top, host}}, "/opt/f")
	require.True(t, ok)
	require.Equal(t, filepath.Join(host, "opt/f"), at)
	if os.Geteuid() == 0 {
		require.NoError(t, unix.Mknod(filepath.Join(top, "opt/f"), unix.S_IFCHR, 0))
		_, _, ok = resolveInBase(rootfs.Base{Lowers: []string{top, host}}, "/opt/f")
		require.False(t, ok, "it was taken away")
	}
}

func TestAnExtendedInterpreterIsTheWantedOne(t *testing.T) {
	for want, ok := range map[string]bool{"": true, "3": true, "3.11": true, "3.11.2": true, "3.1": false, "3.12": false, "/usr/bin/python3.11": true, "/usr/bin/python3": false} {
		require.Equal(t, ok, isPython("/usr/bin/python3.11", want), want)
	}
}

// Upon an environment without packages comes one with some, as upon a base.
func TestPackagesUponWhatHasNone(t *testing.T) {
	m, _, base := stageManager(t)
	ctx := context.Background()
	b, err := m.store.AddBase(ctx, "small", base.Lowers[0], func(string) {}, func(string) (string, []string, error) { return base.Lowers[0], nil, nil })
	require.NoError(t, err)
	parent, _, err := m.Ensure(ctx, Recipe{File: recipe(t, map[string]string{"sbxrun.toml": "[env]\nrun = ['write /opt/a 1']\nenv = {P = '1'}\n"}), Base: b, Name: "parent"})
	require.NoError(t, err)
	file := recipe(t, map[string]string{"sbxrun.toml": "[env]\nextends = 'parent'\nrequirements = 'r.txt'\nenv = {C = '1'}\n", "r.txt": pin("iniconfig", "1.0")})
	child, _, err := m.Ensure(ctx, Recipe{File: file, Base: rootfs.Base{Name: "host"}})
	require.NoError(t, err)
	got := files(t, m, child)
	require.Equal(t, "1", got["opt/a"])
	require.Contains(t, got, "opt/env/lib/python3.11/site-packages/iniconfig.py")
	require.Equal(t, []string{"P=1", "VIRTUAL_ENV=/opt/env", "C=1"}, child.Vars)
	require.Equal(t, "venv", child.Kind)
	require.Equal(t, []Package{{"iniconfig", "1.0"}}, child.Packages)
	require.Equal(t, []string{parent.Digest}, child.Below)
	found, err := m.Find(Recipe{File: file, Base: rootfs.Base{Name: "host"}})
	require.NoError(t, err)
	require.Equal(t, child.Key, found.Key)
}
