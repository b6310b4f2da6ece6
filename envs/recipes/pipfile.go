package recipes

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

type pipfileMeta struct {
	Spec     int `json:"pipfile-spec"`
	Requires struct {
		Version string `json:"python_version"`
		Full    string `json:"python_full_version"`
	}
	Sources []struct{ Name, URL string }
}

type pipfilePackage struct {
	Version, Markers, Index string
	Hashes                  []string
	Git, Ref, Path, File    string
	Subdirectory            string
	Editable                bool
	Extras                  []string
}

// pipfile reads a Pipfile.lock. Its categories are groups; develop is also dev.
func (c *converter) pipfile(in Input) error {
	if line := tooDeep(in.Lock); line > 0 {
		return fmt.Errorf("line %d: nested more than %d deep", line, maxNesting)
	}
	var raw map[string]json.RawMessage
	if err := decodeJSON(in.Lock, &raw); err != nil {
		return err
	}
	var meta pipfileMeta
	if err := decodeJSON(raw["_meta"], &meta); err != nil {
		return fmt.Errorf("_meta: %w", err)
	}
	if meta.Spec != 6 {
		return tip("export it: pipenv requirements --hash", "pipfile-spec %d is not known", meta.Spec)
	}
	need := meta.Requires.Full
	if need == "" && meta.Requires.Version != "" {
		need = meta.Requires.Version + ".*"
	}
	if need != "" {
		if err := c.pythonFits("=="+need, "the project"); err != nil {
			return err
		}
	}
	var groups []string
	for name := range raw {
		if name != "_meta" && name != "default" {
			groups = append(groups, name)
		}
		if name == "develop" {
			groups = append(groups, "dev")
		}
	}
	if err := c.want(nil, groups); err != nil {
		return err
	}
	for _, name := range sortedKeys(raw) {
		wanted := c.env.Groups[pep503.Normalise(name)] || name == "default" && c.main() || name == "develop" && c.env.Groups["dev"]
		if name == "_meta" || !wanted {
			continue
		}
		var packages map[string]pipfilePackage
		if err := decodeJSON(raw[name], &packages); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		for _, k := range sortedKeys(packages) {
			if err := c.addPipfile(k, packages[k], &meta); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *converter) addPipfile(name string, k pipfilePackage, meta *pipfileMeta) error {
	if _, twice := c.pins[pep503.Normalise(name)]; twice {
		return nil // a category's is the default's where both have it
	}
	ok, err := c.holds(k.Markers)
	if err != nil {
		return fmt.Errorf("package %s: %w", name, err)
	}
	switch {
	case !ok:
		return nil
	case k.Git != "":
		return c.addSource(envs.Source{Name: name, URL: k.Git, Rev: k.Ref, Subdirectory: k.Subdirectory})
	case strings.HasPrefix(k.File, "http"):
		f := file{url: k.File}
		for _, h := range k.Hashes {
			f.hash = h
		}
		return c.addURL(name, "", f)
	case k.Path != "" || k.File != "":
		return c.addSource(envs.Source{Name: name, Path: k.Path + k.File, Editable: k.Editable})
	}
	version, exact := strings.CutPrefix(k.Version, "==")
	if !exact {
		return tip("pipenv lock", "package %s: %q is no pin", name, shorten(k.Version))
	}
	var files []file
	for _, h := range k.Hashes {
		files = append(files, file{hash: h})
	}
	// Without an index it comes from the first source.
	index := ""
	for i, s := range meta.Sources {
		if s.Name == k.Index || k.Index == "" && i == 0 {
			index = s.URL
		}
	}
	if k.Index != "" && index == "" {
		return tip("pipenv lock", "package %s: its index %q is none of the sources", name, shorten(k.Index))
	}
	if strings.Contains(index, "${") {
		return tip("give the index with --index-url and lock with a source without variables; credentials belong in the environment or a netrc file",
			"source %q: variables are not expanded", shorten(k.Index))
	}
	return c.add(name, strings.TrimSpace(version), index, files)
}

func decodeJSON(b []byte, to any) error {
	if len(b) == 0 {
		return errors.New("not there")
	}
	err := json.Unmarshal(b, to)
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		line := 1 + bytes.Count(b[:min(int(syntax.Offset), len(b))], []byte("\n"))
		return tip("is it cut off or edited by hand? pipenv lock", "line %d: %w", line, err)
	}
	return err
}
