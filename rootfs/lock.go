package rootfs

import (
	"context"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Use holds layers, by their paths, while a sandbox runs on them: they
// cannot be removed until release is called or the process dies. Paths
// that are no layers of this store are not held. A layer that is gone already
// is an error.
func (s *Store) Use(ctx context.Context, lowers ...string) (release func(), err error) {
	var held []func()
	release = func() {
		for _, r := range held {
			r()
		}
	}
	layers := s.Path("layers")
	for _, l := range lowers {
		rel, err := filepath.Rel(layers, l)
		if base := filepath.Base(rel); err != nil || base != treeName && base != imageName {
			continue
		}
		id := filepath.Dir(rel)
		if _, err := hexOf("sha256:" + id); err != nil {
			continue
		}
		r, err := s.holdLayer(ctx, id, false)
		if err != nil {
			release()
			return nil, err
		}
		held = append(held, r)
		var st unix.Stat_t
		if err := unix.Stat(l, &st); err != nil { // packed or unpacked before we held it
			release()
			return nil, fmt.Errorf("open layer %q: %w", l, err)
		}
	}
	return release, nil
}
