package envs

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// recipeFile is a recipe in TOML: what lies in one folder makes an environment
// in one or several stages.
type recipeFile struct {
	path   string
	stages map[string]*stage
	final  *stage // its name is ""
}

// stage is a table of a recipe. All of its keys may be missing.
type stage struct {
	name         string
	table        string // as written, for messages
	extends      string // another stage, or an environment by name
	base, python string
	apt          []string
	requirements string   // a file beside the recipe
	inline       []string // or the requirements themselves
	conda        string
	extras       []string
	groups       []string
	hooks        []string // after the packages
	copies       []copyStep
	runs         []string // after the copies
	network      []string // what hooks and runs may reach: host or host:port
	env          []string // KEY=VALUE, sorted
	system       bool
	allowBuild   bool
	indexURL     string
	newer        string
	at           map[string]int // key → line
}

// copyStep copies from the recipe's folder, or from the result of a stage.
type copyStep struct{ stage, from, to string }

// tomlTable reads one table and says where something is wrong in it.
type tomlTable struct {
	path, name string
	text       []byte
	table      map[string]any
	err        error
}

func (t *tomlTable) fail(key, hint, format string, a ...any) {
	if t.err == nil {
		t.err = fail(hint, "%s:%d: key %q: %s", t.path, tomlLine(t.text, t.name, key), t.name+"."+key, fmt.Sprintf(format, a...))
	}
}

func (t *tomlTable) text1(key string) string {
	v, ok := t.table[key]
	if !ok {
		return ""
	}
	s, ok := v.(string)
	if !ok || s == "" || len(s) > 4096 || strings.ContainsAny(s, "\x00\n") {
		t.fail(key, "", "a text in one line")
	}
	return s
}

func (t *tomlTable) flag(key string) bool {
	v, ok := t.table[key]
	b, isBool := v.(bool)
	if ok && !isBool {
		t.fail(key, "", "true or false")
	}
	return b
}

// list takes a text for a list of one. Lines are allowed where they make sense.
func (t *tomlTable) list(key string, lines bool) (out []string) {
	var all []any
	switch v := t.table[key].(type) {
	case nil:
		return nil
	case string:
		all = []any{v}
	case []any:
		all = v
	default:
		t.fail(key, "", "a list of texts")
	}
	for _, v := range all {
		s, ok := v.(string)
		if !ok || strings.TrimSpace(s) == "" || len(s) > 64<<10 || strings.IndexByte(s, 0) >= 0 || !lines && strings.Contains(s, "\n") {
			t.fail(key, "", "a list of texts")
			return nil
		}
		out = append(out, s)
	}
	if len(out) > 1000 {
		t.fail(key, "", "more than 1000")
	}
	return out
}

var stageKeys = []string{
	"allow_build", "apt", "base", "conda", "copy", "env", "exclude_newer", "extends", "extras", "groups", "hooks", "index_url",
	"network", "python", "requirements", "run", "stages", "system_site_packages",
}

// IsRecipeTable tells a table [env] of a settings file that is a recipe from one
// of environment variables: it has a key of a recipe's.
func IsRecipeTable(v any) bool {
	t, ok := v.(map[string]any)
	if !ok {
		return false
	}
	for _, k := range stageKeys {
		if _, ok := t[k]; ok {
			return true
		}
	}
	return false
}

// parseRecipe reads a recipe: the table [env], or [tool.sbxrun.env] of a
// pyproject.toml; errNoRecipe where there is none.
func parseRecipe(file string, text []byte) (*recipeFile, error) {
	var doc map[string]any
	if err := toml.Unmarshal(text, &doc); err != nil {
		var d *toml.DecodeError
		if errors.As(err, &d) {
			row, _ := d.Position()
			return nil, fail("", "%s:%d: %v", file, row, d)
		}
		return nil, fail("", "%s: %v", file, err)
	}
	table, name, err := recipeTable(file, doc)
	if err != nil {
		return nil, err
	}
	r := &recipeFile{path: file, stages: map[string]*stage{}}
	if r.final, err = parseStage(file, text, name, table, true); err != nil {
		return nil, err
	}
	stages, ok := table["stages"].(map[string]any)
	if table["stages"] != nil && !ok {
		return nil, fail("[env.stages.NAME]", "%s:%d: key %q: not a table of stages", file, tomlLine(text, name, "stages"), name+".stages")
	}
	for _, n := range sortedKeys(stages) {
		where := name + ".stages." + n
		if checkName(n) != nil {
			return nil, fail("letters, digits, dot, dash and underscore", "%s:%d: stage %q: not a plain name", file, tomlLine(text, where, ""), n)
		}
		t, ok := stages[n].(map[string]any)
		if !ok {
			return nil, fail("", "%s:%d: stage %q: not a table", file, tomlLine(text, where, ""), n)
		}
		if r.stages[n], err = parseStage(file, text, where, t, false); err != nil {
			return nil, err
		}
		r.stages[n].name = n
	}
	return r, r.check(text)
}

