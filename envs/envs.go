// Package envs turns a recipe (a requirements file, a lock) into a baked
// environment: a layer of the store with a virtual environment at /opt/env.
//
//	recipe → lock (hashed) → key → layer (content digest)
//
// Resolving and baking run in sandboxes: the package declares the Runner it
// needs and must never know how one is made. The way of a second run is files
// only: no process, no Python, no resolver.
package envs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/rootfs"
)

// EnvDir is where an environment lies inside a sandbox.
const EnvDir = "/opt/env"

// schema changes when the same recipe would be baked differently.
const schema = "1"

// Runner runs a job in a sandbox of its own.
type Runner interface {
	Run(ctx context.Context, job Job) (JobResult, error)
}

// Job is one step of a bake.
type Job struct {
	Name       string
	Argv, Env  []string
	Dir        string
	Base       rootfs.Base
	Binds      []JobBind
	Trees      []JobTree
	AllowHosts []string // host or host:port; empty is no network
	Stdin      string   // a host file; "" is none
	Stdout     io.Writer
	Stderr     io.Writer
	Timeout    time.Duration // 0 is none
}

// JobBind shows a host path. What the job writes there belongs to root on the host.
type JobBind struct {
	Source, Target string
	ReadOnly       bool
}

// JobTree shows host directories as one writable tree. What the job changes is
// kept in Dir (rootfs.MakeUpper) and belongs to an id of the sandbox's.
type JobTree struct {
	Target string
	Lowers []string // topmost first, one at least
	Dir    string
}

// JobResult is how a job ended.
type JobResult struct {
	ExitCode int
	Reason   string
	Message  string
	Denied   []string // hosts that the network policy refused
}

// Progress hears of long work. Phase names are resolve, download, install,
// compile, publish, tool.
type Progress interface {
	Phase(name, detail string)
	Done()
}

type silent struct{}

func (silent) Phase(string, string) {}
func (silent) Done()                {}

// Error is a failure with a hint.
type Error struct {
	Msg, Tip string
	Err      error
}

func (e *Error) Error() string { return e.Msg }

// Unwrap gives the cause.
func (e *Error) Unwrap() error { return e.Err }

// Hint says what to do.
func (e *Error) Hint() string { return e.Tip }

func fail(hint, format string, a ...any) error {
	return &Error{Msg: fmt.Sprintf(format, a...), Tip: hint}
}

// Recipe is what an environment is made from. The zero value of every field
// but File is the default.
type Recipe struct {
	File               string      `json:"-"` // of any kind (see Kind), by content; or a folder with one
	Name               string      `json:"-"` // a name for it, "" is none
	Base               rootfs.Base `json:"-"`
	Python             string      `json:"python,omitempty"` // "3.12" or a path in the base; "" is its python3
	SystemSitePackages bool        `json:"system_site_packages,omitempty"`
	AllowBuild         bool        `json:"allow_build,omitempty"`   // build source distributions, in a sandbox
	AllowScripts       bool        `json:"allow_scripts,omitempty"` // run conda packages' link scripts, in a sandbox
	Hooks              []string    `json:"hooks,omitempty"`         // shell commands run after the install, in a sandbox, with the environment writable
	Env                []string    `json:"env,omitempty"`           // KEY=VALUE of whoever uses the environment
	IndexURL           string      `json:"index_url,omitempty"`     // "" is the resolver's configuration
	IndexHosts         []string    `json:"index_hosts,omitempty"`   // host or host:port that the index or a channel refers to
	ExcludeNewer       string      `json:"exclude_newer,omitempty"` // a date: nothing published later
	Refresh            bool        `json:"-"`                       // resolve anew
	Upgrade            []string    `json:"-"`                       // resolve these anew, and keep the other pins where they fit
	Extras             []string    `json:"extras,omitempty"`        // of the project
	Groups             []string    `json:"groups,omitempty"`        // its dependency groups, besides its own dependencies
	OnlyGroups         []string    `json:"only_groups,omitempty"`   // instead of its own dependencies
	AllExtras          bool        `json:"all_extras,omitempty"`
	// Staged says that it was a recipe in TOML: its steps are not in here.
	Staged bool `json:"staged,omitempty"`

	// prefer is a lock whose pins are kept where there is a choice.
	prefer []byte
}

// KindFiles is the kind of an environment without packages: what a recipe copied
// and ran.
const KindFiles = "files"

// Package is one installed distribution.
type Package struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

