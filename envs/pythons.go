package envs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// PythonsDir is where interpreters that were added lie inside a sandbox, each at
// its version.
const PythonsDir = "/opt/python"

// Python is an interpreter that was added: a layer that is put upon a base.
type Python struct {
	Version   string    `json:"version"` // 3.12.1
	Digest    string    `json:"digest"`
	Program   string    `json:"program"` // its path in a sandbox
	Source    string    `json:"source"`
	SizeBytes int64     `json:"size_bytes"`
	AddedAt   time.Time `json:"added_at"`
}

func (m *Manager) pythonPath(version string) string {
	return m.store.Path("envs", "pythons", version+".json")
}

// Pythons lists the interpreters that were added, oldest version first.
func (m *Manager) Pythons() ([]Python, error) {
	ents, err := os.ReadDir(m.store.Path("envs", "pythons"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list interpreters: %w", err)
	}
	var out []Python
	for _, de := range ents {
		version, ok := strings.CutSuffix(de.Name(), ".json")
		if !ok {
			continue
		}
		b, err := os.ReadFile(m.pythonPath(version))
		if err != nil {
			return nil, fmt.Errorf("list interpreters: %w", err)
		}
		var p Python
		if json.Unmarshal(b, &p) != nil || p.Version != version {
			continue // damaged: as if it were not there
		}
		out = append(out, p)
	}
	sort.Slice(out, func(i, j int) bool { return olderThan(out[i].Version, out[j].Version) })
	return out, nil
}

// interpreter finds the one that a recipe wants: in the base, else among those
// that were added, which is put upon the base then.
func (m *Manager) interpreter(r *Recipe) (python, error) {
	py, err := findPython(r.Base, r.Python)
	if err == nil {
		return m.exact(py), nil
	}
	if r.Python == "" || strings.Trim(r.Python, "0123456789.") != "" {
		return py, err
	}
	all, lerr := m.Pythons()
	if lerr != nil {
		return py, lerr
	}
	for i := len(all) - 1; i >= 0; i-- {
		p := all[i]
		if p.Version != r.Python && !strings.HasPrefix(p.Version, r.Python+".") {
			continue
		}
		dir, derr := m.store.LayerPath(p.Digest)
		if derr != nil {
			continue
		}
		r.Base = r.Base.With(p.Digest, dir)
		py, err = findPython(r.Base, p.Program)
		return m.exact(py), err
	}
	return py, m.whereElse(r, err)
}

// whereElse says where an interpreter that is not here would be.
func (m *Manager) whereElse(r *Recipe, err error) error {
	var e *Error
	bases, berr := m.store.Bases()
	if berr != nil || !errors.As(err, &e) {
		return err
	}
	for _, info := range bases {
		if info.Name == r.Base.Name {
			continue
		}
		if b, err := m.store.Base(info.Name); err == nil {
			if _, err := findPython(b, r.Python); err == nil {
				return &Error{Msg: e.Msg, Tip: "base " + info.Name + " has it: --base " + info.Name, Err: e}
			}
		}
	}
	return &Error{Msg: e.Msg, Tip: "sbxrun env python add DIR takes one from a folder (of pyenv, say), env python add " + r.Python + " downloads one; or choose a --base that has it", Err: e}
}

// exact puts the digest of an interpreter's binary in place of its times: a
// copy of the same binary is the same interpreter. It is kept by what changes
// with every write, so the binary is read once.
func (m *Manager) exact(py python) python {
	var st unix.Stat_t
	if unix.Stat(py.host, &st) != nil {
		return py
	}
	sign := fmt.Sprintf("%d:%d %d %d.%d %d.%d", st.Dev, st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
	name := m.store.Path("envs", "digests", strconv.FormatUint(st.Dev, 16)+"-"+strconv.FormatUint(st.Ino, 16))
	if b, err := os.ReadFile(name); err == nil {
		if d, ok := strings.CutPrefix(string(b), sign+" "); ok {
			touch(name)
			py.stat = d
			return py
		}
	}
	d, err := rootfs.FileDigest(py.host)
	if err != nil {
		return py
	}
	py.stat = d
	if time.Since(time.Unix(st.Ctim.Unix())) > settled {
		_ = m.store.WriteFile(name, []byte(sign+" "+d)) // read again where it cannot be kept
	}
	return py
}

// CheckPython says whether the interpreter that an environment links to is still
// in its base: an upgrade of the host may have taken it away.
func CheckPython(e *Env, base rootfs.Base) error {
	if e.Kind != "venv" && e.Kind != "" || e.Python == "" {
		return nil
	}
	for _, l := range e.Lowers {
		if filepath.Base(l) != "root" {
			return nil // packed: its content is not to be seen by path
		}
	}
	base.Lowers = append(append([]string{e.Path}, e.Lowers...), base.Lowers...)
	if _, _, ok := resolveInBase(base, e.Python); ok {
		return nil
	}
	if e.Origin != nil {
		return fail("choose a --base that has it; env export --with-base brings the base along", "use environment %q: it was baked with %s of base %q, and base %q here has none", Short(e.Digest), e.Python, e.Base, base.Name)
	}
	return fail("bake it again with another interpreter, or install "+filepath.Base(e.Python)+" again", "use environment %q: its interpreter %s is gone from base %q", Short(e.Digest), e.Python, base.Name)
}

// AddPython adds an interpreter: the prefix that a folder holds, made relocatable,
// or one that uv downloads where what is a version.
func (m *Manager) AddPython(ctx context.Context, what string) (_ *Python, err error) {
	defer m.progress.Done()
	if err := m.store.Writable(); err != nil {
		return nil, fmt.Errorf("add interpreter: %w", err)
	}
	release, err := m.store.Lock(ctx, "objects", false) // no pruning until it is in a layer
	if err != nil {
		return nil, err
	}
	defer release()
	base, err := m.store.Base("host")
	if err != nil {
		return nil, err
	}
	dir, done, err := m.workDir("python")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	source := what
	if strings.Trim(what, "0123456789.") == "" {
		if source, err = m.downloadPython(ctx, base, dir, what); err != nil {
			return nil, err
		}
	}
	real, err := filepath.EvalSymlinks(source)
	if err == nil {
		real, err = filepath.Abs(real)
	}
	if st, serr := os.Stat(real); err != nil || serr != nil || !st.IsDir() {
		return nil, fail("the folder that has bin/python3 in it: /root/.pyenv/versions/3.12.1, say; or a version", "add interpreter %q: not a folder", what)
	}
	given, err := filepath.Abs(source)
	if err != nil {
		return nil, err
	}
	m.progress.Phase("python", what)
	j := m.job(&tool{}, base, "add interpreter "+strconv.Quote(what), dir, nil)
	j.Binds = append(j.Binds, JobBind{Source: real, Target: "/mnt/python", ReadOnly: true})
	var got struct {
		Version, Program string
	}
	req := map[string]any{"source": "/mnt/python", "dest": "/opt/out", "was": []string{given, real}, "at": PythonsDir}
	if err := m.inside(ctx, j, dir, "python-relocate", req, &got); err != nil {
		return nil, err
	}
	p := &Python{Version: got.Version, Source: what, AddedAt: time.Now().UTC()}
	if strings.Trim(p.Version, "0123456789.") != "" || strings.Count(p.Version, ".") != 2 || filepath.Clean("/"+got.Program) != "/"+got.Program {
		return nil, fmt.Errorf("add interpreter %q: version %q, program %q: not as expected", what, p.Version, got.Program)
	}
	home := PythonsDir + "/" + p.Version
	p.Program = home + "/" + got.Program
	if err := m.tryPython(ctx, base, filepath.Join(dir, "out"), home, p); err != nil {
		return nil, err
	}
	m.progress.Phase("store", p.Version)
	top, err := os.OpenFile(filepath.Join(dir, "out"), os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("add interpreter: %w", err)
	}
	defer top.Close()
	man, err := m.store.AddTree(ctx, top, nil)
	if err != nil {
		return nil, fmt.Errorf("add interpreter: %w", err)
	}
	for i := range man.Entries {
		p.SizeBytes += man.Entries[i].Size
		man.Entries[i].Path = home[1:] + "/" + man.Entries[i].Path
	}
	withParents(man)
	p.Digest = man.Digest()
	return p, m.store.Publish(ctx, man, func(string) error {
		b, err := json.Marshal(p)
		if err != nil {
			return err
		}
		return m.store.WriteFile(m.pythonPath(p.Version), b)
	})
}

// tryPython compiles the library and sees that the interpreter starts where it
// will be, and with what environments need.
func (m *Manager) tryPython(ctx context.Context, base rootfs.Base, tree, home string, p *Python) error {
	j := Job{
		Name: "add interpreter", Base: base, Dir: "/", Env: []string{"HOME=/tmp", "PYTHONHASHSEED=0", "SOURCE_DATE_EPOCH=1577836800"},
		Binds: []JobBind{{Source: tree, Target: home}},
	}
	var out tail
	try := func(argv ...string) (JobResult, error) {
		out.b = nil
		j.Argv, j.Stdout, j.Stderr = append([]string{p.Program, "-I", "-S"}, argv...), &out, &out
		return m.runner.Run(ctx, j)
	}
	res, err := try("-c", "import sys, zlib, hashlib, ctypes, ssl, venv; print(sys.prefix, sys.version.split()[0])")
	switch {
	case err != nil:
		return fmt.Errorf("add interpreter: %w", err)
	case res.ExitCode != 0:
		return fail("a library it was built with may be missing in the host's /usr", "add interpreter %q: it does not start: %s", p.Source, lastLine(string(out.b)))
	case lastLine(string(out.b)) != home+" "+p.Version:
		return fail("", "add interpreter %q: at its new place it says %q", p.Source, lastLine(string(out.b)))
	}
	m.progress.Phase("compile", p.Version)
	if _, err := try(compileArgs(home + "/lib")...); err != nil {
		return fmt.Errorf("add interpreter: %w", err)
	}
	return ctx.Err()
}

// pythonHosts is where uv gets interpreters from.
var pythonHosts = []string{"releases.astral.sh", "github.com", "objects.githubusercontent.com", "release-assets.githubusercontent.com"}

// downloadPython has uv download one, in a sandbox that reaches nothing else.
func (m *Manager) downloadPython(ctx context.Context, base rootfs.Base, dir, version string) (string, error) {
	t, err := m.tool(ctx)
	if err != nil {
		return "", err
	}
	const hint = "take one from a folder: sbxrun env python add DIR; or a base from an image: sbxrun base add; UV_PYTHON_INSTALL_MIRROR names a mirror"
	if t.Kind != "uv" {
		return "", fail(hint, "add interpreter %q: only uv downloads interpreters, and it could not be had", version)
	}
	ix := t.index(Recipe{}, &input{})
	ix.hosts = pythonHosts
	if mirror := os.Getenv("UV_PYTHON_INSTALL_MIRROR"); mirror != "" {
		ix.hosts, ix.env = []string{hostPort(mirror)}, append(ix.env, "UV_PYTHON_INSTALL_MIRROR="+mirror)
	}
	j := m.job(t, base, "add interpreter", dir, &ix)
	j.Env = append(j.Env, "UV_PYTHON_DOWNLOADS=manual")
	j.Argv = []string{uvBinary, "python", "install", "--quiet", "--no-bin", "--install-dir", "/opt/uv", version}
	j.Timeout = 10 * time.Minute
	m.progress.Phase("download", "Python "+version)
	var out tail
	j.Stdout, j.Stderr = &out, &out
	res, err := m.runner.Run(ctx, j)
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("add interpreter %q: %w", version, err)
	}
	if res.ExitCode != 0 {
		why := firstError(withoutColours(string(out.b)))
		if len(res.Denied) > 0 {
			why = "it wants " + strings.Join(res.Denied, ", ")
		}
		return "", fail(hint, "add interpreter %q: uv cannot download it: %s", version, why)
	}
	found, _ := filepath.Glob(filepath.Join(dir, "uv", "cpython-*"))
	for _, f := range found {
		if st, err := os.Lstat(f); err == nil && st.IsDir() {
			return f, nil
		}
	}
	return "", fail(hint, "add interpreter %q: uv left none", version)
}

// RemovePython removes an interpreter. Environments on it keep it until they are
// removed themselves.
func (m *Manager) RemovePython(ctx context.Context, version string) error {
	if err := m.store.Writable(); err != nil {
		return err
	}
	all, err := m.Pythons()
	if err != nil {
		return err
	}
	for _, p := range all {
		if p.Version != version {
			continue
		}
		if err := os.Remove(m.pythonPath(version)); err != nil {
			return fmt.Errorf("remove interpreter: %w", err)
		}
		_, err := m.sweep(ctx, PruneOptions{OlderThan: 1 << 62}) // its layer, unless an environment has it
		return err
	}
	return fail("sbxrun env python list shows what there is", "remove interpreter %q: not found", version)
}
