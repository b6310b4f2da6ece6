package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/cmd/sbxrun-oci/ask"
	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime"
)

// recipeOptions say what an environment is made from.
type recipeOptions struct {
	requirements       string
	base, python       string
	allowBuild, system bool
	allowScripts       bool
	indexHosts         []string
	refresh            bool
	hooks, envVars     []string
	indexURL, newer    string
	extras, groups     []string
	onlyGroups         []string
	allExtras          bool
}

func (o *recipeOptions) declareRecipe(f *flagSet) {
	f.StringVarP(&o.requirements, "requirements", "r", "", "`file` by content: requirements.txt, pyproject.toml, pylock.toml, uv.lock, poetry.lock, pdm.lock, Pipfile.lock, environment.yml, @EXPLICIT list, conda-lock.yml, pixi.lock, a recipe (sbxrun.toml); or a folder with one")
	f.ListVar(&o.extras, "extra", "take this extra of the project too, by `name`")
	f.BoolVar(&o.allExtras, "all-extras", "take all extras of the project")
	f.ListVar(&o.groups, "group", "take this dependency group of the project too, by `name`")
	f.ListVar(&o.onlyGroups, "only-group", "take this dependency group and not the project's own dependencies, by `name`")
	f.StringVar(&o.base, "base", "host", "base `name`; host is this host's own /usr, read-only")
	f.StringVar(&o.python, "python", "", "interpreter: a `version` (3.12) or a path in the base (default: its python3)")
	f.BoolVar(&o.allowBuild, "allow-build", "build source distributions, in a sandbox: runs their code")
	f.BoolVar(&o.allowScripts, "allow-scripts", "run the link scripts of conda packages, in a sandbox")
	f.BoolVar(&o.system, "system-site-packages", "let the environment see the base's own packages")
	f.BoolVar(&o.refresh, "refresh", "resolve anew what is not pinned")
	f.ListVar(&o.hooks, "hook", "shell `command` to run after the install, in a sandbox, with the environment writable")
	f.ListVar(&o.envVars, "env-var", "`KEY=VALUE` that belongs to the environment")
	f.StringVar(&o.indexURL, "index-url", "", "package index `URL` (default: uv's and pip's configuration)")
	f.ListVar(&o.indexHosts, "index-host", "further `host[:port]` that the index or a channel refers to")
	f.StringVar(&o.newer, "exclude-newer", "", "resolve to nothing published after this `date`")
}

func (o *recipeOptions) recipe(base rootfs.Base) envs.Recipe {
	return envs.Recipe{
		File: o.requirements, Base: base, Python: o.python, SystemSitePackages: o.system, AllowBuild: o.allowBuild, AllowScripts: o.allowScripts,
		Hooks: o.hooks, Env: o.envVars, IndexURL: o.indexURL, IndexHosts: o.indexHosts, ExcludeNewer: o.newer, Refresh: o.refresh,
		Extras: o.extras, Groups: o.groups, OnlyGroups: o.onlyGroups, AllExtras: o.allExtras,
	}
}

// needRoot and none are what most verbs check.
func needRoot(c *command) error {
	if os.Geteuid() != 0 {
		return &runtime.Error{Op: c.verb.name, Err: errors.New("not root"), Hint: "run sbxrun as root: sudo sbxrun " + c.verb.name + " …"}
	}
	return nil
}

func wantArgs(c *command, args []string, least, most int) error {
	if len(args) < least || len(args) > most {
		return usage("usage: sbxrun "+c.verb.name+" "+c.verb.args, "%s: %d arguments", c.verb.name, len(args))
	}
	return nil
}

// canceled is a context that the usual signals end.
func canceled() (context.Context, func()) {
	return signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
}

// onStore opens the store for a verb.
func onStore(c *command, args []string, least, most int) (*rootfs.Store, error) {
	if err := wantArgs(c, args, least, most); err != nil {
		return nil, err
	}
	if err := needRoot(c); err != nil {
		return nil, err
	}
	return c.store()
}

// store opens the store. Where it is read-only, what has to be made for this
// host lies beside the state.
func (c *command) store() (*rootfs.Store, error) {
	s, err := rootfs.OpenStore(c.dirs.Root)
	if err == nil {
		s.Spare = filepath.Join(c.dirs.State, "spare")
	}
	return s, err
}

