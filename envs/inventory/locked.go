package inventory

import (
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"

	"github.com/sbxrun/sbxrun/envs/recipes"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// lockedSet is what a lock says of distributions, by name.
type lockedSet struct {
	files  map[string][]lockedFile
	extras map[string][]string
}

type lockedFile struct {
	version, sha256 string
	name, url       string // "" where the lock does not say
}

// readLock reads the hashes of a lock of Python distributions. That of conda
// adds nothing to what conda-meta has.
func readLock(kind string, text []byte) (lockedSet, error) {
	l := lockedSet{map[string][]lockedFile{}, map[string][]string{}}
	switch kind {
	case "requirements":
		l.readRequirements(string(text))
	case "pylock":
		return l, l.readPylock(text)
	}
	return l, nil
}

func (l lockedSet) readRequirements(text string) {
	text = strings.ReplaceAll(strings.ReplaceAll(text, "\r", ""), "\\\n", " ")
	for line := range strings.SplitSeq(text, "\n") {
		if i := strings.Index(" "+line, " #"); i >= 0 {
			line = line[:i]
		}
		spec, rest, _ := strings.Cut(line, " --hash=")
		r, err := recipes.ParseDependency(spec)
		if err != nil {
			continue // an option
		}
		l.extras[r.Name] = append(l.extras[r.Name], r.Extras...)
		version := ""
		if _, v, pinned := strings.Cut(spec, "=="); pinned {
			version, _, _ = strings.Cut(v, ";")
			version = strings.TrimSpace(version)
		}
		for h := range strings.SplitSeq(rest, " --hash=") {
			if sum, ok := strings.CutPrefix(strings.TrimSpace(h), "sha256:"); ok && isHex(sum, 64) {
				l.files[r.Name] = append(l.files[r.Name], lockedFile{version: version, sha256: strings.ToLower(sum)})
			}
		}
	}
}

func (l lockedSet) readPylock(text []byte) error {
	type file struct {
		Name   string            `toml:"name"`
		URL    string            `toml:"url"`
		Path   string            `toml:"path"`
		Hashes map[string]string `toml:"hashes"`
	}
	var doc struct {
		Packages []struct {
			Name    string `toml:"name"`
			Version string `toml:"version"`
			Wheels  []file `toml:"wheels"`
			Sdist   *file  `toml:"sdist"`
			Archive *file  `toml:"archive"`
		} `toml:"packages"`
	}
	if err := toml.Unmarshal(text, &doc); err != nil {
		return fmt.Errorf("read the environment's lock: %w", err)
	}
	for _, p := range doc.Packages {
		files := p.Wheels
		for _, f := range []*file{p.Sdist, p.Archive} {
			if f != nil {
				files = append(files, *f)
			}
		}
		name := pep503.Normalise(p.Name)
		for _, f := range files {
			sum := f.Hashes["sha256"]
			if !isHex(sum, 64) {
				continue
			}
			n := f.Name
			for _, from := range []string{f.URL, f.Path} {
				if n == "" && from != "" {
					n = path.Base(strings.SplitN(from, "?", 2)[0])
				}
			}
			l.files[name] = append(l.files[name], lockedFile{p.Version, strings.ToLower(sum), strings.ReplaceAll(n, "%2B", "+"), publicURL(f.URL)})
		}
	}
	return nil
}

// apply tells a package its distribution's hash: that of the only file, of the
// only wheel with the very tags of the installed one, or all that may be.
func (l lockedSet) apply(p *Package, tags []string) {
	var all, same []lockedFile
	for _, f := range l.files[p.Name] {
		if f.version != "" && f.version != p.Version {
			continue
		}
		all = append(all, f)
		if t := tagsOfWheel(f.name); t != nil && slices.Equal(t, tags) {
			same = append(same, f)
		}
	}
	if len(same) == 1 {
		all = same
	}
	switch {
	case p.SHA256 != "" || len(all) == 0:
	case len(all) == 1:
		p.SHA256 = all[0].sha256
		if p.URL == "" {
			p.URL = all[0].url
		}
	default:
		for _, f := range all {
			p.Locked = append(p.Locked, f.sha256)
		}
		slices.Sort(p.Locked)
		p.Locked = slices.Compact(p.Locked)
	}
}

// tagsOfWheel expands the compressed tags of a wheel's file name, sorted.
func tagsOfWheel(name string) []string {
	stem, ok := strings.CutSuffix(name, ".whl")
	parts := strings.Split(stem, "-")
	if n := len(parts); !ok || n < 5 || n > 6 {
		return nil
	}
	parts = parts[len(parts)-3:]
	var out []string
	for py := range strings.SplitSeq(parts[0], ".") {
		for abi := range strings.SplitSeq(parts[1], ".") {
			for plat := range strings.SplitSeq(parts[2], ".") {
				if out = append(out, py+"-"+abi+"-"+plat); len(out) > 1000 {
					return nil
				}
			}
		}
	}
	slices.Sort(out)
	return out
}

// wheelTags reads those of an installed wheel, sorted.
func wheelTags(t *Tree, dir string) []string {
	b, _, err := t.read(path.Join(dir, "WHEEL"), 1<<16)
	if err != nil {
		return nil // none is needed
	}
	out := getAll(parseMetadata(string(b)), "tag")
	slices.Sort(out)
	return out
}
