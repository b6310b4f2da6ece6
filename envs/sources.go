package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/sbxrun/sbxrun/internal/pep503"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Packages that no index has: folders and wheels of the project's own, and git
// repositories. Folders are copied into the bake, built and installed as copies,
// in sandboxes; the digest of what was copied is part of the environment's key.

// notSources are left out of a folder that is built, besides what its
// .dockerignore says (which may take them back by !).
const notSources = "**/.git\n**/.hg\n**/.svn\n**/__pycache__\n**/*.pyc\n**/.venv\n**/venv\n**/.tox\n**/.nox\n**/node_modules\n" +
	"**/.mypy_cache\n**/.pytest_cache\n**/.ruff_cache\n**/*.egg-info\n**/build\n**/dist\n"

// maxSourceBytes bounds what one folder may bring.
const maxSourceBytes = 1 << 30

// sourceMark begins a line of a kept lock for a package that is not from an index.
const sourceMark = "#: source "

// filesMark begins a line of a kept lock for a host that has files of an index.
const filesMark = "#: files "

// tree is what a local source held when it was looked at.
type tree struct {
	Source
	man  *rootfs.Manifest
	file bool
}

// localSource takes a line of a requirements file for a package that is built;
// ok is false for one that is not.
func (in *input) localSource(line, where string) (ok bool, err error) {
	s, editable := line, false
	for _, p := range []string{"--editable=", "--editable ", "-e=", "-e "} {
		if v, is := strings.CutPrefix(line, p); is {
			s, editable = strings.TrimSpace(v), true
			break
		}
	}
	name := ""
	if before, after, is := strings.Cut(s, "@"); is && !strings.HasPrefix(s, ".") && !strings.Contains(before, ":") && !strings.Contains(before, "/") {
		name, s = strings.TrimSpace(before), strings.TrimSpace(after)
	}
	vcs, _, isVCS := strings.Cut(s, "+")
	isVCS = isVCS && (vcs == "git" || vcs == "hg" || vcs == "svn" || vcs == "bzr")
	if !editable && !isVCS && !strings.HasPrefix(s, ".") && !strings.HasPrefix(s, "/") && !strings.HasPrefix(s, "file:") {
		return false, nil
	}
	if in.building == nil && !strings.HasSuffix(firstWord(s), ".whl") {
		in.building = fail("--allow-build builds it, in a sandbox: that runs its code", "%s: %q must be built, and building is off", where, shortWord(s))
	}
	if isVCS {
		if !strings.HasPrefix(s, "git+https://") {
			return true, fail("build a wheel and publish it to an index", "%s: %q: of version control only git over https is fetched", where, shortWord(s))
		}
		in.urls = append(in.urls, urlsIn(s[len("git+"):])...)
		in.vcs = true
		return true, nil
	}
	p, _, _ := strings.Cut(s, ";")
	p = strings.TrimSpace(p)
	if i := strings.IndexByte(p, '['); i > 0 { // extras
		p = p[:i]
	}
	p = path.Clean(strings.TrimPrefix(strings.TrimPrefix(p, "file:"), "//"))
	if !filepath.IsLocal(p) {
		return true, fail("nothing outside of the folder of the first file is read: move it below, and write it as ./NAME", "%s: %q is not below that folder", where, shortWord(s))
	}
	in.sources = append(in.sources, Source{Name: pep503.Normalise(name), Path: p, Editable: editable})
	return true, nil
}

// readMarks takes what env lock wrote before a lock.
func (in *input) readMarks(path string, b []byte) error {
	sources, hosts, err := marksOf(b)
	if err != nil {
		return fail("lock again", "read %q: %v", path, err)
	}
	in.marked, in.urls = sources, append(in.urls, hosts...)
	for _, s := range sources {
		if s.Path != "" && !filepath.IsLocal(s.Path) || s.Path == "" && !strings.HasPrefix(s.URL, "https://") {
			return fail("lock again", "read %q: a source is neither below its folder nor a repository over https", path)
		}
		if in.building == nil && !strings.HasSuffix(s.Path, ".whl") {
			in.building = fail("--allow-build builds it, in a sandbox: that runs its code", "read %q: %q must be built, and building is off", path, shortWord(s.Path+s.URL))
		}
	}
	return nil
}

// hasSources says whether some of the input is not from an index.
func (in *input) hasSources() bool { return len(in.sources) > 0 || in.vcs }

