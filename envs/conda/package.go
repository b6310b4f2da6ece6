package conda

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Package is one conda package of a lock, as much as the lock tells of it: what it
// leaves open (depends, noarch, license of an @EXPLICIT list) Install reads from
// the package itself.
type Package struct {
	Name        string `json:"name"` // lower case
	Version     string `json:"version"`
	Build       string `json:"build"`
	BuildNumber int    `json:"build_number,omitempty"`
	Subdir      string `json:"subdir"`            // linux-64, noarch, …
	Channel     string `json:"channel,omitempty"` // its URL, without credentials
	FileName    string `json:"file_name"`
	URL         string `json:"url"`              // without credentials; https, http or file
	SHA256      string `json:"sha256,omitempty"` // lower-case hex
	// MD5 alone identifies a package only where the lock has nothing else:
	// collisions can be made. Result.WeakHashes names such packages.
	MD5             string   `json:"md5,omitempty"`
	SizeBytes       int64    `json:"size_bytes,omitempty"` // of the archive; 0: the lock does not say
	Depends         []string `json:"depends,omitempty"`
	Constrains      []string `json:"constrains,omitempty"`
	Noarch          string   `json:"noarch,omitempty"` // "", generic, python
	License         string   `json:"license,omitempty"`
	LicenseFamily   string   `json:"license_family,omitempty"`
	TimestampMS     int64    `json:"timestamp_ms,omitempty"`
	Features        string   `json:"features,omitempty"`
	TrackFeatures   []string `json:"track_features,omitempty"`
	PURLs           []string `json:"purls,omitempty"`
	SitePackagesDir string   `json:"python_site_packages_path,omitempty"` // of python itself (CEP 17)
}

// PipPackage is a wheel or sdist that a lock has besides its conda packages.
type PipPackage struct {
	Name    string   `json:"name"` // normalised as PEP 503 says
	Version string   `json:"version"`
	URL     string   `json:"url"` // without credentials
	SHA256  string   `json:"sha256"`
	Extras  []string `json:"extras,omitempty"`
}

// Lock is what one environment on one platform consists of.
type Lock struct {
	Platform string       `json:"platform"` // linux-64, …
	Channels []string     `json:"channels,omitempty"`
	Packages []Package    `json:"packages"`
	Pip      []PipPackage `json:"pip,omitempty"`
}

// Limits of a lock. The largest known environments have some 2,000 packages.
const (
	MaxLockBytes = 64 << 20
	maxPackages  = 50_000
)

// Python is the version of the lock's interpreter, as "3.12"; "" is none.
func (l *Lock) Python() string {
	for i := range l.Packages {
		if l.Packages[i].Name == "python" {
			return minor(l.Packages[i].Version)
		}
	}
	return ""
}

func minor(version string) string {
	p := strings.SplitN(version, ".", 3)
	if len(p) < 2 || !digits(p[0]) || !digits(p[1]) {
		return ""
	}
	return p[0] + "." + p[1]
}

func digits(s string) bool { return s != "" && len(s) < 10 && strings.Trim(s, "0123456789") == "" }

// Encode gives the lock's canonical form: equal locks are equal bytes.
func (l *Lock) Encode() ([]byte, error) {
	if err := l.check(); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(l); err != nil {
		return nil, fmt.Errorf("encode conda lock: %w", err)
	}
	return b.Bytes(), nil
}

