package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Disk use is counted in allocated blocks, each inode once, whatever number of
// layers it is linked from.

type inode struct{ dev, ino uint64 }

// walk visits everything below path, itself too, by descriptors. What is not
// there, or goes meanwhile, is nothing.
func walk(path string, visit func(st *unix.Stat_t)) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("measure %q: %w", path, err)
	}
	visit(&st)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("measure %q: %w", path, err)
	}
	return walkDir(os.NewFile(uintptr(fd), path), visit)
}

func walkDir(dir *os.File, visit func(st *unix.Stat_t)) error {
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("measure %q: %w", dir.Name(), err)
	}
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue
		}
		visit(&st)
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("measure %q: %w", filepath.Join(dir.Name(), name), err)
		}
		if err := walkDir(os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name)), visit); err != nil {
			return err
		}
	}
	return nil
}

// Meter adds up what trees take on disk. What several of them share counts for
// the first that is added.
type Meter struct{ seen map[inode]bool }

// Add gives the bytes below paths that were not counted before.
func (m *Meter) Add(paths ...string) (bytes int64, err error) {
	if m.seen == nil {
		m.seen = map[inode]bool{}
	}
	for _, p := range paths {
		if err := walk(p, func(st *unix.Stat_t) {
			if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
				i := inode{st.Dev, st.Ino}
				if m.seen[i] {
					return
				}
				m.seen[i] = true
			}
			bytes += st.Blocks * 512
		}); err != nil {
			return bytes, err
		}
	}
	return bytes, nil
}

// Reclaim says what would be free if layers were removed.
type Reclaim struct {
	store *Store
	links map[inode]uint64 // in the layers that were added
}

// Reclaim begins with no layer.
func (s *Store) Reclaim() *Reclaim { return &Reclaim{s, map[inode]uint64{}} }

// LayerUse is what a layer takes, in allocated bytes.
type LayerUse struct {
	DirectBytes  int64 // its directories, small files of its own, an image: free when the layer goes
	ContentBytes int64 // objects that no other layer has: free when they are pruned then
	SharedBytes  int64 // objects of layers that stay
}

// OwnBytes is what would be free without the layer.
func (u LayerUse) OwnBytes() int64 { return u.DirectBytes + u.ContentBytes }

// Add adds a layer and says what would become free on top of what the layers
// before it free. Whether others have a file is told by its number of links: all
// of them in layers that go, but for one, the object's (two layers that share a
// file which has lost its object for having had the file system's maximum of
// links would be mistaken for one).
func (r *Reclaim) Add(digest string) (u LayerUse, err error) {
	id, err := hexOf(digest)
	if err != nil {
		return u, err
	}
	type file struct {
		nlink uint64
		bytes int64
	}
	files := map[inode]file{}
	err = walk(r.store.Path("layers", id), func(st *unix.Stat_t) {
		if st.Nlink == 1 || st.Mode&unix.S_IFMT == unix.S_IFDIR {
			u.DirectBytes += st.Blocks * 512
			return
		}
		i := inode{st.Dev, st.Ino}
		r.links[i]++
		files[i] = file{uint64(st.Nlink), st.Blocks * 512}
	})
	for i, f := range files {
		if f.nlink-r.links[i] <= 1 {
			u.ContentBytes += f.bytes
		} else {
			u.SharedBytes += f.bytes
		}
	}
	return u, err
}

// BasePaths gives the directories of the bases' layers and records.
func (s *Store) BasePaths() ([]string, error) {
	layers, err := s.baseLayers("")
	if err != nil {
		return nil, err
	}
	out := []string{s.Path("bases")}
	for l := range layers {
		if id, err := hexOf(l); err == nil {
			out = append(out, s.Path("layers", id))
		}
	}
	return out, nil
}
