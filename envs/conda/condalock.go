package conda

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

type condaLockFile struct {
	Version  int `yaml:"version"`
	Metadata struct {
		Channels []struct {
			URL text `yaml:"url"`
		} `yaml:"channels"`
		Platforms []text `yaml:"platforms"`
	} `yaml:"metadata"`
	Package []condaLockPackage `yaml:"package"`
}

type condaLockPackage struct {
	Name         text      `yaml:"name"`
	Version      text      `yaml:"version"`
	Build        text      `yaml:"build"`
	Manager      text      `yaml:"manager"`
	Platform     text      `yaml:"platform"`
	Dependencies yaml.Node `yaml:"dependencies"` // {name: spec}, or [spec]
	URL          text      `yaml:"url"`
	Hash         struct {
		MD5    text `yaml:"md5"`
		SHA256 text `yaml:"sha256"`
	} `yaml:"hash"`
	Category   text   `yaml:"category"`
	Categories []text `yaml:"categories"`
	Optional   bool   `yaml:"optional"`
}

func parseCondaLock(data []byte, o ParseOptions) (*Lock, error) {
	var f condaLockFile
	if err := parseYAML(data, &f); err != nil {
		return nil, err
	}
	if f.Version != 1 {
		return nil, hinted.New(fmt.Errorf("read lock: conda-lock version %d is unknown", f.Version), "version 1 is what conda-lock and micromamba write")
	}
	if have := texts(f.Metadata.Platforms); len(have) > 0 && !slices.Contains(have, o.Platform) {
		return nil, otherPlatform(o.Platform, have)
	}
	if len(f.Package) == 0 {
		return nil, errors.New("read lock: it names no package")
	}
	want := o.Categories
	if len(want) == 0 {
		want = []string{"main"}
	}
	l := &Lock{Platform: o.Platform}
	for _, c := range f.Metadata.Channels {
		l.Channels = append(l.Channels, channelName(string(c.URL)))
	}
	known := map[string]bool{}
	var other []string
	// A package that several categories need is listed once for each.
	taken := map[[2]string]string{}
	for i := range f.Package {
		e := &f.Package[i]
		if string(e.Platform) != o.Platform {
			other = append(other, string(e.Platform))
			continue
		}
		categories := texts(e.Categories)
		if e.Category != "" || len(categories) == 0 {
			categories = append(categories, cmpOr(string(e.Category), "main"))
		}
		in := false
		for _, c := range categories {
			known[c] = true
			// Optional is set for every category but main: asking for one takes it.
			in = in || slices.Contains(want, c) && (!e.Optional || o.Optional || c != "main")
		}
		if !in {
			continue
		}
		key := [2]string{string(e.Manager), strings.ToLower(string(e.Name))}
		if was, ok := taken[key]; ok && was == string(e.URL) {
			continue
		}
		taken[key] = string(e.URL)
		switch e.Manager {
		case "conda":
			p, err := e.conda()
			if err != nil {
				return nil, err
			}
			l.Packages = append(l.Packages, p)
		case "pip":
			l.Pip = append(l.Pip, e.pip())
		default:
			return nil, fmt.Errorf("read lock: package %s: manager %q is neither conda nor pip", shown(string(e.Name)), shown(string(e.Manager)))
		}
	}
	for _, c := range want {
		if len(known) > 0 && !known[c] && c != "main" {
			return nil, fmt.Errorf("read lock: no package is of category %s", shown(c))
		}
	}
	if len(known) == 0 {
		return nil, otherPlatform(o.Platform, other)
	}
	return l, nil
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// channelName drops the credentials of a channel's URL; names stay.
func channelName(s string) string {
	s = strings.TrimSuffix(s, "/")
	if strings.Contains(s, "://") {
		return strings.TrimSuffix(withoutCredentials(s), "/")
	}
	return uncredentialed(s)
}

func (e *condaLockPackage) conda() (Package, error) {
	p := Package{
		Name: string(e.Name), Version: string(e.Version), Build: string(e.Build),
		SHA256: string(e.Hash.SHA256), MD5: string(e.Hash.MD5),
	}
	if err := p.fromURL(string(e.URL)); err != nil {
		return p, err
	}
	p.BuildNumber = numberOf(p.Build)
	n := &e.Dependencies
	switch {
	case n.Kind == yaml.MappingNode:
		for i := 0; i+1 < len(n.Content); i += 2 {
			p.Depends = append(p.Depends, strings.TrimSpace(n.Content[i].Value+" "+n.Content[i+1].Value))
		}
	case n.Kind == yaml.SequenceNode:
		for _, c := range n.Content {
			p.Depends = append(p.Depends, c.Value)
		}
	}
	slices.Sort(p.Depends)
	return p, nil
}

func (e *condaLockPackage) pip() PipPackage {
	name, extras, _ := strings.Cut(string(e.Name), "[")
	p := PipPackage{Name: pep503.Normalise(strings.TrimSpace(name)), Version: string(e.Version), URL: withoutCredentials(string(e.URL)), SHA256: string(e.Hash.SHA256)}
	for x := range strings.SplitSeq(strings.TrimSuffix(extras, "]"), ",") {
		if x = pep503.Normalise(strings.TrimSpace(x)); x != "" {
			p.Extras = append(p.Extras, x)
		}
	}
	return p
}
