package main

import (
	"context"
	"fmt"
	"text/tabwriter"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/runtime"
)

func envPythonVerb() *verb {
	return &verb{
		name: "env python", args: "add DIR|VERSION | list | rm VERSION", short: "interpreters of your own, for --python",
		long: "add DIR copies the prefix that a folder holds (of pyenv, say) into the store and makes it work at\n" +
			"/opt/python/VERSION; add VERSION has uv download one. What was installed into it stays behind.\n" +
			"Environments whose base lacks the wanted version are baked on it.",
		setup: func(c *command) {
			jsonFlag(c)
			c.flags.BoolVarP(&c.quiet, "quiet", "q", "no progress")
		},
		run: func(c *command, args []string) (int, error) {
			if len(args) == 0 {
				args = []string{"list"}
			}
			want := 1
			switch args[0] {
			case "add", "rm":
				want = 2
			case "list", "ls":
			default:
				return 0, usage("usage: sbxrun env python add DIR|VERSION | list | rm VERSION", "env python: unknown word %q", args[0])
			}
			store, err := onStore(c, args, want, want)
			if err != nil {
				return 0, err
			}
			switch args[0] {
			case "add":
				host, err := runtime.Probe()
				if err != nil {
					return 1, err
				}
				ctx, stop := canceled()
				defer stop()
				p, err := newManager(c, store, host).AddPython(ctx, args[1])
				c.ui.Done()
				if ctx.Err() != nil {
					return 130, fmt.Errorf("env python: %w", ctx.Err())
				}
				if err != nil {
					return 1, err
				}
				if *c.opts.(*bool) {
					return c.json(p)
				}
				c.ui.outf("%s %s\n", p.Version, p.Digest)
				return 0, nil
			case "rm":
				return 0, envs.Open(store, envs.Options{}).RemovePython(context.Background(), args[1])
			}
			all, err := envs.Open(store, envs.Options{}).Pythons()
			if err != nil {
				return 1, err
			}
			if *c.opts.(*bool) {
				if all == nil {
					all = []envs.Python{}
				}
				return c.json(all)
			}
			w := tabwriter.NewWriter(c.ui.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "VERSION\tDIGEST\tSIZE\tPROGRAM\tSOURCE")
			for _, p := range all {
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", p.Version, envs.Short(p.Digest), human(p.SizeBytes), p.Program, printable(p.Source))
			}
			return 0, w.Flush()
		},
	}
}
