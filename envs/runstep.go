package envs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/rootfs"
)

// workshop is a sandbox's view of a stack of layers with the trees that a step
// may change, and a folder of scratch at /mnt/work.
type workshop struct {
	b     *recipeBake
	job   Job
	dir   string // the host's side of /mnt/work
	below *rootfs.Manifest
	done  func() error
}

// scratchDir is where a step that changes an environment has its scratch.
const scratchDir = "/mnt/work"

// workshop prepares a step over what a stage has come to.
func (b *recipeBake) workshop(out *built, name string) (_ *workshop, err error) {
	w := &workshop{b: b}
	top, done, err := b.store.TempDir("step")
	if err != nil {
		return nil, err
	}
	w.done = done
	defer func() {
		if err != nil {
			err = errors.Join(err, done())
		}
	}()
	w.dir = filepath.Join(top, "work")
	empty := filepath.Join(top, "empty")
	if err := errors.Join(os.Mkdir(w.dir, 0o755), os.Mkdir(empty, 0o755)); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	base, err := b.upon(out)
	if err != nil {
		return nil, err
	}
	w.job = Job{Name: name, Base: base, Dir: "/opt", Binds: []JobBind{{Source: w.dir, Target: scratchDir}}}
	var all []*rootfs.Manifest
	for _, dir := range base.Lowers {
		man, err := b.store.LayerAt(dir)
		if err != nil {
			return nil, err
		}
		if man == nil { // a base that is none of the store's layers
			man = &rootfs.Manifest{}
		}
		all = append(all, man)
	}
	for _, p := range writablePrefixes {
		if !writable(p+"/x", out.base.Name != "host") {
			continue
		}
		tree := JobTree{Target: p, Dir: filepath.Join(top, strings.ReplaceAll(p[1:], "/", "-"))}
		if err := errors.Join(os.Mkdir(tree.Dir, 0o700), rootfs.MakeUpper(tree.Dir)); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		for i, dir := range base.Lowers {
			at := p[1:]
			if t := all[i].Type(at); t == 'd' {
				tree.Lowers = append(tree.Lowers, filepath.Join(dir, at))
			} else if t != 0 {
				break
			}
		}
		if tree.Lowers == nil {
			tree.Lowers = []string{empty}
		}
		w.job.Trees = append(w.job.Trees, tree)
	}
	w.below = rootfs.Stack(all...)
	return w, nil
}

// changes is what the jobs left, which are dead by now.
func (w *workshop) changes(ctx context.Context, skip func(string) bool) (*rootfs.Manifest, error) {
	all := &rootfs.Manifest{}
	for _, t := range w.job.Trees {
		up, err := rootfs.OpenUpper(t.Dir)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.job.Name, err)
		}
		man, err := w.b.store.AddUpper(ctx, up, t.Target, w.below, skip)
		up.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.job.Name, err)
		}
		all.Entries = append(all.Entries, man.Entries...)
	}
	return withParents(unique(all)), nil
}

// unique drops the parents that two trees share.
func unique(m *rootfs.Manifest) *rootfs.Manifest {
	m.Encode() // sorts
	m.Entries = slices.Compact(m.Entries)
	return m
}

// run puts what a shell command changed on top.
func (b *recipeBake) run(ctx context.Context, s *stage, out *built, kind, command string) error {
	env := []string{
		"HOME=/tmp", "LANG=C.UTF-8", "PATH=" + EnvDir + "/bin:/usr/local/bin:/usr/bin:/bin", "SOURCE_DATE_EPOCH=1577836800",
		"PYTHONDONTWRITEBYTECODE=1", "PYTHONHASHSEED=0",
	}
	if out.env != nil {
		env = append(env, "PATH="+strings.Join(append(slices.Clone(out.env.PathPrefix()), "/usr/local/bin", "/usr/bin", "/bin"), ":"))
	}
	env = append(append(env, out.vars...), b.file.final.env...)
	inputs := append(append([]string{"run", command, "network"}, s.network...), "env")
	return b.step(ctx, out, func() (_ *rootfs.Manifest, err error) {
		b.progress.Phase(kind, firstLine(command))
		w, err := b.workshop(out, kind)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, w.done()) }()
		j := w.job
		j.Argv, j.Env, j.AllowHosts = []string{"/bin/sh", "-ec", command}, env, s.network
		var text tail
		j.Stdout, j.Stderr = &text, &text
		res, err := b.runner.Run(ctx, j)
		where := fmt.Sprintf("%s:%d", b.file.path, s.at[map[string]string{"hook": "hooks", "run": "run"}[kind]])
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%s: %s %q: %w", where, kind, firstLine(command), ctx.Err())
		case err != nil:
			return nil, fmt.Errorf("%s: %s %q: %w", where, kind, firstLine(command), err)
		case res.Reason != "" && res.Reason != "exit":
			return nil, fail("", "%s: %s %q: %s", where, kind, firstLine(command), res.Message)
		case res.ExitCode != 0:
			last := lastLine(withoutColours(string(text.b)))
			if last == "" {
				last = "it printed nothing"
			}
			hint := ""
			if len(res.Denied) > 0 {
				hint = fmt.Sprintf("it may not reach %s: network = [\"host:port\"] allows more", strings.Join(res.Denied, ", "))
			}
			return nil, fail(hint, "%s: %s %q: exit code %d: %s", where, kind, firstLine(command), res.ExitCode, last)
		}
		return w.changes(ctx, nil)
	}, append(inputs, env...)...)
}

func firstLine(s string) string {
	line, rest, more := strings.Cut(strings.TrimSpace(s), "\n")
	if more && strings.TrimSpace(rest) != "" {
		line += " …"
	}
	return line
}
