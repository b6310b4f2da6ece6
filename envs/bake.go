package envs

import (
	"context"
	"encoding/csv"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/pep503"
	"github.com/sbxrun/sbxrun/rootfs"
)

// bake makes the environment of a lock. Where nothing but wheels is in it, it
// is put together from the files of each wheel as they were installed and
// compiled before: only wheels never seen are installed, in a sandbox. Where
// something may have changed what another wheel left (hooks, builds, markers,
// a pylock), all is installed in one go.
func (m *Manager) bake(ctx context.Context, r Recipe, l *lock, py python, key string) (_ *Env, err error) {
	if _, err := m.store.GC(ctx); err != nil { // what a killed bake left
		return nil, err
	}
	release, err := m.store.Lock(ctx, "objects", false) // no pruning until ours are in a layer
	if err != nil {
		return nil, err
	}
	defer release()
	t, err := m.tool(ctx)
	if err != nil {
		return nil, err
	}
	e := &Env{
		Key: key, Kind: "venv", Recipe: r, Base: r.Base.Name, BaseDigest: r.Base.Digest, Python: py.path, Tool: t.id(), CreatedAt: time.Now().UTC(), Lock: "sha256:" + l.digest(),
		Vars: append([]string{"VIRTUAL_ENV=" + EnvDir}, r.Env...),
	}
	e.Below, e.Lowers = r.Base.Upon, r.Base.Lowers[:len(r.Base.Upon)]
	e.Recipe.IndexURL = withoutUser(r.IndexURL)
	if err := m.keepLock(l); err != nil {
		return nil, err
	}
	var man *rootfs.Manifest
	if composable(r, l) && t.ownsAll() {
		man, err = m.compose(ctx, r, t, l, py)
		if err != nil && !errors.Is(err, errConflict) {
			return nil, err
		}
	}
	if man == nil {
		if man, err = m.install(ctx, r, t, l, py, true); err != nil {
			return nil, err
		}
	}
	m.progress.Phase("publish", fmt.Sprintf("%d files", len(man.Entries)))
	e.Digest = man.Digest()
	e.describe(man)
	err = m.store.Publish(ctx, man, func(path string) error {
		e.Path = path
		return m.save(e)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// withoutUser gives an index's URL without credentials.
func withoutUser(url string) string {
	if url == "" {
		return ""
	}
	return strings.TrimPrefix(dropUserinfo("--index-url "+url), "--index-url ")
}

// ownsAll says whether the tool adds to a wheel's RECORD what the wheel has and
// does not name. Where it does not, one wheel could pass files off as another's.
func (t *tool) ownsAll() bool { return t.Kind != "uv" || !olderThan(t.Version, uvVersion) }

func composable(r Recipe, l *lock) bool {
	if l.kind != "requirements" || r.AllowBuild || len(r.Hooks) > 0 || len(l.sources) > 0 {
		return false
	}
	for _, q := range l.in.reqs {
		if q.marker || q.version == "" || len(q.hashes) == 0 {
			return false
		}
	}
	for _, o := range l.in.opts {
		if strings.HasPrefix(o, "--no-binary") || strings.HasPrefix(o, "--find-links") {
			return false
		}
	}
	return true
}

// install runs the steps of a bake over a lock and stores what comes out.
func (m *Manager) install(ctx context.Context, r Recipe, t *tool, l *lock, py python, full bool) (_ *rootfs.Manifest, err error) {
	dir, done, err := m.workDir("bake")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := handOver(dir, l.fileName(), l.text); err != nil {
		return nil, fmt.Errorf("bake: %w", err)
	}
	offline := m.job(t, r.Base, "bake", dir, nil)
	step := func(phase, detail string, j Job, argv ...string) error {
		m.progress.Phase(phase, detail)
		j.Argv = argv
		return m.run(ctx, j, r.File)
	}
	ix := t.index(r, l.in)
	online := m.job(t, r.Base, "bake", dir, &ix)
	count := fmt.Sprintf("%d packages", len(l.in.reqs))
	if len(l.in.reqs) == 1 {
		count = l.in.reqs[0].name
	}
	if l.kind == "pylock" {
		count = "pylock.toml"
	}
	lockFile := "/opt/" + l.fileName()

	if t.Kind == "pip" {
		err = m.pipInstall(ctx, r, offline, online, py, lockFile, step)
	} else {
		venv := []string{uvBinary, "venv", "--quiet", "--no-project", "--allow-existing", "--python", py.path, EnvDir}
		if r.SystemSitePackages {
			venv = append(venv, "--system-site-packages")
		}
		if err = step("install", "virtual environment", offline, venv...); err != nil {
			return nil, err
		}
		sync := []string{uvBinary, "pip", "sync", "--quiet", "--python", EnvDir + "/bin/python", "--require-hashes", "--allow-empty-requirements"}
		if !r.AllowBuild {
			sync = append(sync, "--no-build")
		}
		if len(l.in.reqs) > 0 || l.kind == "pylock" {
			locked := online // every file has its hash: whichever index has it will do
			locked.Env = append(slices.Clone(locked.Env), "UV_INDEX_STRATEGY=unsafe-best-match")
			err = step("download", count, locked, append(sync, lockFile)...)
		}
	}
	if err == nil {
		err = m.installSources(ctx, r, t, l, online, dir)
	}
	if err != nil {
		return nil, err
	}
	if full {
		if err := m.hooks(ctx, r, offline, []string{"VIRTUAL_ENV=" + EnvDir, "PATH=" + EnvDir + "/bin:/usr/local/bin:/usr/bin:/bin"}); err != nil {
			return nil, err
		}
	}
	m.progress.Phase("compile", count)
	if err := m.compile(ctx, r, offline, append([]string{EnvDir + "/bin/python"}, compileArgs(EnvDir+"/lib")...)); err != nil {
		return nil, err
	}
	m.progress.Phase("store", count)
	return m.storeEnv(ctx, dir)
}

// hooks runs the recipe's shell commands with the environment writable.
func (m *Manager) hooks(ctx context.Context, r Recipe, j Job, vars []string) error {
	for _, h := range r.Hooks {
		m.progress.Phase("hook", h)
		j := j
		j.Name = "hook"
		j.Env = append(append(append([]string{}, j.Env...), vars...), "PYTHONDONTWRITEBYTECODE=1")
		j.Env = append(j.Env, r.Env...)
		j.Argv = []string{"/bin/sh", "-ec", h}
		if err := m.run(ctx, j, r.File); err != nil {
			return err
		}
	}
	return nil
}

// compile runs compileall with -I and -S: no code of the packages runs (.pth
// files). Files that are not valid for this version do not compile and are left
// as they are.
func (m *Manager) compile(ctx context.Context, r Recipe, j Job, argv []string) error {
	j.Argv = argv
	var out tail
	j.Stdout, j.Stderr = &out, &out
	res, err := m.runner.Run(ctx, j)
	if err != nil {
		return fmt.Errorf("compile: %w", err)
	}
	diskFull := strings.Contains(string(out.b), unix.ENOSPC.Error()) || strings.Contains(string(out.b), "No space left on device")
	if res.ExitCode > 1 || res.Reason != "exit" && res.Reason != "" || diskFull {
		return explain("compile", r.File, res, string(out.b))
	}
	return ctx.Err()
}

// storeEnv takes the environment that jobs left below dir into the store.
func (m *Manager) storeEnv(ctx context.Context, dir string) (*rootfs.Manifest, error) {
	// The tool's cache has links to what it installed: without them the files are
	// taken over instead of copied.
	if err := os.RemoveAll(filepath.Join(dir, "cache")); err != nil {
		return nil, fmt.Errorf("bake: %w", err)
	}
	top, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return nil, fmt.Errorf("bake: %w", err)
	}
	defer top.Close()
	return m.store.AddTree(ctx, top, func(p string) bool {
		if p == "opt" || p == "opt/env" {
			return false
		}
		rel, ok := strings.CutPrefix(p, "opt/env/")
		return !ok || dropped(rel)
	})
}

// dropped says what a bake leaves behind that differs from run to run, or that
// is for shells no sandbox has.
func dropped(rel string) bool {
	switch rel {
	case ".lock", ".gitignore", "CACHEDIR.TAG", "bin/activate.bat", "bin/activate.csh", "bin/activate.fish", "bin/activate.nu", "bin/activate.ps1", "bin/Activate.ps1", "bin/deactivate.bat", "bin/pydoc.bat", "bin/activate_this.py":
		return true
	}
	return path.Base(rel) == "uv_cache.json" && strings.HasSuffix(path.Dir(rel), ".dist-info")
}

func (m *Manager) pipInstall(ctx context.Context, r Recipe, offline, online Job, py python, lockFile string, step func(string, string, Job, ...string) error) error {
	if lockFile == "/opt/pylock.toml" {
		return fail("put uv on PATH", "bake %q: a pylock.toml needs uv, which could not be had", r.File)
	}
	if err := m.pipVenv(ctx, r, offline, py); err != nil {
		return err
	}
	venv := []string{py.path, "-I", "-m", "venv", "--without-pip", EnvDir}
	if r.SystemSitePackages {
		venv = append(venv, "--system-site-packages")
	}
	if err := step("install", "virtual environment", offline, venv...); err != nil {
		return err
	}
	sync := []string{"/opt/pip/bin/python", "-m", "pip", "--python", EnvDir + "/bin/python", "install", "--quiet", "--no-deps", "--no-compile", "--require-hashes", "-r", lockFile}
	if !r.AllowBuild {
		sync = append(sync, "--only-binary", ":all:")
	}
	return step("download", "with pip", online, sync...)
}

// ---- wheels seen before --------------------------------------------------

var errConflict = errors.New("two wheels own one file")

// wheelKey names what a locked wheel's installed files depend on.
func wheelKey(q requirement, r Recipe, t *tool, py python) string {
	h := append([]string{}, q.hashes...)
	sort.Strings(h)
	return digestOf(append([]string{schema, "wheel", pycs, q.name, q.version, py.key(r.Base), t.id(), archID}, h...)...)
}

func skeletonKey(r Recipe, t *tool, py python) string {
	return digestOf(schema, "skeleton", py.key(r.Base), t.id(), fmt.Sprint(r.SystemSitePackages))
}

func (m *Manager) part(key string) (*rootfs.Manifest, bool) {
	b, err := os.ReadFile(m.store.Path("envs", "parts", key))
	if err != nil {
		return nil, false
	}
	man, err := rootfs.DecodeManifest(b)
	if err != nil {
		return nil, false
	}
	for _, e := range man.Entries {
		if e.Type == 'f' && !m.store.HasObject(e.Digest, e.Size, e.Mode&0o111 != 0) {
			return nil, false // pruned
		}
	}
	return man, true
}

// compose puts an environment together from parts and installs those that are
// missing.
func (m *Manager) compose(ctx context.Context, r Recipe, t *tool, l *lock, py python) (*rootfs.Manifest, error) {
	var parts []*rootfs.Manifest
	var missing []requirement
	skeleton, ok := m.part(skeletonKey(r, t, py))
	if ok {
		touch(m.store.Path("envs", "parts", skeletonKey(r, t, py)))
	}
	for _, q := range l.in.reqs {
		if p, have := m.part(wheelKey(q, r, t, py)); have {
			touch(m.store.Path("envs", "parts", wheelKey(q, r, t, py)))
			parts = append(parts, p)
		} else {
			missing = append(missing, q)
		}
	}
	if !ok || len(missing) > 0 {
		sub := subset(l, missing)
		man, err := m.install(ctx, r, t, sub, py, false)
		if err != nil {
			return nil, err
		}
		fresh, rest, err := m.split(man, missing)
		if err != nil {
			return nil, err
		}
		for i, q := range missing {
			if err := m.store.WriteFile(m.store.Path("envs", "parts", wheelKey(q, r, t, py)), fresh[i].Encode()); err != nil {
				return nil, err
			}
			parts = append(parts, fresh[i])
		}
		if !ok {
			skeleton = rest
			if err := m.store.WriteFile(m.store.Path("envs", "parts", skeletonKey(r, t, py)), rest.Encode()); err != nil {
				return nil, err
			}
		}
	}
	return merge(append(parts, skeleton))
}

// subset is a lock of some of the requirements, with all options.
func subset(l *lock, some []requirement) *lock {
	var b strings.Builder
	for _, o := range l.in.opts {
		b.WriteString(o + "\n")
	}
	for _, q := range some {
		fmt.Fprintf(&b, "%s==%s", q.name, q.version)
		for _, h := range q.hashes {
			b.WriteString(" --hash=" + h)
		}
		b.WriteString("\n")
	}
	return &lock{kind: l.kind, text: []byte(b.String()), in: &input{kind: l.in.kind, reqs: some, opts: l.in.opts, urls: l.in.urls}}
}

// merge unites parts. Directories and equal files may be in several.
func merge(parts []*rootfs.Manifest) (*rootfs.Manifest, error) {
	all := map[string]rootfs.Entry{}
	for _, p := range parts {
		for _, e := range p.Entries {
			if old, dup := all[e.Path]; dup && old != e {
				return nil, fmt.Errorf("%w: %s", errConflict, e.Path)
			}
			all[e.Path] = e
		}
	}
	out := &rootfs.Manifest{}
	for _, e := range all {
		out.Entries = append(out.Entries, e)
		// Each directory is its own entry in the part that has something in it.
		for d := path.Dir(e.Path); d != "."; d = path.Dir(d) {
			if _, ok := all[d]; !ok {
				return nil, fmt.Errorf("%w: no entry for %s", errConflict, d)
			}
		}
	}
	out.Encode() // sorts
	return out, nil
}

// ofSkeleton says whether a path is the virtual environment's own: a wheel that
// puts something there would take it out of what others get.
func ofSkeleton(p string) bool {
	base := path.Base(p)
	switch {
	case path.Dir(p) == "opt/env/bin":
		return base == "activate" || strings.HasPrefix(base, "activate.") || strings.HasPrefix(base, "python") && strings.Trim(base[len("python"):], "0123456789.") == ""
	case path.Base(path.Dir(p)) == "site-packages":
		return strings.HasPrefix(base, "_virtualenv.")
	}
	return p == "opt/env/pyvenv.cfg"
}

// split gives to each requirement the files that its RECORD names, and the
// bytecode of those; the rest is the skeleton.
func (m *Manager) split(man *rootfs.Manifest, reqs []requirement) (parts []*rootfs.Manifest, rest *rootfs.Manifest, err error) {
	byPath := map[string]rootfs.Entry{}
	records := map[string]rootfs.Entry{}
	for _, e := range man.Entries {
		byPath[e.Path] = e
		if path.Base(e.Path) == "RECORD" && strings.HasSuffix(path.Dir(e.Path), ".dist-info") {
			name, _, _ := strings.Cut(path.Base(path.Dir(e.Path)), "-")
			records[pep503.Normalise(name)] = e
		}
	}
	owner := map[string]int{}
	for i, q := range reqs {
		rec, ok := records[q.name]
		if !ok {
			return nil, nil, fmt.Errorf("%w: %s has no RECORD", errConflict, q.name)
		}
		site := path.Dir(path.Dir(rec.Path))
		itself := false
		files, err := m.readRecord(rec)
		if err != nil {
			return nil, nil, err
		}
		for _, f := range files {
			p := path.Join(site, f)
			if _, ok := byPath[p]; !ok || !strings.HasPrefix(p, "opt/env/") {
				continue
			}
			if o, taken := owner[p]; taken && o != i || ofSkeleton(p) {
				return nil, nil, fmt.Errorf("%w: %s", errConflict, p)
			}
			owner[p] = i
			itself = itself || p == rec.Path
		}
		if !itself { // another wheel's, which brought it along
			return nil, nil, fmt.Errorf("%w: %s", errConflict, rec.Path)
		}
	}
	for _, e := range man.Entries { // bytecode goes with its source
		if path.Base(path.Dir(e.Path)) != "__pycache__" || !strings.HasSuffix(e.Path, ".pyc") {
			continue
		}
		stem, _, _ := strings.Cut(path.Base(e.Path), ".cpython-")
		src := path.Join(path.Dir(path.Dir(e.Path)), stem+".py")
		if o, ok := owner[src]; ok {
			if by, taken := owner[e.Path]; taken && by != o { // planted: we did not compile it
				return nil, nil, fmt.Errorf("%w: %s", errConflict, e.Path)
			}
			owner[e.Path] = o
		}
	}
	parts = make([]*rootfs.Manifest, len(reqs))
	have := make([]map[string]bool, len(reqs)+1)
	for i := range have {
		have[i] = map[string]bool{}
	}
	rest = &rootfs.Manifest{}
	put := func(i int, e rootfs.Entry) {
		to := rest
		if i < len(reqs) {
			if parts[i] == nil {
				parts[i] = &rootfs.Manifest{}
			}
			to = parts[i]
		}
		for d := path.Dir(e.Path); d != "." && !have[i][d]; d = path.Dir(d) {
			have[i][d] = true
			to.Entries = append(to.Entries, byPath[d])
		}
		if e.Type != 'd' {
			to.Entries = append(to.Entries, e)
		}
	}
	for _, e := range man.Entries {
		i, ok := owner[e.Path]
		if !ok {
			i = len(reqs)
		}
		if e.Type == 'd' {
			continue // comes with what is in it
		}
		if !ok && strings.Contains(e.Path, "/site-packages/") && !strings.HasPrefix(path.Base(e.Path), "_virtualenv") {
			return nil, nil, fmt.Errorf("%w: nobody owns %s", errConflict, e.Path)
		}
		put(i, e)
	}
	site := ""
	for p := range byPath {
		if path.Base(p) == "site-packages" {
			site = p
		}
	}
	if site != "" { // also where nothing but directories is in the skeleton
		put(len(reqs), rootfs.Entry{Path: site + "/x", Type: 'd'})
	}
	for i := range parts {
		if parts[i] == nil {
			parts[i] = &rootfs.Manifest{}
		}
	}
	return parts, rest, nil
}

// readRecord lists the paths of an installed distribution's RECORD.
func (m *Manager) readRecord(e rootfs.Entry) ([]string, error) {
	f, err := m.store.OpenObject(e.Digest, e.Mode&0o111 != 0)
	if err != nil {
		return nil, fmt.Errorf("read RECORD: %w", err)
	}
	defer f.Close()
	r := csv.NewReader(io.LimitReader(f, 64<<20))
	r.FieldsPerRecord = -1
	r.LazyQuotes = true
	var out []string
	for {
		row, err := r.Read()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: RECORD: %w", errConflict, err)
		}
		if len(row) > 0 && row[0] != "" && !path.IsAbs(row[0]) {
			out = append(out, row[0])
		}
	}
}

// Short is the beginning of a digest, for people.
func Short(digest string) string {
	d := strings.TrimPrefix(digest, "sha256:")
	if _, err := hex.DecodeString(d); err != nil || len(d) < 12 {
		return d
	}
	return d[:12]
}
