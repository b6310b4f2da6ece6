package envs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/envs/pep440"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Files of Python projects: locks of their tools are converted inside a
// sandbox (package envs/recipes), a pyproject.toml is resolved like a
// requirements file.

// projectLocks are looked for beside a pyproject.toml that is given.
var projectLocks = []string{"pylock.toml", "uv.lock", "poetry.lock", "pdm.lock"}

// read reads the recipe's file and sets what the file itself says of the
// recipe and nobody else has.
func (m *Manager) read(r *Recipe) (*input, error) {
	in, err := readInput(r.File)
	if err != nil {
		return nil, err
	}
	if in.kind == KindPyproject {
		if err := r.fromPyproject(in.files[0].data); err != nil {
			return nil, fmt.Errorf("read %q: %w", r.File, err)
		}
		if r.AllowBuild && needsFolder(in.files[0].data) {
			in.sources = []Source{{Path: "."}}
		}
		dir := filepath.Dir(in.path)
		for _, name := range projectLocks {
			p := filepath.Join(dir, name)
			if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() {
				continue
			}
			beside, err := readInput(p)
			if err != nil {
				return nil, err
			}
			beside.project, in = in, beside
			break
		}
	}
	if in.building != nil && !r.AllowBuild {
		return nil, in.building
	}
	if !r.selects() {
		return in, nil
	}
	switch in.kind {
	case KindRequirements:
		return nil, fail("write them as NAME[EXTRA] in the file, or give the project's pyproject.toml or lock", "read %q: a requirements.txt has no extras and groups to choose from", r.File)
	case KindPylock:
		in.convert = true
	default:
	}
	return in, nil
}

// needsFolder says whether resolving a pyproject.toml takes more than that file:
// dynamic dependencies, which its build says, and sources in folders. It may say
// so too often: then any change in the folder is resolved anew.
func needsFolder(b []byte) bool {
	table := ""
	for line := range bytes.Lines(b) {
		s := strings.TrimSpace(string(line))
		if name, ok := header(s); ok {
			table = name
		}
		key, _, _ := strings.Cut(s, "=")
		if strings.HasPrefix(table, "tool.uv.sources") || table == "tool.uv.workspace" || table == "project" && strings.Trim(strings.TrimSpace(key), `"'`) == "dynamic" {
			return true
		}
	}
	return false
}

// selects says whether parts of a project are asked for.
func (r *Recipe) selects() bool {
	return len(r.Extras)+len(r.Groups)+len(r.OnlyGroups) > 0 || r.AllExtras
}

// selection is all that decides what of a project is taken, for keys.
func (r *Recipe) selection() string {
	return fmt.Sprintf("%q %q %q %v", r.Extras, r.Groups, r.OnlyGroups, r.AllExtras)
}

// fromPyproject takes extra, group, all-extras and python of [tool.sbxrun],
// which have their flags' names. Only that table is parsed: the rest is for
// those who resolve, in a sandbox.
func (r *Recipe) fromPyproject(b []byte) error {
	var table []byte
	in := false
	for line := range bytes.Lines(b) {
		if name, ok := header(strings.TrimSpace(string(line))); ok {
			in = name == "tool.sbxrun"
			continue
		}
		if in {
			table = append(table, line...)
		}
	}
	if len(table) > 64<<10 {
		return fail("", "[tool.sbxrun]: more than 64 KiB")
	}
	var t struct {
		Extra, Group   any
		Extras, Groups any  // as in a recipe
		AllExtras      bool `toml:"all-extras"`
		AllExtras2     bool `toml:"all_extras"`
		Python         string
	}
	if err := toml.Unmarshal(table, &t); err != nil {
		return fail("", "[tool.sbxrun]: %v", err)
	}
	if r.Python == "" {
		r.Python = t.Python
	}
	if r.selects() {
		return nil
	}
	for _, one := range []struct {
		from any
		to   *[]string
	}{{t.Extra, &r.Extras}, {t.Extras, &r.Extras}, {t.Group, &r.Groups}, {t.Groups, &r.Groups}} {
		switch v := one.from.(type) {
		case nil:
		case string:
			*one.to = []string{v}
		case []any:
			for _, e := range v {
				s, ok := e.(string)
				if !ok {
					return fail("", "[tool.sbxrun]: extra and group are names")
				}
				*one.to = append(*one.to, s)
			}
		default:
			return fail("", "[tool.sbxrun]: extra and group are names")
		}
	}
	r.AllExtras = t.AllExtras || t.AllExtras2
	return nil
}

