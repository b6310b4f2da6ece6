package recipes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/pep440"
	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// maxFileBytes bounds a file that is read: locks of 10,000 packages are smaller.
const maxFileBytes = 64 << 20

// Step is the verb of sbxrun-env: it reads the request's files, converts and
// leaves the list where it was told.
func Step(_ context.Context, read func(any) error) (any, error) {
	var q envs.Conversion
	if err := read(&q); err != nil {
		return nil, err
	}
	var in Input
	for i, name := range q.Files {
		b, err := readFile(filepath.Join(q.Dir, name))
		if err != nil {
			return nil, err
		}
		if i == 0 {
			in.Lock = b
		} else {
			in.Project = b
		}
	}
	text, out, err := Convert(q, in)
	if err != nil {
		return nil, err
	}
	if out.Stale != "" {
		return out, nil
	}
	if err := os.WriteFile(q.Output, text, 0o644); err != nil {
		return nil, fmt.Errorf("convert: %w", err)
	}
	return out, nil
}

func readFile(name string) ([]byte, error) {
	b, err := bounded.File(name, maxFileBytes)
	if err != nil {
		return nil, fmt.Errorf("convert: read %q: %w", filepath.Base(name), err)
	}
	return b, nil
}

// Input are the files of a project.
type Input struct {
	Lock    []byte
	Project []byte // the pyproject.toml beside it; nil where there is none
}

// Convert gives the hashed requirements.txt of what the target needs of a
// lock, and what no index has. Errors name the lock's kind and the package.
func Convert(q envs.Conversion, in Input) ([]byte, *envs.Converted, error) {
	c, err := newConverter(q)
	if err != nil {
		return nil, nil, err
	}
	read := map[envs.Kind]func(Input) error{
		envs.KindUV: c.uv, envs.KindPoetry: c.poetry, envs.KindPDM: c.pdm, envs.KindPipfile: c.pipfile, envs.KindPylock: c.pylock,
	}[q.Kind]
	if read == nil {
		return nil, nil, fmt.Errorf("convert %q: not a lock of a Python project", q.Kind)
	}
	if err := read(in); err != nil {
		var s *staleError
		if errors.As(err, &s) {
			return nil, &envs.Converted{Stale: s.needs, StaleHint: s.hint}, nil
		}
		return nil, nil, err
	}
	return c.text(), &envs.Converted{Packages: len(c.pins), Sources: c.sources, Hosts: sortedKeys(c.hosts)}, nil
}

// pin is a package that the target needs, from an index or a URL.
type pin struct {
	version string
	index   string // "" is the public one
	url     string // of the file itself; "" is the index's
	hashes  []string
}

// file is one of a package's distributions.
type file struct{ name, url, hash string }

type converter struct {
	q       envs.Conversion
	env     *Environment
	tags    tags
	pins    map[string]pin
	sources []envs.Source
	hosts   map[string]bool    // scheme://host of files that other indexes than the public one have
	seen    map[string]verdict // of markers
}

type verdict struct {
	holds bool
	err   error
}

func newConverter(q envs.Conversion) (*converter, error) {
	t, err := targetTags(q.Target)
	if err != nil {
		return nil, err
	}
	c := &converter{
		q: q, tags: t, pins: map[string]pin{}, hosts: map[string]bool{}, seen: map[string]verdict{},
		env: &Environment{Vars: q.Target.Vars, Extras: map[string]bool{}, Groups: map[string]bool{}},
	}
	for _, e := range q.Extras {
		c.env.Extras[pep503.Normalise(e)] = true
	}
	for _, g := range append(slices.Clone(q.Groups), q.OnlyGroups...) {
		c.env.Groups[pep503.Normalise(g)] = true
	}
	return c, nil
}

// tip is an error with what to do about it.
func tip(hint, format string, a ...any) error { return hinted.New(fmt.Errorf(format, a...), hint) }

// main says whether the project's own dependencies are wanted.
func (c *converter) main() bool { return len(c.q.OnlyGroups) == 0 }

// holds evaluates a marker; "" holds. A lock has few that differ.
func (c *converter) holds(text string) (bool, error) {
	if text == "" {
		return true, nil
	}
	v, ok := c.seen[text]
	if !ok {
		m, err := parseMarker(text)
		v = verdict{err: err}
		if err == nil {
			v.holds = m(c.env)
		}
		c.seen[text] = v
	}
	return v.holds, v.err
}