func (c *command) json(v any) (int, error) {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return 1, err
	}
	c.ui.outf("%s\n", b)
	return 0, nil
}

type buildOptions struct {
	recipeOptions
	name    string
	json    bool
	out     string
	upgrade bool
}

func declareBuild(c *command, named bool) *buildOptions {
	o := &buildOptions{}
	o.declareRecipe(&c.flags)
	c.flags.StringVarP(&o.requirements, "file", "f", "", "the same as -r, for a `file` that run takes by -f: a recipe (sbxrun.toml)")
	if named {
		c.flags.StringVar(&o.name, "name", "", "a `name` for it, for run --with")
		c.flags.BoolVar(&o.json, "json", "print JSON")
	}
	c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress")
	return o
}

// build is what env build and env lock share: the base, the recipe, the manager.
func (o *buildOptions) build(c *command, args []string) (*envs.Manager, envs.Recipe, error) {
	if len(args) == 1 && o.requirements == "" {
		o.requirements, args = args[0], nil
	}
	store, err := onStore(c, args, 0, 0)
	if err != nil {
		return nil, envs.Recipe{}, err
	}
	if o.requirements == "" {
		return nil, envs.Recipe{}, usage("-r requirements.txt", "%s: no file", c.verb.name)
	}
	base, err := store.Base(o.base)
	if err != nil {
		return nil, envs.Recipe{}, err
	}
	host, err := runtime.Probe()
	if err != nil {
		return nil, envs.Recipe{}, err
	}
	r := o.recipe(base)
	r.Name = o.name
	return newManager(c, store, host), r, nil
}

func envBuildVerb() *verb {
	return &verb{
		name: "env build", args: "[flags] -r FILE", short: "bake an environment, once",
		setup: func(c *command) { c.opts = declareBuild(c, true) },
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*buildOptions)
			m, r, err := o.build(c, args)
			if err != nil {
				return 0, err
			}
			ctx, stop := canceled()
			defer stop()
			e, _, err := m.Ensure(ctx, r)
			c.ui.Done()
			if ctx.Err() != nil {
				return 130, fmt.Errorf("env build: %w", ctx.Err())
			}
			if err != nil {
				return 1, err
			}
			for _, n := range e.Notes {
				c.ui.note("%s", n)
			}
			if o.json {
				return c.json(e)
			}
			c.ui.outf("%s\n", e.Digest)
			return 0, nil
		},
	}
}

func envLockVerb() *verb {
	return &verb{
		name: "env lock", args: "[flags] -r FILE [PACKAGE…]", short: "print the hashed lock of a recipe",
		setup: func(c *command) {
			o := declareBuild(c, false)
			c.flags.StringVarP(&o.out, "output", "o", "", "write it to this `file`")
			c.flags.BoolVar(&o.upgrade, "upgrade", "resolve anew: the packages that are named, or all")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*buildOptions)
			var packages []string
			if o.upgrade && o.requirements != "" {
				packages, args = args, nil
			}
			m, r, err := o.build(c, args)
			if err != nil {
				return 0, err
			}
			r.Upgrade, r.Refresh = packages, r.Refresh || o.upgrade && len(packages) == 0
			ctx, stop := canceled()
			defer stop()
			b, err := m.Lock(ctx, r)
			c.ui.Done()
			if ctx.Err() != nil {
				return 130, fmt.Errorf("env lock: %w", ctx.Err())
			}
			if err != nil {
				return 1, err
			}
			if o.out != "" {
				return 0, os.WriteFile(o.out, b, 0o644)
			}
			c.ui.outf("%s", b)
			return 0, nil
		},
	}
}

func jsonFlag(c *command) {
	asked := new(bool)
	c.flags.BoolVar(asked, "json", "print JSON")
	c.opts = asked
}

func human(n int64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
}

func envRemoveVerb() *verb {
	return &verb{
		name: "env rm", args: "NAME|DIGEST…", short: "remove environments",
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 1, 1<<20)
			if err != nil {
				return 0, err
			}
			m := envs.Open(store, envs.Options{})
			var errs []error
			for _, a := range args {
				errs = append(errs, m.Remove(a))
			}
			return 0, errors.Join(errs...)
		},
	}
}

