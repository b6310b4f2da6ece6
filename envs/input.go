package envs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/internal/pep503"
)

// input is a recipe's file with all that it includes.
type input struct {
	kind  Kind
	conda Kind   // which one, where kind is "conda"
	path  string // of the first file
	files []inputFile
	reqs  []requirement
	opts  []string // index lines: --index-url X, --extra-index-url X, …
	urls  []string // of requirements that name their file: name @ https://…

	convert bool    // into requirements, in a sandbox, for target
	target  *Target // set before it is converted
	project *input  // the pyproject.toml that was given; this is the lock beside it

	sources  []Source // local ones, of lines
	marked   []Source // of a lock that env lock wrote
	trees    []tree   // of them, set before it is resolved
	building error    // the first line that needs building: refused unless it is allowed
	vcs      bool     // some come from git
}

// inputFile is one file; name is relative to a common directory, so that
// includes keep working where the files are copied.
type inputFile struct {
	name string
	data []byte
}

// requirement is one logical line.
type requirement struct {
	name, version string // version is set for == pins only
	marker        bool
	hashes        []string
	constraint    bool
	file          string
	line          int
}

const maxInputBytes = 64 << 20 // a lock of 10,000 packages with all their wheels has 45 MB

func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a pipe must not keep us
	if err != nil {
		return nil, &Error{Msg: fmt.Sprintf("read %q: %v", path, errors.Unwrap(err)), Err: err, Tip: kindsTaken}
	}
	return readText(f, path)
}

// readBelow reads a file that another file names: as a project's own it lies
// below the first one's folder, and no link leads out of there. Who can write to
// the project would have it read, and parts of it told, with root's rights.
func readBelow(top, path string) ([]byte, error) {
	name, err := filepath.Rel(top, path)
	if err != nil || !filepath.IsLocal(name) {
		return nil, fail("move it beside the first file, or below", "read %q: an included file must not lie above the first one", path)
	}
	dir, err := unix.Open(top, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, name, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS,
	})
	switch {
	case errors.Is(err, unix.EXDEV):
		return nil, fail("move it beside the first file, or below", "read %q: a link leads out of %q", path, top)
	case err != nil:
		return nil, &Error{Msg: fmt.Sprintf("read %q: %v", path, err), Err: err, Tip: kindsTaken}
	}
	return readText(os.NewFile(uintptr(fd), path), path)
}

// readText reads a bounded file and closes it.
func readText(f *os.File, path string) ([]byte, error) {
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return nil, fail(kindsTaken, "read %q: not a regular file", path)
	}
	b, err := bounded.Read(f, maxInputBytes)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return nil, fail("is it a text file?", "read %q: it holds NUL bytes", path)
	}
	return bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")), nil
}

