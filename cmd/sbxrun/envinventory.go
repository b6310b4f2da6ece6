package main

import (
	"errors"
	"fmt"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/runtime"
)

type sbomOptions struct {
	format, out string
	base        bool
}

func envSBOMVerb() *verb {
	return &verb{
		name: "env sbom", args: "[flags] NAME|DIGEST", short: "print an environment's bill of materials, from installed metadata",
		setup: func(c *command) {
			o := &sbomOptions{}
			c.flags.StringVar(&o.format, "format", "cyclonedx", "`format`: cyclonedx (1.6) or spdx (2.3), both JSON")
			c.flags.StringVarP(&o.out, "output", "o", "", "write it to this `file`")
			c.flags.BoolVar(&o.base, "with-base", "the base's Debian packages too")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*sbomOptions)
			if _, err := onStore(c, args, 1, 1); err != nil {
				return 0, err
			}
			if o.format != "cyclonedx" && o.format != "spdx" {
				return 2, usage("cyclonedx or spdx", "--format %q: not known", o.format)
			}
			ctx, stop := canceled()
			defer stop()
			err := askEnv(ctx, c, "sbom", struct {
				aboutEnv
				Format   string `json:"format"`
				Output   string `json:"output,omitempty"`
				WithBase bool   `json:"with_base,omitempty"`
			}{aboutEnv{[]byte(c.dirs.Root), args[0]}, o.format, o.out, o.base}, nil)
			if err != nil {
				return 1, err
			}
			return 0, nil
		},
	}
}

type scanOptions struct {
	db, ignore, severity, format string
	base                         bool
}

// exitNotScanned is the exit code of a scan that says nothing: neither "none"
// (0) nor "found" (1).
const exitNotScanned = 3

func envScanVerb() *verb {
	return &verb{
		name: "env scan", args: "--db FILE|DIR|ZIP [flags] NAME|DIGEST", short: "look an environment's packages up in a database of known vulnerabilities",
		long: "The database is what OSV publishes: records in JSON, in a file, a directory or an all.zip. Nothing is\n" +
			"fetched. Exit codes: 0 none found, 1 some found, 2 wrong usage, 3 could not scan.",
		setup: func(c *command) {
			o := &scanOptions{}
			c.flags.StringVar(&o.db, "db", "", "the database: a `path`")
			c.flags.StringVar(&o.ignore, "ignore", "", "TOML `file` of what is ignored: [[ignore]] with id, reason, until, package")
			c.flags.StringVar(&o.severity, "severity", "", "least `severity` that counts: low, medium, high, critical; what has none counts always (default: all)")
			c.flags.StringVar(&o.format, "format", "table", "`format`: table, json or sarif")
			c.flags.BoolVar(&o.base, "with-base", "the base's Debian packages too")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*scanOptions)
			if err := wantArgs(c, args, 1, 1); err != nil {
				return 2, err
			}
			switch {
			case o.db == "":
				return 2, usage("a file, directory or all.zip of records in the OSV format", "env scan: no --db")
			case o.format != "table" && o.format != "json" && o.format != "sarif":
				return 2, usage("table, json or sarif", "--format %q: not known", o.format)
			case o.severity != "" && o.severity != "low" && o.severity != "medium" && o.severity != "high" && o.severity != "critical":
				return 2, usage("low, medium, high or critical", "--severity %q: not known", o.severity)
			}
			if _, err := onStore(c, args, 1, 1); err != nil {
				return exitNotScanned, err
			}
			ctx, stop := canceled()
			defer stop()
			var a struct {
				Found    int `json:"found"`
				Unjudged int `json:"unjudged"`
			}
			err := askEnv(ctx, c, "scan", struct {
				aboutEnv
				Database string `json:"database"`
				Ignore   string `json:"ignore,omitempty"`
				Severity string `json:"severity,omitempty"`
				Format   string `json:"format"`
				WithBase bool   `json:"with_base,omitempty"`
			}{aboutEnv{[]byte(c.dirs.Root), args[0]}, o.db, o.ignore, o.severity, o.format, o.base}, &a)
			switch {
			case err != nil:
				return exitNotScanned, hinted.New(fmt.Errorf("scan %q: %w", args[0], err), hinted.Of(err))
			case a.Found > 0:
				return 1, nil
			case a.Unjudged > 0:
				return exitNotScanned, fmt.Errorf("scan %q: %d records could not be judged", args[0], a.Unjudged)
			}
			return 0, nil
		},
	}
}

