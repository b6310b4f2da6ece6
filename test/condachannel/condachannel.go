// Package condachannel gives tests a conda channel of real packages and rattler to
// compare with. It owns the Python environment that makes both
// (conda-package-handling writes the packages, py-rattler indexes, solves and
// installs), made once in the user's cache folder. It knows nothing of sbxrun.
package condachannel

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sbxrun/sbxrun/test/need"
)

// What the channel holds is told by channel.py.
var (
	//go:embed channel.py
	channelPy string
	//go:embed oracle.py
	oraclePy string
)

var pinned = []string{"py-rattler==0.28.0", "conda-package-handling==2.6.0", "conda-package-streaming==0.13.0"}

// Info is what a channel was built for.
type Info struct {
	Platform string `json:"platform"` // linux-64, linux-aarch64
	Python   string `json:"python"`   // the full version of its python, which is the system's
}

// Build gives the folder of the channel: linux-64 (or what the machine is) and
// noarch with repodata.json. It is shared by all tests: copy it to change it. Without
// the package index, a C compiler or the system's python the test is skipped.
func Build(t testing.TB) string {
	t.Helper()
	python := Python(t) // first: a machine without the index needs nothing more
	need.Compiler(t)
	dir := filepath.Join(cacheDir(t), "channel-"+digest(channelPy, strings.Join(pinned, " "), systemPython(t)))
	once(t, dir, func(dir string) {
		run(t, python, "channel.py", channelPy, dir)
	})
	return dir
}

// Read gives what a channel was built for.
func Read(t testing.TB, channel string) Info {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(channel, "channel.json"))
	var i Info
	if err == nil {
		err = json.Unmarshal(b, &i)
	}
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// Python is an interpreter that has py-rattler and conda-package-handling.
func Python(t testing.TB) string {
	t.Helper()
	need.Python(t)
	dir := filepath.Join(cacheDir(t), "venv-"+digest(pinned...))
	if _, err := os.Stat(filepath.Join(dir, ".done")); err != nil {
		need.Network(t)
	}
	once(t, dir, func(dir string) {
		command(t, "/usr/bin/python3", "-m", "venv", "--without-pip", dir)
		command(t, "python3", append([]string{"-m", "pip", "--disable-pip-version-check", "--python", filepath.Join(dir, "bin", "python"), "install", "-q", "--only-binary", ":all:"}, pinned...)...)
	})
	return filepath.Join(dir, "bin", "python")
}

// Ask is a request to rattler; see oracle.py.
type Ask struct {
	Channel  string   `json:"channel,omitempty"`
	Specs    []string `json:"specs,omitempty"`
	Lock     string   `json:"lock,omitempty"`     // where to write a pixi.lock
	Explicit string   `json:"explicit,omitempty"` // where to write an @EXPLICIT list
	Root     string   `json:"root,omitempty"`     // where to install; an existing folder
	Prefix   string   `json:"prefix,omitempty"`   // the path it is installed for
	Times    int      `json:"times,omitempty"`    // install that often, each into a new folder below Root
	Records  string   `json:"records,omitempty"`  // a conda-meta to read
}

// Answer is what rattler did.
type Answer struct {
	Packages []string          `json:"packages"` // file names
	Seconds  float64           `json:"seconds"`  // of all installations
	Records  map[string]Record `json:"records"`
}

// Record is what rattler reads from a conda-meta file.
type Record struct {
	Name, Version, Build, URL string
	Files                     []string
	Paths                     int
}

// Rattler has rattler do what is asked and fails the test where it does not.
func Rattler(t testing.TB, a Ask) Answer {
	t.Helper()
	python := Python(t)
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	out := run(t, python, "oracle.py", oraclePy, string(b))
	var r Answer
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("rattler: %v: %s", err, out)
	}
	return r
}

func cacheDir(t testing.TB) string {
	t.Helper()
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Skipf("needs a cache folder: %v", err)
	}
	dir = filepath.Join(dir, "sbxrun-test", "conda")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// systemPython changes when the channel's python would.
func systemPython(t testing.TB) string {
	t.Helper()
	path, err := filepath.EvalSymlinks("/usr/bin/python3")
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(path, st.Size(), st.ModTime().Unix())
}

func digest(parts ...string) string {
	h := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(h[:6])
}

// once makes dir, whole or again: tests of several packages run at once and may be
// stopped at any time.
func once(t testing.TB, dir string, fill func(dir string)) {
	t.Helper()
	lock, err := os.OpenFile(dir+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, ".done")); err == nil {
		return
	}
	// A venv's scripts and a channel's URLs name their folder: it is made in place.
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	fill(dir)
	if err := os.WriteFile(filepath.Join(dir, ".done"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func run(t testing.TB, python, name, script string, args ...string) []byte {
	t.Helper()
	return command(t, python, append([]string{"-I", "-c", "import sys\nsource = sys.argv.pop(1)\nsys.argv[0] = " + fmt.Sprintf("%q", name) + "\nexec(compile(source, sys.argv[0], 'exec'))", script}, args...)...)
}

func command(t testing.TB, name string, args ...string) []byte {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := cmd.Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			err = fmt.Errorf("%w\n%s", err, e.Stderr)
		}
		t.Fatalf("%s: %v", filepath.Base(name), err)
	}
	return out
}
