package envs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/internal/pep503"
	"github.com/sbxrun/sbxrun/rootfs"
)

type condaFetchRequest struct {
	condaFiles
	Items []condaPackage `json:"items"`
	To    string         `json:"to"`
}

type condaInstallRequest struct {
	Lock         json.RawMessage `json:"lock"`
	Archives     string          `json:"archives"`
	Prefix       string          `json:"prefix"`
	AllowScripts bool            `json:"allow_scripts"`
	Compile      string          `json:"compile"` // a file for the list of what is to be compiled
}

// condaInstalled is what the installer says.
type condaInstalled struct {
	Python     string   `json:"python"`
	Scripts    []string `json:"scripts"` // packages whose scripts were not run
	Vars       []string `json:"vars"`
	PathPrefix []string `json:"path_prefix"`
	Notes      []string `json:"notes"`
	Compile    int      `json:"compile"` // files to be compiled
}

// ensureConda is Ensure for the kinds of conda.
func (m *Manager) ensureConda(ctx context.Context, r Recipe, in *input, ph Phases) (*Env, error) {
	start := time.Now()
	l, err := m.condaLocked(ctx, r, in)
	ph.add("resolve", start)
	if err != nil {
		return nil, err
	}
	start = time.Now()
	defer func() { ph.add("bake", start) }()
	key := m.condaKey(r, l)
	return m.once(ctx, r.Name, key, func() (*Env, error) { return m.bakeConda(ctx, r, in, l, key) })
}

// once gives the environment of a key, by bake if there is none; of several at
// a time one bakes.
func (m *Manager) once(ctx context.Context, name, key string, bake func() (*Env, error)) (*Env, error) {
	env, err := m.load(key)
	if errors.Is(err, os.ErrNotExist) {
		if err := m.store.Writable(); err != nil {
			return nil, fmt.Errorf("bake: %w", err)
		}
		release, lerr := m.store.Lock(ctx, "env-"+key, true)
		if lerr != nil {
			return nil, lerr
		}
		defer release()
		if env, err = m.load(key); errors.Is(err, os.ErrNotExist) { // else another baked it while we waited
			env, err = bake()
		}
	}
	if err != nil {
		return nil, m.store.Explain(err)
	}
	return env, m.addName(name, env)
}

