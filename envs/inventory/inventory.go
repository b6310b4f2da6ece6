package inventory

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"path"
	"runtime"
	"slices"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/envs/recipes"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// The systems that packages are of, as package URLs call them.
const (
	PyPI  = "pypi"
	Conda = "conda"
	Deb   = "deb"
)

// Package is one that is installed.
type Package struct {
	System  string
	Name    string // normalised, for PyPI
	Version string
	Licence Licence
	// LicenceFiles are where its licences lie inside a sandbox.
	LicenceFiles []string
	// SHA256 is that of the distribution that was installed, "" where more than
	// one may have been: then Locked are those that the lock lets through.
	SHA256 string
	Locked []string
	MD5    string // conda's
	URL    string // where it came from, without credentials; "" is not known
	Record string // sha256 of RECORD, which has the digest of each file
	// Project is the PyPI distribution that a conda package holds: its own
	// metadata says so. ProjectVersion goes with it.
	Project, ProjectVersion string
	Qualifiers              map[string]string // of its package URL
	Summary                 string
	Depends                 []int // indexes of the packages that it needs

	requires []recipes.Dependency
	names    []string        // of what a conda package needs
	extras   map[string]bool // that somebody asked for
	source   string          // of a Debian package
	sourceVersion,
	distro string
}

// Inventory is what is inside an environment.
type Inventory struct {
	Env      *envs.Env
	Python   string // its version, "" is not known
	Packages []Package
}

const (
	maxPackages      = 100_000
	maxDocumentBytes = 16 << 20 // of one JSON document of metadata
	maxRounds        = 100      // of extras that ask for extras: each reads all requirements
)

// Read reads the installed metadata of an environment and what its lock adds.
func Read(t *Tree, e *envs.Env, lockKind string, lock []byte) (*Inventory, error) {
	v := &Inventory{Env: e, Python: pythonVersion(t)}
	owned := map[string]int{} // METADATA files of conda packages
	for _, p := range t.Files() {
		var pkg Package
		var err error
		switch dir, base := path.Dir(p), path.Base(p); {
		case path.Base(dir) == "conda-meta" && path.Dir(dir) == "opt/env" && strings.HasSuffix(base, ".json"):
			var files []string
			if pkg, files, err = readConda(t, p); err == nil {
				for _, f := range files {
					if isDistribution(f) {
						owned["opt/env/"+f] = len(v.Packages)
					}
				}
			}
		default:
			continue
		}
		if err != nil {
			return nil, err
		}
		if v.Packages = append(v.Packages, pkg); len(v.Packages) > maxPackages {
			return nil, errors.New("read environment: too many packages")
		}
	}
	locked, err := readLock(lockKind, lock)
	if err != nil {
		return nil, err
	}
	for _, p := range t.Files() {
		if !isDistribution(p) {
			continue
		}
		pkg, err := readDistribution(t, p)
		if err != nil {
			return nil, err
		}
		if i, ok := owned[p]; ok {
			c := &v.Packages[i]
			// A conda package may hold several: then none is the package.
			if c.Project == "" {
				c.Project, c.ProjectVersion = pkg.Name, pkg.Version
			} else if c.Project != pkg.Name {
				c.Project, c.ProjectVersion = "-", ""
			}
			continue
		}
		locked.apply(&pkg, wheelTags(t, path.Dir(p)))
		if v.Packages = append(v.Packages, pkg); len(v.Packages) > maxPackages {
			return nil, errors.New("read environment: too many packages")
		}
	}
	for i := range v.Packages {
		if v.Packages[i].Project == "-" {
			v.Packages[i].Project = ""
		}
	}
	sortPackages(v.Packages)
	v.link(locked)
	return v, nil
}

func sortPackages(all []Package) {
	slices.SortStableFunc(all, func(a, b Package) int {
		return strings.Compare(a.System+"\x00"+a.Name+"\x00"+a.Version, b.System+"\x00"+b.Name+"\x00"+b.Version)
	})
}

// isDistribution says whether p is the metadata of a distribution that Python
// would find: not of one that another carries along.
func isDistribution(p string) bool {
	dir, base := path.Dir(p), path.Base(p)
	switch site := path.Base(path.Dir(dir)); {
	case site != "site-packages" && site != "dist-packages":
		return false
	case base == "METADATA":
		return strings.HasSuffix(dir, ".dist-info")
	case base == "PKG-INFO":
		return strings.HasSuffix(dir, ".egg-info")
	}
	return false
}

// pythonVersion reads pyvenv.cfg, or the library's directory.
func pythonVersion(t *Tree) string {
	if b, _, err := t.read("opt/env/pyvenv.cfg", 1<<16); err == nil {
		for line := range strings.SplitSeq(string(b), "\n") {
			k, v, _ := strings.Cut(line, "=")
			if k = strings.TrimSpace(k); k == "version_info" || k == "version" {
				return clean(v, 40)
			}
		}
	}
	for _, p := range t.Files() {
		if v, ok := strings.CutPrefix(p, "opt/env/conda-meta/python-3."); ok {
			if v, _, ok = strings.Cut(v, "-"); ok {
				return "3." + clean(v, 40)
			}
		}
	}
	for _, p := range t.Files() {
		if v, ok := strings.CutPrefix(p, "opt/env/lib/python"); ok && v != "" && !strings.Contains(v, "/") {
			return clean(v, 40)
		}
	}
	return ""
}

