package envs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/sbxrun/sbxrun/rootfs"
)

// Rebuild bakes an environment again, from the lock and the recipe that were
// stored and from nothing that the first bake left but conda's archives, which
// are named by their digests. It publishes nothing: whoever asks compares.
func (m *Manager) Rebuild(ctx context.Context, e *Env) (_ *rootfs.Manifest, err error) {
	defer m.progress.Done()
	what := "rebuild " + Short(e.Digest)
	steps := fail("bake the recipe again, and compare with sbxrun env diff", "%s: it is of a recipe with steps, whose files are not stored", what)
	if e.Recipe.Staged {
		return nil, steps
	}
	kind, text, err := m.LockText(e)
	if err != nil {
		return nil, err
	}
	r := e.Recipe
	r.File = "lock of " + Short(e.Digest)
	if r.Base, err = m.store.Base(e.Base); err != nil {
		return nil, err
	}
	if e.BaseDigest != "" && e.BaseDigest != r.Base.Digest {
		return nil, fail("it can be rebuilt where that base is", "%s: base %q is %s now, not %s as when it was baked", what, e.Base, Short(r.Base.Digest), Short(e.BaseDigest))
	}
	var py python
	if kind != "conda" {
		if py, err = m.interpreter(&r); err != nil {
			return nil, err
		}
	}
	if !slices.Equal(e.Below, r.Base.Upon) {
		return nil, steps
	}
	release, err := m.store.Lock(ctx, "objects", false) // no pruning of what is compared
	if err != nil {
		return nil, err
	}
	defer release()
	man, err := m.rebuild(ctx, e, r, py, &lock{kind: kind, text: text}, what)
	if err != nil {
		return nil, m.store.Explain(err)
	}
	return man, nil
}

func (m *Manager) rebuild(ctx context.Context, e *Env, r Recipe, py python, l *lock, what string) (*rootfs.Manifest, error) {
	l.in = &input{kind: map[string]Kind{"requirements": KindRequirements, "pylock": KindPylock, "conda": "conda"}[l.kind], files: []inputFile{{l.fileName(), l.text}}}
	if l.kind == "conda" {
		c, err := parseCondaLock(l.text)
		if err != nil {
			return nil, err
		}
		if e.Origin == nil && m.condaKey(r, c) != e.Key {
			return nil, fail("bake it again", "%s: this version of sbxrun bakes it otherwise", what)
		}
		if err := m.fetchConda(ctx, r, l.in, c); err != nil {
			return nil, err
		}
		man, _, err := m.installConda(ctx, r, l.in, c)
		return man, err
	}
	if l.kind == "requirements" {
		parsed, err := m.parseLock(l.text, r.File)
		if err != nil {
			return nil, err
		}
		l = parsed
	}
	if e.Origin == nil && m.key(r, l, py) != e.Key {
		return nil, fail("bake it again", "%s: %s is another build than when it was baked, or this version of sbxrun bakes it otherwise", what, e.Python)
	}
	t, err := m.tool(ctx)
	if err != nil {
		return nil, err
	}
	return m.install(ctx, r, t, l, py, true)
}

// FileDifference is a path that two bakes have differently.
type FileDifference struct {
	Path    string `json:"path"` // inside a sandbox
	Problem string `json:"problem"`
}

// Differences compares a bake with the one that is stored, file by file.
func (m *Manager) Differences(ctx context.Context, e *Env, now *rootfs.Manifest) ([]FileDifference, error) {
	_, was, err := m.store.Layer(e.Digest)
	if err != nil {
		return nil, err
	}
	var out []FileDifference
	add := func(path, format string, a ...any) {
		out = append(out, FileDifference{"/" + path, fmt.Sprintf(format, a...)})
	}
	old := map[string]rootfs.Entry{}
	for _, f := range was.Entries {
		old[f.Path] = f
	}
	for _, b := range now.Entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		a, ok := old[b.Path]
		delete(old, b.Path)
		switch {
		case a == b:
		case !ok:
			add(b.Path, "only in the new bake")
		case a.Type != b.Type:
			add(b.Path, "another kind of file: %c, was %c", b.Type, a.Type)
		case a.Link != b.Link:
			add(b.Path, "links to %q, was %q", b.Link, a.Link)
		case a.Digest != b.Digest:
			at, err := m.firstDifference(e, a, b)
			if err != nil {
				return nil, err
			}
			add(b.Path, "differs from byte %d on (%d bytes, were %d)", at, b.Size, a.Size)
		default:
			add(b.Path, "mode %o, was %o", b.Mode, a.Mode)
		}
	}
	for _, f := range was.Entries { // in their order
		if _, gone := old[f.Path]; gone {
			add(f.Path, "not in the new bake")
		}
	}
	return out, nil
}

// firstDifference finds the first byte, counted from 1, that two contents do
// not have in common.
func (m *Manager) firstDifference(e *Env, a, b rootfs.Entry) (int64, error) {
	fa, err := m.store.OpenFile(a, e.Digest)
	if err != nil {
		return 0, fmt.Errorf("compare: %w", err)
	}
	defer fa.Close()
	fb, err := m.store.OpenObject(b.Digest, b.Mode&0o111 != 0)
	if err != nil {
		return 0, fmt.Errorf("compare: %w", err)
	}
	defer fb.Close()
	ra, rb := bufio.NewReader(fa), bufio.NewReader(fb)
	for n := int64(1); ; n++ {
		x, errA := ra.ReadByte()
		y, errB := rb.ReadByte()
		switch {
		case errA == nil && errB == nil && x == y:
			continue
		case errors.Is(errA, io.EOF) || errors.Is(errB, io.EOF) || errA == nil && errB == nil:
			return n, nil
		}
		return 0, fmt.Errorf("compare: %w", errors.Join(errA, errB))
	}
}