func shortWord(s string) string {
	s = firstWord(s)
	if _, rest, ok := strings.Cut(s, "://"); ok { // no credentials in messages
		if i := strings.IndexByte(rest, '@'); i >= 0 && !strings.Contains(rest[:i], "/") {
			s = s[:len(s)-len(rest)] + rest[i+1:]
		}
	}
	return s
}

// trees looks at local sources below the input's folder. dry: nothing is
// stored; nil where something changed since it was stored.
func (m *Manager) trees(ctx context.Context, in *input, sources []Source, dry bool) (out []tree, err error) {
	for _, s := range sources {
		if s.Path == "" {
			out = append(out, tree{Source: s})
			continue
		}
		t := tree{Source: s}
		if t.man, t.file, err = m.sourceTree(ctx, filepath.Dir(in.path), s.Path, dry); err != nil {
			return nil, err
		}
		if t.man == nil {
			return nil, nil
		}
		if t.file && s.Hash != "" && s.Hash != "sha256:"+t.man.Entries[0].Digest {
			return nil, fail("the file is not the one that was locked: lock again only if you know why", "copy %q: hash mismatch for %s", s.Path, s.Name)
		}
		out = append(out, t)
	}
	return out, nil
}

func (m *Manager) sourceTree(ctx context.Context, dir, from string, dry bool) (_ *rootfs.Manifest, file bool, err error) {
	p, err := openProject(dir)
	if err != nil {
		return nil, false, err
	}
	defer p.dir.Close()
	own := p.ignore
	if p.ignore, err = parseIgnores("", []byte(notSources)); err != nil {
		return nil, false, err
	}
	p.ignore.patterns = append(p.ignore.patterns, own.patterns...)
	p.ignore.back = own.back
	s, err := p.sign(ctx, from)
	if err != nil {
		return nil, false, err
	}
	var man *rootfs.Manifest
	if dry {
		kept, ok := m.part(copyKey(p, from, s))
		if !ok {
			return nil, false, nil
		}
		man = place(kept, s.file, from, "s")
	} else if man, err = m.copied(ctx, p, from, "s"); err != nil {
		return nil, false, err
	}
	size := int64(0)
	for _, e := range man.Entries {
		size += e.Size
	}
	if size > maxSourceBytes {
		return nil, false, fail("leave some out by a .dockerignore", "copy %q: more than %d MiB", from, maxSourceBytes>>20)
	}
	return man, s.file, nil
}

// treeKeys are what a lock or a bake depends on besides the lock's text.
func treeKeys(trees []tree) (out []string) {
	for _, t := range trees {
		if t.man != nil {
			out = append(out, "tree", t.Path, t.man.Digest())
		}
	}
	return out
}

// lay writes a tree to a place below a job's folder: a copy that the job may
// change. What is laid there already may hold links, which lead nowhere.
func (m *Manager) lay(t tree, dir, at string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("copy %q: %w", t.Path, err)
	}
	defer root.Close()
	if err := root.MkdirAll(path.Dir(at), 0o755); err != nil {
		return fmt.Errorf("copy %q: %w", t.Path, err)
	}
	for _, e := range t.man.Entries {
		p := path.Join(at, strings.TrimPrefix(strings.TrimPrefix(e.Path, "s"), "/"))
		if e.Type == 'd' {
			if err = root.Mkdir(p, 0o755); errors.Is(err, os.ErrExist) {
				err = nil
			}
		} else if err = root.Remove(p); err == nil || errors.Is(err, os.ErrNotExist) { // of the recipe's own, or of a tree that holds this one
			if e.Type == 'l' {
				err = root.Symlink(e.Link, p)
			} else {
				err = m.layFile(root, e, p)
			}
		}
		if err != nil {
			return fmt.Errorf("copy %q: %w", t.Path, err)
		}
	}
	return nil
}

