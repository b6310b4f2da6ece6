package conda

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
)

// prefixRecord is a file of conda-meta: what conda and rattler read of a package
// that is installed. It tells nothing of this machine and this hour.
type prefixRecord struct {
	Arch          string     `json:"arch,omitempty"`
	Build         string     `json:"build"`
	BuildNumber   int        `json:"build_number"`
	Constrains    []string   `json:"constrains,omitempty"`
	Depends       []string   `json:"depends"`
	Features      string     `json:"features,omitempty"`
	License       string     `json:"license,omitempty"`
	LicenseFamily string     `json:"license_family,omitempty"`
	MD5           string     `json:"md5,omitempty"`
	Name          string     `json:"name"`
	Noarch        string     `json:"noarch,omitempty"`
	Platform      string     `json:"platform,omitempty"`
	PURLs         []string   `json:"purls,omitempty"`
	SitePackages  string     `json:"python_site_packages_path,omitempty"`
	SHA256        string     `json:"sha256,omitempty"`
	Size          int64      `json:"size,omitempty"`
	Subdir        string     `json:"subdir"`
	Timestamp     int64      `json:"timestamp,omitempty"`
	TrackFeatures string     `json:"track_features,omitempty"`
	Version       string     `json:"version"`
	FileName      string     `json:"fn"`
	URL           string     `json:"url"`
	Channel       string     `json:"channel"`
	Requested     []string   `json:"requested_specs"`
	Files         []string   `json:"files"`
	PathsData     prefixData `json:"paths_data"`
}

type prefixData struct {
	Version int         `json:"paths_version"`
	Paths   []pathEntry `json:"paths"`
}

// record writes conda-meta.
func (i *installation) record(context.Context) error {
	var names []string
	newest := int64(minTime)
	for _, p := range i.pkgs {
		newest = max(newest, p.about+1)
		data, err := p.record()
		if err != nil {
			return p.fail(err)
		}
		if err := i.meta(p.Name+"-"+p.Version+"-"+p.Build+".json", p.about+1, data); err != nil {
			return p.fail(err)
		}
		names = append(names, "+"+p.Channel+"/"+p.Subdir+"::"+p.Name+"-"+p.Version+"-"+p.Build+"\n")
	}
	slices.Sort(names)
	// conda wants a revision; when it was is not told: equal locks, equal files.
	history := "==> 1980-01-01 00:00:00 <==\n# cmd: sbxrun env create\n" + strings.Join(names, "")
	if err := i.meta("history", newest, []byte(history)); err != nil {
		return fmt.Errorf("install conda packages: %w", err)
	}
	return nil
}

func (i *installation) meta(name string, mtime int64, data []byte) error {
	_, _, err := i.write("conda-meta/"+name, 0o644, mtime, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	return err
}

func (p *installed) record() ([]byte, error) {
	r := prefixRecord{
		Build: p.Build, BuildNumber: p.BuildNumber, Constrains: p.Constrains, Depends: append([]string{}, p.Depends...),
		License: p.License, LicenseFamily: p.LicenseFamily, MD5: p.MD5, Name: p.Name, Noarch: p.Noarch, PURLs: p.PURLs,
		SitePackages: p.SitePackagesDir, SHA256: p.SHA256, Size: p.SizeBytes, Subdir: p.Subdir, Timestamp: p.TimestampMS,
		TrackFeatures: strings.Join(p.TrackFeatures, " "), Version: p.Version, FileName: p.FileName, URL: p.URL, Channel: p.Channel,
		Features: p.Features, Requested: []string{}, Files: []string{},
	}
	if os, arch, ok := strings.Cut(p.Subdir, "-"); ok {
		switch arch {
		case "64":
			arch = "x86_64"
		case "32":
			arch = "x86"
		}
		r.Platform, r.Arch = os, arch
	}
	r.PathsData = prefixData{1, []pathEntry{}}
	for _, e := range p.entries {
		if e.from == "" && e.PathType == directory {
			continue
		}
		r.PathsData.Paths = append(r.PathsData.Paths, e)
	}
	// By path, folder by folder: a/b comes before a-b.
	slices.SortFunc(r.PathsData.Paths, func(a, b pathEntry) int {
		return cmp.Compare(strings.ReplaceAll(a.Path, "/", "\x00"), strings.ReplaceAll(b.Path, "/", "\x00"))
	})
	for _, e := range r.PathsData.Paths {
		r.Files = append(r.Files, e.Path)
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	err := enc.Encode(r)
	return b.Bytes(), err
}
