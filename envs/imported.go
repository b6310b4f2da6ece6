package envs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/sbxrun/sbxrun/internal/bounded"
	"github.com/sbxrun/sbxrun/rootfs"
)

// Portable gives an environment as others may have it: without what is this
// machine's (key, names, times, where it came from) and without credentials, so
// that the same environment is the same everywhere.
func (e *Env) Portable() Env {
	p := *e
	p.Key, p.Names, p.Origin, p.CreatedAt, p.Path, p.Lowers = "", nil, nil, time.Time{}, "", nil
	p.Recipe.IndexURL = withoutUser(p.Recipe.IndexURL)
	if p.Kind == "" {
		p.Kind = "venv"
	}
	return p
}

// PortableLock gives an environment's lock for others. One that has credentials
// in it stays here (nil), as does that of older versions, which was not kept: a
// lock is identified by its text.
func (m *Manager) PortableLock(e *Env) (kind string, text []byte) {
	kind, text, err := m.LockText(e)
	if err != nil || hasUserinfo(string(text)) {
		return "", nil
	}
	return kind, text
}

// hasUserinfo says whether any URL in a text has a user, a password or a token.
func hasUserinfo(text string) bool {
	for {
		_, rest, ok := strings.Cut(text, "://")
		if !ok {
			return false
		}
		host := rest[:run(rest, func(c byte) bool { return !isWhite(c) && !strings.ContainsRune("/\"'#?<>", rune(c)) })]
		if strings.Contains(host, "@") || strings.HasPrefix(rest[len(host):], "/t/") { // conda's tokens
			return true
		}
		text = rest
	}
}

// Imported is an environment from elsewhere whose content was collected and
// compared with its digests.
type Imported struct {
	Env      Env // as [Env.Portable] gives it
	LockKind string
	Lock     []byte // nil is none
	From     string // see [Origin]
	Name     string // "" is none
	// Offered are names it had where it comes from: they are taken where nothing
	// has them here.
	Offered []string
	Layers  []*rootfs.Manifest // its own and those of Below, in any order; what is in the store may be left out
}

// Check refuses a record that is none: it is not trusted.
func (i *Imported) Check() error {
	e := &i.Env
	if e.Kind != "venv" && e.Kind != "conda" && e.Kind != KindFiles {
		return fmt.Errorf("kind %q is not known", bounded.Text(e.Kind))
	}
	words := []string{e.Kind, e.Base, e.BaseDigest, e.Python, e.Tool, e.Lock, i.LockKind, e.Recipe.Python, e.Recipe.IndexURL, e.Recipe.ExcludeNewer}
	words = slices.Concat(words, e.Notes, e.Paths, e.Recipe.Hooks)
	for _, p := range e.Packages {
		words = append(words, p.Name, p.Version)
	}
	for _, p := range e.System {
		words = append(words, p.Name, p.Version, p.Architecture, p.SHA256)
	}
	for _, w := range words {
		if strings.ContainsFunc(w, func(r rune) bool { return r < 0x20 && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 }) {
			return fmt.Errorf("control characters in %q", bounded.Text(w))
		}
	}
	for _, v := range slices.Concat(e.Vars, e.Recipe.Env) {
		if k, _, ok := strings.Cut(v, "="); !ok || k == "" || strings.IndexByte(v, 0) >= 0 {
			return fmt.Errorf("variable %q is not KEY=VALUE", bounded.Text(v))
		}
	}
	for _, p := range e.Paths {
		if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsAny(p, ":\x00") {
			return fmt.Errorf("path %q for programs is none", bounded.Text(p))
		}
	}
	if e.Python != "" && (!path.IsAbs(e.Python) || path.Clean(e.Python) != e.Python) {
		return fmt.Errorf("interpreter %q is not a path", bounded.Text(e.Python))
	}
	if e.Files < 0 || e.SizeBytes < 0 {
		return fmt.Errorf("%d files, %d bytes: out of range", e.Files, e.SizeBytes)
	}
	if checkName(e.Base) != nil {
		return fmt.Errorf("base %q is not a name", bounded.Text(e.Base))
	}
	if i.Lock != nil && LockDigest(i.LockKind, i.Lock) != e.Lock {
		return errors.New("the lock is not the one of the record")
	}
	return nil
}

// Import publishes an environment. Its key is of its record and never that of a
// recipe: what was imported is found by name or digest and in place of no bake.
// notes say what was not done.
func (m *Manager) Import(ctx context.Context, g *rootfs.Staging, i Imported) (_ *Env, notes []string, err error) {
	if i.Name != "" {
		if err := checkName(i.Name); err != nil {
			return nil, nil, err
		}
	}
	e := i.Env.Portable()
	record, err := json.Marshal(e)
	if err != nil {
		return nil, nil, fmt.Errorf("import: %w", err)
	}
	e.Key = digestOf(schema, "imported", string(record))
	e.Origin = &Origin{From: i.From, At: time.Now().UTC()}
	e.CreatedAt = e.Origin.At
	release, err := m.store.Publishing(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if release != nil {
			release()
		}
	}()
	for _, man := range i.Layers {
		if _, err := g.Publish(ctx, man); err != nil {
			return nil, nil, err
		}
	}
	if i.Lock != nil {
		if err := m.keepLock(&lock{kind: i.LockKind, text: i.Lock}); err != nil {
			return nil, nil, err
		}
	}
	if err := m.save(&e); err != nil {
		return nil, nil, err
	}
	release()
	release = nil
	if err := m.addName(i.Name, &e); err != nil {
		return nil, nil, err
	}
	var names []string
	if i.Name != "" {
		names, i.Offered = []string{i.Name}, nil
	}
	for _, n := range i.Offered {
		if checkName(n) != nil { // before it becomes a path
			continue
		}
		b, err := rootfs.ReadSmall(m.store.Path("envs", "names", n))
		if err == nil && strings.TrimSpace(string(b)) != e.Key {
			notes = append(notes, fmt.Sprintf("the name %s is another environment's here: --name gives it one", n))
			continue
		}
		if err := m.addName(n, &e); err != nil {
			return nil, nil, err
		}
		names = append(names, n)
	}
	out, err := m.load(e.Key)
	if err == nil {
		out.Names = names
	}
	return out, notes, err
}

// Fits says in one line how an environment and this machine's bases go together,
// "" where it is the base it was baked on.
func (m *Manager) Fits(e *Env) string {
	b, err := m.store.Base(e.Base)
	switch {
	case err != nil:
		return fmt.Sprintf("baked on base %q (%s), which is not here: add it with base add, or choose one that has %s with run --base", e.Base, Short(e.BaseDigest), e.Python)
	case CheckPython(e, b) != nil:
		return fmt.Sprintf("baked on base %q (%s); the one here (%s) has no %s: choose one that has it with run --base", e.Base, Short(e.BaseDigest), Short(b.Digest), e.Python)
	case b.Digest != e.BaseDigest:
		return fmt.Sprintf("baked on base %q (%s); the one here (%s) is another, and has %s", e.Base, Short(e.BaseDigest), Short(b.Digest), e.Python)
	}
	return ""
}

// LockDigest identifies a lock of a kind, as [Env].Lock does.
func LockDigest(kind string, text []byte) string {
	return "sha256:" + (&lock{kind: kind, text: text}).digest()
}
