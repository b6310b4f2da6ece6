package rootfs

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Staging collects content that is not trusted yet, by digest and below tmp/:
// nothing of it is in the store before [Staging.Publish], and nothing stays
// after Close or a crash.
type Staging struct {
	store   *Store
	dir     string
	done    func() error
	release func()
}

// Stage begins to collect. No prune removes content until Close.
func (s *Store) Stage(ctx context.Context) (*Staging, error) {
	if err := s.Writable(); err != nil {
		return nil, err
	}
	if _, err := s.GC(ctx); err != nil { // what a killed one left
		return nil, err
	}
	release, err := s.Lock(ctx, "objects", false)
	if err != nil {
		return nil, err
	}
	dir, done, err := s.TempDir("staging")
	if err != nil {
		release()
		return nil, err
	}
	return &Staging{s, dir, done, release}, nil
}

// Dir is a directory for other files, which go with Close.
func (g *Staging) Dir() string { return g.dir }

// Close forgets what was not published.
func (g *Staging) Close() error {
	defer g.release()
	return g.done()
}

func stagedName(digest string, exec bool) string {
	if exec {
		return "o-" + digest + "x"
	}
	return "o-" + digest
}

// Put collects content and gives its digest and size.
func (g *Staging) Put(r io.Reader, exec bool) (digest string, size int64, err error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	tmp := filepath.Join(g.dir, "t-"+hex.EncodeToString(b[:]))
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", 0, g.store.Explain(fmt.Errorf("store object: %w", err))
	}
	h := sha256.New()
	size, err = io.Copy(io.MultiWriter(f, h), r)
	digest = hex.EncodeToString(h.Sum(nil))
	err = errors.Join(err, f.Close())
	switch {
	case err != nil:
		return "", 0, errors.Join(g.store.Explain(err), os.Remove(tmp))
	case g.store.HasObject(digest, size, exec):
		return digest, size, os.Remove(tmp)
	}
	return digest, size, os.Rename(tmp, filepath.Join(g.dir, stagedName(digest, exec)))
}

// Publish makes what was collected and the manifest needs content of the store,
// and publishes the layer. Publishing must be held.
func (g *Staging) Publish(ctx context.Context, m *Manifest) (path string, err error) {
	for _, e := range m.Entries {
		exec := e.Mode&0o111 != 0
		if e.Type != 'f' || g.store.HasObject(e.Digest, e.Size, exec) {
			continue
		}
		from, to := filepath.Join(g.dir, stagedName(e.Digest, exec)), g.store.objectPath(e.Digest, exec)
		mode := os.FileMode(0o444)
		if exec {
			mode = 0o555
		}
		err := errors.Join(os.Chmod(from, mode), os.Chtimes(from, layerTime, layerTime), os.MkdirAll(filepath.Dir(to), 0o700))
		if err == nil {
			// Link, as in PutObject: an inode that layers link to is not replaced,
			// unless it is what a power cut left.
			if err = os.Link(from, to); errors.Is(err, os.ErrExist) && !g.store.HasObject(e.Digest, e.Size, exec) {
				err = os.Rename(from, to)
			} else if errors.Is(err, os.ErrExist) {
				err = nil
			}
		}
		if err != nil {
			return "", g.store.Explain(fmt.Errorf("store %q: %w", e.Path, err))
		}
	}
	return g.store.PublishLayer(ctx, m)
}

// AddBaseLayer adds a base of one layer that was collected, under the name or,
// where that is another base's already, one made of it and the digest. A base of
// the same content, whatever its name, is taken as it is.
func (g *Staging) AddBaseLayer(ctx context.Context, name, source string, env []string, m *Manifest) (_ Base, err error) {
	s := g.store
	if b, ok := s.BaseOf(m.Digest()); ok {
		return b, nil
	}
	for {
		if err := checkBaseName(name); err != nil {
			return Base{}, err
		}
		b, err := g.addBaseLayer(ctx, name, source, env, m)
		if !errors.Is(err, os.ErrExist) || len(name) > 64-13 {
			return b, err
		}
		name += "-" + m.Digest()[len("sha256:"):][:12]
	}
}

func (g *Staging) addBaseLayer(ctx context.Context, name, source string, env []string, m *Manifest) (Base, error) {
	s := g.store
	free, err := s.Lock(ctx, "base-"+name, true)
	if err != nil {
		return Base{}, err
	}
	defer free()
	adding, err := s.Lock(ctx, "bases", false)
	if err != nil {
		return Base{}, err
	}
	defer adding()
	publishing, err := s.Publishing(ctx)
	if err != nil {
		return Base{}, err
	}
	defer publishing()
	if b, ok := s.BaseOf(m.Digest()); ok { // another was first
		return b, nil
	}
	if _, err := os.Stat(s.Path("bases", name+".json")); err == nil || name == "host" {
		return Base{}, hinted.New(fmt.Errorf("add base %q: %w", name, os.ErrExist), "sbxrun base rm "+name)
	}
	if _, err := g.Publish(ctx, m); err != nil {
		return Base{}, err
	}
	return s.recordBase(name, source, env, m)
}

// BaseOf gives the base that was added with this content.
func (s *Store) BaseOf(digest string) (Base, bool) {
	all, err := s.Bases()
	if err != nil {
		return Base{}, false
	}
	for _, i := range all {
		if i.Digest == digest {
			b, err := s.Base(i.Name)
			return b, err == nil
		}
	}
	return Base{}, false
}

// Check refuses a manifest from outside that is no tree: PublishLayer would.
func (m *Manifest) Check() error {
	m.Encode() // sorts
	return m.checkTree()
}