// Env is a baked environment.
type Env struct {
	Key    string   `json:"key"`
	Digest string   `json:"digest"`
	Kind   string   `json:"kind"` // "venv", "conda" or "files"; "" in records of older versions is "venv"
	Names  []string `json:"names,omitempty"`
	Base   string   `json:"base"`
	// BaseDigest is the base's; "" in records of older versions.
	BaseDigest string    `json:"base_digest,omitempty"`
	Python     string    `json:"python"`
	Tool       string    `json:"tool"`
	Vars       []string  `json:"env"`
	Packages   []Package `json:"packages"`
	// System are the packages of the base's distribution that were put upon it.
	System    []SystemPackage `json:"system_packages,omitempty"`
	SizeBytes int64           `json:"size_bytes"`
	Files     int             `json:"files"`
	CreatedAt time.Time       `json:"created_at"`
	Lock      string          `json:"lock"` // digest of the lock; LockText gives it
	// Below are the digests of the layers under this one, topmost first: those
	// of the environments that it extends.
	Below []string `json:"below,omitempty"`
	// Recipe is what it was baked from, without the file: that is the lock.
	// Credentials of its index are left out.
	Recipe Recipe `json:"recipe"`
	// Paths are put before PATH; none is the environment's bin alone.
	Paths []string `json:"path_prefix,omitempty"`
	// Notes are what a user should know of it: scripts that were not run.
	Notes []string `json:"notes,omitempty"`
	// Origin is where it was imported from; nil: it was baked on this machine.
	Origin *Origin `json:"origin,omitempty"`

	// BaseVars are the base's variables, where a signature is made or checked of
	// an environment that its base may go along with; nil: they do not matter.
	BaseVars []string `json:"-"`

	Path   string   `json:"-"` // the layer's directory
	Lowers []string `json:"-"` // those of Below
}

// Origin is where an environment that was not baked here came from.
type Origin struct {
	From string    `json:"from"` // as policies name it: registry/repository:tag, or file:/path
	At   time.Time `json:"at"`
}

// SignaturesDir is where the signatures of a content digest are kept, one
// sigstore bundle a file.
func SignaturesDir(store *rootfs.Store, digest string) string {
	return store.Path("envs", "signatures", strings.TrimPrefix(digest, "sha256:"))
}

// PathPrefix is put before PATH.
func (e *Env) PathPrefix() []string {
	if len(e.Paths) > 0 {
		return e.Paths
	}
	return []string{EnvDir + "/bin"}
}

// Options of a Manager.
type Options struct {
	Runner   Runner
	Progress Progress
	Helper   func() (string, error) // finds bin/sbxrun-env
	// Trusted refuses an environment that may not be extended; nil: none is.
	Trusted func(ctx context.Context, e *Env) error
}

// Manager makes and keeps environments in a store.
type Manager struct {
	store    *rootfs.Store
	runner   Runner
	progress Progress
	helper   func() (string, error)
	trusted  func(ctx context.Context, e *Env) error
}

// Open gives a Manager over a store.
func Open(store *rootfs.Store, o Options) *Manager {
	m := &Manager{store: store, runner: o.Runner, progress: o.Progress, helper: o.Helper, trusted: o.Trusted}
	if m.progress == nil {
		m.progress = silent{}
	}
	return m
}

// Phases are the times of Ensure in milliseconds.
type Phases map[string]float64

func (p Phases) add(name string, since time.Time) {
	p[name] += float64(time.Since(since).Microseconds()) / 1000
}

