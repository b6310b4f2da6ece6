package envs

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// The solver: rattler's Python package at this version, with these hashes of its
// wheels (amd64, arm64). It needs no other package and any Python from 3.10 on.
const rattlerVersion = "0.28.0"

var rattlerHashes = []string{
	"sha256:4f4ab1d34d5394e7ce130a86e59009c95ace4f5757d9c3af04de1351bcea47eb",
	"sha256:61b24202374188e72130f1b3dc63b455befaafc3e49e5481a38b6a6c8828c1e0",
}

//go:embed condasolve.py
var solveScript string

// condaSolver is the solver that is installed.
type condaSolver struct {
	Path string `json:"path"` // a directory on the host, to be imported from
	// Alias is where channels lead that are given by name, as the solver knows
	// it: that is not ours to know.
	Alias string `json:"alias"`
}

// condaFiles are what a step inside reads conda's configuration and
// credentials from, by their names there.
type condaFiles struct {
	Configs   []string          `json:"configs,omitempty"` // the first comes first
	Netrc     string            `json:"netrc,omitempty"`
	Rattler   string            `json:"rattler,omitempty"`
	Input     string            `json:"input,omitempty"` // environment.yml or a lock: its URLs may have some
	Variables map[string]string `json:"variables,omitempty"`
	Local     string            `json:"local,omitempty"`
}

type condaReadRequest struct {
	condaFiles
	Platform string `json:"platform"`
	Dir      string `json:"dir"` // of the file, on the host
	Alias    string `json:"alias"`
}

// condaSpec is what a file asks for.
type condaSpec struct {
	Channels   []string `json:"channels"` // URLs without credentials
	Specs      []string `json:"specs"`
	Pip        []string `json:"pip"`
	Variables  []string `json:"variables"`
	AnyChannel bool     `json:"any_channel"` // channel_priority: disabled
}

type condaLockRequest struct {
	File     string `json:"file"`
	Kind     Kind   `json:"kind"` // "": what the solver gave
	Platform string `json:"platform"`
	To       string `json:"to"`
}

type repodataRequest struct {
	condaFiles
	Items []repodataItem `json:"items"`
}

type repodataItem struct {
	Channel string          `json:"channel"`
	Subdir  string          `json:"subdir"`
	To      string          `json:"to"`
	Known   json.RawMessage `json:"known,omitempty"`
}

// repodataResult is what became of an item. Meta is the fetcher's own, to be
// given back as Known.
type repodataResult struct {
	Meta        json.RawMessage `json:"meta"`
	SHA256      string          `json:"sha256"`
	Same        bool            `json:"same"`
	Missing     bool            `json:"missing"`
	Error       string          `json:"error,omitempty"`
	Hint        string          `json:"hint,omitempty"`
	Unreachable bool            `json:"unreachable,omitempty"`
}

// condaVariables are those of conda's that say where packages are from.
var condaVariables = []string{"CONDA_CHANNELS", "CONDA_DEFAULT_CHANNELS", "CONDA_CHANNEL_ALIAS", "CONDA_CHANNEL_PRIORITY"}

// condaConfiguration finds conda's configuration on this host, and the
// credentials where asked for, and how a job is shown them.
func condaConfiguration(credentials bool) (f condaFiles, binds []JobBind) {
	home, _ := os.UserHomeDir()
	show := func(p, as string) string {
		if p == "" || !filepath.IsAbs(p) {
			return ""
		}
		real, err := filepath.EvalSymlinks(p)
		if err != nil {
			return ""
		}
		if st, err := os.Stat(real); err != nil || !st.Mode().IsRegular() {
			return ""
		}
		binds = append(binds, JobBind{Source: real, Target: as, ReadOnly: true})
		return as
	}
	for i, p := range []string{
		os.Getenv("CONDARC"), os.Getenv("MAMBARC"), filepath.Join(home, ".condarc"), filepath.Join(home, ".conda/.condarc"),
		filepath.Join(home, ".conda/condarc"), filepath.Join(home, ".config/conda/.condarc"), filepath.Join(home, ".mambarc"), "/etc/conda/.condarc", "/etc/conda/condarc",
	} {
		if as := show(p, "/mnt/condarc."+strconv.Itoa(i)); as != "" {
			f.Configs = append(f.Configs, as)
		}
	}
	names := slices.Clone(condaVariables)
	for _, b := range binds {
		if text, err := readFile(b.Source); err == nil {
			names = append(names, variablesIn(string(text))...)
		}
	}
	for _, k := range names {
		if v := os.Getenv(k); v != "" {
			if f.Variables == nil {
				f.Variables = map[string]string{}
			}
			f.Variables[k] = v
		}
	}
	if !credentials {
		return f, binds
	}
	for _, p := range []string{os.Getenv("NETRC"), filepath.Join(home, ".netrc")} {
		if f.Netrc = show(p, "/mnt/netrc"); f.Netrc != "" {
			break
		}
	}
	for _, p := range []string{os.Getenv("RATTLER_AUTH_FILE"), filepath.Join(home, ".rattler/credentials.json")} {
		if f.Rattler = show(p, "/mnt/rattler.json"); f.Rattler != "" {
			break
		}
	}
	return f, binds
}