type diffOptions struct{ json, files bool }

func envDiffVerb() *verb {
	return &verb{
		name: "env diff", args: "[flags] A B", short: "say how two environments differ: packages, variables, files; exit code 1 if they do",
		setup: func(c *command) {
			o := &diffOptions{}
			c.flags.BoolVar(&o.json, "json", "print JSON")
			c.flags.BoolVar(&o.files, "files", "list the files")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*diffOptions)
			if err := wantArgs(c, args, 2, 2); err != nil {
				return 2, err
			}
			if _, err := onStore(c, args, 2, 2); err != nil {
				return 2, err
			}
			ctx, stop := canceled()
			defer stop()
			var a struct {
				Same bool `json:"same"`
			}
			err := askEnv(ctx, c, "diff", struct {
				aboutEnv
				Other string `json:"other"`
				Files bool   `json:"files,omitempty"`
				JSON  bool   `json:"json,omitempty"`
			}{aboutEnv{[]byte(c.dirs.Root), args[0]}, args[1], o.files, o.json}, &a)
			if err != nil {
				return 2, err // trouble, as diff has it
			}
			if !a.Same {
				return 1, nil
			}
			return 0, nil
		},
	}
}

type rebuildOptions struct{ check, json bool }

// maxShown bounds how many differing files are printed for people.
const maxShown = 100

func envRebuildVerb() *verb {
	return &verb{
		name: "env rebuild", args: "--check [flags] NAME|DIGEST", short: "bake an environment again from its stored lock, and compare byte by byte; exit code 1 if it differs",
		setup: func(c *command) {
			o := &rebuildOptions{}
			c.flags.BoolVar(&o.check, "check", "compare; the store stays as it is")
			c.flags.BoolVar(&o.json, "json", "print JSON")
			c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			o := c.opts.(*rebuildOptions)
			if err := wantArgs(c, args, 1, 1); err != nil {
				return 2, err
			}
			if !o.check {
				return 2, usage("sbxrun env rebuild --check "+args[0], "env rebuild: --check is all that there is")
			}
			store, err := onStore(c, args, 1, 1)
			if err != nil {
				return 2, err
			}
			host, err := runtime.Probe()
			if err != nil {
				return 2, err
			}
			m := newManager(c, store, host)
			e, err := m.Get(args[0])
			if err != nil {
				return 2, err
			}
			ctx, stop := canceled()
			defer stop()
			man, err := m.Rebuild(ctx, e)
			c.ui.Done()
			if ctx.Err() != nil {
				return 130, fmt.Errorf("env rebuild: %w", ctx.Err())
			}
			if err != nil {
				return 2, err
			}
			list, err := m.Differences(ctx, e, man)
			if err != nil {
				return 2, err
			}
			return c.reportRebuild(e, man.Digest(), list, o.json)
		},
	}
}

// reportRebuild says what came out of a bake against the one that is stored.
func (c *command) reportRebuild(e *envs.Env, digest string, list []envs.FileDifference, asJSON bool) (int, error) {
	code := 0
	if digest != e.Digest {
		code = 1
	}
	if asJSON {
		if list == nil {
			list = []envs.FileDifference{}
		}
		_, err := c.json(map[string]any{"digest": e.Digest, "rebuilt": digest, "same": code == 0, "differences": list})
		return code, err
	}
	for i, d := range list {
		if i == maxShown {
			c.ui.outf("and %d more\n", len(list)-maxShown)
			break
		}
		c.ui.outf("%s: %s\n", printable(d.Path), d.Problem)
	}
	if code == 0 {
		c.ui.outf("%s: rebuilt, the same byte by byte, %d files\n", envs.Short(e.Digest), e.Files)
		return 0, nil
	}
	return code, &runtime.Error{Op: "rebuild", Err: errors.New("the bake differs from the stored one"), Hint: "hooks and builds are not reproducible as a rule; wheels alone should be"}
}
