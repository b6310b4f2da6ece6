package envs

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
)

// Kind is what the file of a recipe is, told by its content.
type Kind string

// The kinds. Their text is what people are told.
const (
	KindRequirements Kind = "requirements.txt"
	KindPylock       Kind = "pylock.toml"
	KindPyproject    Kind = "pyproject.toml"
	KindUV           Kind = "uv.lock"
	KindPoetry       Kind = "poetry.lock"
	KindPDM          Kind = "pdm.lock"
	KindPipfile      Kind = "Pipfile.lock"
	KindEnvironment  Kind = "environment.yml"
	KindExplicit     Kind = "@EXPLICIT list"
	KindCondaLock    Kind = "conda-lock.yml"
	KindPixi         Kind = "pixi.lock"
	KindRecipe       Kind = "sbxrun.toml"
)

// Conda says whether an environment of the kind is a conda prefix.
func (k Kind) Conda() bool {
	switch k {
	case KindEnvironment, KindExplicit, KindCondaLock, KindPixi:
		return true
	default:
		return false
	}
}

// kindsTaken is what -r takes, for hints.
const kindsTaken = "-r takes a requirements.txt, pylock.toml, uv.lock, poetry.lock, pdm.lock, Pipfile.lock, pyproject.toml, environment.yml, @EXPLICIT list, conda-lock.yml, pixi.lock or a recipe (sbxrun.toml), by content, or a folder with one"

// inFolder are the names looked for in a folder, locks first, the most exact
// ones before those that say less.
var inFolder = []string{
	"pylock.toml", "uv.lock", "poetry.lock", "pdm.lock", "Pipfile.lock", "pixi.lock",
	"conda-lock.yml", "environment.yml", "environment.yaml", "requirements.txt", "pyproject.toml",
}

