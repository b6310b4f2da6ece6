package envs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/internal/pep503"
	"github.com/sbxrun/sbxrun/rootfs"
)

// An environment of a TOML recipe is a stack of layers upon a base: what it
// extends, system packages, the packages as Ensure bakes them, and one layer of
// all that hooks, copies and runs changed. Each step is kept by a key of what lay
// below it and of what went into it, so a change bakes only what comes after.

// errNotBaked ends a look for what is there already.
var errNotBaked = errors.New("not baked yet")

// isRecipe says whether a file is a TOML recipe, and reads it.
func isRecipe(file string) (*recipeFile, bool, error) {
	path, err := filepath.Abs(file)
	if err != nil {
		return nil, false, fmt.Errorf("read %q: %w", file, err)
	}
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		path = filepath.Join(path, "sbxrun.toml")
	}
	if !strings.HasSuffix(path, ".toml") {
		return nil, false, nil
	}
	b, err := readFile(path)
	if err != nil {
		return nil, false, nil //nolint:nilerr // whoever else reads it says so
	}
	o := outlineOf(b)
	if !o.keys["env"] && !o.hasTable("env", "env.", "tool.sbxrun.env", "tool.sbxrun.env.") && !o.inTable["tool.sbxrun env"] {
		return nil, false, nil
	}
	r, err := parseRecipe(path, b)
	if errors.Is(err, errNoRecipe) {
		return nil, false, nil
	}
	return r, true, err
}

// built is what a stage came to.
type built struct {
	base   rootfs.Base // without the layers
	layers []string    // topmost first
	env    *Env        // whose packages are in it, nil: none
	lock   *lock       // of the packages where they are more than env's
	vars   []string    // KEY=VALUE of all that is in it
}

// upon gives the base with all layers.
func (m *Manager) upon(b *built) (rootfs.Base, error) {
	base := b.base
	for i := len(b.layers) - 1; i >= 0; i-- {
		dir, err := m.store.LayerPath(b.layers[i])
		if err != nil {
			return base, err
		}
		base = base.With(b.layers[i], dir)
	}
	return base, nil
}

// recipeBake evaluates the stages of one recipe.
type recipeBake struct {
	*Manager
	r     Recipe
	file  *recipeFile
	dry   bool // look, bake nothing
	built map[string]*built
	views map[string]*rootfs.Manifest
	proj  *project
	held  []func() // layers that no prune may take yet
	anew  bool     // make the step even if it was made before
}

// hold keeps layers until the bake is over.
func (b *recipeBake) hold(ctx context.Context, dirs ...string) error {
	if b.dry {
		return nil
	}
	for _, d := range dirs { // steps and trees are made by path
		if rootfs.Packed(d) {
			return notPacked("bake", filepath.Base(filepath.Dir(d)))
		}
	}
	release, err := b.store.Use(ctx, dirs...)
	if err == nil {
		b.held = append(b.held, release)
	}
	return err
}

// fromRecipe gives the environment of a TOML recipe; with dry only if it is
// baked, else errNotBaked.
func (m *Manager) fromRecipe(ctx context.Context, r Recipe, file *recipeFile, dry bool) (*Env, error) {
	b := &recipeBake{Manager: m, r: r, file: file, dry: dry, built: map[string]*built{}, views: map[string]*rootfs.Manifest{}}
	defer func() {
		if b.proj != nil {
			b.proj.dir.Close()
		}
		for _, release := range b.held {
			release()
		}
	}()
	if !dry {
		if err := m.store.Writable(); err != nil {
			return nil, fmt.Errorf("bake %q: %w", file.path, err)
		}
		release, err := m.store.Lock(ctx, "objects", false) // no pruning until all is in layers
		if err != nil {
			return nil, err
		}
		defer release()
	}
	out, err := b.stage(ctx, file.final)
	if err != nil {
		return nil, err
	}
	if len(out.layers) == 0 {
		return nil, fail("requirements, conda, apt, copy, run or extends", "bake %q: the recipe puts nothing into the environment", file.path)
	}
	vars := append(append(out.vars, file.final.env...), r.Env...)
	if e := out.env; e != nil && out.lock == nil && slices.Equal(vars, e.Vars) && slices.Equal(e.layers(), out.layers) {
		return e, nil // nothing is added
	}
	key := digestOf(append(append([]string{schema, "recipe", out.base.Digest}, out.layers...), append([]string{"env"}, vars...)...)...)
	e, err := m.load(key)
	if !errors.Is(err, os.ErrNotExist) {
		return e, err
	}
	if dry {
		return nil, errNotBaked
	}
	return b.record(key, out, vars)
}

