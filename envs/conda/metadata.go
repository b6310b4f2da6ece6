package conda

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
)

// indexJSON is info/index.json: what the package says it is.
type indexJSON struct {
	Name            string          `json:"name"`
	Version         string          `json:"version"`
	Build           string          `json:"build"`
	BuildNumber     int             `json:"build_number"`
	Subdir          string          `json:"subdir"`
	Depends         []string        `json:"depends"`
	Constrains      []string        `json:"constrains"`
	Noarch          json.RawMessage `json:"noarch"` // "python", "generic", or true of old
	License         string          `json:"license"`
	LicenseFamily   string          `json:"license_family"`
	Timestamp       float64         `json:"timestamp"`
	Features        json.RawMessage `json:"features"`
	SitePackagesDir string          `json:"python_site_packages_path"`
}

// complete checks a package against its own index.json and fills what the lock
// left open. Noarch is the package's word alone: it decides where files go.
func (p *Package) complete(data []byte, platform string) error {
	if data == nil {
		return errors.New("has no info/index.json")
	}
	var x indexJSON
	if err := json.Unmarshal(data, &x); err != nil {
		return fmt.Errorf("info/index.json: %w", err)
	}
	if strings.ToLower(x.Name) != p.Name || x.Version != p.Version || x.Build != p.Build {
		return fmt.Errorf("says that it is %s %s %s", shown(x.Name), shown(x.Version), shown(x.Build))
	}
	if x.Subdir != "" && x.Subdir != "noarch" && x.Subdir != platform {
		return fmt.Errorf("is for %s, not %s", shown(x.Subdir), platform)
	}
	switch s := strings.Trim(string(x.Noarch), `"`); s {
	case "", "null", "false":
		p.Noarch = ""
	case "python", "generic":
		p.Noarch = s
	case "true":
		p.Noarch = "generic"
	default:
		return fmt.Errorf("noarch %q is neither python nor generic", shown(s))
	}
	p.BuildNumber = x.BuildNumber
	if p.Depends == nil {
		p.Depends = x.Depends
	}
	if p.Constrains == nil {
		p.Constrains = x.Constrains
	}
	p.License, p.LicenseFamily = cmpOr(p.License, x.License), cmpOr(p.LicenseFamily, x.LicenseFamily)
	p.SitePackagesDir = cmpOr(p.SitePackagesDir, x.SitePackagesDir)
	if p.TimestampMS == 0 && x.Timestamp > 0 && x.Timestamp < 1e15 {
		p.TimestampMS = int64(x.Timestamp)
		if p.TimestampMS < 1e11 { // seconds, as conda-build once wrote
			p.TimestampMS *= 1000
		}
	}
	return nil
}

// What a path is in paths.json and in conda-meta.
const (
	hardlink   = "hardlink"
	softlink   = "softlink"
	directory  = "directory"
	entryPoint = "unix_python_entry_point"
	pycFile    = "pyc_file"
)

// pathEntry is one path of a package: an entry of paths.json and, as it goes on,
// of conda-meta.
type pathEntry struct {
	Path         string `json:"_path"`
	OriginalPath string `json:"original_path,omitempty"`
	PathType     string `json:"path_type"`
	NoLink       bool   `json:"no_link,omitempty"`
	SHA256       string `json:"sha256,omitempty"`           // in the package
	InPrefix     string `json:"sha256_in_prefix,omitempty"` // where it differs
	SizeBytes    *int64 `json:"size_in_bytes,omitempty"`
	FileMode     string `json:"file_mode,omitempty"` // text, binary: how the prefix is replaced
	Placeholder  string `json:"prefix_placeholder,omitempty"`

	from    string // path in the package
	content string // of an entry point
	target  string // of a link, as it will be
}

// paths lists what of a package is to be installed, verified against what the
// archive had.
func (u *unpacked) paths() ([]pathEntry, error) {
	var list []pathEntry
	if data := u.info["paths.json"]; data != nil {
		var x struct {
			Version int         `json:"paths_version"`
			Paths   []pathEntry `json:"paths"`
		}
		if err := json.Unmarshal(data, &x); err != nil {
			return nil, fmt.Errorf("info/paths.json: %w", err)
		}
		if x.Version != 1 {
			return nil, fmt.Errorf("info/paths.json: version %d is unknown", x.Version)
		}
		list = x.Paths
	} else {
		var err error
		if list, err = u.oldPaths(); err != nil {
			return nil, err
		}
	}
	seen := make(map[string]bool, len(list))
	for i := range list {
		e := &list[i]
		e.InPrefix, e.OriginalPath = "", ""
		if err := judge(e.Path); err != nil {
			return nil, fmt.Errorf("info/paths.json: %w", err)
		}
		if seen[e.Path] {
			return nil, fmt.Errorf("info/paths.json: %s twice", shown(e.Path))
		}
		seen[e.Path] = true
		e.from = e.Path
		if err := u.checkPath(e); err != nil {
			return nil, fmt.Errorf("%s: %w", shown(e.Path), err)
		}
	}
	return list, nil
}