// variablesIn: \$\{?([A-Za-z0-9_]+), the names.
func variablesIn(text string) (names []string) {
	for _, after := range strings.Split(text, "$")[1:] {
		after = strings.TrimPrefix(after, "{")
		if n := run(after, func(c byte) bool { return isAlnum(c) || c == '_' }); n > 0 {
			names = append(names, after[:n])
		}
	}
	return names
}

// condaOnline makes a job that reaches what the URLs name and nothing else:
// their hosts by network, their directories by a bind.
func (m *Manager) condaOnline(r Recipe, name, dir string, in *input, urls []string) (Job, condaFiles, error) {
	f, binds := condaConfiguration(true)
	f.Input, f.Local = "/opt/in/"+in.files[0].name, "/mnt/local"
	j := m.job(&tool{}, r.Base, name, dir, nil)
	j.Binds = append(j.Binds, binds...)
	cert, bind := certificates()
	j.Env, j.Binds = append(j.Env, cert...), append(j.Binds, bind...)
	seen := map[string]bool{}
	j.AllowHosts = append(j.AllowHosts, r.IndexHosts...)
	for _, u := range urls {
		if p, ok := strings.CutPrefix(u, "file://"); ok {
			// Whole channels, so that a lock of one needs one bind.
			if p = path.Clean("/" + p); p == "/" || seen[p] {
				continue
			}
			seen[p] = true
			if st, err := os.Stat(p); err != nil || !st.IsDir() {
				return Job{}, f, fail("is the path right?", "%s: channel file://%s: no such directory", name, p)
			}
			j.Binds = append(j.Binds, JobBind{Source: p, Target: f.Local + p, ReadOnly: true})
			continue
		}
		if h := hostPort(u); h != "" && !seen[h] {
			seen[h] = true
			j.AllowHosts = append(j.AllowHosts, h)
		}
	}
	return j, f, nil
}

// readSpec reads an environment.yml inside, with the configuration of channels.
func (m *Manager) readSpec(ctx context.Context, r Recipe, in *input, j Job, dir string) (spec condaSpec, err error) {
	s, err := m.condaSolver(ctx, r)
	if err != nil {
		return spec, err
	}
	abs, err := filepath.Abs(filepath.Dir(r.File))
	if err != nil {
		return spec, fmt.Errorf("read %q: %w", r.File, err)
	}
	f, binds := condaConfiguration(false)
	f.Input = "/opt/in/" + in.files[0].name
	j.Binds = append(j.Binds, binds...)
	j.Name = fmt.Sprintf("read %q", r.File)
	err = m.inside(ctx, j, dir, "conda-read", condaReadRequest{condaFiles: f, Platform: condaPlatform(), Dir: abs, Alias: s.Alias}, &spec)
	return spec, err
}

