package envs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"sort"
	"strings"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

// lock is a hashed list of distributions.
type lock struct {
	kind string // "requirements" or "pylock"
	text []byte
	in   *input

	sources []Source // not from an index
	trees   []tree   // of them
	stale   string   // it is none: what the lock that was converted lacks
}

func (l *lock) digest() string {
	h := sha256.Sum256(append([]byte(l.kind+"\n"), l.text...))
	return hex.EncodeToString(h[:])
}

// names are the distributions' of it.
func (l *lock) names() (names []string) {
	for _, q := range l.in.reqs {
		names = append(names, q.name)
	}
	return names
}

// lockFile is where the text of a lock is kept for as long as an environment has it.
func (m *Manager) lockFile(digest string) string {
	return m.store.Path("envs", "lockfiles", strings.TrimPrefix(digest, "sha256:"))
}

// keepLock keeps what an environment is baked from.
func (m *Manager) keepLock(l *lock) error {
	return m.store.WriteFile(m.lockFile(l.digest()), append([]byte(l.kind+"\n"), l.text...))
}

// LockText gives the lock that an environment was baked from and its kind
// ("requirements", "pylock", "conda"). Environments of older versions have none.
func (m *Manager) LockText(e *Env) (kind string, text []byte, err error) {
	b, err := os.ReadFile(m.lockFile(e.Lock))
	if err != nil {
		return "", nil, fail("bake it again with -r", "read the lock of %q: it was not kept", Short(e.Digest))
	}
	kind, rest, _ := strings.Cut(string(b), "\n")
	return kind, []byte(rest), nil
}

// fileName is what the tool knows the kind by.
func (l *lock) fileName() string {
	if l.kind == "pylock" {
		return "pylock.toml"
	}
	return "requirements.txt"
}

// lock gives the input itself where it is one, the lock that the same input
// was resolved to before, or resolves.
func (m *Manager) lock(ctx context.Context, r Recipe, in *input, py python) (*lock, error) {
	if in.isLock() {
		l := in.asLock()
		var err error
		l.trees, err = m.trees(ctx, in, l.sources, false)
		return l, err
	}
	if in.needsTarget() {
		t, err := m.target(ctx, r.Base, py)
		if err == nil {
			err = in.setTarget(r.File, t)
		}
		if err != nil {
			return nil, err
		}
	}
	var err error
	if in.trees, err = m.trees(ctx, in, in.sources, false); err != nil {
		return nil, err
	}
	l, err := m.pathLock(ctx, r, in, py)
	if err == nil && l.stale != "" { // then the project itself is resolved
		needs, _, _ := strings.Cut(l.stale, "\n")
		project, err := in.ofProject(r.File, l)
		if err != nil {
			return nil, err
		}
		m.progress.Phase("resolve", fmt.Sprintf("pyproject.toml: the %s beside it is older, it lacks %s", in.kind, needs))
		return m.lock(ctx, r, project, py)
	}
	if err == nil {
		l.trees, err = m.trees(ctx, in, l.sources, false)
	}
	return l, err
}

// asLock gives an input that is a lock already.
func (in *input) asLock() *lock {
	kind := "requirements"
	if in.kind == KindPylock {
		kind = "pylock"
	}
	return &lock{kind: kind, text: in.files[0].data, in: in, sources: in.marked}
}

// keptLock gives the lock of an input where that needs no work, nil where it does.
func (m *Manager) keptLock(r Recipe, in *input, py python) (*lock, error) {
	ctx := context.Background()
	if in.isLock() {
		l := in.asLock()
		var err error
		if l.trees, err = m.trees(ctx, in, l.sources, true); err != nil || len(l.trees) < len(l.sources) {
			return nil, err
		}
		return l, nil
	}
	if in.needsTarget() {
		t := m.keptTarget(r.Base, py)
		if t == nil {
			return nil, nil
		}
		if err := in.setTarget(r.File, t); err != nil {
			return nil, err
		}
	}
	var err error
	if in.trees, err = m.trees(ctx, in, in.sources, true); err != nil || len(in.trees) < len(in.sources) {
		return nil, err
	}
	path := m.lockPath(r, in, py)
	l := m.keptAt(path)
	if l == nil {
		return nil, nil // not resolved yet
	}
	if l.stale != "" {
		if in, err = in.ofProject(r.File, l); err == nil {
			return m.keptLock(r, in, py)
		}
	}
	if err == nil {
		if l.trees, err = m.trees(ctx, in, l.sources, true); err != nil || len(l.trees) < len(l.sources) {
			return nil, err
		}
	}
	return l, err
}