func (u *unpacked) checkPath(e *pathEntry) error {
	m, ok := u.members[e.Path]
	if e.PathType == directory {
		if ok {
			return errors.New("paths.json says folder, the archive has a file")
		}
		e.SHA256, e.SizeBytes, e.FileMode, e.Placeholder = "", nil, "", ""
		return nil
	}
	switch {
	case e.PathType != hardlink && e.PathType != softlink:
		return fmt.Errorf("path_type %q is unknown", shown(e.PathType))
	case !ok:
		return errors.New("the archive does not have it")
	case e.PathType == softlink && m.link == "":
		return errors.New("paths.json says link, the archive has a file")
	case m.link != "":
		e.PathType, e.FileMode = softlink, ""
		return nil // its hash and size are those of what it leads to, if anything
	case e.SizeBytes != nil && *e.SizeBytes != m.size:
		return fmt.Errorf("has %d bytes, paths.json says %d", m.size, *e.SizeBytes)
	case e.SHA256 != "" && !strings.EqualFold(e.SHA256, m.sha256):
		return fmt.Errorf("has sha256 %s, paths.json says %s", m.sha256, shown(e.SHA256))
	case len(e.Placeholder) > maxPathBytes || strings.ContainsAny(e.Placeholder, "\x00\n"):
		return fmt.Errorf("prefix_placeholder %q is no path", shown(e.Placeholder))
	case e.Placeholder != "" && e.FileMode != "text" && e.FileMode != "binary":
		return fmt.Errorf("file_mode %q is neither text nor binary", shown(e.FileMode))
	}
	e.SHA256 = strings.ToLower(e.SHA256)
	if e.SizeBytes == nil {
		e.SizeBytes = &m.size
	}
	if e.Placeholder == "" {
		e.FileMode = ""
	}
	return nil
}

// defaultPlaceholder is what has_prefix means where it names a file only. In two
// parts so that nobody replaces it here.
var defaultPlaceholder = "/opt/" + "anaconda1anaconda2anaconda3"

// oldPaths reads what packages had before paths.json.
func (u *unpacked) oldPaths() ([]pathEntry, error) {
	files, ok := u.info["files"]
	if !ok {
		return nil, errors.New("has neither info/paths.json nor info/files")
	}
	prefixed := map[string]pathEntry{}
	for line := range strings.Lines(string(u.info["has_prefix"])) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		f, err := fields(line)
		switch {
		case err == nil && len(f) == 1:
			prefixed[f[0]] = pathEntry{Placeholder: defaultPlaceholder, FileMode: "text"}
		case err == nil && len(f) == 3:
			prefixed[f[2]] = pathEntry{Placeholder: f[0], FileMode: strings.ToLower(f[1])}
		default:
			return nil, fmt.Errorf("info/has_prefix: %q", shown(line))
		}
	}
	noLink := map[string]bool{}
	for line := range strings.Lines(string(u.info["no_link"]) + "\n" + string(u.info["no_softlink"])) {
		noLink[strings.TrimRight(line, "\r\n")] = true
	}
	var list []pathEntry
	for line := range strings.Lines(string(files)) {
		p := strings.TrimRight(line, "\r\n")
		if p == "" {
			continue
		}
		e := prefixed[p]
		e.Path, e.PathType, e.NoLink = p, hardlink, noLink[p]
		if m, ok := u.members[p]; ok && m.link != "" {
			e.PathType = softlink
		}
		list = append(list, e)
	}
	return list, nil
}