// readDistribution reads the dist-info directory whose METADATA is at p.
func readDistribution(t *Tree, p string) (Package, error) {
	b, _, err := t.read(p, maxMetadataBytes)
	if err != nil {
		return Package{}, err
	}
	hs := parseMetadata(string(b))
	dir := path.Dir(p)
	pkg := Package{
		System: PyPI, Name: pep503.Normalise(clean(get(hs, "name"), 200)), Version: clean(get(hs, "version"), 200), Licence: licenceOf(hs),
		Summary: clean(get(hs, "summary"), 500),
	}
	if pkg.Name == "" || pkg.Version == "" {
		return Package{}, fmt.Errorf("read %q: neither name nor version in it", "/"+p)
	}
	for _, f := range getAll(hs, "license-file") {
		for _, at := range []string{path.Join(dir, "licenses", f), path.Join(dir, f)} {
			if e, ok := t.entries[at]; ok && e.Type == 'f' && strings.HasPrefix(at, dir+"/") {
				pkg.LicenceFiles = append(pkg.LicenceFiles, "/"+at)
				break
			}
		}
	}
	for _, r := range getAll(hs, "requires-dist") {
		if q, err := recipes.ParseDependency(r); err == nil {
			pkg.requires = append(pkg.requires, q)
		}
	}
	if e, ok := t.entries[path.Join(dir, "RECORD")]; ok {
		pkg.Record = e.Digest
	}
	b, whole, err := t.read(path.Join(dir, "direct_url.json"), maxMetadataBytes)
	if errors.Is(err, errNoFile) {
		return pkg, nil
	}
	var direct struct {
		URL     string `json:"url"`
		Archive struct {
			Hash   string            `json:"hash"`
			Hashes map[string]string `json:"hashes"`
		} `json:"archive_info"`
		VCS struct {
			VCS    string `json:"vcs"`
			Commit string `json:"commit_id"`
		} `json:"vcs_info"`
	}
	if err != nil || !whole || json.Unmarshal(b, &direct) != nil {
		return pkg, fmt.Errorf("read %q: damaged", "/"+path.Join(dir, "direct_url.json"))
	}
	pkg.URL = publicURL(direct.URL)
	if pkg.URL != "" && direct.VCS.VCS == "git" && isHex(direct.VCS.Commit, 40) {
		pkg.Qualifiers = map[string]string{"vcs_url": "git+" + pkg.URL + "@" + direct.VCS.Commit}
	}
	sum := direct.Archive.Hashes["sha256"]
	if sum == "" {
		sum = strings.TrimPrefix(direct.Archive.Hash, "sha256=")
	}
	if isHex(sum, 64) {
		pkg.SHA256 = strings.ToLower(sum)
	}
	return pkg, nil
}

// readConda reads a record of conda-meta; files are those that it installed.
func readConda(t *Tree, p string) (pkg Package, files []string, err error) {
	b, whole, err := t.read(p, maxDocumentBytes)
	if err != nil {
		return pkg, nil, err
	}
	var r struct {
		Name    string   `json:"name"`
		Version string   `json:"version"`
		Build   string   `json:"build"`
		Subdir  string   `json:"subdir"`
		Channel string   `json:"channel"`
		File    string   `json:"fn"`
		URL     string   `json:"url"`
		SHA256  string   `json:"sha256"`
		MD5     string   `json:"md5"`
		Licence string   `json:"license"`
		Depends []string `json:"depends"`
		Files   []string `json:"files"`
	}
	if !whole || json.Unmarshal(b, &r) != nil || r.Name == "" || r.Version == "" {
		return pkg, nil, fmt.Errorf("read %q: damaged", "/"+p)
	}
	pkg = Package{
		System: Conda, Name: strings.ToLower(clean(r.Name, 200)), Version: clean(r.Version, 200), URL: publicURL(r.URL),
		Qualifiers: map[string]string{},
	}
	if x := expression(r.Licence); x != "" {
		pkg.Licence.Expression = x
	} else if l := clean(r.Licence, maxLicenceName); l != "" {
		pkg.Licence.Names = []string{l}
	}
	if isHex(r.SHA256, 64) {
		pkg.SHA256 = strings.ToLower(r.SHA256)
	}
	if isHex(r.MD5, 32) {
		pkg.MD5 = strings.ToLower(r.MD5)
	}
	kind := ""
	for _, k := range []string{"conda", "tar.bz2"} {
		if strings.HasSuffix(r.File, "."+k) {
			kind = k
		}
	}
	channel := strings.Trim(publicURL(r.Channel), "/")
	if channel == "" && !strings.Contains(r.Channel, "://") {
		channel = strings.Trim(r.Channel, "/")
	}
	channel = strings.TrimSuffix(channel, "/"+r.Subdir)
	for k, q := range map[string]string{"build": r.Build, "subdir": r.Subdir, "channel": path.Base(channel), "type": kind} {
		if q = clean(q, 200); q != "" && q != "." {
			pkg.Qualifiers[k] = q
		}
	}
	for _, d := range r.Depends {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		if name = strings.ToLower(name[strings.LastIndexByte(name, ':')+1:]); name != "" {
			name, _, _ = strings.Cut(name, "=")
			pkg.names = append(pkg.names, name)
		}
	}
	return pkg, r.Files, nil
}

