package envs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/internal/pep503"
	"github.com/sbxrun/sbxrun/rootfs"
)

// extend installs the packages of a stage into an environment that is there:
// what changes is a layer upon it. Its pins stay where the new requirements
// leave them a choice.
func (b *recipeBake) extend(ctx context.Context, s *stage, out *built, r Recipe) error {
	p := out.env
	where := fmt.Sprintf("%s:%d", b.file.path, max(s.at["requirements"], s.at["conda"]))
	old := out.lock
	if old == nil {
		kind, text, err := b.LockText(p)
		if err != nil {
			return err
		}
		if kind != "requirements" || s.conda != "" {
			return fail("extend an environment of pip packages, or leave the packages out", "%s: extends an environment with a lock of kind %q: it cannot be installed upon", where, kind)
		}
		if old, err = b.parseLock(text, "lock of "+s.extends); err != nil {
			return err
		}
	}
	if !isPython(p.Python, r.Python) {
		return fail("leave python out", "%s: python %q: the interpreter is that of what it extends, %s", where, r.Python, p.Python)
	}
	r.Python = p.Python
	in, err := b.read(&r)
	if err != nil {
		return err
	}
	py, err := b.interpreter(&r)
	if err != nil {
		return err
	}
	r.prefer = old.text
	if b.dry {
		l, err := b.keptLock(r, in, py)
		if err != nil {
			return err
		}
		if l == nil {
			return errNotBaked
		}
	}
	l, err := b.lock(ctx, r, in, py)
	if err != nil {
		return err
	}
	if len(l.sources) > 0 {
		return fail("build a wheel of it and publish that to an index", "%s: a package from a folder or from git cannot be installed upon another environment", where)
	}
	if l.kind != "requirements" {
		return fail("give a requirements file", "%s: a %s cannot be installed upon another environment", where, l.kind)
	}
	text := uniteLocks(old.text, l.text)
	if out.lock, err = b.parseLock(text, "united lock"); err != nil {
		return err
	}
	return b.step(ctx, out, func() (*rootfs.Manifest, error) {
		return b.installUpon(ctx, out, r, out.lock, py)
	}, "packages", pycs, out.lock.digest(), py.key(r.Base), fmt.Sprint(r.AllowBuild))
}

// isPython says whether a program is the wanted interpreter: a version or a path.
func isPython(program, want string) bool {
	name := filepath.Base(program)
	want = strings.TrimPrefix(want, "python")
	return want == "" || want == program || strings.HasPrefix("python"+want+".", name+".") || strings.HasPrefix(name+".", "python"+want+".")
}

// installUpon brings a tree to what the lock says.
func (b *recipeBake) installUpon(ctx context.Context, out *built, r Recipe, l *lock, py python) (_ *rootfs.Manifest, err error) {
	t, err := b.tool(ctx)
	if err != nil {
		return nil, err
	}
	if t.Kind != "uv" {
		return nil, fail("put uv on PATH", "bake %q: to extend an environment needs uv, which could not be had", r.File)
	}
	w, err := b.workshop(out, "bake")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.done()) }()
	if err := handOver(w.dir, "requirements.txt", l.text); err != nil {
		return nil, fmt.Errorf("bake: %w", err)
	}
	ix := t.index(r, l.in)
	job := func(ix *indexConfig) Job {
		j := b.job(t, w.job.Base, "bake", w.dir, ix)
		j.Binds = slices.DeleteFunc(j.Binds, func(b JobBind) bool { return b.Target == PythonsDir }) // in the trees
		j.Binds[0].Target, j.Trees, j.Dir = scratchDir, w.job.Trees, scratchDir
		j.Env = append(j.Env, "UV_CACHE_DIR="+scratchDir+"/cache", "UV_LINK_MODE=copy")
		return j
	}
	b.progress.Phase("download", fmt.Sprintf("%d packages", len(l.in.reqs)))
	j := job(&ix)
	j.Argv = []string{uvBinary, "pip", "sync", "--quiet", "--python", EnvDir + "/bin/python", "--require-hashes", "--allow-empty-requirements"}
	if !r.AllowBuild {
		j.Argv = append(j.Argv, "--no-build")
	}
	j.Argv = append(j.Argv, scratchDir+"/requirements.txt")
	if err := b.Manager.run(ctx, j, r.File); err != nil {
		return nil, err
	}
	// What the parent has must still find what it needs.
	j = job(nil)
	j.Argv = []string{uvBinary, "pip", "check", "--python", EnvDir + "/bin/python"}
	var said tail
	j.Stdout, j.Stderr = &said, &said
	res, err := b.runner.Run(ctx, j)
	if err != nil {
		return nil, fmt.Errorf("bake: %w", err)
	}
	if res.ExitCode != 0 {
		return nil, fail("loosen the requirements, or bake both in one", "bake %q: what it extends would no longer be whole: %s", r.File, brokenPackage(string(said.b)))
	}
	if err := b.compileNew(ctx, w, job(nil)); err != nil {
		return nil, err
	}
	return w.changes(ctx, func(p string) bool {
		rel, ok := strings.CutPrefix(p, "opt/env/")
		return ok && dropped(rel)
	})
}