// fields splits at white space; what is quoted stays whole.
func fields(s string) ([]string, error) {
	var out []string
	for s = strings.TrimSpace(s); s != ""; s = strings.TrimLeftFunc(s, unicode.IsSpace) {
		if s[0] != '"' {
			i := strings.IndexFunc(s, unicode.IsSpace)
			if i < 0 {
				i = len(s)
			}
			out, s = append(out, s[:i]), s[i:]
			continue
		}
		var b strings.Builder
		i := 1
		for ; i < len(s) && s[i] != '"'; i++ {
			if s[i] == '\\' && i+1 < len(s) {
				i++
			}
			b.WriteByte(s[i])
		}
		if i >= len(s) {
			return nil, errors.New("quote is not closed")
		}
		out, s = append(out, b.String()), s[i+1:]
	}
	return out, nil
}

var dotted = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$`)

// python is where the environment's interpreter has what noarch packages need.
type python struct {
	version string // 3.12
	site    string // lib/python3.12/site-packages
}

func findPython(pkgs []*Package) (*python, error) {
	for _, p := range pkgs {
		if p.Name != "python" {
			continue
		}
		v := minor(p.Version)
		if v == "" {
			return nil, fmt.Errorf("%s: version %s is none of Python's", p.FileName, p.Version)
		}
		site := cmpOr(p.SitePackagesDir, "lib/python"+v+"/site-packages")
		if err := judge(site); err != nil {
			return nil, fmt.Errorf("%s: python_site_packages_path: %w", p.FileName, err)
		}
		return &python{v, site}, nil
	}
	return nil, nil
}

// place is where a path of a noarch: python package goes.
func (py *python) place(p string) string {
	if rest, ok := strings.CutPrefix(p, "site-packages/"); ok {
		return py.site + "/" + rest
	}
	if rest, ok := strings.CutPrefix(p, "python-scripts/"); ok {
		return "bin/" + rest
	}
	return p
}

// entryPoints makes the commands of a noarch: python package. Names and functions
// become part of a path and of code: GHSA-q53q-5r4j-5729 was a lack of these checks.
func (py *python) entryPoints(data []byte, prefix string) ([]pathEntry, error) {
	if data == nil {
		return nil, nil
	}
	var x struct {
		Noarch struct {
			Type        string   `json:"type"`
			EntryPoints []string `json:"entry_points"`
		} `json:"noarch"`
	}
	if err := json.Unmarshal(data, &x); err != nil {
		return nil, fmt.Errorf("info/link.json: %w", err)
	}
	var list []pathEntry
	for _, s := range x.Noarch.EntryPoints {
		bad := func(what string) error { return fmt.Errorf("info/link.json: entry point %q: %s", shown(s), what) }
		command, rest, ok := strings.Cut(s, "=")
		module, function, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 {
			return nil, bad("is not name = module:function")
		}
		command, module, function = strings.TrimSpace(command), strings.TrimSpace(module), strings.TrimSpace(function)
		switch {
		case command == "" || command[0] == '.' || strings.ContainsAny(command, "/\\"):
			return nil, bad("its name is no plain file name")
		case judge("bin/"+command) != nil:
			return nil, bad("its name is no file name")
		case !dotted.MatchString(module) || !dotted.MatchString(function):
			return nil, bad("module and function are no Python names")
		case slices.ContainsFunc(list, func(e pathEntry) bool { return e.Path == "bin/"+command }):
			return nil, bad("is there twice")
		}
		first, _, _ := strings.Cut(function, ".")
		list = append(list, pathEntry{
			Path: "bin/" + command, PathType: entryPoint,
			content: shebang(path.Join(prefix, "bin", "python"+py.version)) + "\n# -*- coding: utf-8 -*-\nimport re\nimport sys\n\n" +
				"from " + module + " import " + first + "\n\nif __name__ == '__main__':\n" +
				"\tsys.argv[0] = re.sub(r'(-script\\.pyw?|\\.exe)?$', '', sys.argv[0])\n\tsys.exit(" + function + "())\n",
		})
	}
	return list, nil
}

// shebang is the first line of a script that python runs. What the kernel would
// cut off or split is started by sh.
func shebang(python string) string {
	if len(python) > maxShebang-2 || strings.Contains(python, " ") {
		return "#!/bin/sh\n'''exec' \"" + python + "\" \"$0\" \"$@\" #'''"
	}
	return "#!" + python
}

// pycName is where Python looks for the compiled form of a source.
func (py *python) pycName(source string) string {
	dir, file := path.Split(source)
	return dir + "__pycache__/" + strings.TrimSuffix(file, ".py") + ".cpython-" + strings.ReplaceAll(py.version, ".", "") + ".pyc"
}