// ---- the target ------------------------------------------------------------

// describe is what the interpreter says of itself, as wheels and markers name it.
const describe = `
import json, os, platform, sys, sysconfig
def full(v):
    return "%d.%d.%d" % v[:3] + ("" if v.releaselevel == "final" else v.releaselevel[0] + str(v.serial))
libc = ""
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
except (AttributeError, ValueError, OSError):
    pass
print(json.dumps({"soabi": sysconfig.get_config_var("SOABI") or "",
  "glibc": libc.split()[-1] if libc.startswith("glibc") else "", "musl": "" if libc.startswith("glibc") else "1.2",
  "vars": {"implementation_name": sys.implementation.name, "implementation_version": full(sys.implementation.version),
    "os_name": os.name, "platform_machine": platform.machine(), "platform_release": platform.release(), "platform_system": platform.system(),
    "platform_version": platform.version(), "python_full_version": platform.python_version(),
    "platform_python_implementation": platform.python_implementation(),
    "python_version": ".".join(platform.python_version_tuple()[:2]), "sys_platform": sys.platform}}))
`

// targetPath is where the description of an interpreter is kept. It names the
// kernel too, which markers may.
func (m *Manager) targetPath(base rootfs.Base, py python) string {
	var u unix.Utsname
	_ = unix.Uname(&u)
	return m.store.Path("envs", "targets", digestOf(schema, describe, py.key(base), string(u.Release[:]), string(u.Version[:]), string(u.Machine[:]))+".json")
}

func (m *Manager) keptTarget(base rootfs.Base, py python) *Target {
	p := m.targetPath(base, py)
	b, err := os.ReadFile(p)
	if err != nil {
		return nil
	}
	touch(p)
	var t Target
	if json.Unmarshal(b, &t) != nil || len(t.Vars) == 0 {
		return nil
	}
	return &t
}

// target asks the base's interpreter, once, in a sandbox.
func (m *Manager) target(ctx context.Context, base rootfs.Base, py python) (_ *Target, err error) {
	if t := m.keptTarget(base, py); t != nil {
		return t, nil
	}
	dir, done, err := m.workDir("target")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	j := m.job(&tool{}, base, "interpreter", dir, nil)
	j.Argv = []string{py.path, "-I", "-S", "-c", describe}
	var out tail
	j.Stdout, j.Stderr = &out, &out
	res, err := m.runner.Run(ctx, j)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if err != nil {
		return nil, fmt.Errorf("ask interpreter %q: %w", py.path, err)
	}
	var t Target
	if err := json.Unmarshal(out.b, &t); err != nil || res.ExitCode != 0 || len(t.Vars) == 0 {
		return nil, fail("does it run? sbxrun run -- "+py.path+" -V", "ask interpreter %q: %s", py.path, lastLine(string(out.b)+res.Message))
	}
	b, err := json.Marshal(&t)
	if err != nil {
		return nil, err
	}
	return &t, m.store.WriteFile(m.targetPath(base, py), b)
}

// ---- conversion ------------------------------------------------------------

// staleMark begins a kept conversion of a lock that is older than its project.
const staleMark = "#: stale "