// FindRecipe gives the file that -r means: itself, or in a folder the first of
// a project's usual files.
func FindRecipe(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil || !st.IsDir() {
		return path, nil //nolint:nilerr // whoever reads it says what is wrong
	}
	for _, name := range inFolder {
		p := filepath.Join(path, name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", fail(kindsTaken, "read %q: a folder with no %s", path, strings.Join(inFolder, ", no "))
}

// DetectKind tells a file's kind by its content: its name is for messages only.
// It looks at lines: whether the file is valid is for its own parser to say.
func DetectKind(path string, data []byte) (Kind, error) {
	o := outlineOf(data)
	unknown := func(what, hint string) (Kind, error) {
		if hint == "" {
			hint = kindsTaken
		}
		return "", fail(hint, "read %q: it looks like %s", path, what)
	}
	switch {
	case o.conflict > 0:
		return unknown(fmt.Sprintf("a file with an unresolved merge conflict in line %d", o.conflict), "resolve it, or lock again")
	case strings.HasPrefix(o.first, "{") || strings.HasPrefix(o.first, "[") && !o.toml():
		switch {
		case bytes.Contains(data, []byte(`"_meta"`)) && bytes.Contains(data, []byte(`"pipfile-spec"`)):
			return KindPipfile, nil
		case bytes.Contains(data, []byte(`"nbformat"`)):
			return unknown("a notebook", "")
		case bytes.Contains(data, []byte(`"lockfileVersion"`)):
			return unknown("a lock of another language's packages", "")
		}
		return unknown("JSON, but no Pipfile.lock (no _meta with a hash of the Pipfile)", "")
	case o.explicit:
		return KindExplicit, nil
	case strings.HasPrefix(o.first, "#!"):
		return unknown("a script", "")
	case strings.HasPrefix(o.first, "<"):
		return unknown("a web page", "download the file itself, not the page that shows it")
	}
	var is []Kind
	if o.toml() {
		is = o.tomlKinds()
		if len(is) == 0 {
			if what, hint := o.tomlOther(); what != "" {
				return unknown(what, hint)
			}
		}
	} else if len(o.yaml) > 0 && !o.pins {
		is = o.yamlKinds()
		if len(is) == 0 {
			return unknown("YAML with "+names(o.yaml)+", which is none of ours", "")
		}
	}
	switch len(is) {
	case 0:
		return KindRequirements, nil
	case 1:
		return is[0], nil
	}
	var s []string
	for _, k := range is {
		s = append(s, string(k))
	}
	return unknown("several things at once: "+strings.Join(s, ", "), "give the file that the tool wrote, unchanged")
}

// outline is what the lines of a file say at first sight.
type outline struct {
	first    string          // first line that is neither empty nor a comment
	tables   map[string]bool // [x] is "x", [[x]] is "[x]"
	keys     map[string]bool // TOML: x = … before any table
	inTable  map[string]bool // TOML: "table x"
	yaml     map[string]bool // x: at the left edge
	pins     bool            // a line as of requirements.txt
	explicit bool
	conflict int // line of a merge conflict's marker, 0 is none
}

func outlineOf(data []byte) *outline {
	o := &outline{tables: map[string]bool{}, keys: map[string]bool{}, inTable: map[string]bool{}, yaml: map[string]bool{}}
	table, text, at, nested := "", "", 0, 0
	for raw := range bytes.Lines(data) {
		at++
		line := strings.TrimRight(string(raw), white)
		if text != "" { // inside a text of several lines
			if strings.Contains(line, text) {
				text = ""
			}
			continue
		}
		if o.conflict == 0 && (strings.HasPrefix(line, "<<<<<<< ") || strings.HasPrefix(line, ">>>>>>> ")) {
			o.conflict = at
		}
		bare := strings.TrimLeft(line, white)
		if bare == "" || bare[0] == '#' && !(o.first == "" && strings.HasPrefix(line, "#!")) {
			continue
		}
		if o.first == "" {
			o.first = bare
		}
		if bare == "@EXPLICIT" {
			o.explicit = true
		}
		if nested > 0 { // inside an array or a table of several lines
			nested = max(0, nested+depth(bare))
			continue
		}
		if name, ok := header(bare); ok {
			table = name
			o.tables[name] = true
			continue
		}
		n := run(bare, func(c byte) bool { return isNameByte(c) || c == '"' || c == '\'' || c == ' ' })
		key := strings.Trim(strings.TrimSpace(bare[:n]), `"'`)
		if key != "" && !isAlnum(key[0]) && key[0] != '_' {
			key = "" // an item of a YAML list
		}
		rest := bare[n:]
		switch {
		case key != "" && strings.HasPrefix(rest, "=") && !strings.HasPrefix(rest, "=="):
			if table == "" {
				o.keys[key] = true
			} else {
				o.inTable[table+" "+key] = true
			}
			value := strings.TrimLeft(rest[1:], white)
			for _, q := range []string{`"""`, `'''`} {
				if v, ok := strings.CutPrefix(value, q); ok && !strings.Contains(v, q) {
					text = q
				}
			}
			if strings.HasPrefix(value, "[") || strings.HasPrefix(value, "{") {
				nested = max(0, depth(value))
			}
		case key != "" && line[0] == bare[0] && strings.HasPrefix(rest, ":") && (len(rest) == 1 || isWhite(rest[1])):
			o.yaml[key] = true
		case table == "" && key != "" && rest != "" && strings.IndexByte("=<>!~;@[", rest[0]) >= 0, strings.HasPrefix(bare, "-r "), strings.HasPrefix(bare, "--"):
			o.pins = true
		}
	}
	return o
}

// header: [a.b] or [[a]], the latter as "[a]".
func header(s string) (string, bool) {
	s, _, _ = strings.Cut(s, " #")
	s = strings.TrimRight(s, white)
	if len(s) < 2 || s[0] != '[' || s[len(s)-1] != ']' {
		return "", false
	}
	in := s[1 : len(s)-1]
	name := strings.Trim(in, "[]")
	if name == "" || strings.ContainsAny(name, ",={") {
		return "", false
	}
	name = strings.TrimSpace(name)
	if strings.HasPrefix(in, "[") {
		name = "[" + name + "]"
	}
	return name, true
}

// depth counts what a line opens and does not close, outside of quotes.
func depth(s string) int {
	n, quote := 0, byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote != 0:
			if c == '\\' && quote == '"' {
				i++
			} else if c == quote {
				quote = 0
			}
		case c == '"' || c == '\'':
			quote = c
		case c == '#':
			return n
		case c == '[' || c == '{':
			n++
		case c == ']' || c == '}':
			n--
		}
	}
	return n
}

