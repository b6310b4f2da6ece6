package recipes

import (
	"fmt"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

type pdmLock struct {
	Package  []pdmPackage
	Metadata struct {
		LockVersion string `toml:"lock_version"`
		Groups      []string
		Strategy    []string
		Targets     []struct {
			RequiresPython string `toml:"requires_python"`
			Platform       string
			Implementation string
		}
	}
}

type pdmPackage struct {
	Name, Version  string
	RequiresPython string `toml:"requires_python"`
	Extras         []string
	Groups         []string
	Marker         string
	Dependencies   []string
	Files          []poetryFile
	Path, URL, Git string
	Revision       string
	Subdirectory   string
	Editable       bool
	Index          string
}

const pdmMain = "default"

// pdm reads locks of pdm 2. With the strategy inherit_metadata each package
// says its groups and marker; else the pyproject.toml says what is asked for.
func (c *converter) pdm(in Input) error {
	var l pdmLock
	if err := decode(in.Lock, &l); err != nil {
		return err
	}
	if major, _, ok := twoNumbers(l.Metadata.LockVersion); !ok || major != 4 {
		return tip("export it: pdm export -f requirements", "lock_version %q is not known", l.Metadata.LockVersion)
	}
	if slices.Contains(l.Metadata.Strategy, "no_hashes") {
		return tip("pdm lock without it", "it was locked with the strategy no_hashes")
	}
	for i := range l.Package {
		l.Package[i].Name = pep503.Normalise(l.Package[i].Name)
	}
	p, err := readProject(in.Project)
	if err != nil {
		return err
	}
	if err := c.pdmTarget(&l); err != nil {
		return err
	}
	// pdm names extras and groups alike: what is not known as a group is one.
	locked := slices.DeleteFunc(slices.Clone(l.Metadata.Groups), func(g string) bool { return g == pdmMain })
	var groups []string
	extras := sortedKeys(p.Project.Optional)
	for _, g := range locked {
		if !slices.Contains(extras, g) {
			groups = append(groups, g)
		}
	}
	if in.Project == nil {
		extras = locked
	}
	extras = slices.DeleteFunc(extras, func(e string) bool { return !slices.Contains(locked, e) })
	if err := c.want(extras, groups); err != nil {
		return err
	}
	if err := c.fresh(in.Project, func(name string) bool {
		return slices.ContainsFunc(l.Package, func(k pdmPackage) bool { return k.Name == name })
	}, "pdm lock"); err != nil {
		return err
	}
	if !slices.Contains(l.Metadata.Strategy, "inherit_metadata") {
		if in.Project == nil {
			return tip("put it there; or export the lock: pdm export -f requirements", "a lock without the strategy inherit_metadata does not say what is asked for, and no pyproject.toml lies beside it")
		}
		return c.pdmGraph(&l, p)
	}
	for i := range l.Package {
		k := &l.Package[i]
		wanted := slices.ContainsFunc(k.Groups, func(g string) bool {
			return g == pdmMain && c.main() || c.env.Groups[pep503.Normalise(g)] || c.main() && c.env.Extras[pep503.Normalise(g)]
		})
		ok, err := c.holds(k.Marker)
		if err != nil {
			return fmt.Errorf("package %s: %w", k.Name, err)
		}
		if wanted && ok {
			if err := c.addPDM(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// pdmTarget: a lock may be for some platforms only.
func (c *converter) pdmTarget(l *pdmLock) error {
	var there []string
	for _, t := range l.Metadata.Targets {
		ok, err := c.pythonIn(t.RequiresPython)
		if err != nil {
			return fmt.Errorf("target: %w", err)
		}
		if ok && (t.Platform == "" || strings.Contains(t.Platform, "linux")) &&
			(t.Implementation == "" || strings.EqualFold(t.Implementation, c.env.Vars["implementation_name"])) {
			return nil
		}
		there = append(there, strings.TrimSpace(t.RequiresPython+" "+t.Platform+" "+t.Implementation))
	}
	if len(there) == 0 {
		return nil
	}
	return tip("pdm lock --python … --platform linux --append", "it was locked for %s, and the interpreter is %s on linux", shorten(strings.Join(there, "; ")), c.env.Vars["python_full_version"])
}

func (c *converter) addPDM(k *pdmPackage) error {
	switch {
	case k.Git != "":
		return c.addSource(envs.Source{Name: k.Name, URL: k.Git, Rev: k.Revision, Subdirectory: k.Subdirectory})
	case k.Path != "":
		return c.addSource(envs.Source{Name: k.Name, Path: k.Path, Subdirectory: k.Subdirectory, Editable: k.Editable})
	case k.URL != "":
		f := file{url: k.URL}
		for _, x := range k.Files {
			f.name, f.hash = x.File, x.Hash
		}
		return c.addURL(k.Name, k.Version, f)
	}
	var files []file
	for _, f := range k.Files {
		name := f.File
		if name == "" {
			name = fileOf(f.URL)
		}
		files = append(files, file{name: name, url: f.URL, hash: f.Hash})
	}
	return c.add(k.Name, k.Version, k.Index, files)
}

// pdmGraph walks from what the pyproject.toml asks for.
func (c *converter) pdmGraph(l *pdmLock, p *project) error {
	toEdge := func(r requirement) edge {
		return edge{name: r.name, extras: r.extras, ok: r.applies(c.env), takes: func(v string) bool { return allow(r.specs, v) }}
	}
	byName := map[string][]string{}
	entries := map[string][]*pdmPackage{} // the package itself and one for each set of extras
	for i := range l.Package {
		k := &l.Package[i]
		id := k.Name + " " + k.Version
		if entries[id] == nil {
			byName[k.Name] = append(byName[k.Name], id)
		}
		entries[id] = append(entries[id], k)
	}
	w := walk{of: map[string]func(string) ([]edge, error){}, find: func(e edge) (string, error) {
		for _, id := range byName[e.name] {
			k := entries[id][0]
			fits, err := c.pythonIn(k.RequiresPython)
			if err != nil {
				return "", fmt.Errorf("package %s: %w", k.Name, err)
			}
			if fits && e.takes(k.Version) {
				return id, nil
			}
		}
		return "", tip("pdm lock", "%s is needed, and the lock has no version of it that fits", e.name)
	}}
	for id, list := range entries {
		w.of[id] = func(extra string) (out []edge, err error) {
			for _, k := range list {
				if extra == "" && len(k.Extras) > 0 || extra != "" && !slices.ContainsFunc(k.Extras, func(x string) bool { return pep503.Normalise(x) == extra }) {
					continue
				}
				for _, d := range k.Dependencies {
					r, err := parseRequirement(d)
					if err != nil {
						return nil, fmt.Errorf("package %s: %w", k.Name, err)
					}
					if e := toEdge(r); e.ok && r.name != k.Name {
						out = append(out, e)
					}
				}
			}
			return out, nil
		}
	}
	start := func(deps []string) error {
		for _, d := range deps {
			r, err := parseRequirement(d)
			if err != nil {
				return fmt.Errorf("pyproject.toml: %w", err)
			}
			if e := toEdge(r); e.ok {
				w.todo = append(w.todo, e)
			}
		}
		return nil
	}
	var err error
	if c.main() {
		err = start(p.Project.Dependencies)
		for e, deps := range p.Project.Optional {
			if err == nil && c.env.Extras[pep503.Normalise(e)] {
				err = start(deps)
			}
		}
	}
	for _, groups := range []map[string]any{p.Groups, p.Tool.PDM.Dev} {
		for g := range groups {
			if err == nil && c.env.Groups[pep503.Normalise(g)] {
				var deps []string
				if deps, err = groupOf(groups, g, 0); err == nil {
					err = start(deps)
				}
			}
		}
	}
	if err != nil {
		return err
	}
	taken, err := w.run()
	if err != nil {
		return err
	}
	for id := range taken {
		if err := c.addPDM(entries[id][0]); err != nil {
			return err
		}
	}
	return nil
}

// groupOf gives a dependency group (PEP 735) with those that it includes.
func groupOf(groups map[string]any, name string, depth int) (out []string, err error) {
	if depth > 16 {
		return nil, fmt.Errorf("dependency group %q: includes itself, or is nested too deeply", name)
	}
	for g, v := range groups {
		if pep503.Normalise(g) != pep503.Normalise(name) {
			continue
		}
		list, _ := v.([]any)
		for _, e := range list {
			switch e := e.(type) {
			case string:
				out = append(out, e)
			case map[string]any:
				other, _ := e["include-group"].(string)
				more, err := groupOf(groups, other, depth+1)
				if err != nil {
					return nil, err
				}
				out = append(out, more...)
			}
		}
		return out, nil
	}
	return nil, fmt.Errorf("dependency group %q: not there", name)
}
