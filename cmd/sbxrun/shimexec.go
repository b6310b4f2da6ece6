package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/runtime"
)

// shimEnv are the variables of the caller's that a program in a shim gets: those that
// tools and their users speak to Python tools with. No credentials are among them.
var shimEnv = []string{
	"PYTHON*", "PYTEST_*", "PY_COLORS", "COVERAGE_*", "COV_*", "HYPOTHESIS_*", "TOX_*", "NOX_*", "PYDEVD_*", "DEBUGPY_*", "PYCHARM_*", "VSCODE_PID", "IPY_*", "JPY_SESSION_NAME", "MPLBACKEND",
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

// protected are what tools of the host execute, or are told by what to execute,
// unasked: in a project's top folder they are read-only where they are there. So are
// other shims, and virtual environments of the host's.
var protected = []string{".git", ".vscode", ".idea", ".devcontainer", ".envrc"}

// protectedIn gives what of a project is read-only.
func protectedIn(project string) (paths []string) {
	d, err := os.Open(project)
	if err != nil {
		return nil
	}
	defer d.Close()
	names, _ := d.Readdirnames(-1)
	slices.Sort(names)
	for _, n := range names {
		p := filepath.Join(project, n)
		var st unix.Stat_t
		if slices.Contains(protected, n) {
			if unix.Lstat(p, &st) == nil && (st.Mode&unix.S_IFMT == unix.S_IFDIR || st.Mode&unix.S_IFMT == unix.S_IFREG) {
				paths = append(paths, p)
			}
		} else if unix.Lstat(p+"/pyvenv.cfg", &st) == nil && unix.Lstat(p, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			paths = append(paths, p)
		}
	}
	return paths
}

// shimExec is what a script of a shim folder runs: args are the script's path and
// its arguments.
func shimExec(u *ui, args []string) int {
	if len(args) == 0 {
		u.error(usage("sbxrun env shim makes folders whose scripts are run so", "shim-exec: no script"))
		return 125
	}
	// Links followed, of folders too: what is covered inside must be what the
	// project has there.
	script, err := filepath.Abs(args[0])
	if err == nil {
		script, err = filepath.EvalSymlinks(script)
	}
	if err != nil {
		u.error(fmt.Errorf("shim-exec: %w", err))
		return 125
	}
	dir, name := filepath.Dir(filepath.Dir(script)), filepath.Base(script)
	set, err := readShim(dir)
	if err == nil { // again: folders can be moved
		defer set.Close()
		err = set.checkPlace(dir, true, nil)
	}
	if err != nil {
		u.error(err)
		return 125
	}
	set.again = "sbxrun env shim"
	x := shimRun{shimSettings: set, at: dir, dir: dir, argv: append([]string{script}, args[1:]...)}
	switch {
	case isPython(name):
		x.python = args[1:]
	case !slices.Contains(set.Direct, name): // by the interpreter there, so that sys.prefix is the shim's
		x.argv = append([]string{filepath.Join(dir, "bin/python")}, x.argv...)
	}
	return x.run(u)
}

// shimRun is one program of a shim, or a kernel.
type shimRun struct {
	*shimSettings
	at      string // the folder
	dir     string // where the environment is shown too: the folder, "" for a kernel's
	argv    []string
	python  []string // what python itself was given; nil is another program
	publish []string
	shown   []runtime.Volume
	cwd     string
	quietly bool
	result  *runtime.Result
}

// run gives the exit code; where the command died of a signal, this process does too.
func (x *shimRun) run(u *ui) int {
	fail := func(err error) int {
		u.error(err)
		return 125
	}
	if os.Geteuid() != 0 {
		return fail(&runtime.Error{Op: "use shim", Object: x.dir, Err: errors.New("not root"), Hint: "sbxrun needs root: start the tool as root (docs/ide.md)"})
	}
	var err error
	if x.cwd, err = currentDir(); err != nil {
		x.cwd = x.Project
	}
	if err := os.Chdir(x.Cwd); err != nil { // the flags' paths are relative to it
		return fail(usage("make it again: "+x.again+" …", "use shim: %v", err))
	}
	c := newCommand(u, runVerb())
	o := c.opts.(*runOptions)
	if err := c.flags.Parse(x.Flags); err != nil {
		return fail(usage("make it again: "+x.again+" …", "use shim: %v", err))
	}
	c.dirs = runtime.Dirs{Root: x.Root, State: x.State}
	u.quiet = true // no progress
	if err := x.apply(c, o); err != nil {
		return fail(err)
	}
	unseen := x.showScript()
	if x.Debug {
		openDebugPorts(o, x.python)
	}
	o.publish = append(o.publish, x.publish...)
	defer watchParent()()
	code, err := run(c, o, x.argv)
	if err != nil {
		return fail(err)
	}
	if x.quietly {
		dieOf(unix.SignalNum(x.result.Signal))
	}
	u.quiet = false
	if r := x.result; r != nil && r.Message != "" && r.Status == runtime.StatusKilled { // a limit, which a tool would take for a crash
		u.note("%s", r.Message)
	}
	if code == 2 && unseen != "" {
		u.note("%s lies outside of the project: it is not seen inside", unseen)
		u.hint("make the shim with -v " + filepath.Dir(unseen) + ":" + filepath.Dir(unseen) + ":ro, and it is")
	}
	return code
}

// apply sets what the settings say.
func (x *shimRun) apply(c *command, o *runOptions) error {
	if x.File != "" {
		o.file = filepath.Join(x.at, x.File)
	}
	if err := o.load(c); err != nil {
		return err
	}
	c.ui.quiet = true
	o.project, o.with, o.requirements = "none", x.Env, ""
	o.envFiles, o.report, o.status, o.name = nil, "", -1, ""
	if !envs.Baked(x.Root, x.Env) {
		if x.Lock == "" {
			with := " -r FILE"
			if x.Name != "" {
				with = " --with " + x.Name
			}
			return &runtime.Error{Op: "use environment", Object: envs.Short(x.Env), Err: errors.New("it was removed"), Hint: "make the shim again: " + x.again + with + " " + x.at}
		}
		o.with, o.requirements = "", filepath.Join(x.at, x.Lock)
	}
	if term.IsTerminal(0) && term.IsTerminal(1) {
		o.tty, o.interactive = true, true
	}
	var passed []string
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); passesEnv(name) {
			passed = append(passed, kv)
		}
	}
	o.env = append(append(passed, x.Vars...), o.env...) // what flags say wins
	o.arrange = func(spec *runtime.Spec, env *envs.Env) error {
		if env == nil || env.Key != x.Env {
			return usage("make it again: "+x.again+" …", "use shim: the environment was removed, and its lock gives another one now")
		}
		for i := range spec.Volumes { // a link that is in the path now is a sandbox's (checkPaths)
			spec.Volumes[i].NoLinks = true
		}
		x.show(spec, env, x.dir, x.Project)
		spec.Volumes = append(spec.Volumes, x.shown...)
		if spec.Workdir == "" {
			spec.Workdir = x.cwd
		}
		return nil
	}
	o.ended = func(r *runtime.Result, err error) bool {
		x.result = r
		x.quietly = err == nil && r.Signal != "" && (r.Reason == runtime.ReasonSignal || r.Reason == runtime.ReasonCanceled)
		return x.quietly
	}
	return nil
}