// keptAt reads a kept lock, nil where there is none or it is damaged.
func (m *Manager) keptAt(path string) *lock {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	l, err := m.parseLock(b, path)
	if err != nil {
		return nil
	}
	return l
}

func (m *Manager) pathLock(ctx context.Context, r Recipe, in *input, py python) (*lock, error) {
	path := m.lockPath(r, in, py)
	if !r.anew() {
		if l := m.keptAt(path); l != nil {
			return l, nil
		}
	}
	if err := m.store.Writable(); err != nil {
		return nil, fmt.Errorf("resolve %q: %w", r.File, err)
	}
	release, err := m.store.Lock(ctx, "resolve-"+strings.TrimSuffix(filepath.Base(path), ".txt"), true)
	if err != nil {
		return nil, err
	}
	defer release()
	if !r.anew() {
		if l := m.keptAt(path); l != nil {
			return l, nil
		}
	}
	var text []byte
	if in.convert {
		text, err = m.convert(ctx, r, in)
	} else {
		text, err = m.resolve(ctx, r, in, py)
	}
	if err != nil {
		return nil, err
	}
	l, err := m.parseLock(text, path)
	if err != nil {
		return nil, err
	}
	if l.stale != "" {
		return l, m.store.WriteFile(path, text)
	}
	if err := upgradable(r, l.names()); err != nil {
		return nil, err
	}
	if err := m.store.WriteFile(path, text); err != nil {
		return nil, err
	}
	return l, m.remember(r, in, path)
}

// lockPath is where the lock of an input is kept. Neither the tool's version
// nor the interpreter's build is in it: an update of them moves no pins.
func (m *Manager) lockPath(r Recipe, in *input, py python) string {
	parts := []string{schema, in.text(), py.path + " " + baseKey(r.Base), r.IndexURL, r.ExcludeNewer, fmt.Sprint(r.AllowBuild), archID, r.selection(), in.targetText()}
	parts = append(parts, treeKeys(in.trees)...)
	if r.prefer != nil {
		parts = append(parts, "prefer", string(r.prefer))
	}
	key := digestOf(parts...)
	return m.store.Path("envs", "locks", key+".txt")
}

// targetText is what a conversion depends on besides the files.
func (in *input) targetText() string {
	if in.target == nil {
		return ""
	}
	b, err := json.Marshal(in.target) // maps in order
	if err != nil {
		return err.Error()
	}
	return string(b)
}

func (m *Manager) parseLock(b []byte, path string) (*lock, error) {
	if s, ok := bytes.CutPrefix(b, []byte(staleMark)); ok {
		return &lock{stale: string(bytes.TrimSpace(s))}, nil
	}
	in := &input{kind: KindRequirements}
	if err := in.add(path, b, filepath.Dir(path), false, map[string]bool{}, 0); err != nil {
		return nil, err
	}
	sources, hosts, err := marksOf(b)
	in.urls = append(in.urls, hosts...)
	return &lock{kind: "requirements", text: b, in: in, sources: sources}, err
}

// resolve runs the resolver in a sandbox that reaches the indexes only.
// more are arguments for uv; where it is not there they cannot be heeded.
func (m *Manager) resolve(ctx context.Context, r Recipe, in *input, py python, more ...string) (text []byte, err error) {
	t, err := m.tool(ctx)
	if err != nil {
		return nil, err
	}
	m.progress.Phase("resolve", filepath.Base(r.File))
	dir, done, err := m.workDir("resolve")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := writeFiles(dir, in.files); err != nil {
		return nil, err
	}
	for _, t := range in.trees {
		if err := m.lay(t, dir, path.Join("in", t.Path)); err != nil {
			return nil, err
		}
	}
	prefer := r.prefer
	if prefer == nil {
		prefer = m.last(r, in)
	}
	if prefer != nil { // the resolver keeps the pins of its output file
		if err := handOver(dir, "lock.txt", prefer); err != nil {
			return nil, fmt.Errorf("resolve: %w", err)
		}
	}
	ix := t.index(r, in)
	j := m.job(t, r.Base, "resolve", dir, &ix)
	j.Dir = "/opt/in"
	first := "/opt/in/" + in.files[0].name
	if t.Kind == "pip" && len(more) > 0 {
		return nil, fail("put uv on PATH", "resolve %q: it needs uv, which could not be had", r.File)
	}
	if in.vcs {
		if _, _, ok := resolveInBase(r.Base, "/usr/bin/git"); !ok {
			return nil, fail("choose a --base that has it", "resolve %q: git is not in the base", r.File)
		}
	}
	if t.Kind == "pip" {
		if in.kind == KindPyproject || in.hasSources() {
			return nil, fail("put uv on PATH", "resolve %q: it needs uv, which could not be had", r.File)
		}
		return m.resolvePip(ctx, r, j, py, first, dir)
	}
	j.Argv = []string{uvBinary, "pip", "compile", "--quiet", "--generate-hashes", "--no-header", "--no-annotate", "--emit-index-url", "--python", py.path, "--output-file", "/opt/lock.txt"}
	if !r.AllowBuild {
		j.Argv = append(j.Argv, "--no-build")
	}
	if r.ExcludeNewer != "" {
		j.Argv = append(j.Argv, "--exclude-newer", r.ExcludeNewer)
	}
	j.Argv = append(append(append(j.Argv, upgradeArguments(r)...), more...), r.compileArgs(first)...)
	if err := m.run(ctx, j, r.File); err != nil {
		switch {
		case in.kind != KindPyproject:
		case strings.Contains(err.Error(), "Building source distributions is disabled"):
			return nil, fail("--allow-build builds it, in a sandbox; or lock the project with its tool", "resolve %q: its dependencies are dynamic: only its build says them", r.File)
		case strings.Contains(err.Error(), "file:///opt/in"):
			why := strings.ReplaceAll(strings.TrimPrefix(err.Error(), fmt.Sprintf("resolve %q: ", r.File)), "file:///opt/in", ".")
			return nil, fail("--allow-build builds it, in a sandbox: that runs its code", "resolve %q: it needs a folder of the project: %s", r.File, why)
		}
		return nil, err
	}
	b, err := readOutput(filepath.Join(dir, "lock.txt"))
	if err != nil {
		return nil, fmt.Errorf("resolve %q: %w", r.File, err)
	}
	if in.hasSources() {
		return takeSources(b)
	}
	return b, nil
}