var errNoRecipe = errors.New("no recipe in it")

// recipeTable finds the recipe in a file.
func recipeTable(file string, doc map[string]any) (table map[string]any, name string, err error) {
	inTool := ""
	if t, ok := doc["tool"].(map[string]any); ok {
		doc, _ = t["sbxrun"].(map[string]any)
		inTool = "tool.sbxrun."
	}
	if t, ok := doc["env"].(map[string]any); ok && IsRecipeTable(t) {
		return t, inTool + "env", nil
	}
	return nil, "", fmt.Errorf("read %q: %w", file, errNoRecipe)
}

func parseStage(file string, text []byte, name string, table map[string]any, final bool) (*stage, error) {
	t := &tomlTable{path: file, name: name, text: text, table: table}
	s := &stage{
		table: name, extends: t.text1("extends"), base: t.text1("base"), python: t.text1("python"), apt: t.list("apt", false), conda: t.text1("conda"),
		extras: t.list("extras", false), groups: t.list("groups", false), hooks: t.list("hooks", true), runs: t.list("run", true),
		network: t.list("network", false), system: t.flag("system_site_packages"), allowBuild: t.flag("allow_build"),
		indexURL: t.text1("index_url"), newer: t.text1("exclude_newer"), at: map[string]int{},
	}
	for _, k := range sortedKeys(table) {
		s.at[k] = tomlLine(text, name, k)
		known := false
		for _, x := range stageKeys {
			known = known || k == x && (final || k != "stages")
		}
		if !known {
			t.fail(k, "keys: "+strings.Join(stageKeys, ", "), "unknown")
		}
	}
	switch v := table["requirements"].(type) {
	case nil:
	case string:
		s.requirements = t.text1("requirements")
	case []any:
		if s.inline = t.list("requirements", false); len(v) == 0 {
			s.inline = []string{}
		}
	default:
		t.fail("requirements", "", "a file, or a list of requirements")
	}
	for _, p := range s.apt {
		if !plainPackage(p) {
			t.fail("apt", "name, name=version or name:arch", "%q is not a package", p)
		}
	}
	for _, h := range s.network {
		if strings.ContainsAny(h, " /\t\"'*") || strings.HasPrefix(h, "-") {
			t.fail("network", "host or host:port", "%q is not a host", h)
		}
	}
	for key, file := range map[string]string{"requirements": s.requirements, "conda": s.conda} {
		if file != "" && !filepath.IsLocal(file) {
			t.fail(key, "only what is in the recipe's folder can be read: move it there", "%q leaves the recipe's folder", file)
		}
	}
	s.copies = t.copies()
	if vars, ok := table["env"].(map[string]any); ok {
		for _, k := range sortedKeys(vars) {
			v, ok := vars[k].(string)
			if !ok || k == "" || strings.ContainsAny(k, "=\x00") || strings.IndexByte(v, 0) >= 0 {
				t.fail("env", "", "%q is not a variable with a text", k)
			}
			s.env = append(s.env, k+"="+v)
		}
	} else if table["env"] != nil {
		t.fail("env", "", "a table of variables")
	}
	if s.requirements != "" && s.conda != "" || s.inline != nil && s.conda != "" {
		t.fail("conda", "pip packages of a conda environment go into its pip section", "requirements are given too")
	}
	if s.extends != "" && s.base != "" {
		t.fail("base", "the base is that of what it extends", "extends is given too")
	}
	if !final && len(s.env) > 0 {
		t.fail("env", "variables belong to the environment, not to a stage", "not for a stage")
	}
	return s, t.err
}

