package recipes

import (
	"fmt"
	"strings"

	"github.com/sbxrun/sbxrun/envs"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// pylock.toml (PEP 751).
type pylockFile struct {
	LockVersion    string `toml:"lock-version"`
	Environments   []string
	RequiresPython string `toml:"requires-python"`
	Extras         []string
	Groups         []string `toml:"dependency-groups"`
	DefaultGroups  []string `toml:"default-groups"`
	Packages       []pylockPackage
}

type pylockPackage struct {
	Name, Version, Marker, Index string
	RequiresPython               string `toml:"requires-python"`
	VCS                          *struct {
		Type, URL, Path, Subdirectory string
		Commit                        string `toml:"commit-id"`
	}
	Directory *struct {
		Path, Subdirectory string
		Editable           bool
	}
	Archive *pylockDist
	Sdist   *pylockDist
	Wheels  []pylockDist
}

type pylockDist struct {
	Name, URL, Path, Subdirectory string
	Hashes                        map[string]string
}

func (d pylockDist) file() file {
	f := file{name: d.Name, url: d.URL}
	if f.name == "" {
		f.name = fileOf(d.URL + d.Path)
	}
	for _, algorithm := range []string{"md5", "sha1", "sha512", "sha384", "sha256"} { // the last one there is
		if h := d.Hashes[algorithm]; h != "" {
			f.hash = algorithm + ":" + strings.ToLower(h)
		}
	}
	return f
}

// pylock takes the packages whose markers hold.
func (c *converter) pylock(in Input) error {
	var l pylockFile
	if err := decode(in.Lock, &l); err != nil {
		return err
	}
	if major, _, ok := twoNumbers(l.LockVersion); !ok || major != 1 {
		return tip("lock with a tool that writes version 1", "lock-version %q is not known", shorten(l.LockVersion))
	}
	if err := c.pythonFits(l.RequiresPython, "the project"); err != nil {
		return err
	}
	for i, m := range l.Environments {
		ok, err := c.holds(m)
		if err != nil {
			return fmt.Errorf("environments: %w", err)
		}
		if ok {
			break
		}
		if i == len(l.Environments)-1 {
			return tip("lock for this platform too", "it was locked for other environments only: %s", shorten(strings.Join(l.Environments, "; ")))
		}
	}
	if err := c.want(l.Extras, append(l.Groups, l.DefaultGroups...)); err != nil {
		return err
	}

	if c.main() {
		for _, g := range l.DefaultGroups {
			c.env.Groups[pep503.Normalise(g)] = true
		}
	}
	for i := range l.Packages {
		k := &l.Packages[i]
		ok, err := c.holds(k.Marker)
		if err != nil {
			return fmt.Errorf("package %s: %w", k.Name, err)
		}
		if !ok {
			continue
		}
		if err := c.pythonFits(k.RequiresPython, "package "+k.Name); err != nil {
			return err
		}
		if err := c.addPylock(k); err != nil {
			return err
		}
	}
	return nil
}

func (c *converter) addPylock(k *pylockPackage) error {
	switch {
	case k.VCS != nil:
		return c.addSource(envs.Source{Name: k.Name, URL: k.VCS.URL, Rev: k.VCS.Commit, Subdirectory: k.VCS.Subdirectory})
	case k.Directory != nil:
		return c.addSource(envs.Source{Name: k.Name, Path: k.Directory.Path, Subdirectory: k.Directory.Subdirectory, Editable: k.Directory.Editable})
	case k.Archive != nil && k.Archive.URL == "":
		return c.addSource(envs.Source{Name: k.Name, Path: k.Archive.Path, Hash: k.Archive.file().hash, Subdirectory: k.Archive.Subdirectory})
	case k.Archive != nil:
		return c.addURL(k.Name, k.Version, k.Archive.file())
	}
	var files []file
	for _, w := range k.Wheels {
		files = append(files, w.file())
	}
	if k.Sdist != nil {
		files = append(files, k.Sdist.file())
	}
	if k.Index != "" {
		return c.add(k.Name, k.Version, k.Index, files)
	}
	// Without an index its files are at their own URLs: the best one is taken.
	usable, err := c.usable(k.Name, k.Version, files)
	if err != nil {
		return err
	}
	best := usable[0]
	for _, f := range usable[1:] {
		r, wheel := c.tags.rank(f.name)
		if b, than := c.tags.rank(best.name); wheel && (!than || r < b) {
			best = f
		}
	}
	if best.url == "" {
		return c.addSource(envs.Source{Name: k.Name, Path: pathOf(k, best.name), Hash: best.hash})
	}
	return c.addURL(k.Name, k.Version, best)
}

func pathOf(k *pylockPackage, name string) string {
	for _, w := range k.Wheels {
		if w.file().name == name {
			return w.Path
		}
	}
	if k.Sdist != nil {
		return k.Sdist.Path
	}
	return ""
}
