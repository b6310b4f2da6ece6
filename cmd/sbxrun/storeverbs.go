package main

import (
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime"
)

func envListVerb() *verb {
	type opts struct{ json, size bool }
	return &verb{
		name: "env list", args: "[flags]", short: "list the environments",
		setup: func(c *command) {
			o := &opts{}
			c.flags.BoolVar(&o.json, "json", "print JSON")
			c.flags.BoolVarP(&o.size, "size", "s", "what each has on disk of its own, and shares with others: looks at every file")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 0, 0)
			if err != nil {
				return 0, err
			}
			o := c.opts.(*opts)
			all, err := envs.Open(store, envs.Options{}).ListUsed(o.size)
			if err != nil {
				return 1, err
			}
			if o.json {
				return c.json(all)
			}
			w := tabwriter.NewWriter(c.ui.stdout, 0, 0, 2, ' ', 0)
			disk := ""
			if o.size {
				disk = "OWN\tSHARED\t"
			}
			fmt.Fprintln(w, "DIGEST\tNAMES\tBASE\tPYTHON\tPACKAGES\tSIZE\t"+disk+"BAKED\tUSED")
			for _, e := range all {
				if o.size {
					disk = human(e.OwnBytes) + "\t" + human(e.SharedBytes) + "\t"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\t%s%s\t%s\n", envs.Short(e.Digest), strings.Join(e.Names, ","), e.Base, e.Python, len(e.Packages), human(e.SizeBytes),
					disk, e.CreatedAt.Format(time.DateTime), ago(e.UsedAt))
			}
			return 0, w.Flush()
		},
	}
}

// ago tells a time of use to the precision that it has.
func ago(t time.Time) string {
	switch d := time.Since(t); {
	case d < time.Hour:
		return "within the hour"
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h ago", int(d.Hours()))
	default:
		return fmt.Sprintf("%d days ago", int(d.Hours()/24))
	}
}

func envInspectVerb() *verb {
	return &verb{
		name: "env inspect", args: "NAME|DIGEST", short: "print all about an environment as JSON",
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 1, 1)
			if err != nil {
				return 0, err
			}
			i, err := envs.Open(store, envs.Options{}).Inspect(args[0])
			if err != nil {
				return 1, err
			}
			return c.json(i)
		},
	}
}

// sizeBound is a size that may be 0.
type sizeBound struct {
	v     *int64
	given *bool
}

func (f sizeBound) String() string { return "" }
func (f sizeBound) Type() string   { return "size" }
func (f sizeBound) Set(s string) (err error) {
	*f.v, err = parseSize(s)
	*f.given = true
	return err
}

// daysValue is a duration that may be written in days.
type daysValue struct{ v *time.Duration }

func (f daysValue) String() string { return "" }
func (f daysValue) Type() string   { return "duration" }
func (f daysValue) Set(s string) error {
	days, ok := strings.CutSuffix(s, "d")
	if !ok {
		if s != "0" && strings.Trim(s, "0123456789.") == "" { // seconds elsewhere; here most mean days, and what is removed is gone
			return fmt.Errorf("%q has no unit; write %sd or %sh", s, s, s)
		}
		return durationValue(f).Set(s)
	}
	n, err := parseDuration(days) // as seconds
	if err != nil || n > 1<<62/86400 {
		return fmt.Errorf("%q is not a duration; write 30d or 12h", s)
	}
	*f.v = n * 86400
	return nil
}

