package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/sbxrun/sbxrun/rootfs"
)

// The resolver and installer that is used: uv, at this version, with these
// hashes of its wheels (amd64, arm64).
const uvVersion = "0.13.9"

var uvHashes = []string{
	"sha256:d7f459fe4fd247d830351c75686d3996ace3c6f3f728eb0e85a30b7ada0cef19",
	"sha256:5435c5ce14a56431208ca0996416d310f1598e8c2c8ba707688985a16bb82dbe",
}

// uvMinimum is the oldest uv on PATH that is good enough.
const uvMinimum = "0.7.0"

// tool is what resolves and installs, and what it needs to know of indexes.
type tool struct {
	Kind    string `json:"kind"` // "uv" or "pip" (the base's venv and pip)
	Version string `json:"version"`
	Path    string `json:"path"` // on the host; "" for pip
	// IndexURL and FileHost are the public index's, as the ordinary client on
	// this host names them: they are not ours to know.
	IndexURL string `json:"index_url"`
	FileHost string `json:"file_host"`
}

func (t *tool) id() string { return t.Kind + " " + t.Version }

// tool gives the installed tool or installs it: uv on PATH if new enough,
// else uv at the pinned version through pip, else pip itself.
func (m *Manager) tool(ctx context.Context) (*tool, error) {
	rec := m.store.Path("tools", "tool.json")
	read := func() *tool {
		var t tool
		b, err := os.ReadFile(rec)
		if err != nil || json.Unmarshal(b, &t) != nil {
			return nil
		}
		if t.Kind == "uv" {
			if _, err := os.Stat(t.Path); err != nil {
				return nil
			}
		}
		return &t
	}
	if t := read(); t != nil {
		return t, nil
	}
	release, err := m.store.Lock(ctx, "tool", true)
	if err != nil {
		return nil, err
	}
	defer release()
	if t := read(); t != nil {
		return t, nil
	}
	m.progress.Phase("tool", "uv "+uvVersion)
	t := &tool{Kind: "uv"}
	t.IndexURL, t.FileHost = publicIndex(ctx)
	if p, v := uvOnPath(ctx); p != "" {
		t.Path, t.Version = p, v
	} else if p, err := m.installUV(ctx); err == nil {
		t.Path, t.Version = p, uvVersion
	} else if ctx.Err() != nil {
		return nil, ctx.Err()
	} else {
		// Slower, the same contract. Tried anew next time: not recorded.
		return &tool{Kind: "pip", IndexURL: t.IndexURL, FileHost: t.FileHost}, nil
	}
	b, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	return t, m.store.WriteFile(rec, b)
}

func uvOnPath(ctx context.Context) (path, version string) {
	p, err := exec.LookPath("uv")
	if err != nil {
		return "", ""
	}
	if p, err = filepath.EvalSymlinks(p); err != nil || isScript(p) {
		return "", "" // a shim of some version manager: it would not work inside
	}
	out, err := exec.CommandContext(ctx, p, "--version").Output()
	if f := strings.Fields(string(out)); err == nil && len(f) >= 2 && f[0] == "uv" && !olderThan(f[1], uvMinimum) {
		return p, f[1]
	}
	return "", ""
}

func isScript(p string) bool {
	f, err := os.Open(p)
	if err != nil {
		return true
	}
	defer f.Close()
	b := make([]byte, 2)
	n, _ := io.ReadFull(f, b)
	return n < 2 || string(b) == "#!"
}

// olderThan compares dotted versions of numbers.
func olderThan(a, b string) bool {
	var x, y [3]int
	_, _ = fmt.Sscanf(a, "%d.%d.%d", &x[0], &x[1], &x[2])
	_, _ = fmt.Sscanf(b, "%d.%d.%d", &y[0], &y[1], &y[2])
	for i := range x {
		if x[i] != y[i] {
			return x[i] < y[i]
		}
	}
	return false
}

// hostPython runs the ordinary client of this host: with the user's index
// configuration, without what would change what it does otherwise.
func hostPython(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "python3", args...)
	// -c and -m import from the current directory first, which is somebody's project.
	cmd.Dir = "/"
	// It dies with us, and what it starts (python3 may be a shim) with it: as
	// process 1 of a namespace, where we may make one.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() == 0 {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	}
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		switch {
		case k == "PATH", k == "HOME", k == "LANG", k == "SSL_CERT_FILE", k == "REQUESTS_CA_BUNDLE",
			strings.HasSuffix(strings.ToLower(k), "_proxy"),
			k == "PIP_INDEX_URL", k == "PIP_EXTRA_INDEX_URL", k == "PIP_CERT", k == "PIP_TRUSTED_HOST", k == "PIP_CONFIG_FILE", k == "PIP_CLIENT_CERT":
			cmd.Env = append(cmd.Env, kv)
		}
	}
	return cmd
}

// onThread runs f on a thread that stays: PR_SET_PDEATHSIG fires when the thread
// that started the child ends, not the process. Without it pip outlives a
// killed sbxrun and makes anew the directory that was cleaned away under it.
func onThread(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	return f()
}

