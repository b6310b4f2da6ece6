package rootfs

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A layer is layers/<hex digest>/ with its manifest and either the tree, root/,
// or an EROFS image of it. Its lock is that directory itself: it needs no file,
// so that it can be taken on a read-only store, and none is left when it goes.
const (
	treeName  = "root"
	imageName = "image.erofs"
)

// Layer gives a layer's path (see LayerPath) and manifest.
func (s *Store) Layer(digest string) (path string, m *Manifest, err error) {
	path, err = s.LayerPath(digest)
	if err != nil {
		return "", nil, err
	}
	id, _ := hexOf(digest) // LayerPath looked at it
	b, err := os.ReadFile(s.Path("layers", id, "manifest"))
	if err != nil {
		return path, nil, fmt.Errorf("open layer: %w", err)
	}
	m, err = DecodeManifest(b)
	return path, m, err
}

// LayerPath gives a layer's directory, or the EROFS image where it is packed,
// after a look whether it is there: [Assembly].Lowers takes both.
func (s *Store) LayerPath(digest string) (string, error) {
	id, err := hexOf(digest)
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	p := s.Path("layers", id, treeName)
	if err = unix.Stat(p, &st); err == nil {
		return p, nil
	}
	if p := s.Path("layers", id, imageName); unix.Stat(p, &st) == nil {
		return p, nil
	}
	return "", fmt.Errorf("open layer %q: %w", p, err)
}

// Packed says whether a path that LayerPath gave is an image.
func Packed(path string) bool { return filepath.Base(path) == imageName }

// holdLayer takes the flock of a layer's directory. That the directory is still
// the layer is looked at when the lock is had: a layer that is gone is an error.
func (s *Store) holdLayer(ctx context.Context, id string, exclusive bool) (release func(), err error) {
	p := s.Path("layers", id)
	fd, err := unix.Open(p, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open layer %q: %w", p, err)
	}
	var mine, there unix.Stat_t
	if err = flock(ctx, fd, exclusive); err == nil {
		err = unix.Fstat(fd, &mine)
	}
	if err == nil {
		err = unix.Stat(p, &there)
	}
	if err == nil && (mine.Dev != there.Dev || mine.Ino != there.Ino) {
		err = unix.ENOENT // removed, and made anew: not the one that was asked for
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("hold layer %q: %w", p, err)
	}
	return func() { unix.Close(fd) }, nil
}

// Publish publishes a layer and calls record, which must write what names it:
// no prune comes between the two. Bakes of several layers nest it or take
// [Store.Publishing] around all.
func (s *Store) Publish(ctx context.Context, m *Manifest, record func(path string) error) error {
	release, err := s.Publishing(ctx)
	if err != nil {
		return err
	}
	defer release()
	path, err := s.PublishLayer(ctx, m)
	if err != nil {
		return err
	}
	return record(path)
}

// Publishing keeps [Store.RemoveLayers] away until release is called: take it
// before a layer that may be there already is looked for, and release it when
// the record that names it is written. Nothing long may happen meanwhile.
func (s *Store) Publishing(ctx context.Context) (release func(), err error) {
	return s.Lock(ctx, "publish", false)
}

// Removing is the other side of [Store.Publishing]: while it is held no record is
// between its layer and itself. It must not be held when a lock is waited for.
func (s *Store) Removing(ctx context.Context) (release func(), err error) {
	return s.Lock(ctx, "publish", true)
}

// removedPrefix begins the names below tmp/ of what is being removed.
const removedPrefix = "removed-"

// RemoveLayer removes a layer that no live sandbox uses, else ErrBusy. One that
// is not there is no error. It works on a full disk.
func (s *Store) RemoveLayer(digest string) error {
	finish, err := s.RemoveLayers([]string{digest}, nil)
	if err != nil {
		return err
	}
	return finish()
}

// RemoveLayers takes layers out of the store, all or, if a live sandbox uses one
// of them (ErrBusy), none. forget, which may be nil, is called when nothing can
// use them any more and before they go: it removes what names them. finish
// removes their files, which takes long and needs no lock.
func (s *Store) RemoveLayers(digests []string, forget func() error) (finish func() error, err error) {
	var paths, gone []string
	for _, d := range digests {
		id, err := hexOf(d)
		if err != nil {
			return nil, err
		}
		release, err := s.holdLayer(expired(), id, true)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if errors.Is(err, context.Canceled) {
			err = ErrBusy
		}
		if err != nil {
			return nil, fmt.Errorf("remove layer %q: %w", d, err)
		}
		defer release()
		paths = append(paths, s.Path("layers", id))
	}
	if forget != nil {
		if err := forget(); err != nil {
			return nil, err
		}
	}
	for _, p := range paths {
		to, err := s.takeOut(p)
		if err != nil {
			return nil, err
		}
		gone = append(gone, to)
	}
	return func() error {
		var errs []error
		for _, p := range gone {
			errs = append(errs, removeTree(p))
		}
		return errors.Join(errs...)
	}, nil
}

// takeOut takes a path out of the store in one step. What is left to be removed
// lies below tmp/ then, where GC finds it after a crash.
func (s *Store) takeOut(path string) (to string, err error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	to = s.Path("tmp", removedPrefix+hex.EncodeToString(b[:]))
	if err := os.Rename(path, to); err != nil {
		return "", s.Explain(fmt.Errorf("remove %q: %w", path, err))
	}
	return to, nil
}

// expired is a context for what must not wait.
func expired() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}
