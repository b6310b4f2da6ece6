package rootfs

import (
	"context"
	"path/filepath"
)

// Use holds layers, by their directories, while a sandbox runs on them: they
// cannot be removed until release is called or the process dies. Directories
// that are no layers of this store are not held. A layer that is gone already
// is an error.
func (s *Store) Use(ctx context.Context, lowers ...string) (release func(), err error) {
	var held []func()
	release = func() {
		for _, r := range held {
			r()
		}
	}
	for _, l := range lowers {
		rel, err := filepath.Rel(s.Path("layers"), l)
		if err != nil || filepath.Base(rel) != "root" {
			continue
		}
		id := filepath.Dir(rel)
		if _, err := hexOf("sha256:" + id); err != nil {
			continue
		}
		r, err := s.Lock(ctx, "layer-"+id, false)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, r)
		if _, err := s.LayerPath("sha256:" + id); err != nil { // removed before we held it
			release()
			return nil, err
		}
	}
	return release, nil
}