// publicIndex asks pip where the public index is; empty where there is no pip.
func publicIndex(ctx context.Context) (indexURL, fileHost string) {
	cmd := hostPython(ctx, "-c", "from pip._internal.models.index import PyPI as p; print(p.simple_url, p.file_storage_domain)")
	var out bytes.Buffer
	cmd.Stdout = &out
	err := onThread(cmd.Run)
	if f := strings.Fields(out.String()); err == nil && len(f) == 2 {
		return f[0], f[1]
	}
	return "", ""
}

// installUV downloads uv's wheel through pip, with hashes, and takes the one
// program out of it.
func (m *Manager) installUV(ctx context.Context) (path string, err error) {
	path = m.store.Path("tools", "uv-"+uvVersion, "uv")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	tmp, done, err := m.store.TempDir("tool")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, done()) }()
	wheel, err := pipDownload(ctx, tmp, "uv", uvVersion, uvHashes, "apt-get install python3-pip; or put uv on PATH")
	if err != nil {
		return "", err
	}
	bin := filepath.Join(tmp, "uv")
	dst, err := os.OpenFile(bin, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return "", fmt.Errorf("install uv: %w", err)
	}
	// By Python, which pip came with: archive/zip and its inflater would be
	// initialised at every launch.
	var out bytes.Buffer
	unzip := hostPython(ctx, "-c", "import shutil, sys, zipfile; shutil.copyfileobj(zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]), sys.stdout.buffer)",
		wheel, "uv-"+uvVersion+".data/scripts/uv")
	unzip.Stdout, unzip.Stderr = dst, &out
	if err = onThread(unzip.Run); err != nil {
		err = fmt.Errorf("unpack %q: %w: %s", filepath.Base(wheel), err, lastLine(out.String()))
	}
	err = errors.Join(err, dst.Sync(), dst.Close())
	if err == nil {
		err = os.MkdirAll(filepath.Dir(path), 0o700)
	}
	if err == nil {
		err = os.Rename(bin, path)
	}
	if err != nil {
		return "", fmt.Errorf("install uv: %w", err)
	}
	return path, nil
}

// pipDownload downloads one wheel through this host's pip, with hashes.
func pipDownload(ctx context.Context, dir, name, version string, hashes []string, hint string) (wheel string, err error) {
	req := filepath.Join(dir, "requirements.txt")
	if err := os.WriteFile(req, []byte(name+"=="+version+" --hash="+strings.Join(hashes, " --hash=")+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("install %s: %w", name, err)
	}
	cmd := hostPython(ctx, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-cache-dir", "--no-deps", "--only-binary", ":all:", "--require-hashes", "-r", req, "-d", dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := onThread(cmd.Run); err != nil {
		return "", fail(hint, "install %s: %v: %s", name, err, lastLine(out.String()))
	}
	wheels, _ := filepath.Glob(filepath.Join(dir, "*.whl"))
	if len(wheels) != 1 {
		return "", fmt.Errorf("install %s: pip left %d wheels", name, len(wheels))
	}
	return wheels[0], nil
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}

// indexConfig is what a job needs to reach the indexes of this host's
// configuration and no other host.
type indexConfig struct {
	env   []string
	hosts []string
	binds []JobBind
}

// index reads the resolver's configuration: the recipe, the file's own lines,
// UV_* and PIP_* variables, pip's configuration files; first one wins.
func (t *tool) index(r Recipe, in *input) indexConfig {
	var c indexConfig
	seen := map[string]bool{}
	addHost := func(raw string) {
		if h := hostPort(raw); h != "" && !seen[h] {
			seen[h] = true
			c.hosts = append(c.hosts, h)
		}
	}
	conf := pipConfig()
	first := func(values ...string) string {
		for _, v := range values {
			if v != "" {
				return v
			}
		}
		return ""
	}
	index := first(r.IndexURL, os.Getenv("UV_DEFAULT_INDEX"), os.Getenv("UV_INDEX_URL"), os.Getenv("PIP_INDEX_URL"), conf["index-url"])
	extra := first(os.Getenv("UV_INDEX"), os.Getenv("UV_EXTRA_INDEX_URL"), os.Getenv("PIP_EXTRA_INDEX_URL"), conf["extra-index-url"])
	inFile := false
	for _, o := range in.opts {
		inFile = inFile || strings.HasPrefix(o, "--index-url") || strings.HasPrefix(o, "-i")
		for _, u := range urlsIn(o) {
			addHost(u)
		}
	}
	for _, u := range in.urls {
		addHost(u)
	}
	if index != "" {
		c.env = append(c.env, "UV_DEFAULT_INDEX="+index, "PIP_INDEX_URL="+index)
		addHost(index)
	}
	if extra != "" {
		c.env = append(c.env, "UV_INDEX="+extra, "PIP_EXTRA_INDEX_URL="+extra)
		for _, u := range strings.Fields(extra) {
			addHost(u)
		}
	}
	if index == "" || inFile {
		if t.IndexURL != "" {
			addHost(t.IndexURL)
		}
	}
	c.hosts = append(c.hosts, r.IndexHosts...)
	// Files of the public index, and of mirrors that link to them.
	if t.FileHost != "" {
		addHost("https://" + t.FileHost)
	}
	if in.kind == KindPylock {
		for _, u := range urlsIn(string(in.files[0].data)) {
			addHost(u)
		}
	}
	env, binds := certificates()
	c.env, c.binds = append(c.env, env...), append(c.binds, binds...)
	return c
}

// hostIndexesHaveCredentials says whether the resolver's configuration has some:
// a job that reaches the indexes has them too, and so has what is built in it.
func hostIndexesHaveCredentials() bool {
	conf := pipConfig()
	all := []string{conf["index-url"], conf["extra-index-url"]}
	for _, k := range []string{"UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_INDEX", "UV_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} {
		all = append(all, os.Getenv(k))
	}
	return hasUserinfo(strings.Join(all, "\n"))
}

// certificates shows the host's, wherever it keeps them, at one place inside.
func certificates() (env []string, binds []JobBind) {
	for _, p := range []string{os.Getenv("SSL_CERT_FILE"), os.Getenv("PIP_CERT"), "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"} {
		if p == "" {
			continue
		}
		if real, err := filepath.EvalSymlinks(p); err == nil {
			return []string{"SSL_CERT_FILE=/mnt/ca.crt", "PIP_CERT=/mnt/ca.crt"}, []JobBind{{Source: real, Target: "/mnt/ca.crt", ReadOnly: true}}
		}
	}
	return nil, nil
}

// hostPort gives the host:port of a URL, "" where there is none. (net/url would
// bring net/netip along, which is initialised at every launch.)
func hostPort(raw string) string {
	scheme, rest, ok := strings.Cut(raw, "://")
	if !ok {
		return ""
	}
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		rest = rest[:i]
	}
	h := rest[strings.LastIndexByte(rest, '@')+1:] // without user and password
	name, port := h, ""
	if i := strings.LastIndexByte(h, ':'); i > strings.LastIndexByte(h, ']') { // not of an IPv6 address
		name, port = h[:i], h[i+1:]
	}
	if name == "" || strings.Trim(port, "0123456789") != "" || strings.ContainsAny(name, " \t\"<>\\^`{|}") {
		return ""
	}
	switch {
	case port != "":
	case strings.EqualFold(scheme, "http"):
		port = "80"
	default:
		port = "443"
	}
	return name + ":" + port
}