// record writes what was baked down.
func (b *recipeBake) record(key string, out *built, vars []string) (*Env, error) {
	e := &Env{
		Key: key, Kind: KindFiles, Recipe: b.r, Base: out.base.Name, BaseDigest: out.base.Digest, CreatedAt: time.Now().UTC(),
		Digest: out.layers[0], Below: slices.Clone(out.layers[1:]), Vars: append([]string{}, vars...), Packages: []Package{},
	}
	e.Recipe.Staged, e.Recipe.IndexURL = true, withoutUser(e.Recipe.IndexURL)
	if p := out.env; p != nil {
		e.Kind, e.Python, e.Tool, e.Lock, e.Packages = p.Kind, p.Python, p.Tool, p.Lock, p.Packages
		e.Paths, e.Notes = p.Paths, p.Notes
	}
	if out.lock != nil {
		if err := b.keepLock(out.lock); err != nil {
			return nil, err
		}
		e.Lock = "sha256:" + out.lock.digest()
		view, err := b.view(nil, out.layers)
		if err != nil {
			return nil, err
		}
		e.Packages = distributions(view)
	}
	var err error
	if e.System, err = b.systemPackages(out.layers); err != nil {
		return nil, err
	}
	_, top, err := b.store.Layer(e.Digest)
	if err != nil {
		return nil, err
	}
	for _, f := range top.Entries {
		if f.Type == 'f' {
			e.Files++
			e.SizeBytes += f.Size
		}
	}
	if err := b.save(e); err != nil {
		return nil, err
	}
	return b.load(key)
}

// distributions lists what a tree's .dist-info folders say is installed.
func distributions(man *rootfs.Manifest) (out []Package) {
	for _, f := range man.Entries {
		if d, ok := strings.CutSuffix(path.Dir(f.Path), ".dist-info"); ok && path.Base(f.Path) == "METADATA" {
			name, version, _ := strings.Cut(path.Base(d), "-")
			out = append(out, Package{Name: pep503.Normalise(name), Version: version})
		}
	}
	return out
}

// view is what layers show together, upon a base where it is not nil.
func (b *recipeBake) view(base *rootfs.Base, layers []string) (*rootfs.Manifest, error) {
	key := fmt.Sprint(base != nil, layers)
	if v := b.views[key]; v != nil {
		return v, nil
	}
	var all []*rootfs.Manifest
	for _, l := range layers {
		_, man, err := b.store.Layer(l)
		if err != nil {
			return nil, err
		}
		all = append(all, man)
	}
	if base != nil {
		for _, dir := range base.Lowers {
			man, err := b.store.LayerAt(dir)
			if err != nil {
				return nil, err
			}
			if man != nil { // nil: a base that is none of the store's layers
				all = append(all, man)
			}
		}
	}
	v := rootfs.Stack(all...)
	b.views[key] = v
	return v, nil
}

func (b *recipeBake) stage(ctx context.Context, s *stage) (*built, error) {
	if out := b.built[s.name]; out != nil {
		return out, nil
	}
	out, err := b.begin(ctx, s)
	if err != nil {
		return nil, err
	}
	if len(s.apt) > 0 {
		if err := b.apt(ctx, s, out); err != nil {
			return nil, err
		}
	}
	if s.requirements != "" || s.inline != nil || s.conda != "" {
		if err := b.packages(ctx, s, out); err != nil {
			return nil, err
		}
	}
	below := slices.Clone(out.layers)
	hooks := s.hooks
	if s.name == "" {
		hooks = append(slices.Clone(hooks), b.r.Hooks...)
	}
	for _, h := range hooks {
		if err := b.run(ctx, s, out, "hook", h); err != nil {
			return nil, err
		}
	}
	for _, c := range s.copies {
		if err := b.copy(ctx, s, out, c); err != nil {
			return nil, err
		}
	}
	for _, r := range s.runs {
		if err := b.run(ctx, s, out, "run", r); err != nil {
			return nil, err
		}
	}
	if err := b.squash(ctx, out, below); err != nil {
		return nil, err
	}
	b.built[s.name] = out
	return out, nil
}

