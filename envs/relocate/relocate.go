// Package relocate copies an interpreter's prefix so that it works at another
// path: library paths of its binaries, and the texts that name the old one. It
// runs inside a sandbox and must know nothing of the store.
package relocate

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// Request says what is copied: all paths are the sandbox's.
type Request struct {
	Source string   `json:"source"` // the prefix: bin/python3 and lib/python3.X are in it
	Dest   string   `json:"dest"`   // must not be there
	Was    []string `json:"was"`    // what the prefix was called on the host
	At     string   `json:"at"`     // the folder of all interpreters: each is to be used at At/VERSION
}

// Result is what was copied.
type Result struct {
	Version string `json:"version"` // 3.12.1
	Program string `json:"program"` // bin/python3.12
	Patched int    `json:"patched"` // binaries whose library path was changed
}

// What a prefix may be at most.
const (
	maxBytes = 4 << 30
	maxFiles = 200_000
)

// Python copies the prefix of a CPython. What was installed into it, its tests
// and its bytecode are left behind.
func Python(r Request) (*Result, error) {
	version, err := pythonVersion(r.Source)
	if err != nil {
		return nil, err
	}
	short := version[:strings.LastIndexByte(version, '.')]
	res := &Result{Version: version, Program: "bin/python" + short}
	c := &copying{Request: r, lib: "lib/python" + short, to: filepath.Join(r.At, version), res: res}
	if err := filepath.WalkDir(r.Source, c.visit); err != nil {
		return nil, err
	}
	if st, err := os.Stat(filepath.Join(r.Dest, res.Program)); err != nil || !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return nil, fmt.Errorf("no program %q in it", res.Program)
	}
	// Left where a link of it led out, or where it was never made.
	for _, name := range []string{"bin/python3", "bin/python"} {
		if _, err := os.Lstat(filepath.Join(r.Dest, name)); err != nil {
			if err := os.Symlink(filepath.Base(res.Program), filepath.Join(r.Dest, name)); err != nil {
				return nil, err
			}
		}
	}
	return res, nil
}

var patchLevel = regexp.MustCompile(`(?m)^#define\s+PY_VERSION\s+"(3\.[0-9]{1,3}\.[0-9]{1,3})[^"\n]*"`)

func pythonVersion(dir string) (string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "include/python3.*/patchlevel.h"))
	if err != nil || len(found) == 0 {
		return "", errors.New("no include/python3.*/patchlevel.h in it: not the prefix of a CPython 3")
	}
	if len(found) > 1 {
		return "", errors.New("several interpreters are in it")
	}
	b, err := readSome(found[0], 64<<10)
	if err != nil {
		return "", err
	}
	m := patchLevel.FindSubmatch(b)
	if m == nil {
		return "", errors.New("its patchlevel.h names no version")
	}
	return string(m[1]), nil
}

func readSome(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, most))
}

type copying struct {
	Request
	lib   string // lib/python3.12
	to    string
	res   *Result
	bytes int64
	files int
}

// left says what is not copied.
func (c *copying) left(rel string, d fs.DirEntry) bool {
	name := filepath.Base(rel)
	switch {
	case name == "__pycache__", strings.HasSuffix(rel, ".a"), strings.HasSuffix(rel, ".pyc"):
		return true
	case rel == c.lib+"/test", rel == c.lib+"/site-packages", rel == "share", strings.HasSuffix(rel, "/idlelib/idle_test"), strings.HasPrefix(rel, c.lib+"/") && name == "tests" && d.IsDir():
		return true
	case strings.HasPrefix(rel, "bin/"):
		return !strings.HasPrefix(name, "python") || strings.Contains(name, "config") || strings.HasSuffix(name, ".py")
	}
	return false
}

func (c *copying) visit(p string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	rel, err := filepath.Rel(c.Source, p)
	if err != nil {
		return err
	}
	if rel != "." && c.left(rel, d) {
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	}
	to := filepath.Join(c.Dest, rel)
	if c.files++; c.files > maxFiles {
		return fmt.Errorf("more than %d files", maxFiles)
	}
	switch {
	case d.IsDir():
		return os.Mkdir(to, 0o755)
	case d.Type()&fs.ModeSymlink != 0:
		link, err := os.Readlink(p)
		if err != nil {
			return err
		}
		if filepath.IsAbs(link) || !filepath.IsLocal(filepath.Join(filepath.Dir(rel), link)) {
			return nil // it would lead nowhere
		}
		return os.Symlink(link, to)
	case d.Type().IsRegular():
		return c.file(p, rel, to)
	}
	return nil
}

