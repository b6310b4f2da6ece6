package runtime

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
)

// resolveUser turns "uid[:gid]" or "name[:group]" into inside ids and the
// user's home. Ids are bounded: a sandbox owns 65,536 of them, and an overflow
// must never come out as 0 (CVE-2024-40635).
func resolveUser(base rootfs.Base, s string) (uid, gid uint32, home, name string, err error) {
	if s == "" {
		return defaultUID, defaultUID, defaultHome, "sandbox", nil
	}
	u, g, hasGroup := strings.Cut(s, ":")
	home, name = defaultHome, u
	if isDigits(u) {
		if uid, err = parseID(u); err != nil {
			return 0, 0, "", "", err
		}
		gid = uid
		if row := lookup(base, "/etc/passwd", 2, u); row != nil {
			name, home = row[0], row[5]
			if gid, err = parseID(row[3]); err != nil {
				return 0, 0, "", "", err
			}
		}
	} else {
		row := lookup(base, "/etc/passwd", 0, u)
		if row == nil {
			return 0, 0, "", "", fmt.Errorf("user %q is not in the base's /etc/passwd", u)
		}
		if uid, err = parseID(row[2]); err != nil {
			return 0, 0, "", "", err
		}
		if gid, err = parseID(row[3]); err != nil {
			return 0, 0, "", "", err
		}
		home = row[5]
	}
	if hasGroup {
		if !isDigits(g) {
			row := lookup(base, "/etc/group", 0, g)
			if row == nil {
				return 0, 0, "", "", fmt.Errorf("group %q is not in the base's /etc/group", g)
			}
			g = row[2]
		}
		if gid, err = parseID(g); err != nil {
			return 0, 0, "", "", err
		}
	}
	if !strings.HasPrefix(home, "/") {
		home = "/"
	}
	return uid, gid, home, name, nil
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil || n >= idRangeSize {
		return 0, fmt.Errorf("id %q: must be a number from 0 to %d", s, idRangeSize-1)
	}
	return uint32(n), nil
}

// lookup finds the row of a colon-separated file whose column has the value.
// The base's own links are followed inside the base only.
func lookup(base rootfs.Base, path string, column int, value string) []string {
	want := 7
	if path == "/etc/group" {
		want = 4
	}
	for _, lower := range base.Lowers {
		f, err := openInRoot(lower, path)
		if err != nil {
			continue
		}
		defer f.Close()
		sc := bufio.NewScanner(io.LimitReader(f, 1<<20))
		for sc.Scan() {
			row := strings.Split(sc.Text(), ":")
			if len(row) == want && row[column] == value {
				return row
			}
		}
		return nil
	}
	return nil
}

// openInRoot opens a regular file below root as a process chrooted there
// would (Linux 5.6).
func openInRoot(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q: %w", root, err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, fmt.Errorf("open %q in %q: %w", path, root, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		f.Close()
		return nil, errors.Join(fmt.Errorf("open %q in %q: not a regular file", path, root), err)
	}
	return f, nil
}