// pipConfig reads the index lines of pip's configuration files; the user's
// comes before the system's.
func pipConfig() map[string]string {
	out := map[string]string{}
	home, _ := os.UserHomeDir()
	for _, p := range []string{os.Getenv("PIP_CONFIG_FILE"), filepath.Join(home, ".config/pip/pip.conf"), filepath.Join(home, ".pip/pip.conf"), "/etc/pip.conf"} {
		b, err := os.ReadFile(p)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(b), "\n") {
			k, v, ok := strings.Cut(line, "=")
			k = strings.ReplaceAll(strings.TrimSpace(k), "_", "-")
			if ok && (k == "index-url" || k == "extra-index-url") && out[k] == "" {
				out[k] = strings.TrimSpace(v)
			}
		}
	}
	return out
}

// uvBinary is where the tool is shown in a job.
const uvBinary = "/mnt/uv"

// job makes a job over a directory that is shown at /opt. The tool is there
// read-only; the environment is what is set here and nothing else.
func (m *Manager) job(t *tool, base rootfs.Base, name, dir string, ix *indexConfig) Job {
	j := Job{
		Name: name, Base: base, Dir: "/opt",
		Env: []string{
			"HOME=/tmp", "UV_CACHE_DIR=/opt/cache", "UV_NO_CONFIG=1", "UV_PYTHON_DOWNLOADS=never", "UV_NO_PROGRESS=1",
			"UV_LINK_MODE=hardlink", "UV_CONCURRENT_DOWNLOADS=8", "NO_COLOR=1", "PIP_NO_INPUT=1", "PIP_CONFIG_FILE=/dev/null",
			"PIP_CACHE_DIR=/opt/cache", "PIP_DISABLE_PIP_VERSION_CHECK=1", "PYTHONHASHSEED=0", "SOURCE_DATE_EPOCH=1577836800",
		},
		Binds: []JobBind{{Source: dir, Target: "/opt"}},
	}
	if _, host, ok := resolveInBase(base, PythonsDir); ok && isDir(host) { // what is shown at /opt hides the base's own
		j.Binds = append(j.Binds, JobBind{Source: host, Target: PythonsDir, ReadOnly: true})
	}
	if t.Kind == "uv" {
		j.Binds = append(j.Binds, JobBind{Source: t.Path, Target: uvBinary, ReadOnly: true})
	}
	if ix != nil {
		j.Env = append(j.Env, ix.env...)
		j.Binds = append(j.Binds, ix.binds...)
		j.AllowHosts = ix.hosts
	}
	return j
}

// archID is part of what a wheel's files depend on.
var archID = runtime.GOARCH
