package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime"
)

// A shim folder looks like a virtual environment. Each program in it is a script
// whose first line is "#!/usr/local/bin/sbxrun shim-exec": the kernel starts sbxrun
// with the script's path, and nothing is between the tool that asked and the
// supervisor. That is a run, with the flags that the folder was made with, of the
// environment's program of that name (shimexec.go). Inside, the environment lies at
// DIR too, and the project at its own path: paths mean the same on both sides.
//
// The project is writable inside, and what lies in DIR decides what the host does.
// So DIR is covered inside by the environment, and lies where no program can move
// it (checkShimDir); what a run depends on is in DIR and not in the project: which
// environment (by its key), the settings of -f, the lock.

const shimSettingsFile = "sbxrun.json"

// shimSettings is what a shim folder, or the folder of a kernel, remembers.
type shimSettings struct {
	Version int      `json:"version"`
	Env     string   `json:"env"`             // the environment's key
	Name    string   `json:"name,omitempty"`  // that it was asked for by
	Flags   []string `json:"flags,omitempty"` // of run
	Cwd     string   `json:"cwd"`             // that their paths are relative to
	File    string   `json:"file,omitempty"`  // in the folder: a copy of what -f named
	Lock    string   `json:"lock,omitempty"`  // in the folder: what the environment is baked from again
	Vars    []string `json:"vars,omitempty"`  // lines of --env-file
	Project string   `json:"project"`         // "" is none
	Root    string   `json:"root"`
	State   string   `json:"state"`
	Debug   bool     `json:"debug,omitempty"`  // debuggers get the ports that their command lines name
	Direct  []string `json:"direct,omitempty"` // programs that are no scripts of the environment's Python

	again string   // the command that makes it
	lock  *os.File // held while it is used
}

// Close lets go of the lock.
func (set *shimSettings) Close() error { return set.lock.Close() }

// shimFiles are files that a folder has beside what a venv has.
type shimFiles map[string][]byte

type shimOptions struct {
	*runOptions
	remove, copy, debug bool
}

// notInShims are flags of run that a shim decides, or that would be the same for
// all programs that run at a time.
var notInShims = []string{"tty", "interactive", "workdir", "json-status-fd", "name", "command", "report", "quiet", "preserve-fds"}

// ofShims are flags that settings have in other words.
var ofShims = []string{"requirements", "with", "project", "file", "env-file", "root", "state", "refresh", "remove", "copy", "debug", "data-dir", "display-name"}

// declareShim declares the flags of run as a shim has them.
func declareShim(c *command) *shimOptions {
	o := &shimOptions{runOptions: declareRun(c)}
	for _, n := range notInShims {
		if f := c.flags.Lookup(n); f != nil {
			f.hidden = true
		}
	}
	c.flags.Lookup("project").usage = "`directory` to show at its own path, writable; none is none (default: the current one)"
	c.flags.BoolVar(&o.debug, "debug", "give programs the host's ports that a debugger's command line names (debugpy, pydevd)")
	return o
}

func envShimVerb() *verb {
	return &verb{
		name: "env shim", args: "[flags of run] DIR", asRun: true,
		short: "make a folder that looks like a virtual environment and whose programs run in sandboxes",
		long: "Editors and tools use DIR as they use a venv. The project (--project DIR, default: the current\n" +
			"directory) is shown writable at its own path, the environment at DIR, nothing else of the host's\n" +
			"but what flags name. The environment and the settings of -f are kept as they are now: made\n" +
			"again, the folder is renewed. docs/ide.md tells more.",
		setup: func(c *command) {
			o := declareShim(c)
			c.flags.BoolVar(&o.remove, "remove", "remove a folder that was made by this verb")
			c.flags.BoolVar(&o.copy, "copy", "copy the packages' sources, for editors that are not root's")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*shimOptions)
			if err := wantArgs(c, args, 1, 1); err != nil {
				return 0, err
			}
			if err := needRoot(c); err != nil {
				return 0, err
			}
			dir, err := realParent(args[0])
			if err != nil {
				return 1, fmt.Errorf("env shim: %w", err)
			}
			if o.remove {
				return 0, removeShim(dir)
			}
			set, env, files, err := o.settings(c, dir, true)
			if err != nil {
				return 1, err
			}
			if err := writeShim(dir, set, env, files, o.copy); err != nil {
				return 1, err
			}
			c.ui.outf("%s\n", filepath.Join(dir, "bin/python"))
			return 0, nil
		},
	}
}

