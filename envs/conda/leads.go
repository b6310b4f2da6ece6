package conda

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// leadsByHand is leads without openat2, which a sandbox refuses: its filter
// cannot see what it asks for. Nobody else writes in the tree.
func (t *tree) leadsByHand(p string) (outside bool, err error) {
	var at []string // the folder reached so far
	rest := strings.Split(p, "/")
	for hops := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(at) == 0 {
				return true, nil
			}
			at = at[:len(at)-1]
			continue
		}
		here := path.Join(append(at[:len(at):len(at)], name)...)
		buf := make([]byte, maxPathBytes+1)
		n, err := t.readlink(here, buf)
		switch {
		case errors.Is(err, unix.EINVAL): // no link: a folder or a file
			at = append(at, name)
			continue
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG), errors.Is(err, unix.ELOOP):
			return false, nil
		case err != nil:
			return false, fmt.Errorf("resolve %s: %w", shown(p), err)
		}
		target := string(buf[:n])
		if path.IsAbs(target) {
			return true, nil
		}
		if hops++; hops > 40 {
			return false, nil
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return false, nil
}

// readlink reads a link whose folder is reached without one.
func (t *tree) readlink(p string, buf []byte) (int, error) {
	fd, err := t.root, error(nil)
	dirs := strings.Split(p, "/")
	for i, d := range dirs[:len(dirs)-1] {
		next, oerr := unix.Openat(fd, d, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if i > 0 {
			unix.Close(fd)
		}
		if oerr != nil {
			return 0, oerr
		}
		fd = next
	}
	n, err := unix.Readlinkat(fd, dirs[len(dirs)-1], buf)
	if fd != t.root {
		unix.Close(fd)
	}
	return n, err
}