// begin finds what a stage starts from.
func (b *recipeBake) begin(ctx context.Context, s *stage) (*built, error) {
	if p := b.file.stages[s.extends]; p != nil {
		from, err := b.stage(ctx, p)
		if err != nil {
			return nil, err
		}
		return &built{base: from.base, layers: slices.Clone(from.layers), env: from.env, lock: from.lock, vars: slices.Clone(from.vars)}, nil
	}
	if s.extends == "" {
		base := b.r.Base
		if s.base != "" && (base.Name == "host" || base.Name == "") { // --base wins
			var err error
			if base, err = b.store.Base(s.base); err != nil {
				return nil, err
			}
		}
		return &built{base: base}, nil
	}
	p, err := b.Get(s.extends)
	if err != nil {
		return nil, &Error{Msg: fmt.Sprintf("%s:%d: extends %q: %v", b.file.path, s.at["extends"], s.extends, err), Tip: "sbxrun env list shows the environments; bake it with --name " + s.extends + ", or name a stage", Err: err}
	}
	if b.trusted != nil {
		if err := b.trusted(ctx, p); err != nil {
			return nil, fmt.Errorf("%s:%d: extends %q: %w", b.file.path, s.at["extends"], s.extends, err)
		}
	}
	base, err := b.store.Base(p.Base)
	if err != nil {
		return nil, err
	}
	if b.r.Base.Name != "host" && b.r.Base.Name != "" && b.r.Base.Name != p.Base {
		return nil, fail("leave --base out", "%s:%d: extends %q: it is upon base %q, not %q", b.file.path, s.at["extends"], s.extends, p.Base, b.r.Base.Name)
	}
	if p.BaseDigest != "" && p.BaseDigest != base.Digest {
		return nil, fail("bake it again first", "%s:%d: extends %q: its base %q has changed since it was baked", b.file.path, s.at["extends"], s.extends, p.Base)
	}
	if err := b.hold(ctx, append([]string{p.Path}, p.Lowers...)...); err != nil {
		return nil, err
	}
	out := &built{base: base, layers: p.layers(), vars: slices.Clone(p.Vars)}
	if p.Kind != KindFiles {
		out.env = p
	}
	return out, nil
}

// step puts a layer on top: the one that the same step gave before, or what make
// makes. A step that changes nothing adds none.
func (b *recipeBake) step(ctx context.Context, out *built, make func() (*rootfs.Manifest, error), inputs ...string) error {
	key := digestOf(append(append([]string{schema, "step", out.base.Digest}, out.layers...), inputs...)...)
	rec := b.store.Path("envs", "steps", key)
	known := func() (bool, error) {
		t, err := os.ReadFile(rec)
		if err != nil {
			return false, nil //nolint:nilerr // not made yet
		}
		touch(rec)
		digest := strings.TrimSpace(string(t))
		if digest == "" {
			return true, nil
		}
		dir, err := b.store.LayerPath(digest)
		if err == nil {
			err = b.hold(ctx, dir)
		}
		if err != nil {
			return false, nil //nolint:nilerr // pruned: made anew
		}
		out.layers = append([]string{digest}, out.layers...)
		return true, nil
	}
	if !b.anew {
		if ok, err := known(); ok || err != nil {
			return err
		}
	}
	if b.dry {
		return errNotBaked
	}
	release, err := b.store.Lock(ctx, "step-"+key, true)
	if err != nil {
		return err
	}
	defer release()
	if !b.anew {
		if ok, err := known(); ok || err != nil { // another made it while we waited
			return err
		}
	}
	man, err := make()
	if err != nil {
		return err
	}
	digest := ""
	if len(man.Entries) > 0 {
		if err := b.store.Publish(ctx, man, func(dir string) error { return b.hold(ctx, dir) }); err != nil {
			return err
		}
		digest = man.Digest()
	}
	if err := b.store.WriteFile(rec, []byte(digest+"\n")); err != nil {
		return err
	}
	if digest != "" {
		out.layers = append([]string{digest}, out.layers...)
	}
	return nil
}

