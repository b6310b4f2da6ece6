package rootfs

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// PruneObjects removes content that no layer links to, except where keep (which
// may be nil) wants it. Bakes hold the lock "objects" shared while theirs is not
// yet in a layer: the caller holds it exclusively (see BlockBakes).
func (s *Store) PruneObjects(keep func(digest string, exec bool) bool) (freedBytes int64, n int, err error) {
	err = s.unlinked(func(p string, st *unix.Stat_t, digest string, exec bool) error {
		if keep != nil && keep(digest, exec) {
			return nil
		}
		freedBytes += st.Blocks * 512
		n++
		return os.Remove(p)
	})
	return freedBytes, n, err
}

// BlockBakes waits until no bake is running, and keeps new ones waiting until
// release is called. Where ctx ends first it is ErrBusy. Removing must not be
// held meanwhile.
func (s *Store) BlockBakes(ctx context.Context) (release func(), err error) {
	release, err = s.Lock(ctx, "objects", true)
	if ctx.Err() != nil && err != nil {
		err = fmt.Errorf("a bake is running: %w: %w", ErrBusy, err)
	}
	return release, err
}

// Unlinked gives the bytes of content that no layer links to, but for what keep
// (which may be nil) wants.
func (s *Store) Unlinked(keep func(digest string, exec bool) bool) (bytes int64, err error) {
	err = s.unlinked(func(_ string, st *unix.Stat_t, digest string, exec bool) error {
		if keep == nil || !keep(digest, exec) {
			bytes += st.Blocks * 512
		}
		return nil
	})
	return bytes, err
}

// Linked says whether a layer links to a file's content.
func (s *Store) Linked(e Entry) bool {
	if e.Size == 0 {
		return true
	}
	var st unix.Stat_t
	return unix.Lstat(s.objectPath(e.Digest, e.Mode&0o111 != 0), &st) == nil && st.Nlink > 1 && st.Size == e.Size
}

// Orphans gives the layers that neither a base nor used has. Removing must be
// held.
func (s *Store) Orphans(used func(digest string) bool) ([]string, error) {
	bases, err := s.baseLayers("")
	if err != nil {
		return nil, err
	}
	all, err := s.Layers()
	if err != nil {
		return nil, err
	}
	var out []string
	for _, l := range all {
		if bases[l] == "" && !used(l) {
			out = append(out, l)
		}
	}
	return out, nil
}

// unlinked visits the objects that no layer has.
func (s *Store) unlinked(visit func(path string, st *unix.Stat_t, digest string, exec bool) error) error {
	return s.objects(func(p string, st *unix.Stat_t, digest string, exec bool) error {
		if st.Nlink > 1 {
			return nil
		}
		return visit(p, st, digest, exec)
	})
}

// objects visits all objects.
func (s *Store) objects(visit func(path string, st *unix.Stat_t, digest string, exec bool) error) error {
	dirs, err := os.ReadDir(s.Path("objects"))
	if err != nil {
		return fmt.Errorf("read objects: %w", err)
	}
	for _, d := range dirs {
		dir := s.Path("objects", d.Name())
		f, err := os.Open(dir)
		if err != nil {
			return fmt.Errorf("read objects: %w", err)
		}
		names, err := f.Readdirnames(-1)
		for _, name := range names {
			var st unix.Stat_t
			if serr := unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); serr != nil {
				continue // removed beside us
			}
			digest, exec := d.Name()+name, false
			if name[len(name)-1] == 'x' {
				digest, exec = digest[:len(digest)-1], true
			}
			if err == nil {
				err = visit(filepath.Join(dir, name), &st, digest, exec)
			}
		}
		f.Close()
		if err != nil {
			return fmt.Errorf("read objects: %w", err)
		}
	}
	return nil
}
