package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/sbxrun/sbxrun/internal/pep503"
)

// The way of a conda environment:
//
//	environment.yml → channels (read) → repodata (fetched) → solved → lock
//	any conda lock → lock → packages (fetched) → installed → layer
//
// Each step is a sandbox of its own: those that parse and unpack have no
// network, those that have one only fetch. Credentials are shown to the latter,
// as the files that they lie in. What is here knows of YAML, archives and
// solvers nothing: envs/conda does, inside.

// condaLock is a lock as it is kept: conda's part as envs/conda encodes it, the
// hashed requirements of the pip section, the variables of the file.
type condaLock struct {
	Conda        json.RawMessage `json:"conda"`
	Requirements string          `json:"requirements,omitempty"`
	Variables    []string        `json:"variables,omitempty"`

	text []byte
	view condaView
}

// condaView is what is needed here of envs/conda's Lock.
type condaView struct {
	Platform string         `json:"platform"`
	Packages []condaPackage `json:"packages"`
	Pip      []struct {
		Name, Version, URL, SHA256 string
	} `json:"pip"`
}

type condaPackage struct {
	Name      string `json:"name"`
	Version   string `json:"version"`
	Build     string `json:"build"`
	FileName  string `json:"file_name"`
	URL       string `json:"url"`
	SHA256    string `json:"sha256"`
	MD5       string `json:"md5"`
	SizeBytes int64  `json:"size_bytes"`
}

// archive is what its archive is called in the store and in a bake.
func (p condaPackage) archive() string {
	if p.SHA256 != "" {
		return p.SHA256
	}
	return p.MD5
}

func parseCondaLock(b []byte) (*condaLock, error) {
	l := &condaLock{text: b}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("read stored lock: %w", err)
	}
	if err := json.Unmarshal(l.Conda, &l.view); err != nil {
		return nil, fmt.Errorf("read stored lock: %w", err)
	}
	for _, p := range l.view.Packages {
		if !plainHex(p.SHA256) || !plainHex(p.MD5) || p.SHA256 == "" && p.MD5 == "" {
			return nil, fmt.Errorf("read lock: package %q has no hash", p.Name)
		}
	}
	return l, nil
}

func plainHex(s string) bool { return len(s) <= 64 && strings.Trim(s, "0123456789abcdef") == "" }

func (l *condaLock) lock() *lock { return &lock{kind: "conda", text: l.text} }

// python is the version of its interpreter, "3.12"; "" is none.
func (l *condaLock) python() string {
	for _, p := range l.view.Packages {
		if p.Name == "python" {
			if f := strings.SplitN(p.Version, ".", 3); len(f) >= 2 {
				return f[0] + "." + f[1]
			}
		}
	}
	return ""
}

// condaPlatform is this machine's, as conda calls it.
func condaPlatform() string {
	if arch, ok := map[string]string{"amd64": "64", "386": "32", "arm64": "aarch64"}[archID]; ok {
		return "linux-" + arch
	}
	return "linux-" + archID
}

// condaInput takes a file of conda's with those that its pip section includes.
func condaInput(kind Kind, file string, data []byte) (*input, error) {
	in := &input{kind: "conda", conda: kind, files: []inputFile{{filepath.Base(file), data}}}
	if kind != KindEnvironment {
		return in, nil
	}
	// The section is parsed in a sandbox; what it includes is part of the key,
	// so it is looked for by its lines here.
	for line := range bytes.Lines(data) {
		item := strings.Trim(strings.TrimSpace(strings.TrimLeft(strings.TrimSpace(string(line)), "-")), `"'`)
		for _, o := range []string{"-r ", "--requirement ", "-c ", "--constraint ", "r "} {
			v, ok := strings.CutPrefix(item, o)
			if v = strings.TrimSpace(v); !ok || v == "" || filepath.IsAbs(v) {
				continue
			}
			p := filepath.Join(filepath.Dir(file), v)
			b, err := readBelow(filepath.Dir(file), p)
			if err != nil {
				return nil, &Error{Msg: fmt.Sprintf("read %q: its pip section: %v", file, err), Err: err}
			}
			more := &input{kind: KindRequirements}
			if err := more.add(p, b, filepath.Dir(file), false, map[string]bool{}, 0); err != nil {
				return nil, err
			}
			in.files = append(in.files, more.files...)
		}
	}
	return in, nil
}