// brokenPackage finds the line of uv pip check that says what is wrong.
func brokenPackage(out string) string {
	for _, line := range strings.Split(withoutColours(out), "\n") {
		if strings.Contains(line, " requires ") || strings.Contains(line, "not compatible") {
			return strings.TrimSpace(line)
		}
	}
	return lastLine(out)
}

// compileNew compiles the modules that are new: those below are compiled.
func (b *recipeBake) compileNew(ctx context.Context, w *workshop, j Job) error {
	var list bytes.Buffer
	up := filepath.Join(w.job.Trees[0].Dir, "upper")
	err := filepath.WalkDir(up, func(p string, d os.DirEntry, err error) error { // follows no link
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(p, ".py") && !strings.Contains(p, "\n") {
			list.WriteString("/opt" + strings.TrimPrefix(p, up) + "\n")
		}
		return err
	})
	if err != nil || list.Len() == 0 {
		return err
	}
	if err := handOver(w.dir, "modules", list.Bytes()); err != nil {
		return fmt.Errorf("compile: %w", err)
	}
	b.progress.Phase("compile", "")
	j.Argv = append([]string{EnvDir + "/bin/python"}, compileArgs("-i", scratchDir+"/modules")...)
	var out tail
	j.Stdout, j.Stderr = &out, &out
	res, err := b.runner.Run(ctx, j)
	switch {
	case err != nil:
		return fmt.Errorf("compile: %w", err)
	case res.ExitCode > 1 || res.Reason != "exit" && res.Reason != "":
		return explain("compile", b.file.path, res, string(out.b))
	}
	return ctx.Err()
}

// uniteLocks gives old with what new says otherwise, and what only new has.
func uniteLocks(old, new []byte) []byte {
	var out []string
	at := map[string]int{}
	for _, text := range [][]byte{old, new} {
		for _, block := range lockBlocks(text) {
			name := block
			if !strings.HasPrefix(block, "-") {
				n, _, _ := splitRequirement(block)
				name = pep503.Normalise(n)
			}
			if i, ok := at[name]; ok {
				out[i] = block
				continue
			}
			at[name] = len(out)
			out = append(out, block)
		}
	}
	return []byte(strings.Join(out, "\n") + "\n")
}

// lockBlocks cuts a lock into its logical lines, comments dropped.
func lockBlocks(text []byte) (out []string) {
	block := ""
	for _, line := range strings.Split(strings.ReplaceAll(string(text), "\r\n", "\n"), "\n") {
		if i := strings.Index(" "+line, " #"); i >= 0 {
			line = line[:i]
		}
		line = strings.TrimSpace(line)
		more := strings.HasSuffix(line, "\\")
		line = strings.TrimSpace(strings.TrimSuffix(line, "\\"))
		if block != "" && line != "" {
			block += " "
		}
		if block += line; !more && block != "" {
			out = append(out, block)
			block = ""
		}
	}
	if block != "" {
		out = append(out, block)
	}
	return out
}
