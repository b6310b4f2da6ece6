// The runtime need not look every second, and first at once, whether the
// cgroup's CPU limit has changed: 0.02 ms of a launch.
//
//go:debug updatemaxprocs=0

// sbxrun runs a command in a throw-away sandbox over a baked environment.
package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/sbxrun/sbxrun/runtime"
)

// version is set by the linker.
var version = "dev"

// verb is one word after sbxrun (two for the verbs of env and base).
type verb struct {
	name, args, short string
	long              string
	// flags declares the verb's flags; run gets the rest of the arguments and
	// gives the exit code. Errors are printed by main.
	setup func(c *command)
	run   func(c *command, args []string) (int, error)
	// passes says that flags end at the first argument (run).
	passes bool
	// asRun says that all of run's flags are taken too.
	asRun bool
}

// command is a verb being run.
type command struct {
	verb  *verb
	flags flagSet
	ui    *ui
	dirs  runtime.Dirs
	quiet bool
	opts  any
}

// usageError is bad input on the command line.
type usageError struct{ msg, hint string }

func (e *usageError) Error() string { return e.msg }
func (e *usageError) Hint() string  { return e.hint }

func usage(hint, format string, a ...any) error { return &usageError{fmt.Sprintf(format, a...), hint} }

func main() {
	if runtime.TTYGuard(os.Args) {
		return
	}
	os.Exit(dispatch(os.Args[1:]))
}

func dispatch(args []string) int {
	u := newUI()
	if len(args) == 0 {
		u.usage(nil)
		return 2
	}
	switch args[0] {
	case "-h", "--help":
		u.out(helpText(nil))
		return 0
	case "shim-exec": // the first line of a shim's scripts
		return shimExec(u, args[1:])
	case "kernel-exec":
		return kernelExec(u, args[1:])
	case "--version", "-V":
		args[0] = "version"
	case "help":
		return help(u, args[1:])
	}
	if isGroup(args[0]) && len(args) == 1 {
		fmt.Fprint(u.stderr, groupHelp(args[0]))
		return 2
	}
	if isGroup(args[0]) && (args[1] == "-h" || args[1] == "--help" || args[1] == "help") {
		u.out(groupHelp(args[0]))
		return 0
	}
	v, rest := find(args)
	if v == nil {
		u.error(unknownVerb(args))
		return 2
	}
	return invoke(u, v, rest)
}

// invoke parses the flags of a verb and runs it.
func invoke(u *ui, v *verb, args []string) int {
	c := newCommand(u, v)
	bad := 2
	if v.name == "run" {
		bad = 125
	}
	if err := c.flags.Parse(args); err != nil {
		if errors.Is(err, errHelp) {
			u.out(helpText(v))
			return 0
		}
		err = usage(flagHint(&c.flags, err, v), "%s: %v", v.name, err)
		u.error(err)
		reportUsage(c, err)
		return bad
	}
	u.quiet = c.quiet
	code, err := v.run(c, c.flags.rest)
	if err != nil {
		u.error(err)
		var ue *usageError
		if errors.As(err, &ue) {
			code = bad
		}
		if code == 0 {
			code = 1
			if bad == 125 {
				code = 125
			}
		}
	}
	return code
}

func newCommand(u *ui, v *verb) *command {
	c := &command{verb: v, ui: u, dirs: defaultDirs(), flags: flagSet{passes: v.passes}}
	c.flags.StringVar(&c.dirs.Root, "root", c.dirs.Root, "`directory` of bases and environments (SBXRUN_ROOT)")
	c.flags.StringVar(&c.dirs.State, "state", c.dirs.State, "`directory` of live sandboxes (SBXRUN_STATE)")
	if v.setup != nil {
		v.setup(c)
	}
	return c
}

// defaultDirs: the variable, systemd's directory, the usual place.
func defaultDirs() runtime.Dirs {
	first := func(list ...string) string {
		for _, s := range list {
			if s = strings.SplitN(s, ":", 2)[0]; s != "" {
				return s
			}
		}
		return ""
	}
	return runtime.Dirs{
		Root:  first(os.Getenv("SBXRUN_ROOT"), os.Getenv("STATE_DIRECTORY"), "/var/lib/sbxrun"),
		State: first(os.Getenv("SBXRUN_STATE"), os.Getenv("RUNTIME_DIRECTORY"), "/run/sbxrun"),
	}
}

// verbs in the order of the help.
func verbs() []*verb {
	return []*verb{
		runVerb(), planVerb(),
		envBuildVerb(), envListVerb(), envInspectVerb(), envRemoveVerb(), envPruneVerb(), envUsageVerb(), envPackVerb(), envLockVerb(), envPythonVerb(),
		envVerifyVerb(), envSignVerb(), envSBOMVerb(), envScanVerb(), envDiffVerb(), envRebuildVerb(),
		envShimVerb(), envKernelVerb(),
		envExportVerb(), envImportVerb(), envPushVerb(), envPullVerb(),
		baseListVerb(), baseAddVerb(), baseRemoveVerb(),
		doctorVerb(), gcVerb(), unitVerb(), versionVerb(),
	}
}

func isGroup(s string) bool { return s == "env" || s == "base" }

// find gives the verb that args begin with, and the arguments after it.
func find(args []string) (*verb, []string) {
	name, n := args[0], 1
	if isGroup(name) {
		if len(args) < 2 || strings.HasPrefix(args[1], "-") {
			return nil, nil
		}
		alias := map[string]string{"ls": "list", "remove": "rm", "show": "inspect"}
		word := args[1]
		if a := alias[word]; a != "" {
			word = a
		}
		name, n = name+" "+word, 2
	}
	for _, v := range verbs() {
		if v.name == name {
			return v, args[n:]
		}
	}
	return nil, nil
}