func (o *outline) toml() bool {
	return len(o.tables) > 0 || len(o.keys) > 0 && len(o.yaml) == 0 && !o.pins
}

func (o *outline) hasTable(prefixes ...string) bool {
	for t := range o.tables {
		for _, p := range prefixes {
			if t == p || strings.HasSuffix(p, ".") && strings.HasPrefix(t, p) {
				return true
			}
		}
	}
	return false
}

// recipeKeys are what only a recipe of ours has at its top level.
var recipeKeys = []string{"extends", "base", "python", "requirements", "pip", "conda", "apt", "packages", "channels", "copy", "run", "hooks", "system_site_packages", "allow_build"}

func (o *outline) tomlKinds() (is []Kind) {
	add := func(k Kind, ok bool) {
		if ok {
			is = append(is, k)
		}
	}
	packages := o.tables["[package]"] || o.keys["package"]
	metadata := o.tables["metadata"]
	add(KindPylock, o.keys["lock-version"] && (o.tables["[packages]"] || o.keys["packages"]))
	add(KindUV, o.keys["version"] && o.keys["requires-python"] && !metadata)
	add(KindPDM, metadata && (o.inTable["metadata lock_version"] || o.inTable["metadata strategy"]))
	add(KindPoetry, metadata && (packages || o.inTable["metadata python-versions"]) &&
		(o.inTable["metadata lock-version"] || o.inTable["metadata content-hash"] || o.inTable["metadata python-versions"]) &&
		!o.inTable["metadata lock_version"])
	if len(is) > 0 {
		return is
	}
	if pixiProject := o.inTable["project channels"] || o.inTable["project platforms"]; !pixiProject &&
		(o.hasTable("project", "build-system", "dependency-groups", "tool.") && !o.hasTable("workspace")) {
		return []Kind{KindPyproject}
	}
	if packages || metadata || o.hasTable("[packages]", "[source]", "dev-packages", "workspace", "project", "package") {
		return nil // someone else's
	}
	for _, k := range recipeKeys {
		if o.keys[k] {
			return []Kind{KindRecipe}
		}
	}
	add(KindRecipe, o.hasTable("recipe", "env", "conda", "stages.", "stage.", "[stage]", "[stages]", "[step]", "[copy]"))
	return is
}

// tomlOther names what people mistake for a recipe.
func (o *outline) tomlOther() (what, hint string) {
	switch {
	case o.hasTable("[source]", "dev-packages") || o.tables["packages"]:
		return "a Pipfile", "pipenv lock makes a Pipfile.lock: give that"
	case o.hasTable("workspace", "project"):
		return "a pixi.toml", "pixi lock makes a pixi.lock: give that"
	case o.tables["[package]"] && o.keys["version"]:
		return "a Cargo.lock, or a uv.lock without its requires-python", ""
	case o.tables["[package]"] || o.tables["metadata"]:
		return "a lock without its [metadata]: cut off?", "lock again"
	case o.hasTable("package"):
		return "a Cargo.toml", ""
	}
	var all []string
	for k := range o.keys {
		all = append(all, k)
	}
	for t := range o.tables {
		all = append(all, "["+t+"]")
	}
	sort.Strings(all)
	return "TOML with " + strings.Join(all[:min(len(all), 5)], ", ") + ", which is none of ours", ""
}

func (o *outline) yamlKinds() (is []Kind) {
	y := o.yaml
	switch {
	case y["package"] && y["metadata"]:
		return []Kind{KindCondaLock}
	case y["environments"] && y["packages"] && y["version"]:
		return []Kind{KindPixi}
	case y["dependencies"]:
		return []Kind{KindEnvironment}
	}
	return nil
}

func names(set map[string]bool) string {
	var all []string
	for k := range set {
		all = append(all, k+":")
	}
	sort.Strings(all)
	return strings.Join(all[:min(len(all), 5)], ", ")
}
