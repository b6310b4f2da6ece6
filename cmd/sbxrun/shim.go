package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/runtime"
)

// A shim folder looks like a virtual environment. Each program in it is a script of
// one line, "#!/usr/local/bin/sbxrun shim-exec", which the kernel turns into
// "sbxrun shim-exec DIR/bin/python ARG…": a run, with the flags that the folder was
// made with, of the environment's program of that name. Inside, the environment lies
// at DIR too, and the project at its own path: paths mean the same on both sides.
//
// DIR may lie in the project, which the sandbox may write, and what lies in DIR is
// executed on the host. So inside DIR is always covered by a read-only mount, which
// no program in the sandbox can move: not even by its parent, which is the
// project's top folder (see checkShimDir).

const shimSettingsFile = "sbxrun.json"

// shimSettings is what a shim folder, or the folder of a kernel, remembers.
type shimSettings struct {
	Version int      `json:"version"`
	Flags   []string `json:"flags"`   // of run
	Cwd     string   `json:"cwd"`     // that their paths are relative to
	Project string   `json:"project"` // "" is none
	Root    string   `json:"root"`
	State   string   `json:"state"`
	Digest  string   `json:"digest"` // of the environment that the folder shows
}

// shimEnv are the variables of the caller's that a program in a shim gets: those that
// tools and their users speak to Python tools with. No credentials are among them.
var shimEnv = []string{
	"PYTHON*", "PYTEST_*", "PY_COLORS", "COVERAGE_*", "COV_*", "TOX_*", "NOX_*", "PYDEVD_*", "DEBUGPY_*", "PYCHARM_*", "VSCODE_PID", "IPY_*", "MPLBACKEND",
	"TERM", "COLORTERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR*", "COLUMNS", "LINES", "LANG", "LANGUAGE", "LC_*", "TZ", "CI", "SOURCE_DATE_EPOCH",
}

// notShimEnv are matched by those and mean paths of the host's or another Python.
var notShimEnv = []string{"PYTHONHOME", "PYTHONEXECUTABLE", "PYTHONUSERBASE", "PYTHON_KEYRING_BACKEND"}

func passesEnv(name string) bool {
	if slices.Contains(notShimEnv, name) {
		return false
	}
	return slices.ContainsFunc(shimEnv, func(p string) bool {
		prefix, many := strings.CutSuffix(p, "*")
		return name == p || many && strings.HasPrefix(name, prefix)
	})
}

type shimOptions struct {
	*runOptions
	remove bool
}

func envShimVerb() *verb {
	return &verb{
		name: "env shim", args: "[flags of run] DIR", passes: true,
		short: "make a folder that looks like a virtual environment and whose programs run in sandboxes",
		long: "Editors and tools use DIR as they use a venv. The project (--project DIR, default: the current\n" +
			"directory) is shown writable at its own path, the environment at DIR, nothing else of the host's\n" +
			"but what flags name, and files that are arguments: those are readable. Made again, it is renewed.",
		setup: func(c *command) {
			o := &shimOptions{runOptions: declareRun(c)}
			c.flags.BoolVar(&o.remove, "remove", "remove a folder that was made by this verb")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			if err := wantArgs(c, args, 1, 1); err != nil {
				return 0, err
			}
			dir, err := filepath.Abs(args[0])
			if err != nil {
				return 1, err
			}
			o := c.opts.(*shimOptions)
			if o.remove {
				return 0, removeShim(dir)
			}
			set, env, err := shimOf(c, o.runOptions, c.raw[:len(c.raw)-len(args)], dir)
			if err != nil {
				return 1, err
			}
			if err := checkShimDir(dir, set.Project, o.volumes); err != nil {
				return 1, err
			}
			if err := writeShim(dir, set, env); err != nil {
				return 1, err
			}
			c.ui.outf("%s\n", filepath.Join(dir, "bin/python"))
			return 0, nil
		},
	}
}

