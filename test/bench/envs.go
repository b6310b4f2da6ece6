package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/test/condachannel"
)

// EnvRow is one figure of environments: a time or a size, or why there is none.
type EnvRow struct {
	Name    string   `json:"name"`
	MS      *float64 `json:"ms,omitempty"`
	Bytes   *int64   `json:"bytes,omitempty"`
	Note    string   `json:"note,omitempty"`
	Skipped string   `json:"skipped,omitempty"`
}

// envs measures baking: each figure once, for a bake is cold once only.
func (w *workshop) envs(ctx context.Context) (rows []EnvRow) {
	for _, part := range []struct {
		name string
		f    func(context.Context) ([]EnvRow, error)
	}{{"bake of a small environment", w.bakes}, {"disk for ten environments", w.ten}, {"conda packages installed from a lock", w.conda}} {
		got, err := part.f(ctx)
		rows = append(rows, got...)
		if err != nil {
			rows = append(rows, EnvRow{Name: part.name, Skipped: oneLine(err.Error())})
		}
	}
	return rows
}

// sbxrun runs a verb of environments and gives its output and its milliseconds.
func (w *workshop) sbxrun(ctx context.Context, verb string, flags ...string) ([]byte, float64, error) {
	argv := append([]string{w.o.sbxrun}, strings.Fields(verb)...)
	argv = append(append(argv, "--root", filepath.Join(w.dir, "root"), "--state", "/run/sbxrun"), flags...)
	return command(ctx, argv...)
}

func command(ctx context.Context, argv ...string) ([]byte, float64, error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return nil, 0, fmt.Errorf("%s: %w: %s", filepath.Base(argv[0]), err, errs.Bytes())
	}
	return out.Bytes(), float64(time.Since(start).Microseconds()) / 1000, nil
}

const smallEnvironment = "requests\npytest\n"

// lockOf locks requirements, which is not measured: the index's time is in it.
func (w *workshop) lockOf(ctx context.Context, name, text string) (file string, err error) {
	in := filepath.Join(w.dir, name+".in")
	if err := os.WriteFile(in, []byte(text), 0o600); err != nil {
		return "", err
	}
	lock, _, err := w.sbxrun(ctx, "env lock", "-q", "-r", in)
	if err != nil {
		return "", err
	}
	file = filepath.Join(w.dir, name+".txt")
	return file, os.WriteFile(file, lock, 0o600)
}

func (w *workshop) bakes(ctx context.Context) (rows []EnvRow, err error) {
	for _, c := range []struct{ name, text, row, note string }{
		{"cold", smallEnvironment, "cold bake of requests and pytest", "downloads and byte-compiling included, locked before"},
		{"changed", smallEnvironment + "iniconfig<2.1\n", "re-bake with one pin changed", "its download included; the other wheels are known"},
	} {
		lock, err := w.lockOf(ctx, c.name, c.text)
		if err != nil {
			return rows, err
		}
		_, took, err := w.sbxrun(ctx, "env build", "-q", "-r", lock)
		if err != nil {
			return rows, err
		}
		rows = append(rows, EnvRow{Name: c.row, MS: &took, Note: c.note})
	}
	return rows, nil
}

// ten compares ten environments that have most in common with as many venvs.
func (w *workshop) ten(ctx context.Context) ([]EnvRow, error) {
	uv, err := filepath.Glob(filepath.Join(w.dir, "root", "tools", "uv-*", "uv"))
	if err == nil && len(uv) == 0 {
		var p string
		if p, err = exec.LookPath("uv"); err == nil {
			uv = []string{p}
		}
	}
	if err != nil {
		return nil, err
	}
	var layers []string
	venvs := filepath.Join(w.dir, "venvs")
	for _, extra := range []string{"attrs", "six", "tabulate", "toml", "wheel", "click", "colorama", "filelock", "platformdirs", "zipp"} {
		lock, err := w.lockOf(ctx, "ten-"+extra, smallEnvironment+extra+"\n")
		if err != nil {
			return nil, err
		}
		digest, _, err := w.sbxrun(ctx, "env build", "-q", "-r", lock)
		if err != nil {
			return nil, err
		}
		layers = append(layers, filepath.Join(w.dir, "root", "layers", strings.TrimPrefix(strings.TrimSpace(string(digest)), "sha256:")))
		venv := filepath.Join(venvs, extra)
		if _, _, err := command(ctx, "/usr/bin/python3", "-m", "venv", "--without-pip", venv); err != nil {
			return nil, err
		}
		if _, _, err := command(ctx, uv[0], "pip", "sync", "-q", "--no-config", "--cache-dir", filepath.Join(w.dir, "uvcache"), "--link-mode", "copy", "--compile-bytecode", "--python", venv+"/bin/python", lock); err != nil {
			return nil, err
		}
	}
	ours, err := new(rootfs.Meter).Add(layers...)
	if err != nil {
		return nil, err
	}
	plain, err := new(rootfs.Meter).Add(venvs)
	if err != nil {
		return nil, err
	}
	return []EnvRow{
		{Name: "ten environments of requests, pytest and one more", Bytes: &ours, Note: "all of their layers, files that several have counted once"},
		{Name: "the same as ten venvs", Bytes: &plain, Note: "copied, byte-compiled"},
	}, nil
}

