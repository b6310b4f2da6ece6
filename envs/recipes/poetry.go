package recipes

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/pep440"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

type poetryLock struct {
	Package  []poetryPackage
	Extras   map[string][]string
	Metadata struct {
		LockVersion    string                  `toml:"lock-version"`
		PythonVersions string                  `toml:"python-versions"`
		Files          map[string][]poetryFile // before 1.3
		Hashes         map[string][]string     // before 1.0
	}
}

type poetryPackage struct {
	Name, Version  string
	Optional       bool
	PythonVersions string `toml:"python-versions"`
	Groups         []string
	Markers        any // a text, or one for each group
	Files          []poetryFile
	Dependencies   map[string]any
	Extras         map[string][]string
	Source         struct {
		Type, URL, Reference, Subdirectory string
		Resolved                           string `toml:"resolved_reference"`
	}
}

type poetryFile struct{ File, URL, Hash string }

// poetry reads locks of poetry 2 (each package says its groups and markers) and
// of 1 (the project's own pyproject.toml says what is asked for).
func (c *converter) poetry(in Input) error {
	var l poetryLock
	if err := decode(in.Lock, &l); err != nil {
		return err
	}
	major, minor, ok := twoNumbers(l.Metadata.LockVersion)
	if l.Metadata.Hashes != nil || !ok && l.Metadata.Files == nil {
		return tip("export it: poetry export -f requirements.txt; or lock again with a poetry of today", "its format is too old: no lock-version")
	}
	if ok && (major < 1 || major > 2) {
		return tip("export it: poetry export -f requirements.txt", "lock-version %s is not known", l.Metadata.LockVersion)
	}
	match, err := parseConstraint(l.Metadata.PythonVersions)
	if err != nil {
		return fmt.Errorf("python-versions: %w", err)
	}
	if !match(c.env.Vars["python_full_version"]) {
		return tip("choose another with --python, or a --base that has it", "the project needs Python %s, and the interpreter is %s",
			l.Metadata.PythonVersions, c.env.Vars["python_full_version"])
	}
	for i := range l.Package {
		p := &l.Package[i]
		p.Name = pep503.Normalise(p.Name)
		if p.Files == nil {
			for name, f := range l.Metadata.Files {
				if pep503.Normalise(name) == p.Name {
					p.Files = ofVersion(f, p.Name, p.Version)
				}
			}
		}
	}
	if err := c.fresh(in.Project, func(name string) bool {
		return slices.ContainsFunc(l.Package, func(p poetryPackage) bool { return p.Name == name })
	}, "poetry lock"); err != nil {
		return err
	}
	if major == 2 && minor >= 1 {
		return c.poetryGroups(&l, in.Project)
	}
	return c.poetryGraph(&l, in.Project)
}

// ofVersion: the files of several versions are in one list there.
func ofVersion(files []poetryFile, name, ver string) (out []poetryFile) {
	for _, f := range files {
		parts := strings.Split(f.File, "-")
		if strings.HasSuffix(f.File, ".whl") {
			if len(parts) > 1 && parts[1] == ver {
				out = append(out, f)
			}
		} else if n := pep503.Normalise(f.File); strings.HasPrefix(n, pep503.Normalise(name+"-"+ver+".")) {
			out = append(out, f)
		}
	}
	return out
}

const poetryMain = "main"