// Decode reads what Encode wrote and refuses what it would not have written.
func Decode(data []byte) (*Lock, error) {
	if len(data) > MaxLockBytes {
		return nil, fmt.Errorf("read conda lock: over %d bytes", MaxLockBytes)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var l Lock
	if err := d.Decode(&l); err != nil {
		return nil, fmt.Errorf("read conda lock: %w", err)
	}
	if d.More() {
		return nil, errors.New("read conda lock: more than one document")
	}
	if err := l.check(); err != nil {
		return nil, err
	}
	return &l, nil
}

// What becomes part of a path, a file name or a record: conda's own rules.
var (
	nameRule    = regexp.MustCompile(`^[a-z0-9_][a-z0-9_.-]*$`)
	versionRule = regexp.MustCompile(`^[A-Za-z0-9_.!+*~-]+$`)
	buildRule   = regexp.MustCompile(`^[A-Za-z0-9_.+-]*$`)
	subdirRule  = regexp.MustCompile(`^[a-z]+-[a-z0-9]+$`)
	sha256Rule  = regexp.MustCompile(`^[0-9a-f]{64}$`)
	md5Rule     = regexp.MustCompile(`^[0-9a-f]{32}$`)
	pipRule     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
)

// check normalises a lock and refuses what is no lock: each package by name.
func (l *Lock) check() error {
	if !subdirRule.MatchString(l.Platform) {
		return fmt.Errorf("read lock: platform %q is none of conda's", l.Platform)
	}
	if len(l.Packages)+len(l.Pip) > maxPackages {
		return fmt.Errorf("read lock: over %d packages", maxPackages)
	}
	if l.Packages == nil {
		l.Packages = []Package{}
	}
	for i := range l.Packages {
		if err := l.Packages[i].check(l.Platform); err != nil {
			return err
		}
	}
	slices.SortFunc(l.Packages, func(a, b Package) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.URL, b.URL)) })
	for i := 1; i < len(l.Packages); i++ {
		if a, b := &l.Packages[i-1], &l.Packages[i]; a.Name == b.Name {
			return fmt.Errorf("read lock: package %s twice: %s and %s", a.Name, a.FileName, b.FileName)
		}
	}
	for i := range l.Pip {
		if err := l.Pip[i].check(); err != nil {
			return err
		}
	}
	slices.SortFunc(l.Pip, func(a, b PipPackage) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.URL, b.URL)) })
	for i := 1; i < len(l.Pip); i++ {
		if a, b := &l.Pip[i-1], &l.Pip[i]; a.Name == b.Name {
			return fmt.Errorf("read lock: pip package %s twice: %s and %s", a.Name, a.Version, b.Version)
		}
	}
	return nil
}

func (p *Package) check(platform string) error {
	bad := func(hint, format string, a ...any) error {
		who := p.FileName
		if who == "" {
			who = p.Name
		}
		return hinted.New(fmt.Errorf("read lock: package %s: %w", shown(who), fmt.Errorf(format, a...)), hint)
	}
	p.Name = strings.ToLower(p.Name)
	p.SHA256, p.MD5 = strings.ToLower(p.SHA256), strings.ToLower(p.MD5)
	switch {
	case len(p.Name) > 128 || !nameRule.MatchString(p.Name):
		return bad("", "name %q is none of conda's", shown(p.Name))
	case len(p.Version) > 128 || !versionRule.MatchString(p.Version):
		return bad("", "version %q is none of conda's", shown(p.Version))
	case len(p.Build) > 128 || !buildRule.MatchString(p.Build):
		return bad("", "build %q is none of conda's", shown(p.Build))
	case p.Subdir == "":
		return bad("", "its URL does not tell the platform")
	case p.Subdir != "noarch" && p.Subdir != platform:
		return bad("a lock is made per platform: conda-lock -p "+platform+", pixi.toml platforms, or conda list --explicit on such a machine",
			"is for %s, not %s", shown(p.Subdir), platform)
	case !p.called(p.FileName):
		return bad("", "file name does not fit %s %s %s", p.Name, p.Version, p.Build)
	case p.SHA256 == "" && p.MD5 == "":
		return bad("conda list --explicit --sha256 (or --md5) writes them; conda-lock and pixi always do", "has no hash")
	case p.SHA256 != "" && !sha256Rule.MatchString(p.SHA256):
		return bad("", "sha256 %q is no hash", shown(p.SHA256))
	case p.MD5 != "" && !md5Rule.MatchString(p.MD5):
		return bad("", "md5 %q is no hash", shown(p.MD5))
	case p.SizeBytes < 0 || p.BuildNumber < 0:
		return bad("", "negative size or build number")
	case p.Noarch != "" && p.Noarch != "python" && p.Noarch != "generic":
		return bad("", "noarch %q is neither python nor generic", shown(p.Noarch))
	case !slices.Contains([]string{"https", "http", "file"}, scheme(p.URL)):
		return bad("", "URL %q is neither https nor file", shown(p.URL))
	case p.URL != withoutCredentials(p.URL) || p.Channel != withoutCredentials(p.Channel):
		return bad("", "URL has credentials")
	}
	return nil
}

// called says whether a file name is the package's; names have no case.
func (p *Package) called(file string) bool {
	name, version, build, ok := splitFileName(file)
	return ok && strings.ToLower(name) == p.Name && version == p.Version && build == p.Build
}