func envPruneVerb() *verb {
	type opts struct {
		envs.PruneOptions
		keep    int64
		bounded bool
	}
	return &verb{
		name: "env prune", args: "[flags]", short: "remove environments without a name, and what nothing uses",
		long: "What goes first is what was used least recently. What a live sandbox uses stays, and what\n" +
			"another environment extends. Without flags all environments without a name go.",
		setup: func(c *command) {
			o := &opts{}
			c.flags.Var(daysValue{&o.OlderThan}, "older-than", "only what was not used for this `duration`, as 30d or 12h")
			c.flags.Int64Var(&o.keep, "keep", "the `number` of those used last that stay")
			c.flags.Var(sizeBound{&o.SizeBytes, &o.bounded}, "size", "only until the whole store takes no more than this `size` on disk")
			c.flags.BoolVarP(&o.Named, "all", "a", "those with a name too")
			c.flags.BoolVarP(&o.DryRun, "dry-run", "n", "say what would go, and remove nothing")
			c.opts = o
		},
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 0, 0)
			if err != nil {
				return 0, err
			}
			o := c.opts.(*opts)
			if o.keep < 0 || o.keep > 1<<30 {
				return 0, usage("0 or more", "--keep %d: not a number of environments", o.keep)
			}
			o.Keep = int(o.keep)
			if o.bounded {
				o.SizeBytes = max(o.SizeBytes, 1)
			}
			ctx, stop := canceled()
			defer stop()
			p, err := envs.Open(store, envs.Options{}).Prune(ctx, o.PruneOptions)
			removed, freed := "removed", "freed"
			if o.DryRun {
				removed, freed = "would be removed", "would be freed"
			}
			for _, e := range p.Removed {
				c.ui.outf("%s %s %s\n", removed, envs.Short(e.Key), strings.Join(e.Names, ","))
			}
			for _, e := range p.Busy {
				c.ui.note("%s stays: a live sandbox uses it", envs.Short(e.Key))
			}
			if err != nil {
				return 1, err
			}
			c.ui.outf("%d environments %s, %s %s\n", len(p.Removed), removed, human(p.FreedBytes), freed)
			if p.ContentStays {
				c.ui.note("a bake is running: content that nothing uses is left for the next prune")
			}
			if o.bounded && p.StoreBytes > o.SizeBytes {
				return 1, &runtime.Error{
					Op: "prune", Err: fmt.Errorf("the store takes %s, more than --size %s: what is left may not go", human(p.StoreBytes), human(o.SizeBytes)),
					Hint: "--all lets environments with a name go too; sbxrun env df says what takes the room",
				}
			}
			return 0, nil
		},
	}
}

func envUsageVerb() *verb {
	return &verb{
		name: "env df", args: "[flags]", short: "say what takes room in the store, and what a prune would free", setup: jsonFlag,
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 0, 0)
			if err != nil {
				return 0, err
			}
			u, err := envs.Open(store, envs.Options{}).Usage()
			if err != nil {
				return 1, err
			}
			if *c.opts.(*bool) {
				return c.json(u)
			}
			w := tabwriter.NewWriter(c.ui.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintln(w, "KIND\tCOUNT\tSIZE\tRECLAIMABLE")
			for _, r := range u.Rows {
				if r.SizeBytes == 0 {
					continue
				}
				fmt.Fprintf(w, "%s\t%d\t%s\t%s\n", r.Kind, r.Count, human(r.SizeBytes), human(r.ReclaimableBytes))
			}
			fmt.Fprintf(w, "total\t\t%s\t%s\n", human(u.TotalBytes), human(u.ReclaimableBytes))
			return 0, w.Flush()
		},
	}
}

func envPackVerb() *verb {
	return &verb{
		name: "env pack", args: "[--undo] NAME|DIGEST…", short: "turn environments into one EROFS image each, for stores that are copied or read-only",
		setup: func(c *command) {
			undo := new(bool)
			c.flags.BoolVar(undo, "undo", "turn images into shared files again")
			c.opts = undo
		},
		run: func(c *command, args []string) (int, error) {
			store, err := onStore(c, args, 1, 1<<20)
			if err != nil {
				return 0, err
			}
			ctx, stop := canceled()
			defer stop()
			m := envs.Open(store, envs.Options{})
			for _, a := range args {
				err := m.Pack(ctx, a, *c.opts.(*bool))
				if errors.Is(err, rootfs.ErrBusy) {
					err = &runtime.Error{Op: "pack", Object: a, Err: errors.New("a live sandbox uses it"), Hint: "wait for its end"}
				}
				if err != nil {
					return 1, err
				}
			}
			return 0, nil
		},
	}
}