// readOutput reads what a job left, which is dead by now: no link is followed.
func readOutput(path string) ([]byte, error) {
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxInputBytes {
		return nil, fmt.Errorf("read %q: not a file of a sane size", path)
	}
	return os.ReadFile(path)
}

// resolvePip resolves with the base's own pip: a dry run's report has the hashes.
func (m *Manager) resolvePip(ctx context.Context, r Recipe, j Job, py python, first, dir string) ([]byte, error) {
	if err := m.pipVenv(ctx, r, j, py); err != nil {
		return nil, err
	}
	j.Argv = []string{"/opt/pip/bin/python", "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "/opt/report.json", "-r", first}
	if !r.AllowBuild {
		j.Argv = append(j.Argv, "--only-binary", ":all:")
	}
	if err := m.run(ctx, j, r.File); err != nil {
		return nil, err
	}
	b, err := readOutput(filepath.Join(dir, "report.json"))
	if err != nil {
		return nil, fmt.Errorf("resolve %q: %w", r.File, err)
	}
	var rep struct {
		Install []struct {
			Metadata     struct{ Name, Version string }
			DownloadInfo struct {
				ArchiveInfo struct{ Hashes map[string]string } `json:"archive_info"`
			} `json:"download_info"`
		}
	}
	if err := json.Unmarshal(b, &rep); err != nil {
		return nil, fmt.Errorf("resolve %q: %w", r.File, err)
	}
	var lines []string
	for _, p := range rep.Install {
		sum := p.DownloadInfo.ArchiveInfo.Hashes["sha256"]
		if sum == "" {
			return nil, fmt.Errorf("resolve %q: no hash for %s", r.File, p.Metadata.Name)
		}
		lines = append(lines, fmt.Sprintf("%s==%s --hash=sha256:%s\n", pep503.Normalise(p.Metadata.Name), p.Metadata.Version, sum))
	}
	sort.Strings(lines)
	return []byte(strings.Join(lines, "")), nil
}

func (m *Manager) pipVenv(ctx context.Context, r Recipe, j Job, py python) error {
	j.AllowHosts = nil
	j.Argv = []string{py.path, "-I", "-m", "venv", "/opt/pip"}
	if err := m.run(ctx, j, r.File); err != nil {
		return &Error{Msg: "prepare pip: " + err.Error(), Tip: "apt-get install python3-venv (uv could not be had)", Err: err}
	}
	return nil
}

// workDir is a directory of the store's, ours until done, with the parts that
// jobs expect.
func (m *Manager) workDir(name string) (dir string, done func() error, err error) {
	dir, done, err = m.store.TempDir(name)
	if err != nil {
		return "", nil, err
	}
	for _, d := range []string{"opt", "opt/cache", "opt/env", "opt/python"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return "", nil, errors.Join(err, done())
		}
	}
	return filepath.Join(dir, "opt"), done, nil
}

