package main

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