// pythonFits checks a requires-python; what names whose it is.
func (c *converter) pythonFits(requires, what string) error {
	ok, err := c.pythonIn(requires)
	if err != nil {
		return fmt.Errorf("%s: requires-python: %w", what, err)
	}
	if !ok {
		return tip("choose another with --python, or a --base that has it", "%s needs Python %s, and the interpreter is %s", what, requires, c.env.Vars["python_full_version"])
	}
	return nil
}

func (c *converter) pythonIn(requires string) (bool, error) {
	s, err := pep440.ParseSpecifiers(requires)
	if err != nil {
		return false, err
	}
	return allow(s, c.env.Vars["python_full_version"]), nil
}

// want checks the extras and groups that were asked for against what there is,
// and turns on all extras if they all are wanted.
func (c *converter) want(extras, groups []string) error {
	check := func(kind, flag string, wanted map[string]bool, there []string) error {
		for i := range there {
			there[i] = pep503.Normalise(there[i])
		}
		for _, w := range sortedKeys(wanted) {
			if !slices.Contains(there, w) {
				slices.Sort(there)
				hint := "it has none"
				if there = slices.Compact(there); len(there) > 0 {
					hint = "it has " + strings.Join(there[:min(len(there), 20)], ", ")
				}
				return tip(hint, "%s %q: the project has no such %s", flag, w, kind)
			}
		}
		return nil
	}
	if err := check("extra", "--extra", c.env.Extras, slices.Clone(extras)); err != nil {
		return err
	}
	if err := check("dependency group", "--group", c.env.Groups, slices.Clone(groups)); err != nil {
		return err
	}
	if c.q.AllExtras {
		for _, e := range extras {
			c.env.Extras[pep503.Normalise(e)] = true
		}
	}
	clear(c.seen)
	return nil
}

// checkPin refuses what would not be one word in a line of a requirements.txt.
func checkPin(name, ver string) error {
	if !validName(name) {
		return fmt.Errorf("package %q: not a name", shorten(name))
	}
	if _, err := pep440.Parse(ver); err != nil || strings.TrimSpace(ver) != ver {
		return fmt.Errorf("package %s: %q is no version", name, shorten(ver))
	}
	return nil
}

// add pins a package to those of its files that the target can use.
func (c *converter) add(name, ver, index string, files []file) error {
	if err := checkPin(name, ver); err != nil {
		return err
	}
	if index != "" && !plainURL(index) {
		return tip("only http and https are read: export it: uv export, poetry export", "package %s: its index is %q", name, shorten(index))
	}
	usable, err := c.usable(name, ver, files)
	if err != nil {
		return err
	}
	p := pin{version: ver, index: c.index(index)}
	for _, f := range usable {
		p.hashes = append(p.hashes, f.hash)
		if p.index != "" && plainURL(f.url) {
			c.hosts[hostOf(f.url)] = true
		}
	}
	return c.put(name, p)
}

// addURL pins a package to one file at a URL.
func (c *converter) addURL(name, ver string, f file) error {
	if f.name == "" {
		f.name = fileOf(f.url)
	}
	if !validName(name) || !plainURL(f.url) {
		return fmt.Errorf("package %q: not a URL of a file: %q", shorten(name), shorten(f.url))
	}
	if _, err := c.usable(name, ver, []file{f}); err != nil {
		return err
	}
	return c.put(name, pin{version: ver, url: f.url, hashes: []string{f.hash}})
}

func (c *converter) put(name string, p pin) error {
	name = pep503.Normalise(name)
	slices.Sort(p.hashes)
	p.hashes = slices.Compact(p.hashes)
	if old, twice := c.pins[name]; twice && (old.version != p.version || old.url != p.url || !slices.Equal(old.hashes, p.hashes)) {
		return tip("lock again", "package %s: both %s and %s are for this target", name, old.version, p.version)
	}
	c.pins[name] = p
	return nil
}

// index gives an index's URL as it is written: without credentials; "" for the
// public one, for which the user's configuration stands.
func (c *converter) index(url string) string {
	if scheme, rest, ok := strings.Cut(url, "://"); ok {
		host, path, _ := strings.Cut(rest, "/")
		host = host[strings.LastIndexByte(host, '@')+1:]
		url = scheme + "://" + host
		if path != "" {
			url += "/" + path
		}
	}
	if url = strings.TrimRight(url, "/"); url == strings.TrimRight(c.q.PublicIndex, "/") {
		return ""
	}
	return url
}