func baseListVerb() *verb {
	return &verb{
		name: "base list", args: "[flags]", short: "list the bases", setup: jsonFlag,
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 0, 0)
			if err != nil {
				return 0, err
			}
			list, err := store.Bases()
			if err != nil {
				return 1, err
			}
			h, err := store.Base("host")
			if err != nil {
				return 1, err
			}
			list = append([]rootfs.BaseInfo{{Name: "host", Digest: h.Digest, Source: "this host's /usr"}}, list...)
			if *c.opts.(*bool) {
				return c.json(list)
			}
			w := tabwriter.NewWriter(c.ui.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "NAME\tDIGEST\tSIZE\tSOURCE")
			for _, b := range list {
				size := human(b.SizeBytes)
				if b.Name == "host" {
					size = "-"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", b.Name, envs.Short(b.Digest), size, printable(b.Source))
			}
			return 0, w.Flush()
		},
	}
}

func baseAddVerb() *verb {
	return &verb{
		name: "base add", args: "NAME SOURCE", short: "add a base from a directory, a tarball, a docker save archive or an OCI image layout",
		setup: func(c *command) { c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress") },
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 2, 2)
			if err != nil {
				return 0, err
			}
			ctx, stop := canceled()
			defer stop()
			req := ask.AddBase{Root: []byte(store.Path()), Name: []byte(args[0]), Source: []byte(args[1])}
			digest, err := addBase(ctx, req, func(s string) { c.ui.Phase("base", s) })
			c.ui.Done()
			if err != nil {
				return 1, err
			}
			c.ui.outf("%s\n", digest)
			return 0, nil
		},
	}
}

func baseRemoveVerb() *verb {
	return &verb{
		name: "base rm", args: "NAME…", short: "remove bases",
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 1, 1<<20)
			if err != nil {
				return 0, err
			}
			var errs []error
			for _, a := range args {
				errs = append(errs, store.RemoveBase(a))
			}
			return 0, errors.Join(errs...)
		},
	}
}

func doctorVerb() *verb {
	return &verb{
		name: "doctor", args: "[flags]", short: "say what this host can do, and how to mend what it cannot; changes nothing", setup: jsonFlag,
		run: func(c *command, args []string) (int, error) {
			if err := wantArgs(c, args, 0, 0); err != nil {
				return 0, err
			}
			h, err := runtime.Probe()
			if err != nil {
				return 1, err
			}
			checks := h.Report()
			code := 0
			for _, k := range checks {
				if !k.OK {
					code = 1
				}
			}
			if *c.opts.(*bool) {
				_, err := c.json(checks)
				return code, err
			}
			w := tabwriter.NewWriter(c.ui.stdout, 0, 0, 2, ' ', 0)
			for _, k := range checks {
				mark := "ok"
				if k.Warn {
					mark = "warn"
				}
				if !k.OK {
					mark = "MISSING"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", mark, k.Name, k.Detail)
				if k.Hint != "" {
					fmt.Fprintf(w, "\t\t→ %s\n", k.Hint)
				}
			}
			return code, w.Flush()
		},
	}
}

func gcVerb() *verb {
	return &verb{
		name: "gc", args: "[flags]", short: "heal what crashes left: cgroups, locks, unfinished bakes",
		run: func(c *command, args []string) (int, error) {
			if err := wantArgs(c, args, 0, 0); err != nil {
				return 0, err
			}
			if err := needRoot(c); err != nil {
				return 0, err
			}
			did, err := runtime.GC(c.dirs)
			for _, d := range did {
				c.ui.outf("%s\n", d)
			}
			if err == nil && len(did) == 0 {
				c.ui.outf("nothing to do\n")
			}
			return 0, err
		},
	}
}

func versionVerb() *verb {
	return &verb{
		name: "version", args: "[flags]", short: "print the version", setup: jsonFlag,
		run: func(c *command, args []string) (int, error) {
			if err := wantArgs(c, args, 0, 0); err != nil {
				return 0, err
			}
			if *c.opts.(*bool) {
				return c.json(map[string]string{"version": version, "go": goruntime.Version(), "arch": goruntime.GOARCH})
			}
			c.ui.outf("sbxrun %s (%s, %s)\n", version, goruntime.Version(), goruntime.GOARCH)
			return 0, nil
		},
	}
}