func (t *tomlTable) copies() (out []copyStep) {
	all, ok := t.table["copy"].([]any)
	if t.table["copy"] != nil && !ok {
		t.fail("copy", `copy = [{from = "src", to = "/opt/app"}]`, "a list of tables")
	}
	for _, v := range all {
		c, _ := v.(map[string]any)
		for k := range c {
			if k != "from" && k != "to" && k != "stage" {
				t.fail("copy", "keys: from, to, stage", "unknown key %q", k)
			}
		}
		one := copyStep{}
		one.from, _ = c["from"].(string)
		one.to, _ = c["to"].(string)
		one.stage, _ = c["stage"].(string)
		_, staged := c["stage"]
		switch {
		case one.from == "" || one.to == "" || staged && one.stage == "" || strings.ContainsAny(one.from+one.to, "\x00\n"):
			t.fail("copy", `copy = [{from = "src", to = "/opt/app"}]`, "a list of tables with from and to")
		case staged && (!path.IsAbs(one.from) || path.Clean(one.from) != strings.TrimSuffix(one.from, "/")):
			t.fail("copy", "", "from = %q: an absolute path of the stage's", one.from)
		case !staged && !filepath.IsLocal(one.from):
			t.fail("copy", "only what is in the recipe's folder can be copied: move it there", "from = %q: it leaves the recipe's folder", one.from)
		case !path.IsAbs(one.to) || path.Clean(one.to) != strings.TrimSuffix(one.to, "/"):
			t.fail("copy", "", "to = %q: an absolute path without . and ..", one.to)
		case !writable(path.Clean(one.to), true):
			t.fail("copy", "an environment is below "+strings.Join(writablePrefixes, " and "), "to = %q: not there", one.to)
		}
		if !staged {
			one.from = path.Clean(one.from)
		}
		out = append(out, one)
	}
	return out
}

// writablePrefixes are what the steps of a recipe may change: /opt always,
// /usr/local where the base is not the host's own.
var writablePrefixes = []string{"/opt", "/usr/local"}

func writable(p string, inBase bool) bool {
	for i, w := range writablePrefixes {
		if strings.HasPrefix(p, w+"/") && (i == 0 || inBase) {
			return true
		}
	}
	return false
}

// plainPackage is a Debian package's name, with =version or :arch.
func plainPackage(p string) bool {
	name, version, _ := strings.Cut(p, "=")
	return name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789+-.:") == "" && name[0] != '-' && name[0] != '+' &&
		strings.Trim(version, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-.:~") == ""
}

// check looks at what stages want of one another.
func (r *recipeFile) check(text []byte) error {
	const done, open = 1, 2
	state := map[string]int{}
	var visit func(s *stage, chain []string) error
	visit = func(s *stage, chain []string) error {
		if s.name != "" {
			if state[s.name] == done {
				return nil
			}
			chain = append(chain, s.name)
			if state[s.name] == open {
				return fail("a stage can only use what comes before it", "%s:%d: stages go round in a circle: %s", r.path, tomlLine(text, s.table, ""), strings.Join(chain, " → "))
			}
			state[s.name] = open
		}
		for _, c := range s.copies {
			if c.stage == "" {
				continue
			}
			if r.stages[c.stage] == nil {
				return fail("stages: "+strings.Join(sortedKeys(r.stages), ", "), "%s:%d: copy: stage %q is not in the recipe", r.path, s.at["copy"], c.stage)
			}
			if err := visit(r.stages[c.stage], chain); err != nil {
				return err
			}
		}
		if p := r.stages[s.extends]; p != nil {
			if err := visit(p, chain); err != nil {
				return err
			}
		}
		if s.name != "" {
			state[s.name] = done
		}
		return nil
	}
	for _, n := range sortedKeys(r.stages) {
		if err := visit(r.stages[n], nil); err != nil {
			return err
		}
	}
	return visit(r.final, nil)
}

func sortedKeys[V any](m map[string]V) []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// tomlLine finds the line of a table's key, or of the table, for messages.
func tomlLine(text []byte, table, key string) int {
	in, best := "", 1
	for i, raw := range strings.Split(string(text), "\n") {
		line := strings.TrimSpace(raw)
		if name, ok := header(line); ok {
			in = strings.Trim(name, "[]")
			if in == table || in == table+"."+key {
				best = i + 1
			}
			if key != "" && in == table+"."+key {
				return best
			}
			continue
		}
		k, _, ok := strings.Cut(line, "=")
		if k = strings.Trim(strings.TrimSpace(k), `"'`); !ok || strings.HasPrefix(line, "#") {
			continue
		}
		if full := strings.TrimPrefix(in+"."+k, "."); key != "" && (full == table+"."+key || strings.HasPrefix(full, table+"."+key+".")) {
			return i + 1
		}
	}
	return best
}