var condaSpecs = []string{"python", "hello-bin", "text-prefix", "text-twin", "greet", "sounds", "uselink", "pymod", "old-format"}

const condaTimes = 10

// conda compares installers on the packages of the tests' channel.
func (w *workshop) conda(ctx context.Context) (rows []EnvRow, err error) {
	var channel string
	var theirs condachannel.Answer
	lock := filepath.Join(w.dir, "conda.txt")
	err = borrowed(func(t testing.TB) {
		channel = condachannel.Build(t)
		root := filepath.Join(w.dir, "rattler")
		if err := os.Mkdir(root, 0o755); err != nil {
			t.Fatal(err)
		}
		theirs = condachannel.Rattler(t, condachannel.Ask{Channel: channel, Specs: condaSpecs, Explicit: lock, Root: root, Prefix: "/opt/env", Times: condaTimes})
	})
	if err != nil {
		return nil, err
	}
	packages := fmt.Sprintf("%d small packages, archives at hand", len(theirs.Packages))
	_, whole, err := w.sbxrun(ctx, "env build", "-q", "-r", lock)
	if err != nil {
		return nil, err
	}
	installer, err := w.condaInstall(ctx, lock)
	if err != nil {
		return nil, err
	}
	rattler := theirs.Seconds * 1000 / condaTimes
	rows = append(rows,
		EnvRow{Name: "conda lock: our installer, a process each", MS: &installer, Note: packages},
		EnvRow{Name: "conda lock: rattler's install()", MS: &rattler, Note: "the same packages, in a process that runs"},
		EnvRow{Name: "conda lock: whole bake", MS: &whole, Note: "read, fetched, installed, compiled, each in a sandbox; stored"})
	if p, _ := exec.LookPath("micromamba"); p == "" {
		return append(rows, EnvRow{Name: "conda lock: micromamba", Skipped: "not on PATH"}), nil
	}
	var took []float64
	for i := range 3 {
		_, ms, err := command(ctx, "micromamba", "create", "-q", "-y", "-r", filepath.Join(w.dir, "mamba"), "-p", filepath.Join(w.dir, "mamba", fmt.Sprint(i)), "-f", lock)
		if err != nil {
			return append(rows, EnvRow{Name: "conda lock: micromamba", Skipped: oneLine(err.Error())}), nil
		}
		took = append(took, ms)
	}
	return append(rows, EnvRow{Name: "conda lock: micromamba", MS: &took[len(took)-1], Note: "archives at hand"}), nil
}

// condaInstall times the installer alone, as a bake starts it, over the store's
// archives: the median.
func (w *workshop) condaInstall(ctx context.Context, lock string) (float64, error) {
	stored, err := filepath.Glob(filepath.Join(w.dir, "root", "envs", "lockfiles", "*"))
	if err != nil {
		return 0, err
	}
	var text []byte
	for _, f := range stored {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, err
		}
		if rest, ok := bytes.CutPrefix(b, []byte("conda\n")); ok {
			text = rest
		}
	}
	var kept struct{ Conda json.RawMessage }
	if err := json.Unmarshal(text, &kept); err != nil {
		return 0, fmt.Errorf("read the lock that was kept of %s: %w", filepath.Base(lock), err)
	}
	var times []sample
	for i := range condaTimes {
		dir := filepath.Join(w.dir, fmt.Sprintf("conda-%d", i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return 0, err
		}
		q, err := json.Marshal(map[string]any{"lock": kept.Conda, "archives": filepath.Join(w.dir, "root", "cache", "conda", "pkgs"), "prefix": filepath.Join(dir, "env"), "compile": filepath.Join(dir, "compile.txt")})
		if err != nil {
			return 0, err
		}
		cmd := exec.CommandContext(ctx, w.o.sbxrun+"-env", "inside", "conda-install")
		cmd.Stdin = bytes.NewReader(q)
		start := time.Now()
		if out, err := cmd.Output(); err != nil {
			return 0, fmt.Errorf("install: %w: %s", err, out)
		}
		times = append(times, sample{wallUS: float64(time.Since(start).Microseconds()), ok: true})
	}
	s, _ := summarise(times)
	return s.MedianUS / 1000, nil
}

// borrowed calls what is made for tests and gives their failure or skip.
func borrowed(f func(t testing.TB)) (err error) {
	b := &borrower{}
	defer func() {
		if r := recover(); r != nil {
			if r != any(b) {
				panic(r)
			}
			err = errors.New(b.why)
		}
	}()
	f(b)
	return nil
}

// borrower is as much of a test as test/condachannel and test/need ask for.
type borrower struct {
	testing.TB
	why string
}

func (b *borrower) Helper()                        {}
func (b *borrower) Fatal(a ...any)                 { b.why = fmt.Sprint(a...); panic(b) }
func (b *borrower) Fatalf(format string, a ...any) { b.why = fmt.Sprintf(format, a...); panic(b) }
func (b *borrower) Skip(a ...any)                  { b.why = fmt.Sprint(a...); panic(b) }
func (b *borrower) Skipf(format string, a ...any)  { b.why = fmt.Sprintf(format, a...); panic(b) }