// bakeConda makes the environment of a lock.
func (m *Manager) bakeConda(ctx context.Context, r Recipe, in *input, l *condaLock, key string) (_ *Env, err error) {
	if _, err := m.store.GC(ctx); err != nil { // what a killed bake left
		return nil, err
	}
	release, err := m.store.Lock(ctx, "objects", false) // no pruning until ours are in a layer
	if err != nil {
		return nil, err
	}
	defer release()
	e := &Env{
		Key: key, Kind: "conda", Recipe: r, Base: r.Base.Name, BaseDigest: r.Base.Digest, Tool: "sbxrun conda", CreatedAt: time.Now().UTC(), Lock: "sha256:" + l.lock().digest(),
	}
	e.Below, e.Recipe.IndexURL = r.Base.Upon, withoutUser(r.IndexURL)
	if err := m.keepLock(l.lock()); err != nil {
		return nil, err
	}
	var man *rootfs.Manifest
	var done condaInstalled
	for again := false; ; again = true {
		if err := m.fetchConda(ctx, r, in, l); err != nil {
			return nil, err
		}
		man, done, err = m.installConda(ctx, r, in, l)
		if err == nil || again || ctx.Err() != nil {
			break
		}
		// The installer reads every byte before it believes it. Was it the store's
		// fault, then what is damaged is fetched again.
		if n, derr := m.dropDamaged(l); derr != nil || n == 0 {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	m.progress.Phase("publish", fmt.Sprintf("%d files", len(man.Entries)))
	e.Digest = man.Digest()
	e.Vars = append(append(done.Vars, l.Variables...), r.Env...)
	e.Notes, e.Paths = done.Notes, done.PathPrefix
	if done.Python != "" {
		e.Python = EnvDir + "/bin/python" + done.Python
	}
	e.describe(man)
	for _, p := range l.view.Packages {
		e.addPackage(p.Name, p.Version)
	}
	sort.Slice(e.Packages, func(i, j int) bool { return e.Packages[i].Name < e.Packages[j].Name })
	err = m.store.Publish(ctx, man, func(path string) error {
		e.Path = path
		return m.save(e)
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// describe counts what is in a manifest and takes the distributions of it.
func (e *Env) describe(man *rootfs.Manifest) {
	for _, f := range man.Entries {
		if f.Type == 'f' {
			e.Files++
			e.SizeBytes += f.Size
		}
		if d, ok := strings.CutSuffix(path.Dir(f.Path), ".dist-info"); ok && path.Base(f.Path) == "METADATA" {
			name, version, _ := strings.Cut(path.Base(d), "-")
			e.Packages = append(e.Packages, Package{Name: pep503.Normalise(name), Version: version})
		}
	}
}

// addPackage adds a package of conda's unless it is there as a distribution of
// Python's.
func (e *Env) addPackage(name, version string) {
	for _, p := range e.Packages {
		if p.Name == pep503.Normalise(name) && p.Version == version {
			return
		}
	}
	e.Packages = append(e.Packages, Package{Name: name, Version: version})
}

// archivePath is where a package's archive is kept.
func (m *Manager) archivePath(p condaPackage) string {
	return m.store.Path("cache", "conda", "pkgs", p.archive())
}

// fetchConda brings the archives that are not in the store. What comes is
// verified by the job and again here.
func (m *Manager) fetchConda(ctx context.Context, r Recipe, in *input, l *condaLock) (err error) {
	var missing []condaPackage
	var bytes int64
	for _, p := range l.view.Packages {
		st, err := os.Lstat(m.archivePath(p))
		if err != nil || p.SizeBytes > 0 && st.Size() != p.SizeBytes {
			missing = append(missing, p)
			bytes += p.SizeBytes
		}
	}
	if len(missing) == 0 {
		return nil
	}
	m.progress.Phase("download", fmt.Sprintf("%d packages, %d MB", len(missing), bytes>>20))
	dir, done, err := m.workDir("fetch")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := errors.Join(writeFiles(dir, in.files[:1]), os.Mkdir(filepath.Join(dir, "pkgs"), 0o755)); err != nil {
		return err
	}
	j, f, err := m.condaOnline(r, fmt.Sprintf("bake %q", r.File), dir, in, origins(missing))
	if err != nil {
		return err
	}
	if err := m.inside(ctx, j, dir, "conda-fetch", condaFetchRequest{f, missing, "/opt/pkgs"}, nil); err != nil {
		return err
	}
	for _, p := range missing {
		from, sum := filepath.Join(dir, "pkgs", p.archive()), p.SHA256
		if sum == "" { // the fetcher verified the md5; what it is called by is not ours to say
			if sum, _, err = hashFile(from); err != nil {
				return fmt.Errorf("bake %q: package %s: %w", r.File, p.Name, err)
			}
		}
		if err := m.keep(from, m.archivePath(p), sum); err != nil {
			return fmt.Errorf("bake %q: package %s: %w", r.File, p.Name, err)
		}
	}
	return nil
}

// dropDamaged removes from the store the archives that are not what they are
// called, and those of which that cannot be said, and says how many.
func (m *Manager) dropDamaged(l *condaLock) (n int, err error) {
	for _, p := range l.view.Packages {
		if sum, _, err := hashFile(m.archivePath(p)); err == nil && sum == p.SHA256 {
			continue
		}
		n++
		if err := os.Remove(m.archivePath(p)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return n, fmt.Errorf("remove damaged package: %w", err)
		}
	}
	return n, nil
}

// installConda installs the archives in a sandbox without a network, then the
// pip section and the hooks, and stores what comes out.
func (m *Manager) installConda(ctx context.Context, r Recipe, in *input, l *condaLock) (_ *rootfs.Manifest, got condaInstalled, err error) {
	dir, done, err := m.workDir("bake")
	if err != nil {
		return nil, got, err
	}
	defer func() { err = errors.Join(err, done()) }()
	archives := filepath.Join(filepath.Dir(dir), "pkgs")
	if err := os.Mkdir(archives, 0o755); err != nil {
		return nil, got, fmt.Errorf("bake: %w", err)
	}
	for _, p := range l.view.Packages { // these and no others: channels may be private
		if err := os.Link(m.archivePath(p), filepath.Join(archives, p.archive())); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, got, fmt.Errorf("bake: %w", err)
		}
	}
	t := &tool{}
	if l.Requirements != "" {
		if t, err = m.tool(ctx); err != nil {
			return nil, got, err
		}
	}
	count := fmt.Sprintf("%d packages", len(l.view.Packages))
	m.progress.Phase("install", count)
	offline := m.job(t, r.Base, fmt.Sprintf("bake %q", r.File), dir, nil)
	ij := offline
	ij.Binds = append(ij.Binds[:len(ij.Binds):len(ij.Binds)], JobBind{Source: archives, Target: "/mnt/pkgs", ReadOnly: true})
	q := condaInstallRequest{Lock: l.Conda, Archives: "/mnt/pkgs", Prefix: EnvDir, AllowScripts: r.AllowScripts, Compile: "/opt/compile.txt"}
	if err := m.inside(ctx, ij, dir, "conda-install", q, &got); err != nil {
		return nil, got, err
	}
	if len(got.Scripts) > 0 {
		got.Notes = append(got.Notes, "link scripts were not run (--allow-scripts runs them, in a sandbox): "+strings.Join(got.Scripts, ", "))
	}
	if l.Requirements != "" {
		if err := m.installPipSection(ctx, r, t, l, dir); err != nil {
			return nil, got, err
		}
	}
	vars := append(append([]string{}, got.Vars...), l.Variables...)
	if err := m.hooks(ctx, r, offline, append(vars, "PATH="+strings.Join(append(got.PathPrefix[:len(got.PathPrefix):len(got.PathPrefix)], "/usr/local/bin", "/usr/bin", "/bin"), ":"))); err != nil {
		return nil, got, err
	}
	if got.Python != "" {
		m.progress.Phase("compile", count)
		var what []string
		if l.Requirements != "" || len(r.Hooks) > 0 {
			what = append(what, EnvDir+"/lib/python"+got.Python+"/site-packages")
		}
		if got.Compile > 0 {
			what = append(what, "-i", "/opt/compile.txt")
		}
		if len(what) > 0 {
			if err := m.compile(ctx, r, offline, append([]string{EnvDir + "/bin/python" + got.Python}, compileArgs(what...)...)); err != nil {
				return nil, got, err
			}
		}
	}
	m.progress.Phase("store", count)
	man, err := m.storeEnv(ctx, dir)
	return man, got, err
}

// installPipSection adds the pip section's distributions to the prefix: no
// others than those of the lock, for conda has the rest.
func (m *Manager) installPipSection(ctx context.Context, r Recipe, t *tool, l *condaLock, dir string) error {
	if t.Kind != "uv" {
		return fail("put uv on PATH", "bake %q: its pip section needs uv, which could not be had", r.File)
	}
	if err := handOver(dir, "requirements.txt", []byte(l.Requirements)); err != nil {
		return fmt.Errorf("bake: %w", err)
	}
	section := &input{kind: KindRequirements}
	if err := section.add("/opt/requirements.txt", []byte(l.Requirements), "/opt", false, map[string]bool{}, 0); err != nil {
		return err
	}
	m.progress.Phase("download", fmt.Sprintf("%d packages of the pip section", len(section.reqs)))
	ix := t.index(r, section)
	j := m.job(t, r.Base, "bake", dir, &ix)
	j.Argv = []string{uvBinary, "pip", "install", "--quiet", "--python", EnvDir + "/bin/python", "--break-system-packages", "--no-deps", "--require-hashes", "-r", "/opt/requirements.txt"}
	if !r.AllowBuild {
		j.Argv = append(j.Argv, "--no-build")
	}
	return m.run(ctx, j, r.File)
}
