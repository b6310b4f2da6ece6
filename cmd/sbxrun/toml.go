package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/sbxrun/sbxrun/envs"
)

// otherSpellings are keys that other tools use for the same limits.
var otherSpellings = map[string]func(n string) (flag, value string){
	"max_cpu_percent": func(n string) (string, string) { return "cpus", n + "/100" },
	"max_memory_mb":   func(n string) (string, string) { return "memory", n + "m" },
	"max_disk_mb":     func(n string) (string, string) { return "disk", n + "m" },
}

// settingsNames are what -f DIR looks for.
var settingsNames = []string{"sbxrun.toml", "pyproject.toml"}

// applyFile sets flags from a TOML file: its top level, or [tool.sbxrun] of a
// pyproject.toml. Keys are the flags' names, with - or _. Flags on the command
// line win. An unknown key is an error. Its tables [services.NAME] are given back.
func applyFile(f *flagSet, path string) ([]serviceTable, error) {
	if st, err := os.Stat(path); err == nil && st.IsDir() {
		found := ""
		for _, name := range settingsNames {
			if _, err := os.Stat(filepath.Join(path, name)); err == nil {
				found = filepath.Join(path, name)
				break
			}
		}
		if found == "" {
			return nil, usage("", "read settings %q: neither sbxrun.toml nor pyproject.toml is in it", path)
		}
		path = found
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, usage("", "read settings %q: %v", path, errors.Unwrap(err))
	}
	var doc map[string]any
	if err := toml.Unmarshal(b, &doc); err != nil {
		var d *toml.DecodeError
		if errors.As(err, &d) {
			row, _ := d.Position()
			return nil, usage("", "%s:%d: %v", path, row, d)
		}
		return nil, usage("", "%s: %v", path, err)
	}
	table := doc
	prefix := ""
	if t, ok := doc["tool"].(map[string]any); ok || filepath.Base(path) == "pyproject.toml" {
		s, ok := t["sbxrun"].(map[string]any)
		if !ok {
			return nil, usage("add a table [tool.sbxrun]", "%s: no table [tool.sbxrun]", path)
		}
		table, prefix = s, "tool.sbxrun."
	}
	file := tomlFile{path: path, text: b}
	services, err := takeServices(&file, table, prefix)
	if err != nil {
		return nil, err
	}
	if envs.IsRecipeTable(table["env"]) { // else it is variables
		delete(table, "env")
		if _, twice := table["requirements"]; twice {
			return nil, usage("keep one of them", "%s: key %q: [%senv] is a recipe too", file.at("requirements"), prefix+"requirements", prefix)
		}
		if x := f.Lookup("requirements"); x != nil && !x.changed && !f.Changed("with") {
			if err := x.set(path); err != nil {
				return nil, err
			}
		}
	}
	return services, file.apply(f, table, prefix)
}

// tomlFile is a settings file that is being applied.
type tomlFile struct {
	path string
	text []byte
}

// at says where a key is.
func (t *tomlFile) at(key string) string { return fmt.Sprintf("%s:%d", t.path, lineOf(t.text, key)) }

// apply sets flags from a table.
func (t *tomlFile) apply(f *flagSet, table map[string]any, prefix string) error {
	var keys []string
	for k := range table {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	fromFile := map[string]string{} // flag → key that set it
	for _, k := range keys {
		at := t.at(k)
		name := strings.ReplaceAll(k, "_", "-")
		values, err := asStrings(table[k])
		if err != nil {
			return usage("", "%s: key %q: %v", at, prefix+k, err)
		}
		if other, ok := otherSpellings[k]; ok && len(values) == 1 {
			var v string
			name, v = other(values[0])
			if n, ok := strings.CutSuffix(v, "/100"); ok {
				var pct float64
				if _, err := fmt.Sscanf(n, "%g", &pct); err != nil {
					return usage("", "%s: key %q: not a number", at, prefix+k)
				}
				v = fmt.Sprint(pct / 100)
			}
			values = []string{v}
		}
		x := f.Lookup(name)
		if x == nil || name == "file" || name == "root" || name == "state" {
			return usage("keys are the names of run's flags", "%s: unknown key %q", at, prefix+k)
		}
		same := name
		if name == "wall-time" { // two names of one limit
			same = "timeout"
		}
		if other, twice := fromFile[same]; twice {
			return usage("keep one of them", "%s: key %q: %q says the same", at, prefix+k, prefix+other)
		}
		if x.changed || same == "timeout" && (f.Changed("timeout") || f.Changed("wall-time")) {
			continue
		}
		fromFile[same] = k
		if list, ok := x.value.(*listValue); ok {
			*list, x.changed = values, true
			continue
		}
		if _, list := x.value.(rateValue); len(values) != 1 && !list {
			return usage("", "%s: key %q: one value, not a list", at, prefix+k)
		}
		for _, v := range values {
			if err := x.set(v); err != nil {
				return usage("", "%s: key %q: %v", at, prefix+k, err)
			}
		}
	}
	return nil
}

// asStrings gives the values of a key as a flag takes them; a table is a list
// of key=value (env, labels, ulimits).
func asStrings(v any) ([]string, error) {
	switch v := v.(type) {
	case string:
		return []string{v}, nil
	case float64:
		return []string{strconv.FormatFloat(v, 'f', -1, 64)}, nil
	case bool, int64:
		return []string{fmt.Sprint(v)}, nil
	case []any:
		var out []string
		for _, x := range v {
			s, err := asStrings(x)
			if err != nil || !plain(x) {
				return nil, errors.New("a list of plain values")
			}
			out = append(out, s[0])
		}
		return out, nil
	case map[string]any:
		var out []string
		for k, x := range v {
			s, err := asStrings(x)
			if err != nil || !plain(x) {
				return nil, errors.New("a table of plain values")
			}
			out = append(out, k+"="+s[0])
		}
		sort.Strings(out)
		return out, nil
	}
	return nil, fmt.Errorf("a value of a kind that no flag takes (%T)", v)
}

func plain(v any) bool {
	switch v.(type) {
	case []any, map[string]any:
		return false
	}
	return true
}

// lineOf finds the line of a key, for messages.
func lineOf(b []byte, key string) int {
	for i, line := range bytes.Split(b, []byte("\n")) {
		l := strings.TrimSpace(string(line))
		if k, _, ok := strings.Cut(l, "="); ok && strings.Trim(strings.TrimSpace(k), `"'`) == key || strings.HasSuffix(l, "."+key+"]") || l == "["+key+"]" {
			return i + 1
		}
	}
	return 1
}