// solve fetches the channels' repodata and solves over it, without a network,
// into solved.json.
func (m *Manager) solve(ctx context.Context, r Recipe, in *input, spec condaSpec, dir string) error {
	s, err := m.condaSolver(ctx, r)
	if err != nil {
		return err
	}
	type at struct {
		Channel string `json:"channel"`
		Subdir  string `json:"subdir"`
		Path    string `json:"path"`
	}
	type pin struct {
		Name string `json:"name"`
		URL  string `json:"url"`
	}
	q := struct {
		Alias        bool     `json:"alias"`
		Repodata     []at     `json:"repodata"`
		Specs        []string `json:"specs"`
		Locked       []pin    `json:"locked"`
		ExcludeNewer string   `json:"exclude_newer"`
		AnyChannel   bool     `json:"any_channel"`
	}{Specs: spec.Specs, Locked: []pin{}, ExcludeNewer: r.ExcludeNewer, AnyChannel: spec.AnyChannel}
	last, _ := m.pins(r, in)
	for _, p := range last {
		q.Locked = append(q.Locked, pin{p.Name, p.URL})
	}
	index := filepath.Join(filepath.Dir(dir), "repodata")
	if err := os.Mkdir(index, 0o755); err != nil {
		return fmt.Errorf("solve: %w", err)
	}
	have, err := m.repodata(ctx, r, in, spec.Channels, dir, index)
	if err != nil {
		return err
	}
	for _, h := range have {
		q.Repodata = append(q.Repodata, at{h.channel, h.subdir, "/mnt/repodata/" + h.file})
	}
	m.progress.Phase("resolve", fmt.Sprintf("%d packages asked for", len(spec.Specs)))
	a, err := m.runSolver(ctx, r, s.Path, dir, q, JobBind{Source: index, Target: "/mnt/repodata", ReadOnly: true})
	if err != nil {
		return err
	}
	if a.Error != "" {
		return explainSolver(r.File, a.Error, a.Kind, spec.Channels)
	}
	return nil
}

type solverAnswer struct {
	Error, Kind, Alias string
}

// runSolver runs the script in a sandbox that has no network. What it found is
// left in solved.json.
func (m *Manager) runSolver(ctx context.Context, r Recipe, solver, dir string, request any, binds ...JobBind) (a solverAnswer, err error) {
	py, err := findPython(r.Base, "")
	if err != nil {
		return a, fmt.Errorf("solve %q: the solver runs on the base's Python: %w", r.File, err)
	}
	b, err := json.Marshal(request)
	if err != nil {
		return a, fmt.Errorf("solve: %w", err)
	}
	stdin := filepath.Join(dir, "solve.json")
	if err := handOver(dir, "solve.json", b); err != nil {
		return a, fmt.Errorf("solve: %w", err)
	}
	j := m.job(&tool{}, r.Base, "solve", dir, nil)
	j.Binds = append(append(j.Binds, JobBind{Source: solver, Target: "/mnt/rattler", ReadOnly: true}), binds...)
	j.Stdin = stdin
	j.Argv = []string{py.path, "-I", "-S", "-c", solveScript, "/opt/solved.json"}
	for _, k := range []string{"CONDA_OVERRIDE_GLIBC", "CONDA_OVERRIDE_CUDA", "CONDA_OVERRIDE_ARCHSPEC"} {
		if v := os.Getenv(k); v != "" {
			j.Env = append(j.Env, k+"="+v)
		}
	}
	if err := m.run(ctx, j, r.File); err != nil {
		return a, &Error{Msg: err.Error(), Tip: "the solver needs Python 3.10 or newer and glibc in the base: lock upon another --base", Err: err}
	}
	out, err := readOutput(filepath.Join(dir, "solved.json"))
	if err == nil {
		err = json.Unmarshal(out, &a)
	}
	if err != nil {
		return a, fmt.Errorf("solve %q: the solver's answer: %w", r.File, err)
	}
	return a, nil
}

// explainSolver makes one line of a solver's tree of reasons.
func explainSolver(file, text, kind string, channels []string) error {
	var parts []string
	for _, l := range strings.Split(text, "\n") {
		branch := strings.HasPrefix(l, "└") || strings.HasPrefix(l, "├")
		if l = strings.TrimSpace(strings.TrimLeft(l, "│├└─ ")); l == "" {
			continue
		}
		if branch && len(parts) > 1 {
			parts[len(parts)-1] += ";"
		}
		parts = append(parts, l)
	}
	flat := strings.TrimPrefix(strings.Join(parts, " "), "Cannot solve the request because of: ")
	where := strings.Join(channels, ", ")
	if name, ok := strings.CutPrefix(flat, "No candidates were found for "); ok {
		name = strings.TrimSuffix(strings.TrimSuffix(name, "."), " *")
		return fail("is the name right, and the channel? is it there for this platform?", "solve %q: no channel has %s (%s)", file, name, where)
	}
	if kind == "InvalidMatchSpecError" {
		return fail("a dependency is: numpy >=2, or channel::numpy", "solve %q: a dependency cannot be read: %s", file, flat)
	}
	flat = strings.TrimPrefix(flat, "The following packages are incompatible ")
	if r := []rune(flat); len(r) > 600 {
		flat = string(r[:600]) + "…"
	}
	return fail("loosen the versions, or add a channel", "solve %q: the packages do not fit together: %s", file, flat)
}