// shimOf bakes or finds the environment and gives the settings of a folder that
// runs programs over it.
func shimOf(c *command, o *runOptions, flags []string, dir string) (*shimSettings, *envs.Env, error) {
	if o.requirements == "" && o.with == "" && o.file == "" {
		return nil, nil, usage("-r FILE or --with NAME", "%s: no environment", c.verb.name)
	}
	cwd, err := os.Getwd()
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", c.verb.name, err)
	}
	set := &shimSettings{Version: 1, Flags: flags, Cwd: cwd, Root: c.dirs.Root, State: c.dirs.State}
	if err := o.load(c); err != nil {
		return nil, nil, err
	}
	switch {
	case o.project == "none":
	case o.project == "" && unsafeProject(cwd):
		return nil, nil, usage("--project DIR names it, --project none shows none", "%s: %q holds more than a project", c.verb.name, cwd)
	case o.project == "":
		set.Project = cwd
	default:
		if set.Project, err = o.projectOf(); err != nil {
			return nil, nil, err
		}
	}
	o.project = "none" // not at /work
	var env *envs.Env
	o.arrange = func(spec *runtime.Spec, e *envs.Env) error {
		env = e
		return nil
	}
	var sigs signals
	_, _, err = o.prepare(&sigs, c, nil, []string{"python"}, false)
	c.ui.Done()
	if err == nil && env == nil {
		err = usage("-r FILE or --with NAME", "%s: no environment", c.verb.name)
	}
	if err != nil {
		return nil, nil, err
	}
	set.Digest = env.Digest
	return set, env, nil
}

// checkShimDir refuses a folder that a sandbox could replace: what is in it runs
// on the host.
func checkShimDir(dir, project string, volumes []string) error {
	if strings.ContainsAny(dir, " \t\n") {
		return usage("the kernel splits a script's first line there", "env shim %q: white space in the path", dir)
	}
	under := func(top string) bool {
		rel, err := filepath.Rel(top, dir)
		return err == nil && filepath.IsLocal(rel)
	}
	if under(project) && project != "" && filepath.Dir(dir) != project {
		return usage("put it right into the project ("+filepath.Join(project, ".venv")+") or outside", "env shim %q: deep in the project, where what runs in the sandbox could replace it", dir)
	}
	for _, v := range volumes {
		if vol, err := parseVolume(v); err == nil && vol.Mode == "rw" && under(vol.Source) {
			return usage("put it elsewhere, or the volume :ro", "env shim %q: in the volume %s, where what runs in the sandbox could replace it", dir, v)
		}
	}
	return nil
}

// programs lists what an environment has in its bin, by name.
func programs(env *envs.Env) (names []string, python string) {
	for _, top := range append([]string{env.Path}, env.Lowers...) {
		ents, _ := os.ReadDir(filepath.Join(top, envs.EnvDir, "bin"))
		for _, e := range ents {
			name := e.Name()
			if strings.HasPrefix(strings.ToLower(name), "activate") || strings.HasPrefix(name, "deactivate") || strings.ContainsAny(name, "\n\r") || strings.HasPrefix(name, "-") {
				continue
			}
			if v, ok := strings.CutPrefix(name, "python3."); ok && strings.Trim(v, "0123456789") == "" {
				python = name
			}
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), python
}

// writeShim makes the folder, or renews one that is ours.
func writeShim(dir string, set *shimSettings, env *envs.Env) error {
	if ents, err := os.ReadDir(dir); err == nil && len(ents) > 0 {
		if err := oursAt(dir); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("env shim: %w", err)
	}
	line := "#!" + self + " shim-exec\n"
	if len(line) > 127 || strings.ContainsAny(self, " \t\n") { // old kernels cut it there
		return usage("install sbxrun at a shorter path: make install", "env shim: %q is too long for a script's first line", self)
	}
	names, python := programs(env)
	if python == "" {
		return usage("add python to its recipe", "env shim %q: the environment has no python", dir)
	}
	for _, d := range []string{"bin", filepath.Join("lib", python)} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return fmt.Errorf("env shim: %w", err)
		}
	}
	b, err := json.MarshalIndent(set, "", "  ")
	if err != nil {
		return fmt.Errorf("env shim: %w", err)
	}
	script := line + "# Made by sbxrun env shim: runs in a sandbox; see ../" + shimSettingsFile + "\n"
	cfg := fmt.Sprintf("home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n", strings.TrimPrefix(python, "python"))
	if own, err := os.ReadFile(filepath.Join(env.Path, envs.EnvDir, "pyvenv.cfg")); err == nil && len(own) < 1<<16 {
		cfg = string(own)
	}
	activate := strings.ReplaceAll(shimActivate, "@DIR@", dir)
	files := map[string]string{shimSettingsFile: string(b) + "\n", "pyvenv.cfg": cfg, "bin/activate": activate, ".gitignore": "*\n"}
	for _, n := range append([]string{"python", "python3", python}, names...) {
		files["bin/"+n] = script
	}
	ents, _ := os.ReadDir(filepath.Join(dir, "bin"))
	for _, e := range ents { // of an environment before
		if files["bin/"+e.Name()] == "" {
			if err := os.Remove(filepath.Join(dir, "bin", e.Name())); err != nil {
				return fmt.Errorf("env shim: %w", err)
			}
		}
	}
	for name, text := range files {
		mode := os.FileMode(0o644)
		if text == script {
			mode = 0o755
		}
		path := filepath.Join(dir, name)
		if old, err := os.ReadFile(path); err == nil && string(old) == text {
			continue
		}
		if err := replaceFile(path, text, mode); err != nil {
			return fmt.Errorf("env shim: %w", err)
		}
	}
	// For editors that read it; the store is root's, as sbxrun is.
	site := filepath.Join(dir, "lib", python, "site-packages")
	if err := os.Remove(site); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("env shim: %w", err)
	}
	if err := os.Symlink(filepath.Join(env.Path, envs.EnvDir, "lib", python, "site-packages"), site); err != nil {
		return fmt.Errorf("env shim: %w", err)
	}
	return nil
}