// plainURL: http or https, and one word in a requirements.txt.
func plainURL(u string) bool {
	rest, ok := strings.CutPrefix(u, "https://")
	if !ok {
		rest, ok = strings.CutPrefix(u, "http://")
	}
	return ok && rest != "" && span(u, func(b byte) bool { return b > ' ' && b < 0x7f && !strings.ContainsRune("\"'\\`<>{}$;#", rune(b)) }) == len(u)
}

// hostOf cuts a plain URL after its host, without user and password.
func hostOf(u string) string {
	scheme, rest, _ := strings.Cut(u, "://")
	host, _, _ := strings.Cut(rest, "/")
	return scheme + "://" + host[strings.LastIndexByte(host, '@')+1:]
}

func fileOf(url string) string {
	url, _, _ = strings.Cut(url, "#")
	url, _, _ = strings.Cut(url, "?")
	name := path.Base(url)
	return strings.ReplaceAll(name, "%2B", "+")
}

// checkHash: those that installers take, of the right length.
func checkHash(h string) error {
	algorithm, hex, _ := strings.Cut(h, ":")
	want := map[string]int{"sha256": 64, "sha384": 96, "sha512": 128}[algorithm]
	if want == 0 || len(hex) != want || span(hex, func(c byte) bool { return isDigit(c) || c >= 'a' && c <= 'f' }) != want {
		return fmt.Errorf("%q is no sha256, sha384 or sha512", shorten(h))
	}
	return nil
}

// usable gives the files that the target can use: wheels with its tags, and
// source distributions where building is allowed. Files without a name are
// taken as they are: the installer knows them.
func (c *converter) usable(name, ver string, files []file) (out []file, err error) {
	what := name + " " + ver
	if len(files) == 0 {
		return nil, tip("lock again with a tool of today; or export it: poetry export, uv export", "%s", what+": the lock holds no hash of a file")
	}
	var foreign []string
	sdist := false
	for _, f := range files {
		if err := checkHash(f.hash); err != nil {
			return nil, tip("lock again", "%s: %q: %w", what, shorten(f.name), err)
		}
		switch _, fits := c.tags.rank(f.name); {
		case f.name == "", fits:
			out = append(out, f)
		case strings.HasSuffix(f.name, ".whl"):
			foreign = append(foreign, tagsOf(f.name))
		case !strings.HasSuffix(f.name, ".egg") && !strings.HasSuffix(f.name, ".exe"):
			sdist = true
			if c.q.AllowBuild {
				out = append(out, f)
			}
		}
	}
	if len(out) > 0 {
		return out, nil
	}
	slices.Sort(foreign)
	foreign = slices.Compact(foreign)
	there := strings.Join(foreign[:min(len(foreign), 8)], ", ")
	if len(foreign) > 8 {
		there += ", …"
	}
	switch {
	case sdist && there == "":
		return nil, tip("--allow-build builds it, in a sandbox: that runs its code", "%s", what+" has only a source distribution, and building is off")
	case sdist:
		return nil, tip("--allow-build builds its source distribution, in a sandbox: that runs its code", "%s has no wheel for this target (%s), only for %s, and building is off", what, c.target(), there)
	}
	return nil, tip("another --python or --base may have one; or lock for this platform", "%s has no wheel for this target (%s), only for %s", what, c.target(), there)
}

func tagsOf(file string) string {
	python, abi, platform, ok := wheelTags(file)
	if !ok {
		return file
	}
	return strings.Join(python, ".") + "-" + strings.Join(abi, ".") + "-" + strings.Join(platform, ".")
}

// target names it for people, as its best tag.
func (c *converter) target() string {
	for k, r := range c.tags {
		if r == 0 {
			return k
		}
	}
	return "?"
}