func digestOf(parts ...string) string {
	h := sha256.New()
	for _, p := range parts {
		fmt.Fprintf(h, "%d:%s\n", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Ensure gives the environment of a recipe and bakes it if it is not there.
func (m *Manager) Ensure(ctx context.Context, r Recipe) (*Env, Phases, error) {
	defer m.progress.Done()
	file, ok, err := isRecipe(r.File)
	if err != nil {
		return nil, Phases{}, err
	}
	if !ok {
		return m.ensure(ctx, r)
	}
	ph, start := Phases{}, time.Now()
	env, err := m.fromRecipe(ctx, r, file, false)
	if err == nil {
		err = m.addName(r.Name, env)
	}
	ph.add("bake", start)
	if err != nil {
		return nil, ph, m.store.Explain(err)
	}
	return env, ph, nil
}

// ensure is Ensure for whatever is packages only.
func (m *Manager) ensure(ctx context.Context, r Recipe) (*Env, Phases, error) {
	ph := Phases{}
	start := time.Now()
	in, err := m.read(&r)
	if err != nil {
		return nil, ph, err
	}
	if in.conda != "" {
		env, err := m.ensureConda(ctx, r, in, ph)
		return env, ph, err
	}
	py, err := m.interpreter(&r)
	if err != nil {
		return nil, ph, err
	}
	lock, err := m.lock(ctx, r, in, py)
	ph.add("resolve", start)
	if err != nil {
		return nil, ph, m.store.Explain(err)
	}
	start = time.Now()
	key := m.key(r, lock, py)
	env, err := m.load(key)
	if err == nil {
		err = m.addName(r.Name, env)
		ph.add("bake", start)
		return env, ph, err
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, ph, err
	}
	if err := m.store.Writable(); err != nil {
		return nil, ph, fmt.Errorf("bake %q: %w", r.File, err)
	}
	release, err := m.store.Lock(ctx, "env-"+key, true)
	if err != nil {
		return nil, ph, err
	}
	defer release()
	if env, err = m.load(key); errors.Is(err, os.ErrNotExist) { // else another baked it while we waited
		env, err = m.bake(ctx, r, lock, py, key)
	}
	if err == nil {
		err = m.addName(r.Name, env)
	}
	ph.add("bake", start)
	if err != nil {
		return nil, ph, m.store.Explain(err)
	}
	return env, ph, nil
}

// key is the digest of everything that a bake depends on.
func (m *Manager) key(r Recipe, lock *lock, py python) string {
	parts := []string{
		schema, "venv", lock.digest(), py.key(r.Base), EnvDir, pycs,
		fmt.Sprint(r.SystemSitePackages, r.AllowBuild), "hooks",
	}
	parts = append(append(append(parts, r.Hooks...), "env"), r.Env...)
	parts = append(parts, treeKeys(lock.trees)...)
	if len(r.Base.Upon) > 0 {
		parts = append(append(parts, "upon"), r.Base.Upon...)
	}
	return digestOf(parts...)
}

func (m *Manager) recordPath(key string) string { return m.store.Path("envs", key+".json") }

// load reads an environment's record. Its layer must be there: a record
// without one is as none.
func (m *Manager) load(key string) (*Env, error) {
	b, err := rootfs.ReadSmall(m.recordPath(key))
	if err != nil {
		return nil, err
	}
	var e Env
	if err := json.Unmarshal(b, &e); err != nil || e.Key != key {
		return nil, fmt.Errorf("read environment %q: %w", key, os.ErrNotExist) // damaged: baked anew
	}
	if e.Path, err = m.store.LayerPath(e.Digest); err != nil {
		return nil, err
	}
	for _, d := range e.Below {
		p, err := m.store.LayerPath(d)
		if err != nil {
			return nil, err
		}
		e.Lowers = append(e.Lowers, p)
	}
	return &e, nil
}

// save writes an environment's record. Its layers are looked for while none can
// be removed: a record never names what is not there. Who publishes them and saves
// within [rootfs.Store.Publish] or Publishing need not fear that they have gone
// meanwhile.
func (m *Manager) save(e *Env) error {
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	release, err := m.store.Publishing(context.Background())
	if err != nil {
		return err
	}
	defer release()
	for _, l := range e.layers() {
		if _, err := m.store.LayerPath(l); err != nil {
			return &Error{Msg: "bake: a layer was removed meanwhile: " + err.Error(), Tip: "run it again", Err: err}
		}
	}
	return m.store.WriteFile(m.recordPath(e.Key), b)
}

func checkName(name string) error {
	if name == "" || len(name) > 64 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" || name[0] == '.' || name[0] == '-' {
		return fail("letters, digits, dot, dash and underscore, at most 64", "environment name %q: not a plain name", name)
	}
	return nil
}

func (m *Manager) addName(name string, e *Env) error {
	if name == "" {
		return nil
	}
	if err := checkName(name); err != nil {
		return err
	}
	p, text := m.store.Path("envs", "names", name), e.Key+"\n"
	if b, err := os.ReadFile(p); err == nil && string(b) == text {
		return nil // also on a read-only store
	}
	release, err := m.store.Publishing(context.Background())
	if err != nil {
		return err
	}
	defer release()
	if _, err := m.load(e.Key); err != nil {
		return &Error{Msg: fmt.Sprintf("name environment %q: it was removed meanwhile", name), Tip: "run it again", Err: err}
	}
	return m.store.WriteFile(p, []byte(text))
}

// List gives all environments, oldest first.
func (m *Manager) List() ([]*Env, error) {
	names := map[string][]string{}
	ents, _ := os.ReadDir(m.store.Path("envs", "names"))
	for _, e := range ents {
		if b, err := rootfs.ReadSmall(m.store.Path("envs", "names", e.Name())); err == nil {
			k := strings.TrimSpace(string(b))
			names[k] = append(names[k], e.Name())
		}
	}
	ents, err := os.ReadDir(m.store.Path("envs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list environments: %w", err)
	}
	var out []*Env
	for _, de := range ents {
		key, ok := strings.CutSuffix(de.Name(), ".json")
		if !ok {
			continue
		}
		e, err := m.load(key)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		e.Names = names[key]
		out = append(out, e)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].CreatedAt.Before(out[j].CreatedAt) })
	return out, nil
}