// squash makes one layer of a stage's steps.
func (b *recipeBake) squash(ctx context.Context, out *built, below []string) error {
	own := out.layers[:len(out.layers)-len(below)]
	if len(own) < 2 {
		return nil
	}
	one := &built{base: out.base, layers: slices.Clone(below)}
	err := b.step(ctx, one, func() (*rootfs.Manifest, error) {
		now, err := b.view(&out.base, out.layers)
		if err != nil {
			return nil, err
		}
		before, err := b.view(&out.base, below)
		if err != nil {
			return nil, err
		}
		return rootfs.Diff(now, before), nil
	}, append([]string{"squash"}, own...)...)
	out.layers = one.layers
	return err
}

// packages puts the packages of a stage on top.
func (b *recipeBake) packages(ctx context.Context, s *stage, out *built) error {
	r, label, err := b.packageRecipe(s, out)
	if err != nil {
		return err
	}
	if out.env != nil {
		if err := b.extend(ctx, s, out, r); err != nil {
			return relabel(err, r.File, label)
		}
		return nil
	}
	var e *Env
	if b.dry {
		if e, err = b.find(r); err == nil && e == nil {
			return errNotBaked
		}
	} else {
		e, _, err = b.ensure(ctx, r)
	}
	if err != nil {
		return relabel(err, r.File, label)
	}
	out.env, out.layers, out.vars = e, e.layers(), append(out.vars, e.Vars...)
	return b.hold(ctx, append([]string{e.Path}, e.Lowers...)...)
}

// packageRecipe is what Ensure is asked for; label is what people know its file by.
func (b *recipeBake) packageRecipe(s *stage, out *built) (r Recipe, label string, err error) {
	r = b.r
	r.Name, r.Hooks, r.Env = "", nil, nil
	if r.Python == "" {
		r.Python = s.python
	}
	if r.IndexURL == "" {
		r.IndexURL = s.indexURL
	}
	if r.ExcludeNewer == "" {
		r.ExcludeNewer = s.newer
	}
	if s.allowBuild && !r.AllowBuild && hostIndexesHaveCredentials() {
		return r, "", fail("--allow-build, if you trust them with those", "%s:%d: allow_build: what is built would see the credentials of this host's indexes, and a recipe does not decide that",
			b.file.path, s.at["allow_build"])
	}
	r.AllowBuild = r.AllowBuild || s.allowBuild
	if !r.selects() {
		r.Extras, r.Groups = s.extras, s.groups
	}
	r.SystemSitePackages = r.SystemSitePackages || s.system
	if r.Base, err = b.upon(out); err != nil {
		return r, "", err
	}
	dir := filepath.Dir(b.file.path)
	switch {
	case s.conda != "":
		r.File = filepath.Join(dir, s.conda)
	case s.requirements != "":
		r.File = filepath.Join(dir, s.requirements)
	default:
		text := strings.Join(s.inline, "\n") + "\n"
		r.File = b.store.Path("envs", "inline", digestOf(text), "requirements.txt")
		label = fmt.Sprintf("%s:%d: requirements", b.file.path, s.at["requirements"])
		if _, serr := os.Stat(r.File); serr != nil {
			err = b.store.WriteFile(r.File, []byte(text))
		} else {
			touch(filepath.Dir(r.File))
		}
	}
	return r, label, err
}

// relabel names the recipe where a message names the file that its inline
// requirements were put into.
func relabel(err error, file, label string) error {
	var e *Error
	if label == "" || !errors.As(err, &e) || !strings.Contains(e.Msg, file) {
		return err
	}
	return &Error{Msg: strings.ReplaceAll(strings.ReplaceAll(e.Msg, `"`+file+`"`, label), file, label), Tip: e.Tip, Err: e}
}