func isHex(s string, n int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == n/2
}

// publicURL gives a URL of the network without what may be a secret: user,
// password, query, and the tokens that conda puts into paths. Others give "".
func publicURL(s string) string {
	u, err := url.Parse(strings.TrimPrefix(s, "git+"))
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		return ""
	}
	u.User, u.RawQuery, u.Fragment, u.RawFragment = nil, "", "", ""
	if p, ok := strings.CutPrefix(u.Path, "/t/"); ok {
		_, p, _ = strings.Cut(p, "/")
		u.Path, u.RawPath = "/"+p, ""
	}
	return u.String()
}

// markers is what they are evaluated in, but for extras.
func (v *Inventory) markers() recipes.Environment {
	short := v.Python
	if parts := strings.SplitN(short, ".", 3); len(parts) > 1 {
		short = parts[0] + "." + parts[1]
	}
	machine := runtime.GOARCH
	if m := (map[string]string{"amd64": "x86_64", "arm64": "aarch64"})[machine]; m != "" {
		machine = m
	}
	return recipes.Environment{Vars: map[string]string{
		"python_version": short, "python_full_version": v.Python, "implementation_version": v.Python, "implementation_name": "cpython",
		"platform_python_implementation": "CPython", "os_name": "posix", "sys_platform": "linux", "platform_system": "Linux", "platform_machine": machine,
	}}
}

// link finds for each package those that it needs.
func (v *Inventory) link(l lockedSet) {
	env := v.markers()
	byName := map[string]int{}
	for i, p := range v.Packages {
		if p.System == Conda && p.Project != "" {
			byName[PyPI+p.Project] = i // a wheel may need what conda brought
		}
	}
	for i := range v.Packages {
		p := &v.Packages[i]
		byName[p.System+p.Name] = i
		p.extras = map[string]bool{}
		for _, x := range l.extras[p.Name] {
			p.extras[x] = p.System == PyPI
		}
	}
	// Extras ask for more extras: until nothing changes. Each round adds one at least.
	for again, rounds := true, 0; again && rounds < maxRounds; rounds++ {
		again = false
		for i := range v.Packages {
			p := &v.Packages[i]
			p.Depends = nil
			need := func(name string, extras []string) {
				j, ok := byName[p.System+name]
				if !ok {
					return
				}
				for _, x := range extras {
					if q := &v.Packages[j]; !q.extras[x] {
						q.extras[x], again = true, true
					}
				}
				if j != i {
					p.Depends = append(p.Depends, j)
				}
			}
			env.Extras = p.extras
			for _, r := range p.requires {
				if r.Applies(&env) {
					need(r.Name, r.Extras)
				}
			}
			for _, n := range p.names {
				need(n, nil)
			}
			slices.Sort(p.Depends)
			p.Depends = slices.Compact(p.Depends)
		}
	}
}

// roots are the packages that no other needs, and of each ring that nobody
// needs the first.
func (v *Inventory) roots() []int {
	needed := make([]bool, len(v.Packages))
	for _, p := range v.Packages {
		for _, d := range p.Depends {
			needed[d] = true
		}
	}
	var out []int
	seen := make([]bool, len(v.Packages))
	visit := func(i int) {
		for stack := []int{i}; len(stack) > 0; {
			n := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if seen[n] {
				continue
			}
			seen[n] = true
			stack = append(stack, v.Packages[n].Depends...)
		}
	}
	for i := range v.Packages {
		if !needed[i] {
			out = append(out, i)
			visit(i)
		}
	}
	for i := range v.Packages {
		if !seen[i] {
			out = append(out, i)
			visit(i)
		}
	}
	slices.Sort(out)
	return out
}

// PURL is its package URL.
func (p *Package) PURL() string {
	ns := ""
	if p.System == Deb {
		ns = p.distroID() + "/"
	}
	s := "pkg:" + p.System + "/" + ns + purlEscape(p.Name) + "@" + purlEscape(p.Version)
	var keys []string
	for k := range p.Qualifiers {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	sep := "?"
	for _, k := range keys {
		s += sep + k + "=" + purlEscape(p.Qualifiers[k])
		sep = "&"
	}
	return s
}

func purlEscape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte(".-_~:/", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