type indexFile struct{ channel, subdir, file string }

// repodata brings the channels' indexes up to date and links them, verified,
// into the directory to. Those that cannot be reached are as they were last.
func (m *Manager) repodata(ctx context.Context, r Recipe, in *input, channels []string, dir, to string) ([]indexFile, error) {
	var items []repodataItem
	var recs []string
	for _, c := range channels {
		for _, subdir := range []string{condaPlatform(), "noarch"} {
			rec := m.store.Path("cache", "conda", "repodata", digestOf(c, subdir)+".json")
			it := repodataItem{Channel: c, Subdir: subdir, To: "/opt/repodata-" + strconv.Itoa(len(items))}
			if b, err := os.ReadFile(rec); err == nil && json.Valid(b) {
				it.Known = b
			}
			items, recs = append(items, it), append(recs, rec)
		}
	}
	release, err := m.store.Lock(ctx, "objects", false) // no pruning until they are linked
	if err != nil {
		return nil, err
	}
	defer release()
	m.progress.Phase("download", fmt.Sprintf("repodata of %d channels", len(channels)))
	j, f, err := m.condaOnline(r, fmt.Sprintf("resolve %q", r.File), dir, in, channels)
	if err != nil {
		return nil, err
	}
	for i := range items {
		if !m.linkIndex(items[i].Known, "") {
			items[i].Known = nil
		}
	}
	var results []repodataResult
	if err := m.inside(ctx, j, dir, "conda-repodata", repodataRequest{f, items}, &results); err != nil {
		return nil, err
	}
	if len(results) != len(items) {
		return nil, fmt.Errorf("resolve %q: %d answers for %d indexes", r.File, len(results), len(items))
	}
	var out []indexFile
	for i, res := range results {
		it := items[i]
		name := strconv.Itoa(i) + ".json"
		switch {
		case res.Missing:
			if it.Subdir == "noarch" && results[i-1].Missing {
				return nil, fail("is the channel's name or URL right?", "resolve %q: channel %s: it has packages neither for %s nor noarch", r.File, it.Channel, condaPlatform())
			}
			continue
		case res.Error != "" && res.Unreachable && it.Known != nil && !r.Refresh:
		case res.Error != "":
			return nil, fail(res.Hint, "resolve %q: channel %s: %s", r.File, it.Channel, res.Error)
		case !res.Same:
			if err := m.keepIndex(filepath.Join(dir, path.Base(it.To)), res); err != nil {
				return nil, fmt.Errorf("resolve %q: channel %s: %w", r.File, it.Channel, err)
			}
			if err := m.store.WriteFile(recs[i], res.Meta); err != nil {
				return nil, err
			}
			it.Known = res.Meta
		}
		if !m.linkIndex(it.Known, filepath.Join(to, name)) {
			return nil, fail("", "resolve %q: channel %s: its repodata changed in the store", r.File, it.Channel)
		}
		out = append(out, indexFile{it.Channel, it.Subdir, name})
	}
	return out, nil
}

// indexPath is where an index lies in the store, "" for a record that is none.
func (m *Manager) indexPath(meta json.RawMessage) (file, sum string) {
	var k struct {
		SHA256 string `json:"sha256"`
	}
	if json.Unmarshal(meta, &k) != nil || len(k.SHA256) != 64 || !plainHex(k.SHA256) {
		return "", ""
	}
	return m.store.Path("cache", "conda", "repodata", k.SHA256), k.SHA256
}

// linkIndex says whether an index is in the store and whole, and links it to to
// unless that is "". A damaged one is removed.
func (m *Manager) linkIndex(meta json.RawMessage, to string) bool {
	p, sum := m.indexPath(meta)
	if p == "" {
		return false
	}
	if to == "" {
		_, err := os.Stat(p)
		return err == nil
	}
	if got, _, err := hashFile(p); err != nil || got != sum {
		os.Remove(p)
		return false
	}
	return os.Link(p, to) == nil
}

// keepIndex takes into the store what a job left. The job is dead.
func (m *Manager) keepIndex(from string, res repodataResult) error {
	p, sum := m.indexPath(res.Meta)
	if p == "" || sum != res.SHA256 {
		return errors.New("the fetcher gave no hash")
	}
	return m.keep(from, p, sum)
}

