package rootfs

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxOpen is how many folders in folders are held open at once.
const maxOpen = 256

// removeTree is os.RemoveAll for what a workload made. That holds each folder
// open that it is in, and folders may lie deeper than a process may have
// descriptors: one bake would leave what no prune can take away.
func removeTree(path string) error {
	err := os.RemoveAll(path)
	if !errors.Is(err, unix.EMFILE) && !errors.Is(err, unix.ENFILE) {
		return err
	}
	top, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	defer top.Close()
	names, err := top.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	for len(names) > 0 { // what lies too deep is moved up here, and is one more
		name := names[len(names)-1]
		names = names[:len(names)-1]
		deep, err := shorten(top, top, name, 1)
		if err == nil {
			err = os.RemoveAll(filepath.Join(path, name))
		}
		if err != nil {
			return fmt.Errorf("remove: %w", err)
		}
		names = append(names, deep...)
	}
	return os.RemoveAll(path)
}

// shorten moves folders that lie maxOpen deep below name to top, and gives their
// names there.
func shorten(top, parent *os.File, name string, depth int) (moved []string, err error) {
	if depth == maxOpen {
		var st unix.Stat_t
		if unix.Fstatat(int(parent.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, nil
		}
		var b [8]byte
		_, _ = rand.Read(b[:]) // never fails
		to := removedPrefix + hex.EncodeToString(b[:])
		return []string{to}, unix.Renameat(int(parent.Fd()), name, int(top.Fd()), to)
	}
	fd, err := unix.Openat(int(parent.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	for _, n := range names {
		if err != nil {
			break
		}
		var more []string
		more, err = shorten(top, dir, n, depth+1)
		moved = append(moved, more...)
	}
	return moved, err
}
