package conda

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Bounds of an activation.
const (
	maxScriptBytes = 64 << 10
	maxScripts     = 1000
	maxValueBytes  = 8 << 10
)

var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// Activation reads what activating the prefix in the folder root sets, root being
// found at prefix when it is used: the variables of conda itself, of
// etc/conda/env_vars.d, conda-meta/state, and of etc/conda/activate.d/*.sh. Scripts
// are not run: an interpreter of its own follows the assignments, conditions and
// loops that most of them consist of, on the assumption that variables nobody set
// are not set. A script with anything else (a command, a function) is left out as a
// whole and reported; nothing is guessed.
//
// vars are NAME=VALUE, sorted and without PATH; pathPrefix are the folders to put
// before PATH, in order; each warning names the file that is not applied and why.
func Activation(root, prefix string) (vars, pathPrefix, warnings []string, err error) {
	t, err := os.OpenRoot(root)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("read activation: %w", err)
	}
	defer t.Close()
	warn := func(file string, err error) {
		warnings = append(warnings, fmt.Sprintf("%s is not applied: %v", shown(file), err))
	}
	state := shellState{vars: map[string]shellVar{
		"CONDA_PREFIX":      {prefix, true},
		"CONDA_DEFAULT_ENV": {prefix, true}, // a prefix outside of conda's envs folder has no shorter name
		"CONDA_SHLVL":       {"1", true},
		"IFS":               {" \t\n", false},
	}}
	state.setPath([]string{prefix + "/bin"})
	files, err := list(t, "etc/conda/env_vars.d", ".json")
	if err != nil {
		return nil, nil, nil, err
	}
	set := func(file string, vars map[string]any) {
		for _, name := range slices.Sorted(maps.Keys(vars)) {
			switch v, ok := vars[name].(string); {
			case !ok || !variableName.MatchString(name) || name == "PATH" || len(v) > maxValueBytes || strings.ContainsRune(v, 0):
				warn(file, fmt.Errorf("%q is no variable with a text", shown(name)))
			case v != "***unset***": // how conda writes it
				state.vars[name] = shellVar{v, true}
			}
		}
	}
	for _, file := range files {
		vars := map[string]any{}
		if err := readJSON(t, file, &vars); err != nil {
			warn(file, err)
			continue
		}
		set(file, vars)
	}
	var kept struct {
		Vars map[string]any `json:"env_vars"`
	}
	if err := readJSON(t, "conda-meta/state", &kept); err == nil {
		set("conda-meta/state", kept.Vars)
	} else if !errors.Is(err, fs.ErrNotExist) {
		warn("conda-meta/state", err)
	}
	if files, err = list(t, "etc/conda/activate.d", ".sh"); err != nil {
		return nil, nil, nil, err
	}
	for _, file := range files {
		text, err := read(t, file)
		var next shellState
		if err == nil {
			next, err = state.run(string(text), t, prefix)
		}
		if err != nil {
			warn(file, err)
			continue
		}
		state = next
	}
	for _, name := range slices.Sorted(maps.Keys(state.vars)) {
		if v := state.vars[name]; v.exported && name != "PATH" {
			vars = append(vars, name+"="+v.value)
		}
	}
	return vars, state.path(), warnings, nil
}

// list gives the files of a folder that end in suffix, sorted; no folder is none.
// os.Root follows links within the prefix, as a shell would, and none out of it.
func list(t *os.Root, dir, suffix string) ([]string, error) {
	d, err := t.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read activation: %w", err)
	}
	defer d.Close()
	entries, err := d.ReadDir(maxScripts + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read activation: %w", err)
	}
	if len(entries) > maxScripts {
		return nil, fmt.Errorf("read activation: %s has over %d files", dir, maxScripts)
	}
	var out []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) {
			out = append(out, dir+"/"+e.Name())
		}
	}
	slices.Sort(out)
	return out, nil
}

func read(t *os.Root, name string) ([]byte, error) {
	st, err := t.Stat(name)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxScriptBytes {
		return nil, fmt.Errorf("is no file of at most %d bytes", maxScriptBytes)
	}
	f, err := t.Open(filepath.FromSlash(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxScriptBytes))
}

func readJSON(t *os.Root, name string, to any) error {
	b, err := read(t, name)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, to)
}