// realParent is the absolute path with the links of the folders above it followed,
// not its own.
func realParent(p string) (string, error) {
	p, err := filepath.Abs(p)
	if err != nil {
		return "", err
	}
	below := filepath.Base(p)
	for up := filepath.Dir(p); ; up = filepath.Dir(up) {
		real, err := filepath.EvalSymlinks(up)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || up == "/" {
			return filepath.Join(real, below), err
		}
		below = filepath.Join(filepath.Base(up), below)
	}
}

// settings bakes or finds the environment and gives the settings of a folder that
// runs programs over it; shown says that the folder itself is seen inside. A plan is
// made: what is wrong is told now.
func (o *shimOptions) settings(c *command, dir string, shown bool) (*shimSettings, *envs.Env, shimFiles, error) {
	bad := func(hint, format string, a ...any) (*shimSettings, *envs.Env, shimFiles, error) {
		return nil, nil, nil, usage(hint, c.verb.name+": "+format, a...)
	}
	for _, n := range notInShims {
		if c.flags.Changed(n) {
			return bad("each program of a shim has its own", "--%s: not for shims", n)
		}
	}
	if strings.Contains(o.indexURL, "@") {
		return bad("uv's and pip's own configuration can have them", "--index-url with credentials would be written down")
	}
	set := &shimSettings{Version: 1, Name: o.with, Debug: o.debug}
	files := shimFiles{}
	var err error
	for p, to := range map[*string]string{&set.Root: c.dirs.Root, &set.State: c.dirs.State, &set.Cwd: "."} {
		if *p, err = filepath.Abs(to); err != nil {
			return nil, nil, nil, fmt.Errorf("%s: %w", c.verb.name, err)
		}
	}
	for i := range c.flags.all {
		if f := &c.flags.all[i]; !slices.Contains(ofShims, f.name) {
			for _, v := range f.given {
				set.Flags = append(set.Flags, "--"+f.name+"="+v)
			}
		}
	}
	if err := o.load(c); err != nil {
		return nil, nil, nil, err
	}
	if len(o.services) > 0 {
		return bad("start them by themselves", "-f %q: services are for run", o.file)
	}
	if o.requirements == "" && o.with == "" {
		return bad("-r FILE or --with NAME", "no environment")
	}
	if o.file != "" {
		file := settingsFile(o.file)
		set.File = filepath.Base(file)
		if files[set.File], err = os.ReadFile(file); err != nil {
			return nil, nil, nil, fmt.Errorf("%s: %w", c.verb.name, err)
		}
	}
	if set.Project, err = o.shimProject(c, set.Cwd); err != nil {
		return nil, nil, nil, err
	}
	if err := set.checkPlace(dir, shown, o.volumes); err != nil {
		return nil, nil, nil, err
	}
	if set.Vars, err = parseEnv(nil, o.envFiles); err != nil {
		return nil, nil, nil, usage("", "--env-file: %v", err)
	}
	o.project = "none" // not at /work
	if !shown {
		dir = ""
	}
	var env *envs.Env
	o.arrange = func(spec *runtime.Spec, e *envs.Env) error {
		env = e
		if err := set.checkPaths(spec, o.netLog); err != nil {
			return err
		}
		set.show(spec, e, dir, set.Project)
		return nil
	}
	var sigs signals
	_, _, err = o.prepare(&sigs, c, nil, []string{"python"}, false)
	c.ui.Done()
	if err != nil {
		return nil, nil, nil, err
	}
	set.Env = env.Key
	if o.requirements != "" {
		if err := o.keepLock(c, set, env, files); err != nil {
			return nil, nil, nil, err
		}
	}
	return set, env, files, nil
}

