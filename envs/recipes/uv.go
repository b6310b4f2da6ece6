package recipes

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// What uv.lock holds, as far as an environment is made from it.
type uvLock struct {
	Version        int
	RequiresPython string   `toml:"requires-python"`
	Supported      []string `toml:"supported-markers"`
	Manifest       struct {
		Members      []string
		Requirements []uvRequirement
	}
	Package []uvPackage
}

type uvPackage struct {
	Name, Version string
	Source        uvSource
	Forks         []string `toml:"resolution-markers"`
	Dependencies  []uvDependency
	Optional      map[string][]uvDependency `toml:"optional-dependencies"`
	Dev           map[string][]uvDependency `toml:"dev-dependencies"`
	Sdist         *uvFile
	Wheels        []uvFile
	Metadata      struct {
		RequiresDist   []uvRequirement            `toml:"requires-dist"`
		ProvidesExtras []string                   `toml:"provides-extras"`
		RequiresDev    map[string][]uvRequirement `toml:"requires-dev"`
	}
}

type uvRequirement struct{ Name, Marker, Specifier string }

type uvSource struct{ Registry, URL, Git, Path, Directory, Editable, Virtual, Subdirectory string }

// own says whether the source is the lock's folder itself.
func (s uvSource) own() bool { return s.Virtual == "." || s.Editable == "." || s.Directory == "." }

type uvDependency struct {
	Name, Version, Marker string
	Source                *uvSource
	Extra                 []string
}

type uvFile struct{ URL, Path, Filename, Hash string }

func (f uvFile) file() file {
	n := f.Filename
	if n == "" {
		n = fileOf(f.URL + f.Path)
	}
	return file{name: n, url: f.URL, hash: f.Hash}
}

// uv walks the lock from the project along the dependencies that hold here.
func (c *converter) uv(in Input) error {
	var l uvLock
	if err := decode(in.Lock, &l); err != nil {
		return err
	}
	if l.Version != 1 {
		return tip("lock with a uv that writes version 1; or export it: uv export --frozen", "version %d of the format is not known", l.Version)
	}
	w := uvWalk{c: c, lock: &l, byName: map[string][]*uvPackage{}, done: map[uvNode]bool{}}
	var roots []*uvPackage
	for i := range l.Package {
		p := &l.Package[i]
		p.Name = pep503.Normalise(p.Name)
		w.byName[p.Name] = append(w.byName[p.Name], p)
		if p.Source.own() {
			roots = append(roots, p)
		}
	}
	if len(roots) == 0 { // a workspace without a project of its own
		for _, m := range l.Manifest.Members {
			roots = append(roots, w.byName[pep503.Normalise(m)]...)
		}
	}
	script := len(l.Manifest.Requirements) > 0
	if len(roots) == 0 && !script && len(l.Package) > 0 {
		return tip("lock again", "no package of it is the project")
	}
	if err := c.pythonFits(l.RequiresPython, "the project"); err != nil {
		return err
	}
	if err := w.supported(l.Supported); err != nil {
		return err
	}
	var extras, groups []string
	for _, r := range roots {
		extras = append(append(extras, r.Metadata.ProvidesExtras...), sortedKeys(r.Optional)...)
		groups = append(append(groups, sortedKeys(r.Metadata.RequiresDev)...), sortedKeys(r.Dev)...)
	}
	if err := c.want(extras, groups); err != nil {
		return err
	}
	if err := c.fresh(in.Project, func(name string) bool {
		for _, r := range roots {
			for _, q := range r.Metadata.RequiresDist {
				if pep503.Normalise(q.Name) == name {
					return true
				}
			}
		}
		return len(w.byName[name]) > 0
	}, "uv lock"); err != nil {
		return err
	}
	for _, r := range roots {
		w.conflictNames(r.Name)
	}
	for _, r := range roots {
		if err := w.root(r); err != nil {
			return err
		}
	}
	for _, q := range l.Manifest.Requirements {
		if err := w.follow("the script", []uvDependency{{Name: q.Name, Marker: q.Marker}}); err != nil {
			return err
		}
	}
	return w.run()
}

// uvNode is a package, or one of its extras.
type uvNode struct {
	p     *uvPackage
	extra string
}

type uvWalk struct {
	c      *converter
	lock   *uvLock
	byName map[string][]*uvPackage
	done   map[uvNode]bool
	todo   []uvNode
}

func (w *uvWalk) supported(markers []string) error {
	for _, m := range markers {
		if ok, err := w.c.holds(m); err != nil || ok {
			return err
		}
	}
	if len(markers) > 0 {
		return tip("lock for this platform too: [tool.uv] environments", "it was locked for other environments only: %s", shorten(strings.Join(markers, "; ")))
	}
	return nil
}