// addSource notes a package that is not from an index. p is local below the
// lock's folder.
func (c *converter) addSource(s envs.Source) error {
	if !validName(s.Name) {
		return fmt.Errorf("package %q: not a name", shorten(s.Name))
	}
	where := s.Path
	if s.URL != "" {
		where = s.URL
		if !plainURL(s.URL) || !strings.HasPrefix(s.URL, "https://") {
			return tip("only git over https is fetched: build a wheel and publish it to an index", "package %s comes from %q", s.Name, shorten(s.URL))
		}
		if len(s.Rev) != 40 || span(s.Rev, func(b byte) bool { return isDigit(b) || b >= 'a' && b <= 'f' }) != 40 {
			return tip("lock again", "package %s comes from git without a full commit hash", s.Name)
		}
	} else if s.Path = path.Clean(s.Path); !filepath.IsLocal(s.Path) || s.Path == "." {
		return tip("nothing outside of it is read: move it below, or build a wheel and publish it to an index", "package %s comes from %q, which is not below the lock's folder", s.Name, shorten(where))
	}
	if s.Subdirectory != "" && !filepath.IsLocal(s.Subdirectory) {
		return fmt.Errorf("package %s: subdirectory %q leaves its repository", s.Name, shorten(s.Subdirectory))
	}
	if !c.q.AllowBuild && !strings.HasSuffix(s.Path, ".whl") {
		return tip("--allow-build builds it, in a sandbox: that runs its code", "package %s comes from %q and must be built, and building is off", s.Name, shorten(where))
	}
	if s.Hash != "" {
		if err := checkHash(s.Hash); err != nil {
			return tip("lock again", "package %s: %w", s.Name, err)
		}
	} else if strings.HasSuffix(s.Path, ".whl") {
		return tip("lock again", "package %s: the lock holds no hash of %q", s.Name, shorten(s.Path))
	}
	s.Name = pep503.Normalise(s.Name)
	if !slices.Contains(c.sources, s) {
		c.sources = append(c.sources, s)
	}
	return nil
}

// text is the list, in an order that does not depend on the lock's.
func (c *converter) text() []byte {
	slices.SortFunc(c.sources, func(a, b envs.Source) int { return strings.Compare(a.Name, b.Name) })
	var b strings.Builder
	others := map[string]bool{}
	public := false
	for _, p := range c.pins {
		if p.url != "" {
			continue
		}
		if p.index == "" {
			public = true
		} else {
			others[p.index] = true
		}
	}
	for i, u := range sortedKeys(others) {
		option := "--extra-index-url"
		if i == 0 && !public {
			option = "--index-url"
		}
		fmt.Fprintf(&b, "%s %s\n", option, u)
	}
	for _, name := range sortedKeys(c.pins) {
		p := c.pins[name]
		if p.url != "" {
			fmt.Fprintf(&b, "%s @ %s", name, p.url)
		} else {
			fmt.Fprintf(&b, "%s==%s", name, p.version)
		}
		for _, h := range p.hashes {
			b.WriteString(" --hash=" + h)
		}
		b.WriteString("\n")
	}
	return []byte(b.String())
}

// ---- TOML ------------------------------------------------------------------

const maxNesting = 64

// decode reads TOML; errors say the line.
func decode(b []byte, to any) error {
	if line := tooDeep(b); line > 0 {
		return fmt.Errorf("line %d: nested more than %d deep", line, maxNesting)
	}
	err := toml.Unmarshal(b, to)
	var d *toml.DecodeError
	if errors.As(err, &d) {
		row, _ := d.Position()
		return tip("is it cut off or edited by hand? lock again", "line %d: %v", row, d)
	}
	return err
}

// tooDeep finds the line where more brackets are open than anyone needs: the
// decoder goes down by recursion.
func tooDeep(b []byte) int {
	line, depth := 1, 0
	quote := byte(0)
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case c == '\n':
			line++
			quote = 0 // a text of several lines holds brackets seldom, and pairs of them
		case quote != 0:
			if c == '\\' && quote == '"' {
				i++
			} else if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '#':
			for i+1 < len(b) && b[i+1] != '\n' {
				i++
			}
		case c == '[' || c == '{':
			if depth++; depth > maxNesting {
				return line
			}
		case c == ']' || c == '}':
			depth = max(0, depth-1)
		}
	}
	return 0
}

// texts reads a value that may be one text or a list of them.
func texts(v any) (out []string) {
	switch v := v.(type) {
	case string:
		return []string{v}
	case []any:
		for _, e := range v {
			if s, ok := e.(string); ok {
				out = append(out, s)
			}
		}
	}
	return out
}