// convert has the lock converted in a sandbox without network.
func (m *Manager) convert(ctx context.Context, r Recipe, in *input) (text []byte, err error) {
	if len(r.Upgrade) > 0 {
		return nil, fail("uv lock --upgrade-package, poetry update, pdm update, pipenv upgrade", "lock %q: the pins of a %s are its own tool's to move", r.File, in.kind)
	}
	t, err := m.tool(ctx)
	if err != nil {
		return nil, err
	}
	m.progress.Phase("convert", string(in.kind))
	dir, done, err := m.workDir("convert")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := writeFiles(dir, in.files); err != nil {
		return nil, err
	}
	q := Conversion{
		Kind: in.kind, Dir: "/opt/in", Output: "/opt/lock.txt", Extras: r.Extras, Groups: r.Groups, OnlyGroups: r.OnlyGroups, AllExtras: r.AllExtras,
		AllowBuild: r.AllowBuild, Target: *in.target, PublicIndex: t.IndexURL,
	}
	for _, f := range in.files {
		q.Files = append(q.Files, f.name)
	}
	var out Converted
	j := m.job(&tool{}, r.Base, fmt.Sprintf("convert %q as %s", r.File, in.kind), dir, nil)
	if err := m.inside(ctx, j, dir, ConvertVerb, &q, &out); err != nil {
		return nil, err
	}
	if out.Stale != "" {
		return []byte(staleMark + out.Stale + "\n" + out.StaleHint + "\n"), nil
	}
	if text, err = readOutput(filepath.Join(dir, "lock.txt")); err != nil {
		return nil, fmt.Errorf("convert %q: %w", r.File, err)
	}
	var head bytes.Buffer
	for _, s := range out.Sources {
		b, err := json.Marshal(s)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(&head, "%s%s\n", sourceMark, b)
	}
	for _, h := range out.Hosts {
		fmt.Fprintf(&head, "%s%s\n", filesMark, h)
	}
	return append(head.Bytes(), text...), nil
}

// ofProject goes on with the project itself where the lock beside it is stale.
// Where the lock was given, that is an error.
func (in *input) ofProject(file string, l *lock) (*input, error) {
	if in.project == nil {
		needs, hint, _ := strings.Cut(l.stale, "\n")
		return nil, fail(hint, "convert %q: the lock is older than its pyproject.toml, which needs %s", file, needs)
	}
	return in.project, nil
}

// needsTarget says whether what becomes of an input depends on the interpreter's
// own description.
func (in *input) needsTarget() bool { return in.convert || in.kind == KindPyproject }

func (in *input) setTarget(file string, t *Target) error {
	if in.convert {
		in.target = t
		return nil
	}
	return in.fitsPython(file, t)
}

// fitsPython compares a pyproject.toml's requires-python with the interpreter:
// the resolver takes the interpreter as it is.
func (in *input) fitsPython(file string, t *Target) error {
	table := ""
	for line := range bytes.Lines(in.files[0].data) {
		s := strings.TrimSpace(string(line))
		if name, ok := header(s); ok {
			table = name
			continue
		}
		key, value, ok := strings.Cut(s, "=")
		if !ok || table != "project" || strings.Trim(strings.TrimSpace(key), `"'`) != "requires-python" {
			continue
		}
		value, _, _ = strings.Cut(value, " #")
		wants := strings.Trim(strings.TrimSpace(value), `"'`)
		s2, err := pep440.ParseSpecifiers(wants)
		if err != nil {
			return fail("", "read %q: requires-python: %v", file, err)
		}
		has := t.Vars["python_full_version"]
		if v, err := pep440.Parse(has); err == nil && !s2.Contains(v) {
			return fail("choose another with --python, or a --base that has it", "resolve %q: the project needs Python %s, and the interpreter is %s", file, wants, has)
		}
	}
	return nil
}

// projectInput is the input of a pyproject.toml, or of a lock with the
// pyproject.toml beside it.
func projectInput(kind Kind, path string, b []byte) (*input, error) {
	in := &input{kind: kind, path: path, files: []inputFile{{string(kind), b}}}
	switch kind {
	case KindUV, KindPoetry, KindPDM:
		in.convert = true
		p, err := readBelow(filepath.Dir(path), filepath.Join(filepath.Dir(path), "pyproject.toml"))
		if err == nil {
			in.files = append(in.files, inputFile{"pyproject.toml", p})
		} else if !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	case KindPipfile:
		in.convert = true
	default:
	}
	return in, nil
}

// compileArgs are what the resolver is told of a pyproject.toml's parts.
func (r *Recipe) compileArgs(first string) (args []string) {
	for _, e := range r.Extras {
		args = append(args, "--extra", e)
	}
	if r.AllExtras {
		args = append(args, "--all-extras")
	}
	for _, g := range slices.Concat(r.Groups, r.OnlyGroups) {
		args = append(args, "--group", first+":"+g)
	}
	if len(r.OnlyGroups) > 0 {
		return args
	}
	return append(args, first)
}