// conflictNames turns on the names under which uv's markers know the extras and
// groups of a project that has conflicts among them.
func (w *uvWalk) conflictNames(project string) {
	for _, e := range sortedKeys(w.c.env.Extras) {
		w.c.env.Extras[fmt.Sprintf("extra-%d-%s-%s", len(project), project, e)] = true
	}
	for g := range w.c.env.Groups {
		w.c.env.Extras[fmt.Sprintf("group-%d-%s-%s", len(project), project, g)] = true
	}
	if w.c.main() {
		w.c.env.Extras[fmt.Sprintf("project-%d-%s", len(project), project)] = true
	}
}

func (w *uvWalk) root(r *uvPackage) error {
	if w.c.main() {
		w.push(uvNode{r, ""})
		for e := range r.Optional {
			if w.c.env.Extras[pep503.Normalise(e)] {
				w.push(uvNode{r, e})
			}
		}
	}
	for g, deps := range r.Dev {
		if w.c.env.Groups[pep503.Normalise(g)] {
			if err := w.follow("group "+g, deps); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *uvWalk) push(n uvNode) {
	if !w.done[n] {
		w.done[n] = true
		w.todo = append(w.todo, n)
	}
}

func (w *uvWalk) run() error {
	for len(w.todo) > 0 {
		n := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		if n.extra != "" {
			for name, deps := range n.p.Optional {
				if pep503.Normalise(name) == pep503.Normalise(n.extra) {
					if err := w.follow(n.p.Name, deps); err != nil {
						return err
					}
				}
			}
			continue
		}
		if err := w.emit(n.p); err != nil {
			return err
		}
		if err := w.follow(n.p.Name, n.p.Dependencies); err != nil {
			return err
		}
	}
	return nil
}

// follow adds those of the dependencies that hold.
func (w *uvWalk) follow(of string, deps []uvDependency) error {
	for _, d := range deps {
		ok, err := w.c.holds(d.Marker)
		if err != nil {
			return fmt.Errorf("package %s: dependency %s: %w", of, d.Name, err)
		}
		if !ok {
			continue
		}
		p, err := w.find(of, d)
		if err != nil {
			return err
		}
		w.push(uvNode{p, ""})
		for _, e := range d.Extra {
			w.push(uvNode{p, e})
		}
	}
	return nil
}

func (w *uvWalk) find(of string, d uvDependency) (*uvPackage, error) {
	var found []*uvPackage
	for _, p := range w.byName[pep503.Normalise(d.Name)] {
		if (d.Version == "" || d.Version == p.Version) && (d.Source == nil || *d.Source == p.Source) {
			found = append(found, p)
		}
	}
	if len(found) > 1 {
		found = slices.DeleteFunc(found, func(p *uvPackage) bool {
			for _, m := range p.Forks {
				if ok, err := w.c.holds(m); ok || err != nil {
					return false
				}
			}
			return len(p.Forks) > 0
		})
	}
	if len(found) != 1 {
		return nil, tip("lock again", "package %s needs %s %s, of which the lock holds %d", of, d.Name, d.Version, len(found))
	}
	return found[0], nil
}

func (w *uvWalk) emit(p *uvPackage) error {
	s := p.Source
	switch {
	case s.own() || s.Virtual != "":
		return nil // the project is not part of its environment
	case s.Editable != "" || s.Directory != "":
		return w.c.addSource(envs.Source{Name: p.Name, Path: s.Editable + s.Directory, Subdirectory: s.Subdirectory, Editable: s.Editable != ""})
	case s.Path != "":
		local := envs.Source{Name: p.Name, Path: s.Path}
		for _, f := range p.Wheels {
			local.Hash = f.Hash
		}
		if p.Sdist != nil && local.Hash == "" {
			local.Hash = p.Sdist.Hash
		}
		return w.c.addSource(local)
	case s.Git != "":
		// https://host/x?branch=main&subdirectory=y#commit
		url, rev, _ := strings.Cut(s.Git, "#")
		url, query, _ := strings.Cut(url, "?")
		for part := range strings.SplitSeq(query, "&") {
			if v, ok := strings.CutPrefix(part, "subdirectory="); ok {
				s.Subdirectory = strings.ReplaceAll(v, "%2F", "/")
			}
		}
		return w.c.addSource(envs.Source{Name: p.Name, URL: url, Rev: rev, Subdirectory: s.Subdirectory})
	case s.URL != "":
		f := file{url: s.URL}
		if p.Sdist != nil {
			f.hash = p.Sdist.Hash
		}
		for _, w := range p.Wheels {
			f.hash = w.Hash
		}
		return w.c.addURL(p.Name, p.Version, f)
	}
	var files []file
	for _, f := range p.Wheels {
		files = append(files, f.file())
	}
	if p.Sdist != nil {
		files = append(files, p.Sdist.file())
	}
	return w.c.add(p.Name, p.Version, s.Registry, files)
}