// poetryGroups takes the packages of the groups asked for whose markers hold.
func (c *converter) poetryGroups(l *poetryLock, project []byte) error {
	p, err := readProject(project)
	if err != nil {
		return err
	}
	groups := p.groupNames()
	for _, k := range l.Package {
		groups = append(groups, k.Groups...)
	}
	groups = slices.DeleteFunc(groups, func(g string) bool { return g == poetryMain })
	if err := c.want(sortedKeys(l.Extras), groups); err != nil {
		return err
	}
	for i := range l.Package {
		k := &l.Package[i]
		wanted := false
		for _, g := range k.Groups {
			g = pep503.Normalise(g)
			if g == poetryMain && !c.main() || g != poetryMain && !c.env.Groups[g] {
				continue
			}
			text, _ := k.Markers.(string)
			if each, ok := k.Markers.(map[string]any); ok {
				for name, m := range each {
					if pep503.Normalise(name) == g {
						text, _ = m.(string)
					}
				}
			}
			ok, err := c.holds(text)
			if err != nil {
				return fmt.Errorf("package %s: %w", k.Name, err)
			}
			wanted = wanted || ok
		}
		if wanted {
			if err := c.addPoetry(k); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *converter) addPoetry(k *poetryPackage) error {
	s := k.Source
	switch s.Type {
	case "directory":
		return c.addSource(envs.Source{Name: k.Name, Path: s.URL, Subdirectory: s.Subdirectory})
	case "file":
		local := envs.Source{Name: k.Name, Path: s.URL}
		for _, f := range k.Files {
			local.Hash = f.Hash
		}
		return c.addSource(local)
	case "git":
		return c.addSource(envs.Source{Name: k.Name, URL: s.URL, Rev: s.Resolved, Subdirectory: s.Subdirectory})
	case "url":
		f := file{url: s.URL}
		for _, x := range k.Files {
			f.name, f.hash = x.File, x.Hash
		}
		return c.addURL(k.Name, k.Version, f)
	case "", "legacy", "pypi":
	default:
		return tip("export it: poetry export -f requirements.txt", "package %s comes from a source of type %q, which is not known", k.Name, shorten(s.Type))
	}
	var files []file
	for _, f := range k.Files {
		files = append(files, file{name: f.File, hash: f.Hash})
	}
	if s.Type != "legacy" {
		s.URL = ""
	}
	return c.add(k.Name, k.Version, s.URL, files)
}

// edge is a dependency: what it names and which versions it takes.
type edge struct {
	name   string
	extras []string
	takes  func(version string) bool
	ok     bool // its markers hold
	maybe  bool // only with an extra
}

// poetryEdges reads a dependency as poetry writes it: a constraint, a table, or
// a list of tables of which the markers tell one. extra is the one of the
// dependent that is looked at, "" for none.
func (c *converter) poetryEdges(name string, v any, extra string) (out []edge, err error) {
	e := edge{name: pep503.Normalise(name), ok: true}
	switch v := v.(type) {
	case string:
		e.takes, err = parseConstraint(v)
	case []any:
		for _, one := range v {
			es, err := c.poetryEdges(name, one, extra)
			if err != nil {
				return nil, err
			}
			out = append(out, es...)
		}
		return out, nil
	case map[string]any:
		text, _ := v["version"].(string)
		if e.takes, err = parseConstraint(text); err != nil {
			break
		}
		e.extras = texts(v["extras"])
		e.maybe, _ = v["optional"].(bool)
		if m, _ := v["markers"].(string); m != "" {
			e.maybe = e.maybe || strings.Contains(m, "extra")
			var parsed marker
			if parsed, err = parseMarker(m); err != nil {
				break
			}
			e.ok = parsed(&Environment{Vars: c.env.Vars, Extras: map[string]bool{extra: true}}) // the dependent's, not the project's
		}
		if py, _ := v["python"].(string); py != "" {
			var match func(string) bool
			if match, err = parseConstraint(py); err != nil {
				break
			}
			e.ok = e.ok && match(c.env.Vars["python_full_version"])
		}
	default:
		err = fmt.Errorf("neither a version nor a table")
	}
	if err != nil {
		return nil, fmt.Errorf("dependency %s: %w", name, err)
	}
	return []edge{e}, nil
}

// poetryGraph walks from what the pyproject.toml asks for.
func (c *converter) poetryGraph(l *poetryLock, project []byte) error {
	p, err := readProject(project)
	if err != nil {
		return err
	}
	if project == nil {
		return tip("put it there; or export the lock: poetry export -f requirements.txt", "a lock of poetry 1 does not say what is asked for, and no pyproject.toml lies beside it")
	}
	poetry := p.Tool.Poetry
	groups := map[string]map[string]any{}
	for g, t := range poetry.Group {
		groups[pep503.Normalise(g)] = t.Dependencies
	}
	if poetry.Dev != nil {
		groups["dev"] = poetry.Dev
	}
	if err := c.want(sortedKeys(l.Extras), sortedKeys(groups)); err != nil {
		return err
	}
	byName := map[string][]*poetryPackage{}
	for i := range l.Package {
		byName[l.Package[i].Name] = append(byName[l.Package[i].Name], &l.Package[i])
	}
	asked := map[string]bool{} // by the project's extras
	for e, names := range l.Extras {
		for _, n := range names {
			n, _, _ = strings.Cut(n, " ")
			asked[pep503.Normalise(n)] = asked[pep503.Normalise(n)] || c.env.Extras[pep503.Normalise(e)]
		}
	}
	w := walk{of: map[string]func(string) ([]edge, error){}, find: func(e edge) (string, error) {
		var fit []*poetryPackage
		for _, k := range byName[e.name] {
			match, err := parseConstraint(k.PythonVersions)
			if err != nil {
				return "", fmt.Errorf("package %s: python-versions: %w", k.Name, err)
			}
			if e.takes(k.Version) && match(c.env.Vars["python_full_version"]) {
				fit = append(fit, k)
			}
		}
		if len(fit) == 0 {
			return "", tip("poetry lock", "%s is needed, and the lock has no version of it that fits", e.name)
		}
		return fit[0].Name + " " + fit[0].Version, nil
	}}
	for i := range l.Package {
		k := &l.Package[i]
		w.of[k.Name+" "+k.Version] = func(extra string) (out []edge, err error) {
			with := map[string]bool{}
			if extra != "" {
				for name, list := range k.Extras {
					for _, r := range list {
						q, err := parseRequirement(r)
						if err == nil && pep503.Normalise(name) == extra {
							with[q.name] = true
						}
					}
				}
			}
			for _, name := range sortedKeys(k.Dependencies) {
				edges, err := c.poetryEdges(name, k.Dependencies[name], extra)
				if err != nil {
					return nil, fmt.Errorf("package %s: %w", k.Name, err)
				}
				for _, e := range edges {
					if e.ok && (extra == "" && !e.maybe || with[e.name]) {
						out = append(out, e)
					}
				}
			}
			return out, nil
		}
	}
	start := func(deps map[string]any) error {
		for _, name := range sortedKeys(deps) {
			if pep503.Normalise(name) == "python" {
				continue
			}
			edges, err := c.poetryEdges(name, deps[name], "")
			if err != nil {
				return fmt.Errorf("pyproject.toml: %w", err)
			}
			for _, e := range edges {
				if e.ok && (!e.maybe || asked[e.name]) {
					w.todo = append(w.todo, e)
				}
			}
		}
		return nil
	}
	if c.main() {
		if err := start(poetry.Dependencies); err != nil {
			return err
		}
	}
	for _, g := range sortedKeys(groups) {
		if c.env.Groups[g] {
			if err := start(groups[g]); err != nil {
				return err
			}
		}
	}
	taken, err := w.run()
	if err != nil {
		return err
	}
	for i := range l.Package {
		if k := &l.Package[i]; taken[k.Name+" "+k.Version] {
			if err := c.addPoetry(k); err != nil {
				return err
			}
		}
	}
	return nil
}

// walk goes along dependencies from todo.
type walk struct {
	todo []edge
	// find names the package that an edge leads to; of gives the edges of one, or
	// of one of its extras.
	find func(edge) (id string, err error)
	of   map[string]func(extra string) ([]edge, error)
}

func (w *walk) run() (taken map[string]bool, err error) {
	taken = map[string]bool{}
	done := map[string]bool{}
	for len(w.todo) > 0 {
		e := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		id, err := w.find(e)
		if err != nil {
			return nil, err
		}
		taken[id] = true
		for _, extra := range append([]string{""}, e.extras...) {
			extra = pep503.Normalise(extra)
			if done[id+" "+extra] {
				continue
			}
			done[id+" "+extra] = true
			next, err := w.of[id](extra)
			if err != nil {
				return nil, err
			}
			w.todo = append(w.todo, next...)
		}
	}
	return taken, nil
}

// parseConstraint reads poetry's version constraints: ^1.2, ~1.2, 1.2.*, >=1,<2,
// *, 1.2, and alternatives with ||.
func parseConstraint(text string) (func(version string) bool, error) {
	var any []pep440.Specifiers
	for alt := range strings.SplitSeq(strings.ReplaceAll(text, "||", "|"), "|") {
		var all []string
		alt = strings.ReplaceAll(alt, ",", " ")
		for _, op := range operators { // ">= 1" is one word
			alt = strings.ReplaceAll(alt, op+" ", op)
		}
		for word := range strings.FieldsSeq(alt) {
			if word != "*" {
				all = append(all, constraintWord(word))
			}
		}
		s, err := pep440.ParseSpecifiers(strings.Join(all, ","))
		if err != nil {
			return nil, err
		}
		any = append(any, s)
	}
	return func(version string) bool {
		return slices.ContainsFunc(any, func(s pep440.Specifiers) bool { return allow(s, version) })
	}, nil
}

// constraintWord says one of poetry's words as specifiers. What is not a
// version is left for their parser to refuse.
func constraintWord(word string) string {
	caret, isCaret := strings.CutPrefix(word, "^")
	tilde, isTilde := strings.CutPrefix(word, "~")
	switch {
	case isTilde && strings.HasPrefix(tilde, "="):
	case isCaret, isTilde:
		base := strings.TrimPrefix(caret, "~")
		release := strings.Split(base[:span(base, func(c byte) bool { return isDigit(c) || c == '.' })], ".")
		at := min(1, len(release)-1) // ~1.2.3 is <1.3
		if isCaret {                 // the leftmost number that is not 0 stays
			for at = 0; at < len(release)-1 && strings.Trim(release[at], "0") == ""; {
				at++
			}
		}
		n, err := strconv.ParseUint(release[at], 10, 32)
		if err != nil {
			return ">=" + base + ",<" + base
		}
		return fmt.Sprintf(">=%s,<%s", base, strings.Join(append(slices.Clone(release[:at]), strconv.FormatUint(n+1, 10)), "."))
	case isDigit(word[0]) || word[0] == 'v':
		return "==" + word
	case word[0] == '=' && !strings.HasPrefix(word, "=="):
		return "=" + word
	}
	return word
}