// show completes a spec: the project at its own path, and the environment at dir.
// A path that the flags show is not shown again.
func (set *shimSettings) show(spec *runtime.Spec, env *envs.Env, dir, project string) {
	add := func(path, mode string) {
		if !slices.ContainsFunc(spec.Volumes, func(v runtime.Volume) bool { return filepath.Clean(v.Target) == path }) {
			spec.Volumes = append(spec.Volumes, runtime.Volume{Source: path, Target: path, Mode: mode, NoLinks: true})
		}
	}
	if project != "" {
		add(project, "rw")
		for _, p := range protectedIn(project) {
			if p != dir {
				add(p, "ro")
			}
		}
	}
	l := spec.Layer
	if dir == "" || l == nil || env == nil {
		return
	}
	l.At, l.Prefix = dir, strings.TrimPrefix(envs.EnvDir, "/")
	move := func(list []string, before string) (out []string) {
		for _, x := range list {
			if rest, ok := strings.CutPrefix(x, before+envs.EnvDir); ok && (rest == "" || rest[0] == '/') {
				x = before + dir + rest
			}
			out = append(out, x)
		}
		return out
	}
	l.PathPrefix, l.Env = move(l.PathPrefix, ""), move(move(l.Env, "VIRTUAL_ENV="), "CONDA_PREFIX=")
}

