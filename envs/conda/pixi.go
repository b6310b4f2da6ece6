package conda

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

type pixiFile struct {
	Version   int `yaml:"version"`
	Platforms []struct {
		Name   text `yaml:"name"`
		Subdir text `yaml:"subdir"`
	} `yaml:"platforms"`
	Environments map[string]struct {
		Channels []struct {
			URL text `yaml:"url"`
		} `yaml:"channels"`
		Packages map[string][]pixiSelector `yaml:"packages"`
	} `yaml:"environments"`
	Packages []pixiPackage `yaml:"packages"`
}

type pixiSelector struct {
	Conda  text `yaml:"conda"`
	Source text `yaml:"conda_source"`
	Pypi   text `yaml:"pypi"`
}

type pixiPackage struct {
	pixiSelector  `yaml:",inline"`
	Name          text   `yaml:"name"`
	Version       text   `yaml:"version"`
	Build         text   `yaml:"build"`
	BuildNumber   *int   `yaml:"build_number"`
	Subdir        text   `yaml:"subdir"`
	Noarch        text   `yaml:"noarch"`
	FileName      text   `yaml:"file_name"`
	Channel       text   `yaml:"channel"`
	SHA256        text   `yaml:"sha256"`
	MD5           text   `yaml:"md5"`
	Depends       []text `yaml:"depends"`
	Constrains    []text `yaml:"constrains"`
	Features      text   `yaml:"features"`
	TrackFeatures []text `yaml:"track_features"`
	License       text   `yaml:"license"`
	LicenseFamily text   `yaml:"license_family"`
	PURLs         []text `yaml:"purls"`
	Size          int64  `yaml:"size"`
	Timestamp     int64  `yaml:"timestamp"`
	SitePackages  text   `yaml:"python_site_packages_path"`
}

func parsePixi(data []byte, o ParseOptions) (*Lock, error) {
	var f pixiFile
	if err := parseYAML(data, &f); err != nil {
		return nil, err
	}
	if f.Version != 6 && f.Version != 7 {
		return nil, hinted.New(fmt.Errorf("read lock: pixi.lock version %d is unknown", f.Version), "versions 6 and 7 are read: pixi lock, of pixi 0.40 or later, writes them")
	}
	name := cmpOr(o.Environment, "default")
	env, ok := f.Environments[name]
	if !ok {
		have := slices.Sorted(maps.Keys(f.Environments))
		return nil, hinted.New(fmt.Errorf("read lock: no environment %q", shown(name)), "it has: "+shown(strings.Join(have, ", ")))
	}
	// Version 7 gives platforms names of their own, which may differ from the subdir.
	key := o.Platform
	for _, p := range f.Platforms {
		if string(p.Subdir) == o.Platform && env.Packages[o.Platform] == nil {
			key = string(p.Name)
		}
	}
	chosen, ok := env.Packages[key]
	if !ok {
		if len(env.Packages) == 0 {
			return nil, fmt.Errorf("read lock: environment %s names no package", shown(name))
		}
		return nil, otherPlatform(o.Platform, slices.Collect(maps.Keys(env.Packages)))
	}
	l := &Lock{Platform: o.Platform}
	for _, c := range env.Channels {
		l.Channels = append(l.Channels, channelName(string(c.URL)))
	}
	at := make(map[pixiSelector]int, len(f.Packages))
	for i := range f.Packages {
		at[f.Packages[i].pixiSelector] = i
	}
	for _, s := range chosen {
		i, ok := at[s]
		switch {
		case s.Source != "":
			return nil, hinted.New(fmt.Errorf("read lock: package %s: is built from source", shown(uncredentialed(string(s.Source)))), "publish it to a channel, or build it in a run step")
		case !ok:
			return nil, fmt.Errorf("read lock: package %s: environment %s names it, packages has no such entry", shown(uncredentialed(string(s.Conda+s.Pypi))), shown(name))
		case s.Conda != "":
			p, err := f.Packages[i].conda()
			if err != nil {
				return nil, err
			}
			l.Packages = append(l.Packages, p)
		case s.Pypi != "":
			e := &f.Packages[i]
			u := string(s.Pypi)
			if !strings.Contains(u, "://") {
				return nil, hinted.New(fmt.Errorf("read lock: pip package %s: is a local path", shown(string(e.Name))), "install the project itself in a run step, or publish a wheel")
			}
			l.Pip = append(l.Pip, PipPackage{Name: pep503.Normalise(string(e.Name)), Version: string(e.Version), URL: withoutCredentials(u), SHA256: string(e.SHA256)})
		default:
			return nil, errors.New("read lock: an entry is neither conda nor pypi")
		}
	}
	return l, nil
}

func (e *pixiPackage) conda() (Package, error) {
	p := Package{
		Name: string(e.Name), Version: string(e.Version), Build: string(e.Build), Subdir: string(e.Subdir),
		FileName: string(e.FileName), SHA256: string(e.SHA256), MD5: string(e.MD5), SizeBytes: e.Size,
		Depends: texts(e.Depends), Constrains: texts(e.Constrains), Noarch: string(e.Noarch),
		License: string(e.License), LicenseFamily: string(e.LicenseFamily), TimestampMS: e.Timestamp,
		Features: string(e.Features), TrackFeatures: texts(e.TrackFeatures), PURLs: texts(e.PURLs),
		SitePackagesDir: string(e.SitePackages),
	}
	if c := string(e.Channel); strings.Contains(c, "://") {
		p.Channel = channelName(c)
	}
	location := string(e.Conda)
	if strings.HasPrefix(location, "/") { // how a file:// channel is written
		location = (&url.URL{Scheme: "file", Path: location}).String()
	}
	if !strings.Contains(location, "://") {
		return p, hinted.New(fmt.Errorf("read lock: package %s: is a local path", shown(string(e.Conda))), "give its absolute path, or put it into a channel (a file:// one will do)")
	}
	if err := p.fromURL(location); err != nil {
		return p, err
	}
	if e.BuildNumber != nil {
		p.BuildNumber = *e.BuildNumber
	} else {
		p.BuildNumber = numberOf(p.Build)
	}
	if p.Noarch == "" && p.Subdir == "noarch" {
		// What the lock leaves out because it follows from the build string.
		p.Noarch = "generic"
		if strings.Contains(p.Build, "py") {
			p.Noarch = "python"
		}
	}
	return p, nil
}