// Get finds an environment by name, or by the beginning (8 digits or more) of
// its key or content digest.
func (m *Manager) Get(ref string) (*Env, error) {
	if b, err := rootfs.ReadSmall(m.store.Path("envs", "names", filepath.Base("/"+ref))); err == nil && checkName(ref) == nil {
		e, err := m.load(strings.TrimSpace(string(b)))
		if err == nil {
			e.Names = []string{ref}
			return e, nil
		}
		return nil, fail("bake it again: sbxrun env build --name "+ref, "environment %q: its layer is gone", ref)
	}
	found, err := m.byDigits(strings.TrimPrefix(ref, "sha256:"))
	if err != nil {
		return nil, err
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, fail("sbxrun env list shows what there is", "environment %q: not found", ref)
	}
	// The same content by several ways, of which one is this machine's own bake.
	var own []*Env
	for _, e := range found {
		if e.Digest != found[0].Digest {
			own = nil
			break
		}
		if e.Origin == nil {
			own = append(own, e)
		}
	}
	if len(own) == 1 {
		return own[0], nil
	}
	return nil, fail("give more digits, or a name or key of sbxrun env list --json", "environment %q: several match", ref)
}

// byDigits gives the environments whose key or content digest begins with the
// digits. A thousand others are looked at by name or, unparsed, by content.
func (m *Manager) byDigits(digits string) (found []*Env, err error) {
	if len(digits) < 8 {
		return nil, nil
	}
	d, err := os.Open(m.store.Path("envs"))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find environment: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("find environment: %w", err)
	}
	// No layer of these digits: no record needs to be read for them.
	layers, _ := filepath.Glob(m.store.Path("layers", digits+"*"))
	for _, n := range names {
		key, ok := strings.CutSuffix(n, ".json")
		if !ok || !strings.HasPrefix(key, digits) && len(layers) == 0 {
			continue
		}
		if !strings.HasPrefix(key, digits) {
			if b, err := rootfs.ReadSmall(m.recordPath(key)); err != nil || !bytes.Contains(b, []byte(`"sha256:`+digits)) {
				continue
			}
		}
		e, err := m.load(key)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(key, digits) || strings.HasPrefix(e.Digest, "sha256:"+digits) {
			found = append(found, e)
		}
	}
	return found, nil
}

// Verify reads an environment's every byte and says what changed.
func (m *Manager) Verify(ctx context.Context, ref string) (*Env, []rootfs.Damage, error) {
	e, err := m.Get(ref)
	if err != nil {
		return nil, nil, err
	}
	var all []rootfs.Damage
	for _, l := range e.layers() {
		d, err := m.store.VerifyLayer(ctx, l)
		if err != nil {
			return e, nil, err
		}
		all = append(all, d...)
	}
	return e, all, nil
}

// Lock gives the hashed lock of a recipe. What was resolved comes without the
// credentials of indexes: a lock is a file that people commit.
func (m *Manager) Lock(ctx context.Context, r Recipe) ([]byte, error) {
	defer m.progress.Done()
	if _, ok, err := isRecipe(r.File); ok || err != nil {
		e, _, err := m.Ensure(ctx, r)
		if err != nil {
			return nil, err
		}
		_, text, err := m.LockText(e)
		return withoutUserinfo(text), err
	}
	in, err := m.read(&r)
	if err != nil {
		return nil, err
	}
	if in.conda != "" {
		return m.lockOfConda(ctx, r, in)
	}
	py, err := m.interpreter(&r)
	if err != nil {
		return nil, err
	}
	l, err := m.lock(ctx, r, in, py)
	if err != nil {
		return nil, err
	}
	if in.isLock() {
		return l.text, nil // theirs already
	}
	return withoutUserinfo(l.text), nil
}

// Find gives the environment of a recipe if it is baked, nil if it is not. It
// changes nothing.
func (m *Manager) Find(r Recipe) (*Env, error) {
	file, ok, err := isRecipe(r.File)
	if err != nil {
		return nil, err
	}
	if ok {
		e, err := m.fromRecipe(context.Background(), r, file, true)
		if errors.Is(err, errNotBaked) || errors.Is(err, os.ErrNotExist) {
			return nil, nil
		}
		return e, err
	}
	return m.find(r)
}

// find is Find for whatever is packages only.
func (m *Manager) find(r Recipe) (*Env, error) {
	in, err := m.read(&r)
	if err != nil {
		return nil, err
	}
	if in.conda != "" {
		return m.findConda(r, in)
	}
	py, err := m.interpreter(&r)
	if err != nil {
		return nil, err
	}
	if r.anew() && !in.isLock() {
		return nil, nil
	}
	l, err := m.keptLock(r, in, py)
	if l == nil || err != nil {
		return nil, err
	}
	e, err := m.load(m.key(r, l, py))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return e, err
}
