package envs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"
)

// prefix is where EnvDir lies in a layer.
const prefix = "opt/env"

// maxPrograms bounds what is read of an environment that someone else made.
const maxPrograms = 10_000

// Layout is what of an environment a folder that looks like it needs to have.
type Layout struct {
	Programs []Program
	// Site is where packages lie, below the prefix (lib/python3.12/site-packages);
	// "" is nowhere: no Python.
	Site string
	// Python is the interpreter's name with its version (python3.12); "" is none.
	Python string
	// Config is the text of pyvenv.cfg; "" is none.
	Config string
}

// Program is one entry of bin.
type Program struct {
	Name string
	// Python says that it is a script of the environment's own interpreter.
	Python bool
}

// Baked says whether the store at root has a record of the environment with that
// whole key.
func Baked(root, key string) bool {
	st, err := os.Lstat(filepath.Join(root, "envs", key+".json"))
	return err == nil && st.Mode().IsRegular()
}

// Layout reads the layers' names and first lines. No link leads out of a layer.
func (e *Env) Layout() (*Layout, error) {
	l, seen := &Layout{}, map[string]bool{}
	for _, dir := range append([]string{e.Path}, e.Lowers...) {
		if err := l.add(dir, seen); err != nil {
			return nil, fmt.Errorf("look into environment %s: %w", Short(e.Digest), err)
		}
	}
	sort.Slice(l.Programs, func(i, j int) bool { return l.Programs[i].Name < l.Programs[j].Name })
	return l, nil
}

// add takes what a layer has and those above it (seen) have not.
func (l *Layout) add(layer string, seen map[string]bool) error {
	if st, err := os.Stat(layer); err == nil && st.Mode().IsRegular() {
		return fail("sbxrun env pack --undo turns it into files again", "it is an image")
	}
	top, err := os.OpenRoot(layer)
	if err != nil {
		return err
	}
	defer top.Close()
	root, err := top.OpenRoot(prefix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer root.Close()
	names, err := readNames(root, "bin")
	if err != nil {
		return err
	}
	for _, n := range names {
		if seen[n] || !plainName(n) {
			continue
		}
		seen[n] = true
		if v, ok := strings.CutPrefix(n, "python3."); ok && l.Python == "" && v != "" && strings.Trim(v, "0123456789t") == "" {
			l.Python = n
		}
		st, err := root.Lstat("bin/" + n)
		if err != nil {
			return err
		}
		switch {
		case st.Mode()&fs.ModeSymlink != 0:
			l.Programs = append(l.Programs, Program{Name: n})
		case st.Mode().IsRegular() && st.Mode()&0o111 != 0: // not a whiteout, nothing to be read by a shell
			first, err := beginning(root, "bin/"+n, 64)
			if err != nil {
				return err
			}
			l.Programs = append(l.Programs, Program{n, bytes.HasPrefix(first, []byte("#!"+EnvDir+"/bin/python"))})
		}
		if len(l.Programs) > maxPrograms {
			return fmt.Errorf("more than %d programs", maxPrograms)
		}
	}
	if l.Config == "" {
		b, err := beginning(root, "pyvenv.cfg", 16<<10)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		l.Config = string(b)
	}
	if l.Site == "" {
		l.Site, err = site(root)
	}
	return err
}

func site(root *os.Root) (string, error) {
	names, err := readNames(root, "lib")
	if err != nil {
		return "", err
	}
	slices.Sort(names)
	for _, n := range names {
		p := path.Join("lib", n, "site-packages")
		if v, ok := strings.CutPrefix(n, "python"); !ok || v == "" || strings.Trim(v, "0123456789.t") != "" {
			continue
		}
		if st, err := root.Lstat(p); err == nil && st.IsDir() {
			return p, nil
		}
	}
	return "", nil
}

func readNames(root *os.Root, dir string) ([]string, error) {
	d, err := root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(maxPrograms)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

func beginning(root *os.Root, name string, most int64) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

// plainName: a name that needs no quotes in any shell.
func plainName(s string) bool {
	return s != "" && s[0] != '-' && s[0] != '.' &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-[") == "" && len(s) <= 128
}

// Sources calls put for each file of the packages that people and editors read:
// not for what is compiled. name is relative to the site directory; a layer's
// files come before those of the layers above, which replace them.
func (e *Env) Sources(siteDir string, put func(name string, text fs.File) error) error {
	dirs := append([]string{e.Path}, e.Lowers...)
	slices.Reverse(dirs)
	for _, dir := range dirs {
		top, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer top.Close()
		fsys := top.FS()
		base := path.Join(prefix, siteDir)
		err = fs.WalkDir(fsys, base, func(p string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist) && p == base:
				return fs.SkipAll
			case err != nil:
				return err
			case d.IsDir() && d.Name() == "__pycache__":
				return fs.SkipDir
			case !d.Type().IsRegular() || strings.HasSuffix(p, ".so"):
				return nil
			}
			f, err := fsys.Open(p)
			if err != nil {
				return err
			}
			defer f.Close()
			return put(strings.TrimPrefix(p, base+"/"), f)
		})
		if err != nil {
			return err
		}
	}
	return nil
}