func (p *PipPackage) check() error {
	p.SHA256 = strings.ToLower(p.SHA256)
	switch {
	case !pipRule.MatchString(p.Name):
		return fmt.Errorf("read lock: pip package %q: no name of a Python package", shown(p.Name))
	case !versionRule.MatchString(p.Version):
		return fmt.Errorf("read lock: pip package %s: version %q is none", p.Name, shown(p.Version))
	case p.SHA256 == "":
		return hinted.New(fmt.Errorf("read lock: pip package %s: has no sha256", p.Name), "local, editable and VCS packages cannot be installed from a lock: publish a wheel, or install them in a run step")
	case !sha256Rule.MatchString(p.SHA256):
		return fmt.Errorf("read lock: pip package %s: sha256 %q is no hash", p.Name, shown(p.SHA256))
	case p.URL != "" && !slices.Contains([]string{"https", "http", "file"}, scheme(p.URL)):
		return fmt.Errorf("read lock: pip package %s: URL %q is neither https nor file", p.Name, shown(p.URL))
	case p.URL != withoutCredentials(p.URL):
		return fmt.Errorf("read lock: pip package %s: URL has credentials", p.Name)
	}
	slices.Sort(p.Extras)
	return nil
}

func scheme(u string) string { s, _, _ := strings.Cut(u, "://"); return s }

// shown bounds what an error repeats of the input.
func shown(s string) string {
	if len(s) > 120 {
		s = s[:120] + "…"
	}
	return strings.ToValidUTF8(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s), "?")
}

// withoutCredentials drops user:password@, a /t/TOKEN and the query of a URL.
func withoutCredentials(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Scheme == "" {
		// Not to be understood, so not to be trusted to hold none.
		return ""
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment, u.RawFragment = nil, "", false, "", ""
	for u.Scheme != "file" { // there /t/ is a folder
		p := strings.SplitN(u.EscapedPath(), "/", 4)
		if len(p) < 4 || p[1] != "t" {
			break
		}
		u.RawPath = "/" + p[3]
		if u.Path, err = url.PathUnescape(u.RawPath); err != nil {
			return ""
		}
	}
	return u.String()
}

// fromURL fills what a package's URL tells and is not yet known: …/channel/subdir/name-version-build.ext
func (p *Package) fromURL(raw string) error {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme == "" {
		return fmt.Errorf("read lock: package %s: no URL", shown(uncredentialed(raw)))
	}
	p.URL = withoutCredentials(raw)
	parts := strings.Split(strings.TrimSuffix(u.Path, "/"), "/")
	file := parts[len(parts)-1]
	if p.FileName == "" {
		p.FileName = file
	}
	name, version, build, ok := splitFileName(p.FileName)
	if !ok {
		return fmt.Errorf("read lock: package %s: no file name of a conda package (name-version-build.conda or .tar.bz2)", shown(p.FileName))
	}
	for _, f := range []struct {
		to   *string
		from string
	}{{&p.Name, name}, {&p.Version, version}, {&p.Build, build}} {
		if *f.to == "" {
			*f.to = f.from
		}
	}
	if len(parts) > 1 {
		if sub := parts[len(parts)-2]; p.Subdir == "" && (sub == "noarch" || subdirRule.MatchString(sub)) {
			p.Subdir = sub
		}
		if p.Channel == "" {
			if i := strings.LastIndex(p.URL[:max(strings.LastIndex(p.URL, "/"), 0)], "/"); i > len(u.Scheme)+2 {
				p.Channel = p.URL[:i]
			}
		}
	}
	p.Channel = strings.TrimSuffix(p.Channel, "/")
	return nil
}

// uncredentialed is for errors: what cannot be parsed is cut before its first @.
func uncredentialed(s string) string {
	if i := strings.LastIndex(s, "@"); i >= 0 {
		return s[i+1:]
	}
	return s
}

func splitFileName(file string) (name, version, build string, ok bool) {
	stem, ok := strings.CutSuffix(file, ".conda")
	if !ok {
		if stem, ok = strings.CutSuffix(file, ".tar.bz2"); !ok {
			return "", "", "", false
		}
	}
	i := strings.LastIndex(stem, "-")
	if i < 0 {
		return "", "", "", false
	}
	j := strings.LastIndex(stem[:i], "-")
	if j <= 0 {
		return "", "", "", false
	}
	return stem[:j], stem[j+1 : i], stem[i+1:], true
}

// numberOf is a build string's number, as conda-build and rattler derive it.
func numberOf(build string) int {
	n, err := strconv.Atoi(build[len(strings.TrimRight(build, "0123456789")):])
	if err != nil {
		return 0
	}
	return n
}

// dependencyName is the name of a match spec as depends has it.
func dependencyName(spec string) string {
	if i := strings.LastIndex(spec, "::"); i >= 0 {
		spec = spec[i+2:]
	}
	if i := strings.IndexAny(spec, " \t<>=!~[;,|"); i >= 0 {
		spec = spec[:i]
	}
	return strings.ToLower(spec)
}
