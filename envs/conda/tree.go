package conda

import (
	"errors"
	"fmt"
	"path"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// Bounds of one path, archive's or prefix's.
const (
	maxPathBytes = 1024
	maxNameBytes = 255
	maxDepth     = 64
)

// judge refuses what is no plain relative path: nothing else reaches a tree.
func judge(p string) error {
	switch {
	case p == "":
		return errors.New("empty path")
	case len(p) > maxPathBytes:
		return fmt.Errorf("path %q is over %d bytes", shown(p), maxPathBytes)
	case p[0] == '/':
		return fmt.Errorf("path %q is absolute", shown(p))
	case !utf8.ValidString(p) || strings.ContainsAny(p, "\x00\n\r"):
		return fmt.Errorf("path %q is no text", shown(p))
	}
	depth := 0
	for part := range strings.SplitSeq(p, "/") {
		depth++
		switch {
		case part == "" || part == ".":
			return fmt.Errorf("path %q is not clean", shown(p))
		case part == "..":
			return fmt.Errorf("path %q has a .. in it", shown(p))
		case len(part) > maxNameBytes:
			return fmt.Errorf("path %q has a name over %d bytes", shown(p), maxNameBytes)
		case depth > maxDepth:
			return fmt.Errorf("path %q is over %d folders deep", shown(p), maxDepth)
		}
	}
	return nil
}

// places are the paths of one package: none may be both a file and a folder.
type places struct {
	files, folders map[string]bool
}

func newPlaces() *places { return &places{map[string]bool{}, map[string]bool{}} }

// add takes the path of a file or link; the same again is no error.
func (x *places) add(p string) error {
	if x.folders[p] {
		return fmt.Errorf("path %q is a folder and a file", shown(p))
	}
	x.files[p] = true
	return x.addFolder(path.Dir(p))
}

func (x *places) addFolder(p string) error {
	for ; p != "." && !x.folders[p]; p = path.Dir(p) {
		if x.files[p] {
			return fmt.Errorf("path %q is a folder and a file", shown(p))
		}
		x.folders[p] = true
	}
	return nil
}

// tree writes below one folder, by descriptors: no link on the way is followed, so
// nothing outside can be reached whatever the tree holds. Paths were judged before.
type tree struct {
	root int
	dirs map[string]int // open folders by path; bounded
}

// maxOpenDirs bounds a tree's descriptors.
const maxOpenDirs = 128

func openTree(at int, name string) (*tree, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open folder %s: %w", name, err)
	}
	return &tree{root: fd, dirs: map[string]int{}}, nil
}

func (t *tree) forget() {
	for _, fd := range t.dirs {
		unix.Close(fd)
	}
	clear(t.dirs)
}

func (t *tree) close() {
	t.forget()
	unix.Close(t.root)
}

// dir opens a folder, made with its parents where asked. The descriptor is the
// tree's and valid until the next call.
func (t *tree) dir(p string, make bool) (int, error) {
	if p == "." || p == "" {
		return t.root, nil
	}
	if fd, ok := t.dirs[p]; ok {
		return fd, nil
	}
	if len(t.dirs) >= maxOpenDirs {
		t.forget()
	}
	up, err := t.dir(path.Dir(p), make)
	if err != nil {
		return -1, err
	}
	name := path.Base(p)
	made := false
	if make {
		switch err := unix.Mkdirat(up, name, 0o755); {
		case err == nil:
			made = true
		case !errors.Is(err, unix.EEXIST):
			return -1, fmt.Errorf("make folder %s: %w", shown(p), err)
		}
	}
	fd, err := unix.Openat(up, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return -1, fmt.Errorf("path %q: on the way is a link or a file", shown(p))
	}
	if err != nil {
		return -1, fmt.Errorf("open folder %s: %w", shown(p), err)
	}
	if made { // whatever the umask
		if err := unix.Fchmod(fd, 0o755); err != nil {
			unix.Close(fd)
			return -1, fmt.Errorf("make folder %s: %w", shown(p), err)
		}
	}
	t.dirs[p] = fd
	return fd, nil
}

// create makes a new file with mode 0600.
func (t *tree) create(p string) (int, error) {
	up, err := t.dir(path.Dir(p), true)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Openat(up, path.Base(p), unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, fmt.Errorf("create %s: %w", shown(p), err)
	}
	return fd, nil
}

func (t *tree) symlink(p, target string) error {
	up, err := t.dir(path.Dir(p), true)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(target, up, path.Base(p)); err != nil {
		return fmt.Errorf("link %s: %w", shown(p), err)
	}
	return nil
}

// open opens a regular file, made ours to read (and to write, where asked) first:
// not everyone who installs may overrule modes. The caller sets the mode again.
func (t *tree) open(p string, mode uint32, write bool) (int, error) {
	up, err := t.dir(path.Dir(p), false)
	if err != nil {
		return -1, err
	}
	flags := unix.O_RDONLY
	want := uint32(0o400)
	if write {
		flags, want = unix.O_RDWR, 0o600
	}
	if mode&want != want {
		if err := unix.Fchmodat(up, path.Base(p), want, 0); err != nil {
			return -1, fmt.Errorf("open %s: %w", shown(p), err)
		}
	}
	fd, err := unix.Openat(up, path.Base(p), flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", shown(p), err)
	}
	return fd, nil
}

// move renames a file of from, which is on the same file system.
func (t *tree) move(from *tree, p, to string) error {
	src, err := from.dir(path.Dir(p), false)
	if err != nil {
		return err
	}
	dst, err := t.dir(path.Dir(to), true)
	if err != nil {
		return err
	}
	if err := unix.Renameat2(src, path.Base(p), dst, path.Base(to), unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("place %s: %w", shown(to), err)
	}
	return nil
}

// finish gives a new file its mode and time.
func finish(fd int, mode uint32, mtime int64) error {
	return errors.Join(unix.Fchmod(fd, mode), unix.Futimes(fd, []unix.Timeval{unix.NsecToTimeval(mtime * 1e9), unix.NsecToTimeval(mtime * 1e9)}))
}

// leads reports whether a link resolves to something outside of the tree. One that
// leads nowhere does not.
func (t *tree) leads(p string) (outside bool, err error) {
	fd, err := unix.Openat2(t.root, p, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	switch {
	case err == nil:
		unix.Close(fd)
		return false, nil
	case errors.Is(err, unix.EXDEV):
		return true, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ELOOP), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG):
		return false, nil
	case errors.Is(err, unix.ENOSYS):
		return t.leadsByHand(p)
	}
	return false, fmt.Errorf("resolve %s: %w", shown(p), err)
}