// keep publishes a file that a job left under its hash; a file that is there is
// replaced, for it may be damaged.
func (m *Manager) keep(from, to, sum string) error {
	got, _, err := hashFile(from)
	if err != nil {
		return err
	}
	if got != sum {
		return fmt.Errorf("hash mismatch: %s, not %s", got, sum)
	}
	f, err := os.OpenFile(from, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	err = errors.Join(f.Chmod(0o444), f.Sync(), f.Close())
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o700)
	}
	if err == nil {
		err = os.Rename(from, to)
	}
	return err
}

// hashFile hashes a regular file; no link is followed.
func hashFile(p string) (sum string, n int64, err error) {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return "", 0, fmt.Errorf("read %q: not a regular file", p)
	}
	h := sha256.New()
	n, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), n, err
}

func (m *Manager) rattlerDir() string {
	return m.store.Path("tools", "py-rattler-"+rattlerVersion)
}

// solverRecord says where the solver is, and what it said of itself in a base,
// whose own Python asks it: what one base says is not for another.
func (m *Manager) solverRecord(base string) string {
	return m.store.Path("tools", solverRecords+base+".json")
}

const solverRecords = "conda-solver-" + rattlerVersion + "-"

// condaSolver gives the installed solver or installs it.
func (m *Manager) condaSolver(ctx context.Context, r Recipe) (*condaSolver, error) {
	rec := m.solverRecord(digestOf(baseKey(r.Base))[:16])
	read := func() *condaSolver {
		var s condaSolver
		b, err := os.ReadFile(rec)
		if err != nil || json.Unmarshal(b, &s) != nil {
			return nil
		}
		if _, err := os.Stat(s.Path); err != nil {
			return nil
		}
		touch(rec)
		return &s
	}
	if s := read(); s != nil {
		return s, nil
	}
	release, err := m.store.Lock(ctx, "tool", true)
	if err != nil {
		return nil, err
	}
	defer release()
	if s := read(); s != nil {
		return s, nil
	}
	m.progress.Phase("tool", "py-rattler "+rattlerVersion)
	s := &condaSolver{}
	if s.Path, err = m.installRattler(ctx); err != nil {
		return nil, err
	}
	dir, done, err := m.workDir("solver")
	if err != nil {
		return nil, err
	}
	a, err := m.runSolver(ctx, r, s.Path, dir, map[string]bool{"alias": true})
	if err = errors.Join(err, done()); err != nil {
		return nil, err
	}
	if s.Alias = a.Alias; a.Error != "" {
		return nil, fmt.Errorf("start the solver: %s", a.Error)
	}
	b, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return s, m.store.WriteFile(rec, b)
}

// installRattler downloads the wheel through pip, with hashes, and unpacks it.
func (m *Manager) installRattler(ctx context.Context) (dir string, err error) {
	dir = m.rattlerDir()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp, done, err := m.store.TempDir("tool")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, done()) }()
	wheel, err := pipDownload(ctx, tmp, "py-rattler", rattlerVersion, rattlerHashes, "apt-get install python3-pip; or give a lock (@EXPLICIT, conda-lock.yml, pixi.lock), which needs no solver")
	if err != nil {
		return "", err
	}
	out := filepath.Join(tmp, "rattler")
	var said bytes.Buffer
	unzip := hostPython(ctx, "-c", "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extractall(sys.argv[2])", wheel, out)
	unzip.Stderr = &said
	if err := onThread(unzip.Run); err != nil {
		return "", fmt.Errorf("unpack %q: %w: %s", filepath.Base(wheel), err, lastLine(said.String()))
	}
	d, err := os.Open(out)
	if err == nil {
		err = errors.Join(unix.Syncfs(int(d.Fd())), d.Close())
	}
	if err == nil {
		err = os.MkdirAll(filepath.Dir(dir), 0o700)
	}
	if err == nil {
		err = os.Rename(out, dir)
	}
	if err != nil {
		return "", fmt.Errorf("install py-rattler: %w", err)
	}
	return dir, nil
}

// localChannel is the channel's directory of a package's file:// URL.
func localChannel(u string) string {
	p, ok := strings.CutPrefix(u, "file://")
	if !ok {
		return u
	}
	return "file://" + path.Dir(path.Dir(path.Clean("/"+p)))
}

// origins are what must be reached for some packages.
func origins(pkgs []condaPackage) []string {
	var out []string
	for _, p := range pkgs {
		if o := localChannel(p.URL); !slices.Contains(out, o) {
			out = append(out, o)
		}
	}
	return out
}