func (c *copying) file(p, rel, to string) error {
	st, err := os.Stat(p)
	if err != nil {
		return err
	}
	if c.bytes += st.Size(); c.bytes > maxBytes {
		return fmt.Errorf("more than %d bytes", int64(maxBytes))
	}
	b, err := readSome(p, maxBytes)
	if err != nil {
		return err
	}
	switch {
	case bytes.HasPrefix(b, []byte(elf.ELFMAG)):
		changed, err := patchELF(b, c.Was, rel)
		if err != nil {
			return fmt.Errorf("%s: %w", rel, err)
		}
		if changed {
			c.res.Patched++
		}
	case text(rel):
		for _, was := range c.Was {
			b = replacePath(b, was, c.to)
		}
	}
	mode := os.FileMode(0o644)
	if st.Mode()&0o111 != 0 {
		mode = 0o755
	}
	return os.WriteFile(to, b, mode)
}

// text says which files name the prefix in a way that somebody reads.
func text(rel string) bool {
	name := filepath.Base(rel)
	return strings.HasPrefix(name, "_sysconfigdata") || strings.HasPrefix(name, "_sysconfig_vars") || name == "Makefile" || name == "pyconfig.h" ||
		strings.HasSuffix(name, ".pc") || name == "python-config.py" || name == "build-details.json"
}

// replacePath replaces a folder's path where it is not the beginning of a longer name.
func replacePath(b []byte, was, now string) []byte {
	var out []byte
	for {
		i := bytes.Index(b, []byte(was))
		if i < 0 {
			return append(out, b...)
		}
		end := i + len(was)
		out = append(out, b[:i]...)
		if end < len(b) && (b[end] == '-' || b[end] == '.' || b[end] == '_' || b[end] >= '0' && b[end] <= '9' || b[end] >= 'a' && b[end] <= 'z' || b[end] >= 'A' && b[end] <= 'Z') {
			out = append(out, was...)
		} else {
			out = append(out, now...)
		}
		b = b[end:]
	}
}

// patchELF makes the library search path of a binary relative to the binary
// itself, in place: rel is its name below the prefix.
func patchELF(b []byte, was []string, rel string) (changed bool, err error) {
	defer func() { // debug/elf has had its panics on hostile input
		if r := recover(); r != nil {
			err = fmt.Errorf("damaged ELF file: %v", r)
		}
	}()
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return false, err
	}
	dyn := f.SectionByType(elf.SHT_DYNAMIC)
	if dyn == nil {
		return false, nil // static, or an object file
	}
	if int(dyn.Link) >= len(f.Sections) {
		return false, errors.New("no table of strings")
	}
	str := f.Sections[dyn.Link]
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		values, err := f.DynValue(tag)
		if err != nil {
			return false, err
		}
		for _, v := range values {
			at := str.Offset + v
			if v >= str.Size || at >= uint64(len(b)) {
				return false, errors.New("a library path outside of the file")
			}
			end := bytes.IndexByte(b[at:], 0)
			if end < 0 {
				return false, errors.New("a library path without an end")
			}
			old := string(b[at : at+uint64(end)])
			now := relativePaths(old, was, rel)
			if now == old {
				continue
			}
			if len(now) > len(old) {
				return false, fmt.Errorf("no room to change its library path %q to %q", old, now)
			}
			n := copy(b[at:], now)
			clear(b[at+uint64(n) : at+uint64(end)])
			changed = true
		}
	}
	return changed, nil
}

func relativePaths(paths string, was []string, rel string) string {
	var out []string
	for _, p := range strings.Split(paths, ":") {
		for _, w := range was {
			below, ok := strings.CutPrefix(p, w)
			if !ok || below != "" && below[0] != '/' {
				continue
			}
			if r, err := filepath.Rel(filepath.Dir(rel), strings.TrimPrefix(filepath.Clean("/"+below), "/")); err == nil {
				p = "$ORIGIN/" + r // not joined: that would take $ORIGIN for a folder with a parent
			}
			break
		}
		out = append(out, p)
	}
	return strings.Join(out, ":")
}
