package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

const noErofs = "modprobe erofs; where the kernel has none: sbxrun env pack --undo NAME, on a host that has it"

// fileBacked is replaced by tests of what is done on kernels without it.
var fileBacked = true

// mountImage gives a detached read-only mount of an EROFS image, from the file
// itself (Linux 6.12) or by a loop device. Only images that this package made
// are mounted: a file system's driver is no parser of outside input.
func mountImage(path string) (int, error) {
	const attr = safeAttr | unix.MOUNT_ATTR_RDONLY
	if fileBacked {
		fd, err := Fsmount("erofs", attr, [2]string{"source", path}, [2]string{"ro", ""})
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.ENODEV):
			return -1, hinted.New(fmt.Errorf("mount layer %q: %w", path, err), noErofs)
		case !errors.Is(err, unix.ENOTBLK): // it wants a block device
			return -1, fmt.Errorf("mount layer %q: %w", path, err)
		}
	}
	img, err := os.Open(path)
	if err != nil {
		return -1, fmt.Errorf("mount layer: %w", err)
	}
	defer img.Close()
	loop, err := attachLoop(img, true)
	if err != nil {
		return -1, fmt.Errorf("mount layer %q: %w", path, err)
	}
	defer loop.Close() // the mount holds it
	fd, err := Fsmount("erofs", attr, [2]string{"source", loop.Name()}, [2]string{"ro", ""})
	if err != nil {
		return -1, fmt.Errorf("mount layer %q: %w", path, err)
	}
	return fd, nil
}

// OpenLayer opens a layer's tree for reading, packed or not, until it is closed.
// Nothing appears in any mount table.
func (s *Store) OpenLayer(digest string) (*os.File, error) {
	path, err := s.LayerPath(digest)
	if err != nil {
		return nil, err
	}
	return openTree(path)
}

func openTree(path string) (*os.File, error) {
	if !Packed(path) {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("open layer: %w", err)
		}
		return f, nil
	}
	m, err := mountImage(path)
	if err != nil {
		return nil, err
	}
	defer unix.Close(m)
	// The mount's descriptor is O_PATH: one that can be read holds the mount too.
	fd, err := unix.Openat(m, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open layer %q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// WriteEROFS writes a layer, after every byte of it was compared with its
// manifest, as an uncompressed EROFS image to dst, which must not be there. The
// same layer gives the same bytes with the same mkfs.erofs: owner, times and
// UUID are fixed. One that is packed is copied as it is.
func (s *Store) WriteEROFS(ctx context.Context, digest, dst string) error {
	id, err := hexOf(digest)
	if err != nil {
		return err
	}
	release, err := s.holdLayer(ctx, id, false)
	if err != nil {
		return err
	}
	defer release()
	return s.writeEROFS(ctx, digest, id, dst)
}

// writeEROFS is for who holds the layer.
func (s *Store) writeEROFS(ctx context.Context, digest, id, dst string) (err error) {
	damage, err := s.VerifyLayer(ctx, digest)
	if err != nil {
		return err
	}
	if len(damage) > 0 {
		return hinted.New(fmt.Errorf("write EROFS image of %q: %s: %s", digest, damage[0].Path, damage[0].Problem), "the layer is damaged: remove the environment and bake it again")
	}
	from, err := s.LayerPath(digest)
	if err != nil {
		return err
	}
	if Packed(from) {
		err := copyFile(from, dst, 0o600)
		if err != nil && !errors.Is(err, os.ErrExist) {
			err = errors.Join(s.Explain(err), os.Remove(dst))
		}
		return err
	}
	mkfs, err := exec.LookPath("mkfs.erofs")
	if err != nil {
		if mkfs = "/usr/sbin/mkfs.erofs"; !isFile(mkfs) {
			return hinted.New(errors.New("write EROFS image: mkfs.erofs not found"), "apt-get install erofs-utils")
		}
	}
	out, err := os.OpenFile(dst, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return s.Explain(fmt.Errorf("write EROFS image: %w", err))
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err != nil {
			err = errors.Join(s.Explain(err), os.Remove(dst))
		}
	}()
	// Modification times are all the store's own; -T without them kept would give
	// the directories the time of now.
	cmd := exec.CommandContext(ctx, mkfs, "--quiet", "-x-1", "--all-root", "-T"+strconv.FormatInt(layerTime.Unix(), 10),
		"-U", uuidOf(id), "/proc/self/fd/3", from) // it goes by the name of the source, not by what is open
	cmd.ExtraFiles = []*os.File{out}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		if strings.Contains(said.String(), unix.ENOSPC.Error()) || strings.Contains(said.String(), "No space left") {
			err = unix.ENOSPC
		}
		lines := strings.Split(strings.TrimSpace(said.String()), "\n")
		return fmt.Errorf("write EROFS image of %q: %w: %s", digest, err, lines[len(lines)-1])
	}
	if err := out.Sync(); err != nil {
		return fmt.Errorf("write EROFS image: %w", err)
	}
	return nil
}

// uuidOf makes an image's UUID of the layer's digest.
func uuidOf(id string) string {
	return id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:32]
}