// keepLock keeps the lock where that alone gives the same environment again.
func (o *shimOptions) keepLock(c *command, set *shimSettings, env *envs.Env, files shimFiles) error {
	store, err := c.store()
	if err != nil {
		return err
	}
	m := envs.Open(store, envs.Options{})
	kind, text := m.PortableLock(env) // without credentials: others may read the folder
	name := map[string]string{"requirements": "requirements.txt", "pylock": "pylock.toml"}[kind]
	if name == "" {
		return nil
	}
	tmp, err := os.MkdirTemp("", "sbxrun-lock-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	r := o.recipe(rootfs.Base{})
	if r.Base, err = store.Base(o.base); err != nil {
		return err
	}
	r.File = filepath.Join(tmp, name)
	if err := os.WriteFile(r.File, text, 0o600); err != nil {
		return err
	}
	if again, err := m.Find(r); err == nil && again != nil && again.Key == env.Key {
		set.Lock, files[name] = name, text
	}
	return nil
}

// settingsFile is the file that -f FILE or -f DIR means.
func settingsFile(file string) string {
	if st, err := os.Stat(file); err == nil && st.IsDir() {
		for _, n := range settingsNames {
			if _, err := os.Stat(filepath.Join(file, n)); err == nil {
				return filepath.Join(file, n)
			}
		}
	}
	return file
}

// shimProject gives the project, links followed; "" is none.
func (o *shimOptions) shimProject(c *command, cwd string) (string, error) {
	p := o.project
	switch p {
	case "none":
		return "", nil
	case "":
		if p = cwd; unsafeProject(cwd) {
			return "", usage("--project DIR names it, --project none shows none", "%s: %q holds more than a project", c.verb.name, cwd)
		}
	}
	real, err := filepath.Abs(p)
	if err == nil {
		real, err = filepath.EvalSymlinks(real)
	}
	if err != nil {
		return "", usage("", "--project %q: %v", p, err)
	}
	if st, err := os.Stat(real); err != nil || !st.IsDir() {
		return "", usage("", "--project %q: not a directory", p)
	}
	for _, system := range []string{"/usr", "/etc", "/proc", "/dev", "/sys"} {
		if within(real, system) || within(system, real) && system != "/usr" {
			return "", usage("a project lies elsewhere", "--project %q: it is part of the system, or holds it", p)
		}
	}
	return real, nil
}

// checkPlace refuses a folder that a sandbox could replace: what is in it decides
// what the host does. covered says that it is covered inside.
func (set *shimSettings) checkPlace(dir string, covered bool, volumes []string) error {
	if strings.ContainsAny(dir, ":\n'\\") {
		return usage("PATH or a shell could not have it", "shim %q: a colon, a quote, a backslash or a line break in the path", dir)
	}
	if p := set.Project; p != "" && within(dir, p) {
		return usage("choose another folder", "shim %q: the project lies in it, and what runs in the sandbox could replace it", dir)
	} else if p != "" && within(p, dir) && (!covered || filepath.Dir(dir) != p) {
		where := "outside of it"
		if covered {
			where = "right into the project (" + filepath.Join(p, ".venv") + ") or outside"
		}
		return usage("put it "+where, "shim %q: deep in the project, where what runs in the sandbox could replace it", dir)
	}
	for _, v := range volumes {
		vol, err := parseVolume(v)
		if err != nil || vol.Mode != "rw" {
			continue
		}
		if real, err := filepath.EvalSymlinks(vol.Source); err == nil && within(real, dir) {
			return usage("put it elsewhere, or the volume :ro", "shim %q: in the volume %s, where what runs in the sandbox could replace it", dir, v)
		}
	}
	return nil
}

// checkPaths refuses what is read or written by each run at a path that a sandbox
// could make lead elsewhere: it may write the project.
func (set *shimSettings) checkPaths(spec *runtime.Spec, netLog string) error {
	for _, v := range spec.Volumes {
		real, err := filepath.EvalSymlinks(v.Source)
		if err != nil {
			return usage("the host path must be there: it is not made for you", "--volume %q: %v", v.Source, err)
		}
		if real != filepath.Clean(v.Source) { // and show opens no other later
			return usage("if that is what you mean, give "+real, "--volume %q: a link is in the path", v.Source)
		}
	}
	paths := map[string]string{}
	for _, x := range spec.Secrets {
		paths[x.Source] = "--secret"
	}
	for _, x := range spec.Net.ExposeUnix {
		paths[x.Path] = "--expose-unix"
	}
	if netLog != "" {
		paths[netLog] = "--net-log"
	}
	for p, flag := range paths {
		abs, err := realParent(p)
		if err != nil {
			return fmt.Errorf("%s %q: %w", flag, p, err)
		}
		if within(set.Project, abs) {
			return usage("keep it outside of the project", "%s %q: what runs in the sandbox could put a link there", flag, p)
		}
	}
	return nil
}

// within says whether path is top or below it. Both are clean and absolute.
func within(top, path string) bool {
	return top != "" && (path == top || strings.HasPrefix(path, strings.TrimSuffix(top, "/")+"/"))
}

// interpreter is this program as the first line of a script names it.
func interpreter() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("find sbxrun: %w", err)
	}
	if len(self) > 127-len("#! shim-exec\n") || strings.ContainsAny(self, " \t\n") { // old kernels cut it there
		return "", usage("install sbxrun at a shorter path: make install", "make shim: %q is too long for a script's first line, or has white space", self)
	}
	return self, nil
}