// copy puts what a copy adds on top.
func (b *recipeBake) copy(ctx context.Context, s *stage, out *built, c copyStep) error {
	where := fmt.Sprintf("%s:%d", b.file.path, s.at["copy"])
	if !writable(path.Clean(c.to), out.base.Name != "host") {
		return fail("an environment upon the host's own /usr is below /opt; --base another has /usr/local too", "%s: copy to %q: not in an environment upon base %q", where, c.to, out.base.Name)
	}
	var add addition
	var err error
	if c.stage != "" {
		from, err := b.stage(ctx, b.file.stages[c.stage])
		if err == nil {
			key := digestOf(append([]string{schema, "copy from a stage", c.from, c.to}, from.layers...)...)
			add, err = b.remembered(ctx, true, key, func(context.Context) (*rootfs.Manifest, error) { return b.copyFromStage(from, c, where) })
		}
		if err != nil {
			return err
		}
	} else {
		if b.proj == nil {
			if b.proj, err = openProject(filepath.Dir(b.file.path)); err != nil {
				return err
			}
		}
		if add, err = b.copyOf(ctx, b.proj, c.from, c.to); err != nil {
			return errorAt(where, err)
		}
	}
	return b.step(ctx, out, func() (*rootfs.Manifest, error) {
		below, err := b.view(&out.base, out.layers)
		if err != nil {
			return nil, err
		}
		man, err := add.load(ctx)
		if err != nil {
			return nil, err
		}
		for d := path.Dir(strings.Trim(path.Clean(c.to), "/")); d != "."; d = path.Dir(d) {
			if t := below.Type(d); t == 'l' || t == 'f' {
				return nil, fail("name the folder itself", "%s: copy to %q: /%s is no folder", where, c.to, d)
			}
		}
		b.progress.Phase("copy", c.to)
		return rootfs.Diff(rootfs.Stack(withParents(man), below), below), nil
	}, "copy", add.digest)
}

func errorAt(where string, err error) error {
	var e *Error
	if errors.As(err, &e) {
		return &Error{Msg: where + ": " + e.Msg, Tip: e.Tip, Err: err}
	}
	return fmt.Errorf("%s: %w", where, err)
}

// withParents adds the folders that entries lie in.
func withParents(m *rootfs.Manifest) *rootfs.Manifest {
	have := map[string]bool{}
	for _, e := range m.Entries {
		have[e.Path] = true
	}
	for _, e := range m.Entries[:len(m.Entries):len(m.Entries)] {
		for d := path.Dir(e.Path); d != "." && !have[d]; d = path.Dir(d) {
			have[d] = true
			m.Entries = append(m.Entries, rootfs.Entry{Path: d, Type: 'd', Mode: 0o755})
		}
	}
	m.Encode() // sorts
	return m
}

// copyFromStage takes a path of a stage's result: names change, no byte is read.
func (b *recipeBake) copyFromStage(from *built, c copyStep, where string) (*rootfs.Manifest, error) {
	view, err := b.view(nil, from.layers)
	if err != nil {
		return nil, err
	}
	at := strings.Trim(path.Clean(c.from), "/")
	top := view.Type(at)
	switch top {
	case 0:
		return nil, fail("what its steps left is below "+strings.Join(writablePrefixes, " and "), "%s: copy: stage %q has no %q", where, c.stage, c.from)
	case 'l':
		return nil, fail("name what it links to", "%s: copy: %q of stage %q is a link", where, c.from, c.stage)
	}
	part := &rootfs.Manifest{}
	for _, e := range view.Below(at).Entries {
		if top == 'f' {
			e.Path = singleFile
		} else if e.Path == at {
			continue
		} else {
			e.Path = strings.TrimPrefix(e.Path, at+"/")
		}
		part.Entries = append(part.Entries, e)
	}
	return place(part, top == 'f', c.from, c.to), nil
}

// pruneSteps forgets steps whose layer is gone.
func (m *Manager) pruneSteps() error {
	dir := m.store.Path("envs", "steps")
	ents, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("prune steps: %w", err)
	}
	for _, e := range ents {
		p := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(p)
		if err != nil {
			continue // another prune beside us
		}
		if digest := strings.TrimSpace(string(b)); digest != "" {
			if _, err := m.store.LayerPath(digest); err == nil {
				continue
			}
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("prune steps: %w", err)
		}
	}
	return nil
}