func (m *Manager) layFile(root *os.Root, e rootfs.Entry, to string) error {
	src, err := m.store.OpenObject(e.Digest, e.Mode&0o111 != 0)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := root.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, os.FileMode(0o644|e.Mode&0o111))
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// takeSources takes the lines for what is not from an index out of a resolver's
// list, and puts them before it as comments.
func takeSources(text []byte) ([]byte, error) {
	var rest, head bytes.Buffer
	text = bytes.ReplaceAll(text, []byte("\\\n"), nil) // hashes follow on lines of their own
	for raw := range bytes.Lines(text) {
		line, hashes := cutHashes(strings.TrimSpace(string(raw)))
		line = strings.TrimSpace(line)
		s := Source{}
		if len(hashes) > 0 {
			s.Hash = hashes[0]
		}
		at := line
		if v, ok := strings.CutPrefix(line, "-e "); ok {
			at, s.Editable = v, true
		}
		if name, v, ok := strings.Cut(at, " @ "); ok {
			if strings.HasPrefix(v, "git+") || strings.HasPrefix(v, "file:") {
				s.Name, at = pep503.Normalise(name), v
			}
		}
		at, _, _ = strings.Cut(at, " ;")
		switch {
		case strings.HasPrefix(at, "git+"):
			url, sub, _ := strings.Cut(at[len("git+"):], "#")
			i := strings.LastIndexByte(url, '@')
			if i < 0 || len(url)-i-1 != 40 {
				return nil, fail("", "resolve: %q is no commit", shortWord(at))
			}
			s.URL, s.Rev = url[:i], url[i+1:]
			s.Subdirectory = strings.TrimPrefix(sub, "subdirectory=")
		case s.Editable || at == "." || strings.HasPrefix(at, "file:"), // also of [tool.uv.sources]: libs/a
			strings.Contains(at, "/") && !strings.Contains(at, "://") && !strings.HasPrefix(at, "-"):
			s.Path = path.Clean(strings.TrimPrefix(strings.TrimPrefix(at, "file://"), "/opt/in/"))
			if i := strings.IndexByte(s.Path, '['); i > 0 {
				s.Path = s.Path[:i]
			}
			if !filepath.IsLocal(s.Path) {
				return nil, fail("", "resolve: %q is not below the folder of the first file", at)
			}
		default:
			rest.Write(raw)
			continue
		}
		b, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&head, "%s%s\n", sourceMark, b)
	}
	return append(head.Bytes(), rest.Bytes()...), nil
}

// buildCause is the last line of what a failed build printed.
func buildCause(out string) string {
	_, said, ok := strings.Cut(out, "[stderr]\n")
	if !ok {
		return ""
	}
	said, _, _ = strings.Cut(said, "\nhint:")
	said, _, _ = strings.Cut(said, "\n\n")
	last := lastLine(said)
	if len(last) > 300 {
		last = last[:300] + "…"
	}
	return last
}

// marksOf reads what is said before a kept lock: packages that are not from an
// index, and hosts that have files of an index.
func marksOf(text []byte) (sources []Source, hosts []string, err error) {
	for line := range bytes.Lines(text) {
		if h, ok := bytes.CutPrefix(line, []byte(filesMark)); ok {
			hosts = append(hosts, string(bytes.TrimSpace(h)))
			continue
		}
		b, ok := bytes.CutPrefix(line, []byte(sourceMark))
		if !ok {
			break
		}
		var s Source
		if err := json.Unmarshal(b, &s); err != nil {
			return nil, nil, fmt.Errorf("read lock: source: %w", err)
		}
		sources = append(sources, s)
	}
	return sources, hosts, nil
}

// installSources builds and installs what no index has into an environment that
// has all else.
func (m *Manager) installSources(ctx context.Context, r Recipe, t *tool, l *lock, online Job, dir string) error {
	for i, s := range l.trees {
		what := s.Path
		args := []string{uvBinary, "pip", "install", "--quiet", "--no-deps", "--python", EnvDir + "/bin/python"}
		if t.Kind == "pip" {
			args = []string{"/opt/pip/bin/python", "-m", "pip", "--python", EnvDir + "/bin/python", "install", "--quiet", "--no-deps", "--no-compile"}
		}
		j := online
		if s.man == nil {
			what = s.URL
			if _, _, ok := resolveInBase(r.Base, "/usr/bin/git"); !ok {
				return fail("choose a --base that has it", "build %q: git is not in the base", s.URL)
			}
			from := "git+" + s.URL + "@" + s.Rev
			if s.Subdirectory != "" {
				from += "#subdirectory=" + s.Subdirectory
			}
			if s.Name != "" {
				from = s.Name + " @ " + from
			}
			j.AllowHosts = append(j.AllowHosts[:len(j.AllowHosts):len(j.AllowHosts)], hostPort(s.URL))
			args = append(args, from)
		} else {
			name := fmt.Sprintf("src/%d/%s", i, path.Base(path.Join("/project", s.Path)))
			if err := m.lay(s, dir, name); err != nil {
				return err
			}
			if s.file && t.Kind == "uv" && strings.HasSuffix(name, ".whl") {
				args = append(args, "--no-build")
			}
			args = append(args, path.Join("/opt", name, s.Subdirectory))
		}
		m.progress.Phase("build", what)
		j.Name, j.Argv = "build", args
		if err := m.run(ctx, j, what); err != nil {
			return err
		}
	}
	return nil
}
