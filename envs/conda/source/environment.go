// Package source reads what a conda environment is asked by: environment.yml,
// the channels that conda's and mamba's configuration means by a name, and the
// credentials of the usual files. It must never know the network nor a solver:
// it gives texts to whoever asks those.
package source

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Environment is an environment.yml without what only a shell has use for.
type Environment struct {
	Name      string   // "" where the file gives none
	Channels  []string // as written, nodefaults left out
	Specs     []string // of conda packages
	Pip       []string // lines of a requirements file
	Variables []string // KEY=VALUE, sorted by key
}

// maxSpecs bounds what a file may ask for.
const maxSpecs = 20_000

// ReadEnvironment reads an environment.yml for a platform ("linux-64"). Lines
// with a selector ("# [osx]", "sel(osx): …") of another platform are left out.
func ReadEnvironment(data []byte, platform string) (*Environment, error) {
	var doc struct {
		Name         yaml.Node            `yaml:"name"`
		Channels     []yaml.Node          `yaml:"channels"`
		Dependencies []yaml.Node          `yaml:"dependencies"`
		Variables    map[string]yaml.Node `yaml:"variables"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(data))
	if err := dec.Decode(&doc); err != nil {
		return nil, fmt.Errorf("not valid YAML for an environment: %s", oneLine(err))
	}
	if err := dec.Decode(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one YAML document")
	}
	e := &Environment{Name: scalar(doc.Name)}
	for _, n := range doc.Channels {
		if c := scalar(n); c != "" && c != "nodefaults" && chosen(n, platform) {
			e.Channels = append(e.Channels, c)
		}
	}
	for _, n := range doc.Dependencies {
		if err := e.dependency(n, platform); err != nil {
			return nil, err
		}
	}
	if len(e.Specs) == 0 && len(e.Pip) == 0 {
		return nil, hinted.New(fmt.Errorf("no dependencies for %s", platform), "list packages below dependencies:")
	}
	if len(e.Specs)+len(e.Pip) > maxSpecs {
		return nil, fmt.Errorf("more than %d dependencies", maxSpecs)
	}
	for k, n := range doc.Variables {
		if k == "" || strings.ContainsAny(k, "=\x00\n") || n.Kind != yaml.ScalarNode || strings.ContainsAny(n.Value, "\x00") {
			return nil, fmt.Errorf("line %d: variable %q: not a plain name and text", n.Line, k)
		}
		e.Variables = append(e.Variables, k+"="+n.Value)
	}
	sort.Strings(e.Variables)
	return e, nil
}

func (e *Environment) dependency(n yaml.Node, platform string) error {
	if !chosen(n, platform) {
		return nil
	}
	switch {
	case n.Kind == yaml.ScalarNode && n.Value != "":
		if strings.ContainsAny(n.Value, "\n\x00") {
			return fmt.Errorf("line %d: a dependency of several lines", n.Line)
		}
		e.Specs = append(e.Specs, strings.TrimSpace(n.Value))
		return nil
	case n.Kind == yaml.MappingNode && len(n.Content) == 2 && n.Content[0].Value == "pip" && n.Content[1].Kind == yaml.SequenceNode:
		for _, p := range n.Content[1].Content {
			if p.Kind != yaml.ScalarNode || strings.ContainsAny(p.Value, "\n\x00") {
				return fmt.Errorf("line %d: a requirement below pip: must be one line", p.Line)
			}
			if chosen(*p, platform) {
				e.Pip = append(e.Pip, p.Value)
			}
		}
		return nil
	case n.Kind == yaml.MappingNode && len(n.Content) == 2:
		sel, ok := strings.CutPrefix(n.Content[0].Value, "sel(")
		if ok && strings.HasSuffix(sel, ")") {
			if !onPlatform(strings.TrimSuffix(sel, ")"), platform) {
				return nil
			}
			return e.dependency(*n.Content[1], platform)
		}
	}
	return hinted.New(fmt.Errorf("line %d: not a dependency", n.Line), "an entry is a package (numpy >=2) or pip: with a list")
}

func scalar(n yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		return ""
	}
	return strings.TrimSpace(n.Value)
}

// chosen evaluates the selector of a node's line, if it has one.
func chosen(n yaml.Node, platform string) bool {
	c := strings.TrimSpace(strings.TrimLeft(n.LineComment, "# "))
	if !strings.HasPrefix(c, "[") || !strings.HasSuffix(c, "]") {
		return true
	}
	return onPlatform(c[1:len(c)-1], platform)
}

// onPlatform knows "linux", "not win", "osx or linux", "linux64 and x86_64". A
// word that it does not know is no selector: true.
func onPlatform(sel, platform string) bool {
	system, arch, _ := strings.Cut(platform, "-")
	known := map[string]bool{
		"linux": system == "linux", "osx": system == "osx", "win": system == "win", "unix": system != "win",
		"linux64": platform == "linux-64", "osx64": platform == "osx-64", "win64": platform == "win-64", "win32": platform == "win-32",
		"x86_64": arch == "64", "aarch64": platform == "linux-aarch64", "arm64": arch == "arm64", "ppc64le": arch == "ppc64le",
		"linux-64": platform == "linux-64", "linux-aarch64": platform == "linux-aarch64", "osx-64": platform == "osx-64", "osx-arm64": platform == "osx-arm64", "win-64": platform == "win-64",
	}
	some := false
	for _, alternative := range strings.Split(sel, " or ") {
		all := true
		for _, word := range strings.Split(alternative, " and ") {
			word, negated := strings.CutPrefix(strings.TrimSpace(word), "not ")
			yes, ok := known[strings.TrimSpace(word)]
			if !ok {
				return true
			}
			all = all && yes != negated
		}
		some = some || all
	}
	return some
}

func oneLine(err error) string {
	s := strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), "yaml: ")), " ")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return s
}
