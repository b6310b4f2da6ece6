package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// flock takes the lock of an open file and waits for it until ctx ends.
func flock(ctx context.Context, fd int, exclusive bool) error {
	how := unix.LOCK_SH
	if exclusive {
		how = unix.LOCK_EX
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := unix.Flock(fd, how|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
	}
}

// PruneLocks removes lock files that nobody holds and says how many. Who opened
// one just before sees that it is gone and makes it anew.
func (s *Store) PruneLocks() (n int, err error) {
	ents, err := os.ReadDir(s.Path("locks"))
	if err != nil {
		return 0, fmt.Errorf("prune locks: %w", err)
	}
	for _, e := range ents {
		p := filepath.Join(s.Path("locks"), e.Name())
		f, err := os.OpenFile(p, os.O_RDWR, 0)
		if err != nil {
			continue
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			var st unix.Stat_t
			if unix.Fstat(int(f.Fd()), &st) == nil && st.Nlink > 0 && os.Remove(p) == nil {
				n++
			}
		}
		f.Close()
	}
	return n, nil
}

// Explain gives an error of a full or read-only store the hint that helps.
func (s *Store) Explain(err error) error {
	switch {
	case err == nil || hinted.Of(err) != "":
		return err
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return hinted.New(err, "the store "+s.root+" is full: sbxrun env prune frees what nothing uses; --root DIR chooses another")
	case errors.Is(err, unix.EROFS):
		return hinted.New(err, "the store "+s.root+" is read-only: what is in it can be run (--with NAME); to bake or remove, mount it writable or choose another --root DIR")
	}
	return err
}

// Writable says whether the store can be written, else why not, with a hint.
func (s *Store) Writable() error {
	if err := unix.Access(s.Path("tmp"), unix.W_OK); err != nil {
		return s.Explain(fmt.Errorf("write to the store: %w", err))
	}
	return nil
}