// condaLockPath is where the lock of an input is kept.
func (m *Manager) condaLockPath(r Recipe, in *input) string {
	key := digestOf(schema, "conda", in.text(), baseKey(r.Base), r.IndexURL, r.ExcludeNewer, archID)
	return m.store.Path("envs", "locks", key+".json")
}

// condaKey is the digest of everything that a bake depends on.
func (m *Manager) condaKey(r Recipe, l *condaLock) string {
	parts := []string{schema, "conda", l.lock().digest(), r.Base.Digest, EnvDir, pycs, archID, fmt.Sprint(r.AllowBuild, r.AllowScripts), "hooks"}
	parts = append(append(append(parts, r.Hooks...), "env"), r.Env...)
	return digestOf(append(append(parts, "upon"), r.Base.Upon...)...)
}

// findConda gives the baked environment, nil if there is none.
func (m *Manager) findConda(r Recipe, in *input) (*Env, error) {
	if r.anew() && in.conda == KindEnvironment {
		return nil, nil
	}
	b, err := os.ReadFile(m.condaLockPath(r, in))
	if err != nil {
		return nil, nil //nolint:nilerr // not locked yet
	}
	l, err := parseCondaLock(b)
	if err != nil {
		return nil, nil //nolint:nilerr // damaged: made anew
	}
	e, err := m.load(m.condaKey(r, l))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return e, err
}

// condaLocked gives the lock of an input: the one that was kept, or a new one.
func (m *Manager) condaLocked(ctx context.Context, r Recipe, in *input) (*condaLock, error) {
	file := m.condaLockPath(r, in)
	read := func() *condaLock {
		if r.anew() {
			return nil
		}
		if b, err := os.ReadFile(file); err == nil {
			if l, err := parseCondaLock(b); err == nil {
				return l
			}
		}
		return nil
	}
	if l := read(); l != nil {
		return l, nil
	}
	release, err := m.store.Lock(ctx, "resolve-"+strings.TrimSuffix(filepath.Base(file), ".json"), true)
	if err != nil {
		return nil, err
	}
	defer release()
	if l := read(); l != nil {
		return l, nil
	}
	l, err := m.lockConda(ctx, r, in)
	if err != nil {
		return nil, err
	}
	if l.text, err = json.Marshal(l); err != nil {
		return nil, fmt.Errorf("encode lock: %w", err)
	}
	if l, err = parseCondaLock(l.text); err != nil {
		return nil, err
	}
	names := []string{}
	for _, p := range l.view.Packages {
		names = append(names, p.Name)
	}
	if section, err := m.parseLock([]byte(l.Requirements), file); err == nil {
		names = append(names, section.names()...)
	}
	if err := upgradable(r, names); err != nil {
		return nil, err
	}
	if err := m.store.WriteFile(file, l.text); err != nil {
		return nil, err
	}
	return l, m.remember(r, in, file)
}

// lockConda makes a lock: it solves an environment.yml and reads the others.
func (m *Manager) lockConda(ctx context.Context, r Recipe, in *input) (_ *condaLock, err error) {
	m.progress.Phase("resolve", filepath.Base(r.File))
	dir, done, err := m.workDir("solve")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := writeFiles(dir, in.files[:1]); err != nil {
		return nil, err
	}
	job := m.job(&tool{}, r.Base, "resolve", dir, nil)
	q := condaLockRequest{File: "/opt/in/" + in.files[0].name, Kind: in.conda, Platform: condaPlatform(), To: "/opt/lock.json"}
	var spec condaSpec
	if in.conda == KindEnvironment {
		if spec, err = m.readSpec(ctx, r, in, job, dir); err == nil {
			err = m.solve(ctx, r, in, spec, dir)
		}
		if err != nil {
			return nil, err
		}
		q.File, q.Kind = "/opt/solved.json", ""
	}
	job.Name = fmt.Sprintf("read %q", r.File)
	if err := m.inside(ctx, job, dir, "conda-lock", q, nil); err != nil {
		return nil, err
	}
	l := &condaLock{Variables: spec.Variables}
	if l.Conda, err = readOutput(filepath.Join(dir, "lock.json")); err != nil {
		return nil, fmt.Errorf("read %q: %w", r.File, err)
	}
	if err := json.Unmarshal(l.Conda, &l.view); err != nil {
		return nil, fmt.Errorf("read %q: %w", r.File, err)
	}
	if len(spec.Pip) > 0 {
		if _, text := m.pins(r, in); text != "" {
			r.prefer = []byte(text)
		}
		if l.Requirements, err = m.resolvePipSection(ctx, r, l, in, spec.Pip); err != nil {
			return nil, err
		}
	}
	var b strings.Builder
	for _, p := range l.view.Pip { // of the lock's own
		fmt.Fprintf(&b, "%s @ %s --hash=sha256:%s\n", p.Name, p.URL, p.SHA256)
	}
	l.Requirements = b.String() + l.Requirements
	return l, nil
}

