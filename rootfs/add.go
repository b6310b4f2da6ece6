package rootfs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// AddBase adds a base from the tree that unpack gives: the source itself, or
// what it was unpacked to below tmp. It must not change while it is read.
func (s *Store) AddBase(ctx context.Context, name, source string, progress func(string), unpack func(tmp string) (root string, env []string, err error)) (_ Base, err error) {
	if err := checkBaseName(name); err != nil {
		return Base{}, err
	}
	free, err := s.Lock(ctx, "base-"+name, true)
	if err != nil {
		return Base{}, err
	}
	defer free()
	adding, err := s.Lock(ctx, "bases", false) // against RemoveBase
	if err != nil {
		return Base{}, err
	}
	defer adding()
	record := s.Path("bases", name+".json")
	if _, serr := os.Stat(record); serr == nil || name == "host" {
		return Base{}, hinted.New(fmt.Errorf("add base %q: %w", name, os.ErrExist), "sbxrun base rm "+name+", or choose another name")
	}
	if _, err := os.Stat(source); err != nil {
		return Base{}, hinted.New(fmt.Errorf("add base from %q: %w", source, errors.Unwrap(err)), "a directory, a tarball, a docker save archive or an OCI layout")
	}
	if _, err := s.GC(ctx); err != nil {
		return Base{}, err
	}
	release, err := s.Lock(ctx, "objects", false)
	if err != nil {
		return Base{}, err
	}
	defer release()
	tmp, done, err := s.TempDir("base")
	if err != nil {
		return Base{}, err
	}
	defer func() { err = errors.Join(err, done()) }()
	root, env, err := unpack(tmp)
	if err != nil {
		return Base{}, fmt.Errorf("add base from %q: %w", source, err)
	}
	progress("store")
	d, err := os.Open(root)
	if err != nil {
		return Base{}, err
	}
	defer d.Close()
	m := &Manifest{}
	err = s.addDir(ctx, d, "", addOptions{lenient: true, adopt: s.isStaged(d)}, m)
	if err != nil {
		return Base{}, s.Explain(fmt.Errorf("add base from %q: %w", source, err))
	}
	if len(m.Entries) == 0 {
		return Base{}, fmt.Errorf("add base from %q: it is empty", source)
	}
	addMountpoints(m)
	var b Base
	err = s.Publish(ctx, m, func(string) error {
		b, err = s.recordBase(name, source, env, m)
		return err
	})
	return b, err
}

// recordBase names a layer that was just published, see [Store.Publish].
func (s *Store) recordBase(name, source string, env []string, m *Manifest) (Base, error) {
	r := baseRecord{Base: Base{Name: name, Digest: m.Digest(), Env: env}, Layers: []string{m.Digest()}}
	r.Info = BaseInfo{Name: name, Digest: m.Digest(), Source: source}
	for _, e := range m.Entries {
		r.Info.SizeBytes += e.Size
	}
	b, err := json.Marshal(r)
	if err != nil {
		return Base{}, err
	}
	if err := s.WriteFile(s.Path("bases", name+".json"), b); err != nil {
		return Base{}, err
	}
	return s.Base(name)
}

// addMountpoints adds the directories that every sandbox mounts on: a bind
// cannot make them in a read-only layer. It works on the list, for a tree that
// an image made may have links where directories are expected.
func addMountpoints(m *Manifest) {
	have := map[string]byte{"": 'd'}
	for _, e := range m.Entries {
		have[e.Path] = e.Type
	}
	for _, d := range skeletonDirs { // parents come first
		up := filepath.Dir(d)
		if up == "." {
			up = ""
		}
		if have[d] == 0 && have[up] == 'd' {
			have[d] = 'd'
			m.Entries = append(m.Entries, Entry{Path: d, Type: 'd', Mode: 0o755})
		}
	}
}