// tail keeps the last bytes of what a tool prints.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if len(t.b) > 64<<10 {
		t.b = append([]byte{}, t.b[len(t.b)-(64<<10):]...)
	}
	return len(p), nil
}

// run runs a job and turns its failure into one clear line.
func (m *Manager) run(ctx context.Context, j Job, file string) error {
	var out tail
	j.Stdout, j.Stderr = &out, &out
	res, err := m.runner.Run(ctx, j)
	if ctx.Err() != nil {
		return fmt.Errorf("%s %q: %w", j.Name, file, ctx.Err())
	}
	if err != nil {
		return fmt.Errorf("%s: %w", j.Name, err)
	}
	if res.ExitCode == 0 {
		return nil
	}
	return explain(j.Name, file, res, string(out.b))
}

// explain distils a tool's output. What is not recognised is given as its
// first error line.
func explain(step, file string, res JobResult, out string) error {
	out = withoutColours(out)
	flat := strings.Join(strings.Fields(out), " ")
	low := strings.ToLower(flat)
	switch {
	case res.Reason != "" && res.Reason != "exit":
		return fail("", "%s %q: %s", step, file, res.Message)
	case strings.Contains(low, "no space left on device"):
		return fail("sbxrun env prune frees what nothing uses; --root DIR chooses another store", "%s %q: no space left on the store's disk", step, file)
	case len(res.Denied) > 0:
		return fail("--index-host NAME, if you trust the index; or another --index-url", "%s %q: the index refers to %s, which it may not reach", step, file, strings.Join(res.Denied, ", "))
	case strings.Contains(low, "hash mismatch") || strings.Contains(low, "do not match the hashes"):
		what := "a distribution"
		if name := hashMismatch(flat); name != "" {
			what = name
		}
		return fail("the file on the index is not the one that was locked: lock again only if you know why", "%s %q: hash mismatch for %s", step, file, what)
	case strings.Contains(low, "no usable wheels") || strings.Contains(low, "--no-build") || strings.Contains(low, "building from source is disabled") || strings.Contains(low, "no wheels are usable") || strings.Contains(low, "no binary distribution"):
		what := "a requirement"
		if name := sdistOnly(flat); name != "" {
			what = name
		}
		return fail("--allow-build builds it, in a sandbox: that runs its code", "%s %q: %s has only a source distribution, and building is off", step, file, what)
	case noPackage(flat) != "":
		return fail("is the name right, and on this index?", "%s %q: %s is not on the index", step, file, noPackage(flat))
	case strings.Contains(low, "error sending request") || strings.Contains(low, "failed to fetch") || strings.Contains(low, "dns error") || strings.Contains(low, "connection refused") || strings.Contains(low, "tunnel") || strings.Contains(low, "retries exceeded") || strings.Contains(low, "timed out"):
		return fail("check --index-url, the network and HTTPS_PROXY", "%s %q: the index cannot be reached: %s", step, file, firstError(out))
	case strings.Contains(low, "no solution found") || noVersion(flat):
		return fail("loosen the pins, or another --python", "%s %q: %s", step, file, unsolvable(flat))
	}
	if c := buildCause(out); c != "" {
		return fail("its build says so: is all that it needs in its folder?", "%s %q: %s: %s", step, file, firstError(out), c)
	}
	return fail("", "%s %q: %s", step, file, firstError(out))
}

// unsolvable gives the resolver's reasoning in one line.
func unsolvable(flat string) string {
	if i := strings.Index(flat, "Because "); i >= 0 {
		flat = flat[i:]
	}
	flat = strings.TrimLeft(strings.NewReplacer("╰─▶", "", "×", "").Replace(flat), " ")
	if len(flat) > 400 {
		flat = flat[:400] + "…"
	}
	return strings.TrimSpace(flat)
}

func firstError(out string) string {
	lines := strings.Split(out, "\n")
	for i, l := range lines {
		l = strings.TrimSpace(strings.NewReplacer("╰─▶", "", "×", "", "├─▶", "").Replace(l))
		if strings.HasPrefix(strings.ToLower(l), "error") {
			if msg := strings.TrimSpace(strings.TrimLeft(l[5:], ":")); msg != "" {
				// The cause is the last line of what follows.
				if c := lastCause(lines[i+1:]); c != "" {
					msg += ": " + c
				}
				return msg
			}
		}
	}
	if l := lastLine(out); l != "" {
		return l
	}
	return "the tool failed without a word"
}

func lastCause(lines []string) string {
	c := ""
	for _, l := range lines {
		for _, said := range []string{"Caused by: ", "cause: "} { // of older and newer uv
			if v, ok := strings.CutPrefix(strings.TrimSpace(l), said); ok {
				c = v
			}
		}
	}
	return c
}