// currentDir is the kernel's answer: of PWD's links nothing is known inside.
func currentDir() (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil || n < 2 || buf[0] != '/' {
		return "", errors.Join(errors.New("the current directory is gone"), err)
	}
	return string(buf[:n-1]), nil
}

// showScript shows the one file that python is told to run, where it lies outside
// of the project: editors ask an interpreter about itself with a script of their
// own. No other argument is shown: what tools are told in the project's own files is
// what a sandbox may have written there. It gives a script that stays unseen.
func (x *shimRun) showScript() (unseen string) {
	script := scriptOf(x.python)
	if script == "" {
		return ""
	}
	if !filepath.IsAbs(script) {
		script = filepath.Join(x.cwd, script)
	}
	script = filepath.Clean(script)
	real, err := filepath.EvalSymlinks(script)
	if err != nil || within(x.Project, real) || within(x.dir, real) || within("/usr", real) {
		return ""
	}
	if st, err := os.Stat(real); err != nil || !st.Mode().IsRegular() || !strings.HasSuffix(real, ".py") || within("/proc", script) || within("/dev", script) {
		return real
	}
	x.shown = append(x.shown, runtime.Volume{Source: real, Target: script, Mode: "ro", NoLinks: true})
	return ""
}

// scriptOf gives the script among python's arguments, "" is none (-c, -m, -).
func scriptOf(args []string) string {
	for i := 0; i < len(args); i++ {
		a := args[i]
		switch {
		case a == "-" || a == "":
			return ""
		case a[0] != '-':
			return a
		case a == "--check-hash-based-pycs":
			i++
			continue
		case strings.HasPrefix(a, "--"):
			continue
		}
		for j := 1; j < len(a); j++ {
			switch a[j] {
			case 'c', 'm':
				return ""
			case 'W', 'X':
				if j == len(a)-1 {
					i++
				}
				j = len(a)
			}
		}
	}
	return ""
}

// dieOf ends this process as its command ended. It returns where that signal does
// not end a process.
func dieOf(sig unix.Signal) {
	_ = unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}) // no core of ours
	// Go's own handler would tell of a crash of this program: back to the default.
	var dfl [4]uint64 // the kernel's struct sigaction, all zero
	_, _, _ = unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&dfl)), 0, 8, 0, 0)
	if unix.Kill(os.Getpid(), sig) == nil {
		time.Sleep(100 * time.Millisecond)
	}
}

// watchParent asks the command to stop when the Jupyter server that started this
// process is gone: inside nothing can be known of it. The kernel's own word for that
// (PR_SET_PDEATHSIG) comes already when the server's thread ends. The function that
// it gives ends the watch.
func watchParent() (stop func()) {
	if os.Getenv("JPY_PARENT_PID") == "" {
		return func() {}
	}
	parent, done := os.Getppid(), make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case <-time.After(time.Second):
			}
			if os.Getppid() != parent {
				_ = unix.Kill(os.Getpid(), unix.SIGTERM) // a second one kills
			}
		}
	}()
	return func() { close(done) }
}