// shimActivate is bin/activate for POSIX shells.
const shimActivate = `# Made by sbxrun env shim. Use: . @DIR@/bin/activate
deactivate() {
	PATH="$_SBXRUN_OLD_PATH"; export PATH
	unset VIRTUAL_ENV _SBXRUN_OLD_PATH
	unset -f deactivate
}
_SBXRUN_OLD_PATH="$PATH"
VIRTUAL_ENV='@DIR@'; export VIRTUAL_ENV
PATH='@DIR@/bin':"$PATH"; export PATH
`

// oursAt says whether the folder was made by env shim or env kernel.
func oursAt(dir string) error {
	if _, err := readShim(dir); err != nil {
		return usage("give one that is not there yet", "%q: there is something else", dir)
	}
	return nil
}

func readShim(dir string) (*shimSettings, error) {
	b, err := os.ReadFile(filepath.Join(dir, shimSettingsFile))
	if err != nil {
		return nil, fmt.Errorf("read shim: %w", err)
	}
	var s shimSettings
	if err := json.Unmarshal(b, &s); err != nil || s.Version != 1 {
		return nil, usage("make it again: sbxrun env shim …", "read shim %q: damaged", dir)
	}
	return &s, nil
}

func removeShim(dir string) error {
	if err := oursAt(dir); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// shimExec is what a script of a shim folder runs: args are the script's path and
// its arguments.
func shimExec(u *ui, args []string) int {
	if len(args) == 0 {
		u.error(usage("sbxrun env shim makes folders whose scripts are run so", "shim-exec: no script"))
		return 125
	}
	script, err := filepath.Abs(args[0])
	if err == nil {
		if _, serr := os.Stat(filepath.Join(filepath.Dir(filepath.Dir(script)), shimSettingsFile)); serr != nil {
			script, err = filepath.EvalSymlinks(script) // a link to it from elsewhere
		}
	}
	if err != nil {
		u.error(fmt.Errorf("shim-exec: %w", err))
		return 125
	}
	dir := filepath.Dir(filepath.Dir(script))
	set, err := readShim(dir)
	if err != nil {
		u.error(err)
		return 125
	}
	return set.exec(u, dir, func(env *envs.Env, home string) []string {
		return append(programOf(env, home, filepath.Base(script)), args[1:]...)
	}, nil)
}

// programOf is the command line inside of a program of the environment. A script of
// Python's is given to the interpreter at home, so that sys.prefix and
// sys.executable are the shim's paths.
func programOf(env *envs.Env, home, name string) []string {
	path := filepath.Join(home, "bin", name)
	if home == envs.EnvDir {
		return []string{path}
	}
	f, err := os.Open(filepath.Join(env.Path, envs.EnvDir, "bin", name))
	if err != nil || strings.HasPrefix(name, "python") {
		return []string{path}
	}
	defer f.Close()
	head := make([]byte, 128)
	n, _ := f.Read(head)
	if bytes.HasPrefix(head[:n], []byte("#!"+envs.EnvDir+"/bin/python")) {
		return []string{filepath.Join(home, "bin/python"), path}
	}
	return []string{path}
}

// exec runs a command over the settings' environment. dir is the folder of the shim,
// "" for a kernel's. command is told where the environment lies inside.
func (set *shimSettings) exec(u *ui, dir string, command func(env *envs.Env, home string) []string, more func(*runOptions) error) int {
	cwd, err := os.Getwd()
	if err == nil {
		err = os.Chdir(set.Cwd) // the flags' paths are relative to it
	}
	if err != nil {
		u.error(usage("make it again: sbxrun env shim …", "use shim: %v", err))
		return 125
	}
	v := runVerb()
	c := newCommand(u, v)
	c.dirs.Root, c.dirs.State = set.Root, set.State
	o := c.opts.(*runOptions)
	if err := c.flags.Parse(set.Flags); err != nil {
		u.error(usage("make it again: sbxrun env shim …", "use shim: %v", err))
		return 125
	}
	if more != nil {
		if err := more(o); err != nil {
			u.error(err)
			return 125
		}
	}
	o.project = "none"
	u.quiet = true
	o.tty = o.tty || term.IsTerminal(0) && term.IsTerminal(1)
	o.interactive = true
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); passesEnv(name) {
			o.env = append(o.env, kv)
		}
	}
	o.arrange = func(spec *runtime.Spec, env *envs.Env) error {
		if env == nil {
			return usage("make it again: sbxrun env shim …", "use shim: no environment")
		}
		home := envs.EnvDir
		if dir != "" {
			if env.Digest != set.Digest { // its file changed, and it was baked anew
				set.Digest = env.Digest
				if err := writeShim(dir, set, env); err != nil {
					return err
				}
			}
			cover := runtime.Volume{Source: dir, Target: dir, Mode: "ro"}
			if env.Kind != "conda" && len(env.Lowers) == 0 { // a venv may lie anywhere
				cover.Source, home = filepath.Join(env.Path, envs.EnvDir), dir
				spec.Env = append(spec.Env, "VIRTUAL_ENV="+dir)
			}
			spec.Volumes = append(spec.Volumes, cover)
		}
		if spec.Workdir == "" {
			spec.Workdir = set.Project
		}
		shown := []string{dir}
		if set.Project != "" {
			spec.Volumes = append(spec.Volumes, runtime.Volume{Source: set.Project, Target: set.Project, Mode: "rw"})
			shown = append(shown, set.Project)
		}
		for _, v := range spec.Volumes {
			shown = append(shown, v.Target)
			if within(v.Target, cwd) {
				spec.Workdir = cwd
			}
		}
		spec.Argv = command(env, home)
		for _, a := range filesAmong(spec.Argv[1:], shown) {
			spec.Volumes = append(spec.Volumes, runtime.Volume{Source: a, Target: a, Mode: "ro"})
		}
		return nil
	}
	code, err := run(c, o, []string{"python"}) // arrange says which
	if err != nil {
		u.error(err)
	}
	return code
}

func within(top, path string) bool {
	rel, err := filepath.Rel(top, path)
	return top != "" && err == nil && (rel == "." || filepath.IsLocal(rel))
}

// filesAmong gives the arguments that are files of the host's beyond what is shown
// anyway: the caller named them, so they may be read. Editors ask an interpreter
// about itself with a script of their own.
func filesAmong(args, shown []string) (files []string) {
	for _, a := range args {
		if len(files) == 16 || !filepath.IsAbs(a) || filepath.Clean(a) != a || slices.Contains(files, a) || strings.HasPrefix(a, "/proc/") || strings.HasPrefix(a, "/dev/") {
			continue
		}
		if slices.ContainsFunc(shown, func(top string) bool { return within(top, a) }) || within("/usr", a) {
			continue
		}
		var st unix.Stat_t
		if unix.Lstat(a, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG {
			files = append(files, a)
		}
	}
	return files
}