// Pack turns a layer into one EROFS image: fewer inodes, and a store that can be
// copied or served as few large files. The image is compared with the manifest
// before the tree goes; a crash leaves one of the two, or both. A layer that a
// live sandbox uses is ErrBusy.
func (s *Store) Pack(ctx context.Context, digest string) error {
	return s.convert(ctx, digest, imageName, func(id, tmp string, m *Manifest) error {
		if err := s.writeEROFS(ctx, digest, id, tmp); err != nil {
			return err
		}
		damage, err := s.verifyTree(ctx, tmp, m)
		if err == nil && len(damage) > 0 {
			err = fmt.Errorf("the image differs: %s: %s", damage[0].Path, damage[0].Problem)
		}
		return err
	})
}

// Unpack turns an image into a tree of links to objects again.
func (s *Store) Unpack(ctx context.Context, digest string) error {
	release, err := s.Lock(ctx, "objects", false)
	if err != nil {
		return err
	}
	defer release()
	return s.convert(ctx, digest, treeName, func(_, tmp string, m *Manifest) error {
		path, err := s.LayerPath(digest)
		if err != nil {
			return err
		}
		damage, err := s.verifyTree(ctx, path, m)
		if err != nil {
			return err
		}
		if len(damage) > 0 {
			return fmt.Errorf("the image is damaged: %s: %s", damage[0].Path, damage[0].Problem)
		}
		tree, err := openTree(path)
		if err != nil {
			return err
		}
		defer tree.Close()
		for _, e := range m.Entries {
			exec := e.Mode&0o111 != 0
			if e.Type != 'f' || s.HasObject(e.Digest, e.Size, exec) {
				continue
			}
			f, err := openBelow(tree, e.Path)
			if err != nil {
				return err
			}
			got, _, err := s.PutObject(f, exec)
			if err = errors.Join(err, f.Close()); err != nil {
				return err
			}
			if got != e.Digest {
				return fmt.Errorf("the image is damaged: %q", e.Path)
			}
		}
		if err := s.linkTree(ctx, m, tmp); err != nil {
			return err
		}
		return syncAll(tmp)
	})
}

// convert makes the other form of a layer, publishes it and removes the first.
func (s *Store) convert(ctx context.Context, digest, form string, make func(id, tmp string, m *Manifest) error) (err error) {
	defer func() {
		if err != nil {
			err = s.Explain(fmt.Errorf("convert layer %q: %w", digest, err))
		}
	}()
	id, err := hexOf(digest)
	if err != nil {
		return err
	}
	release, err := s.holdLayer(ctx, id, false)
	if err != nil {
		return err
	}
	defer func() { release() }()
	path, m, err := s.Layer(digest)
	if err != nil || filepath.Base(path) == form && form == imageName {
		return err
	}
	to := s.Path("layers", id, form)
	if filepath.Base(path) != form { // else a crash left both
		tmp, done, terr := s.TempDir("convert")
		if terr != nil {
			return terr
		}
		defer func() { err = errors.Join(err, done()) }()
		if err := make(id, filepath.Join(tmp, form), m); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(tmp, form), to); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
		if err := syncDir(filepath.Dir(to)); err != nil {
			return err
		}
	}
	// What runs on the other form goes on with it.
	release()
	if release, err = s.holdLayer(expired(), id, true); err != nil {
		release = func() {}
		if errors.Is(err, context.Canceled) {
			err = ErrBusy
		}
		if form == imageName { // the tree is what everybody uses while it is there
			err = errors.Join(err, os.Remove(to))
		}
		return err
	}
	other := map[string]string{imageName: treeName, treeName: imageName}[form]
	if _, err := os.Lstat(s.Path("layers", id, other)); err != nil {
		return nil //nolint:nilerr // another was first
	}
	gone, err := s.takeOut(s.Path("layers", id, other))
	if err != nil {
		return err
	}
	return removeTree(gone)
}

// OpenFile opens the content of an entry of some layers: the object or, where
// layers are packed and it has been pruned, the file in an image. Whoever reads it
// compares the digest.
func (s *Store) OpenFile(e Entry, layers ...string) (*os.File, error) {
	f, err := s.OpenObject(e.Digest, e.Mode&0o111 != 0)
	if !errors.Is(err, os.ErrNotExist) {
		return f, err
	}
	for _, l := range layers {
		path, lerr := s.LayerPath(l)
		if lerr != nil || !Packed(path) {
			continue
		}
		tree, lerr := openTree(path)
		if lerr != nil {
			return nil, lerr
		}
		f, lerr := openBelow(tree, e.Path)
		tree.Close()
		if lerr != nil {
			continue
		}
		if st, serr := f.Stat(); serr == nil && st.Mode().IsRegular() && st.Size() == e.Size {
			return f, nil
		}
		f.Close()
	}
	return nil, err
}

// openBelow opens a file of a tree, through no link (Linux 5.6).
func openBelow(tree *os.File, path string) (*os.File, error) {
	fd, err := unix.Openat2(int(tree.Fd()), path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NOFOLLOW | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}