// writeShim makes the folder, or renews one that is ours, file by file. The folder
// itself stays: the kernel takes away what running sandboxes have mounted on one that
// is removed, and they would see the new one, and might write it.
func writeShim(dir string, set *shimSettings, env *envs.Env, files shimFiles, sources bool) (err error) {
	if _, err := oursAt(dir); err != nil {
		return err
	}
	self, err := interpreter()
	if err != nil {
		return err
	}
	layout, err := env.Layout()
	if err != nil {
		return err
	}
	if layout.Python == "" {
		return usage("add python to its recipe", "env shim %q: the environment has no python", dir)
	}
	script := "#!" + self + " shim-exec\n# Made by sbxrun env shim: runs in a sandbox; see ../" + shimSettingsFile + "\n"
	scripts := map[string]bool{"python": true, "python3": true}
	set.Direct = nil
	for _, p := range layout.Programs {
		if shellScript(p.Name) {
			continue
		}
		scripts[p.Name] = true
		if !p.Python && !isPython(p.Name) {
			set.Direct = append(set.Direct, p.Name)
		}
	}
	w := openShimWriter(dir)
	defer w.close()
	w.mkdir("bin")
	w.settings(set, files) // first: what is not whole is ours, and is renewed
	for n := range scripts {
		w.file("bin/"+n, script, 0o755)
	}
	w.file("pyvenv.cfg", venvConfig(layout), 0o644)
	for name, text := range activates {
		w.file("bin/"+name, strings.ReplaceAll(text, "@DIR@", dir), 0o644)
	}
	w.file(".gitignore", "*\n", 0o644)
	w.do(func() error { return w.root.Chmod(".", 0o755) }) //nolint:gosec // as a venv's: others' editors may read it
	if layout.Site != "" {
		w.site(env, layout.Site, sources)
	}
	w.removeOthers("bin", func(n string) bool { return scripts[n] || activates[n] != "" })
	w.removeOthers("lib", func(n string) bool { return n == filepath.Base(filepath.Dir(layout.Site)) })
	if w.err != nil {
		return fmt.Errorf("env shim %q: %w", dir, w.err)
	}
	return nil
}

// shellScript: what is sourced, and is made for the folder itself.
func shellScript(name string) bool {
	l := strings.ToLower(name)
	return strings.HasPrefix(l, "activate") || strings.HasPrefix(l, "deactivate")
}

// isPython: python, python3, python3.12, python3.13t.
func isPython(name string) bool {
	v, ok := strings.CutPrefix(name, "python")
	return ok && strings.Trim(v, "0123456789.t") == ""
}