// readInput reads the file and detects its kind by its content.
func readInput(path string) (*input, error) {
	path, err := FindRecipe(path)
	if err != nil {
		return nil, err
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	b, err := readFile(abs)
	if err != nil {
		return nil, err
	}
	kind, err := DetectKind(path, b)
	if err != nil {
		return nil, err
	}
	switch kind {
	case KindEnvironment, KindExplicit, KindCondaLock, KindPixi:
		return condaInput(kind, abs, b)
	case KindRequirements:
	case KindPylock, KindPyproject, KindUV, KindPoetry, KindPDM, KindPipfile:
		return projectInput(kind, abs, b)
	default:
		return nil, fail(kindsTaken, "read %q: it looks like a %s, which this version cannot bake", path, kind)
	}
	in := &input{kind: kind, path: abs}
	if err := in.add(abs, b, filepath.Dir(abs), false, map[string]bool{}, 0); err != nil {
		return nil, err
	}
	if err := in.readMarks(path, b); err != nil {
		return nil, err
	}
	return in, nil
}

// add parses one file. top is the directory that all names are relative to.
func (in *input) add(path string, data []byte, top string, constraint bool, seen map[string]bool, depth int) error {
	if seen[path] {
		return nil
	}
	seen[path] = true
	if depth > 16 || len(seen) > 64 {
		return fail("", "read %q: includes are nested too deeply", path)
	}
	name, err := filepath.Rel(top, path)
	if err != nil || !filepath.IsLocal(name) {
		return fail("move it beside the first file, or below", "read %q: an included file must not lie above the first one", path)
	}
	in.files = append(in.files, inputFile{name, data})

	lines := strings.Split(strings.ReplaceAll(string(data), "\r\n", "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		at := i + 1
		line := lines[i]
		for strings.HasSuffix(line, "\\") && i+1 < len(lines) {
			i++
			line = strings.TrimSuffix(line, "\\") + " " + lines[i]
		}
		if j := strings.Index(" "+line, " #"); j >= 0 {
			line = line[:j]
		}
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		if err := in.line(line, path, top, at, constraint, seen, depth); err != nil {
			return err
		}
	}
	return nil
}

func (in *input) line(line, path, top string, at int, constraint bool, seen map[string]bool, depth int) error {
	where := fmt.Sprintf("%s:%d", path, at)
	option := func(long, short string) (string, bool) {
		for _, p := range []string{long + "=", long + " ", short + " ", short} {
			if v, ok := strings.CutPrefix(line, p); ok && p != "" && v != "" {
				return strings.Trim(strings.TrimSpace(v), `"'`), true
			}
		}
		return "", false
	}
	if ok, err := in.localSource(line, where); ok || err != nil {
		return err
	}
	if strings.HasPrefix(line, "-") {
		if v, ok := option("--requirement", "-r"); ok {
			return in.include(v, where, path, top, constraint, seen, depth)
		}
		if v, ok := option("--constraint", "-c"); ok {
			return in.include(v, where, path, top, true, seen, depth)
		}
		for _, o := range []string{"--index-url", "-i", "--extra-index-url", "--find-links", "-f", "--no-index", "--pre", "--prefer-binary", "--only-binary", "--no-binary", "--require-hashes", "--trusted-host"} {
			if line == o || strings.HasPrefix(line, o+" ") || strings.HasPrefix(line, o+"=") {
				if hasVariable(line) {
					return fail("credentials belong in the environment or a netrc file", "%s: variables in options are not expanded", where)
				}
				in.opts = append(in.opts, line)
				return nil
			}
		}
		return fail("", "%s: unknown option %q", where, firstWord(line))
	}
	spec, hashes := cutHashes(line)
	name, rest, ok := splitRequirement(strings.TrimSpace(spec))
	if !ok {
		return fail("a line is: name==1.2.3", "%s: not a requirement: %q", where, shortWord(line))
	}
	r := requirement{name: pep503.Normalise(name), file: path, line: at, constraint: constraint}
	for _, h := range hashes {
		r.hashes = append(r.hashes, strings.ToLower(h))
	}
	rest = strings.TrimSpace(rest)
	r.marker = strings.Contains(rest, ";")
	r.version = exactPin(rest)
	if rest != "" && !strings.ContainsAny(rest[:1], "=<>!~;@(") {
		return fail("a line is: name==1.2.3", "%s: not a requirement: %q", where, shortWord(line))
	}
	if strings.HasPrefix(rest, "@") {
		in.urls = append(in.urls, urlsIn(rest)...)
	}
	in.reqs = append(in.reqs, r)
	return nil
}

func firstWord(s string) string {
	if f := strings.Fields(s); len(f) > 0 {
		return f[0]
	}
	return s
}

func (in *input) include(v, where, path, top string, constraint bool, seen map[string]bool, depth int) error {
	if strings.Contains(v, "://") {
		return fail("download it and include the file", "%s: %q: only files can be included", where, v)
	}
	p := v
	if !filepath.IsAbs(p) {
		p = filepath.Join(filepath.Dir(path), p)
	}
	b, err := readBelow(top, filepath.Clean(p))
	if err != nil {
		var e *Error
		if errors.As(err, &e) {
			return &Error{Msg: where + ": " + e.Msg, Tip: e.Tip, Err: err}
		}
		return &Error{Msg: where + ": " + err.Error(), Err: err}
	}
	return in.add(p, b, top, constraint, seen, depth+1)
}

// isLock says whether every requirement is pinned and hashed: then it is a
// lock already and nothing is resolved.
func (in *input) isLock() bool {
	if in.kind == KindPylock {
		return !in.convert
	}
	if in.kind != KindRequirements || len(in.files) != 1 || in.hasSources() {
		return false
	}
	for _, r := range in.reqs {
		if r.version == "" || len(r.hashes) == 0 {
			return false
		}
	}
	return true
}

// text is all of the input, for keys.
func (in *input) text() string {
	var b strings.Builder
	b.WriteString(string(in.kind) + "\n")
	for _, f := range in.files {
		fmt.Fprintf(&b, "%q %d\n%s", f.name, len(f.data), f.data)
	}
	return b.String()
}