// writeFiles puts files where a job sees them below /opt/in.
func writeFiles(dir string, files []inputFile) error {
	for _, f := range files {
		if err := handOver(dir, path.Join("in", f.name), f.data); err != nil {
			return fmt.Errorf("resolve: %w", err)
		}
	}
	return nil
}

// resolvePipSection resolves what pip is to add, for the python that conda
// brings and beside the distributions that conda brings already.
func (m *Manager) resolvePipSection(ctx context.Context, r Recipe, l *condaLock, in *input, lines []string) (string, error) {
	version := l.python()
	if version == "" {
		return "", fail("add python to the dependencies", "resolve %q: its pip section needs python, which is not in the environment", r.File)
	}
	py, err := findPython(r.Base, "") // runs uv's questions only; the markers are of version
	if err != nil {
		return "", err
	}
	have := map[string]string{}
	constraints := ""
	for _, p := range l.view.Packages {
		if strings.HasPrefix(p.Build, "py") || strings.HasPrefix(p.Build, "np") { // a distribution of python's, most likely
			have[pep503.Normalise(p.Name)] = p.Version
			constraints += pep503.Normalise(p.Name) + "==" + p.Version + "\n"
		}
	}
	section := &input{kind: KindRequirements}
	top, err := filepath.Abs(filepath.Dir(r.File))
	if err != nil {
		return "", fmt.Errorf("resolve %q: %w", r.File, err)
	}
	text := strings.Join(lines, "\n") + "\n"
	if constraints != "" {
		text += "-c conda-constraints.txt\n"
	}
	seen := map[string]bool{}
	const first = "pip-section.txt"
	strip := strings.TrimSuffix(text, "-c conda-constraints.txt\n")
	if err := section.add(filepath.Join(top, first), []byte(strip), top, false, seen, 0); err != nil {
		return "", err
	}
	section.files[0].data = []byte(text)
	if constraints != "" {
		section.files = append(section.files, inputFile{"conda-constraints.txt", []byte(constraints)})
	}
	out, err := m.resolve(ctx, r, section, py, "--python-version", version)
	if err != nil {
		return "", err
	}
	return dropPinned(out, have, section.opts), nil
}

// dropPinned takes out of a lock what conda brings already, and the indexes that
// the section does not name itself: they are this host's configuration, maybe with
// credentials, and are asked again when it is installed.
func dropPinned(text []byte, have map[string]string, options []string) string {
	var out strings.Builder
	for _, o := range options {
		out.WriteString(dropUserinfo(o) + "\n")
	}
	drop := true
	for line := range bytes.Lines(text) {
		s := string(line)
		if s != "" && !isWhite(s[0]) {
			name, rest, ok := splitRequirement(strings.TrimRight(strings.TrimSpace(s), "\\ "))
			version := have[pep503.Normalise(name)]
			drop = !ok || version != "" && version == exactPin(strings.TrimSpace(rest))
		}
		if !drop {
			out.WriteString(s)
		}
	}
	return out.String()
}

// lockOfConda gives a lock as other tools read it, an @EXPLICIT list for this
// platform and without credentials; what is a lock already becomes one too.
func (m *Manager) lockOfConda(ctx context.Context, r Recipe, in *input) ([]byte, error) {
	l, err := m.condaLocked(ctx, r, in)
	if err != nil {
		return nil, err
	}
	return l.explicit(), nil
}

// explicit is the list that conda, mamba and pixi install from. They install no
// more than packages: the rest is told in comments.
func (l *condaLock) explicit() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# platform: %s\n@EXPLICIT\n", l.view.Platform)
	for _, p := range l.view.Packages {
		if p.SHA256 != "" {
			fmt.Fprintf(&b, "%s#sha256:%s\n", p.URL, p.SHA256)
		} else {
			fmt.Fprintf(&b, "%s#%s\n", p.URL, p.MD5)
		}
	}
	for line := range strings.Lines(l.Requirements) {
		b.WriteString("# pip: " + line)
	}
	for _, v := range l.Variables {
		b.WriteString("# variable: " + v + "\n")
	}
	return b.Bytes()
}