// activates are the folder's own bin/activate, for each kind of shell.
var activates = map[string]string{
	"activate": `# Made by sbxrun env shim. Use: . "@DIR@/bin/activate"
deactivate() {
	PATH="$_SBXRUN_OLD_PATH"; export PATH
	unset VIRTUAL_ENV _SBXRUN_OLD_PATH
	unset -f deactivate
}
_SBXRUN_OLD_PATH="$PATH"
VIRTUAL_ENV='@DIR@'; export VIRTUAL_ENV
PATH='@DIR@/bin':"$PATH"; export PATH
`,
	"activate.fish": `# Made by sbxrun env shim. Use: source "@DIR@/bin/activate.fish"
function deactivate
	set -gx PATH $_SBXRUN_OLD_PATH
	set -e VIRTUAL_ENV _SBXRUN_OLD_PATH
	functions -e deactivate
end
set -g _SBXRUN_OLD_PATH $PATH
set -gx VIRTUAL_ENV '@DIR@'
set -gx PATH '@DIR@/bin' $PATH
`,
}

// venvConfig is pyvenv.cfg for who looks at it from outside, in the usual words. An
// environment can come from anywhere: what it says is not what tools are told to
// start, as they may with home.
func venvConfig(l *envs.Layout) string {
	home, system, version := "/usr/bin", "false", strings.TrimPrefix(l.Python, "python")
	for _, line := range strings.Split(l.Config, "\n") {
		k, v, _ := strings.Cut(line, "=")
		switch k, v = strings.TrimSpace(k), strings.TrimSpace(v); {
		case k == "home" && v == "/usr/local/bin":
			home = v
		case k == "include-system-site-packages" && v == "true":
			system = v
		case (k == "version" || k == "version_info") && v != "" && strings.Trim(v, "0123456789.abcfilnr") == "":
			version = v
		}
	}
	return "home = " + home + "\nimplementation = CPython\ninclude-system-site-packages = " + system + "\nversion = " + version + "\n"
}

// oursAt says whether the folder was made by env shim or env kernel. Anything else
// that is there, but for an empty folder, is an error.
func oursAt(dir string) (bool, error) {
	if st, err := os.Lstat(dir); err == nil && !st.IsDir() {
		return false, usage("give one that is not there yet", "%q: there is something else", dir)
	}
	names, err := os.ReadDir(dir)
	// A link in a project may be a sandbox's: what is written must stay there.
	st, lerr := os.Lstat(dir)
	switch {
	case lerr == nil && !st.IsDir():
		err = unix.ENOTDIR
	case errors.Is(err, fs.ErrNotExist), err == nil && len(names) == 0:
		return false, nil
	case err == nil:
		var set *shimSettings
		if set, err = readShim(dir); err == nil {
			err = set.Close()
		}
	}
	if err != nil {
		return false, usage("give one that is not there yet", "%q: there is something else", dir)
	}
	return true, nil
}

func removeShim(dir string) error {
	ours, err := oursAt(dir)
	if err == nil && !ours {
		err = usage("nothing was removed", "%q: no folder of env shim or env kernel", dir)
	}
	if err != nil {
		return err
	}
	// What running programs have mounted on the folder would go with it (see writeShim).
	lock, err := lockShim(dir, unix.LOCK_EX)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return &runtime.Error{Op: "remove shim", Object: dir, Err: errors.New("a program of it is running"), Hint: "wait for its end"}
	}
	if err != nil {
		return fmt.Errorf("remove shim %q: %w", dir, err)
	}
	defer lock.Close()
	return os.RemoveAll(dir)
}

// lockShim locks the folder, which stays when its files are renewed.
func lockShim(dir string, how int) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), dir)
	if err := unix.Flock(fd, how|unix.LOCK_NB); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// readShim reads the settings. Root acts on them: nobody else may have written them.
// They are locked until Close, so that nobody removes what is in use.
func readShim(dir string) (s *shimSettings, err error) {
	path := filepath.Join(dir, shimSettingsFile)
	lock, err := lockShim(dir, unix.LOCK_SH)
	if err != nil {
		return nil, fmt.Errorf("read shim %q: %w", path, err)
	}
	defer func() {
		if s == nil {
			lock.Close()
		}
	}()
	fd, err := unix.Openat(int(lock.Fd()), shimSettingsFile, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read shim %q: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("read shim %q: %w", path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o022 != 0 || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return nil, usage("who could change it could show a sandbox any file: make it again", "read shim %q: others may have written it", path)
	}
	got := &shimSettings{lock: lock}
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil || json.Unmarshal(b, got) != nil || got.Version != 1 || len(got.Env) != 64 || strings.Contains(got.File+got.Lock, "/") {
		return nil, usage("make it again: sbxrun env shim …", "read shim %q: damaged", path)
	}
	return got, nil
}

// shimWriter writes into a folder; the first error stays. No link leads it out of
// there: the folder may lie in a project, where a sandbox may have made one of its own.
type shimWriter struct {
	root *os.Root
	err  error
}

// openShimWriter makes the folder where it is not there.
func openShimWriter(dir string) *shimWriter {
	w := &shimWriter{}
	var parent *os.Root
	w.do(func() error { return os.MkdirAll(filepath.Dir(dir), 0o755) }) //nolint:gosec // as venv does
	w.do(func() (err error) { parent, err = os.OpenRoot(filepath.Dir(dir)); return err })
	w.do(func() (err error) {
		defer parent.Close()
		if err = parent.Mkdir(filepath.Base(dir), 0o755); errors.Is(err, fs.ErrExist) {
			err = nil
		}
		if err == nil {
			w.root, err = parent.OpenRoot(filepath.Base(dir))
		}
		return err
	})
	return w
}

func (w *shimWriter) close() {
	if w.root != nil {
		w.root.Close()
	}
}

func (w *shimWriter) do(f func() error) {
	if w.err == nil {
		w.err = f()
	}
}

func (w *shimWriter) mkdir(name string) {
	w.do(func() error { return w.root.MkdirAll(name, 0o755) }) //nolint:gosec // as a venv's
}

// file replaces a file in one step.
func (w *shimWriter) file(name, text string, mode fs.FileMode) {
	w.do(func() error {
		tmp := tmpName(name)
		f, err := w.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
		if err != nil {
			return err
		}
		_, err = f.WriteString(text)
		err = errors.Join(err, f.Chmod(mode), f.Close())
		if err == nil {
			err = w.root.Rename(tmp, name)
		}
		if err != nil {
			err = errors.Join(err, w.root.Remove(tmp))
		}
		return err
	})
}

func tmpName(name string) string { return fmt.Sprintf("%s.sbxrun-%d", name, os.Getpid()) }

func (w *shimWriter) settings(set *shimSettings, files shimFiles) {
	b, err := json.MarshalIndent(set, "", "  ")
	w.do(func() error { return err })
	for name, text := range files {
		w.file(name, string(text), 0o600)
	}
	w.file(shimSettingsFile, string(b)+"\n", 0o600) // it may have variables of the user's
}

// removeOthers removes what an environment before has left in a folder.
func (w *shimWriter) removeOthers(folder string, keep func(name string) bool) {
	w.do(func() error {
		names, err := fs.ReadDir(w.root.FS(), folder)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		for _, n := range names {
			if !keep(n.Name()) {
				err = errors.Join(err, w.root.RemoveAll(folder+"/"+n.Name()))
			}
		}
		return err
	})
}

// site shows the packages to editors: by a link into the store, or by copies.
func (w *shimWriter) site(env *envs.Env, site string, sources bool) {
	w.mkdir(filepath.Dir(site))
	w.link("lib", "lib64")
	if !sources {
		w.link(filepath.Join(env.Path, envs.EnvDir, site), site)
		return
	}
	w.do(func() error { return w.root.RemoveAll(site) })
	w.mkdir(site)
	w.do(func() error {
		to, err := w.root.OpenRoot(site)
		if err != nil {
			return err
		}
		defer to.Close()
		return env.Sources(site, func(name string, text fs.File) error {
			if err := to.MkdirAll(filepath.Dir(name), 0o755); err != nil { //nolint:gosec // as a venv's
				return err
			}
			f, err := to.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
			if err != nil {
				return err
			}
			_, err = io.Copy(f, text)
			return errors.Join(err, f.Close())
		})
	})
}

// link makes a symbolic link, in one step where there was one.
func (w *shimWriter) link(to, name string) {
	w.do(func() error {
		if st, err := w.root.Lstat(name); err == nil && st.IsDir() { // copies of before
			if err := w.root.RemoveAll(name); err != nil {
				return err
			}
		}
		if err := w.root.Symlink(to, tmpName(name)); err != nil {
			return err
		}
		return w.root.Rename(tmpName(name), name)
	})
}
