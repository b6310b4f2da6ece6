package rootfs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// isStaged says whether a directory lies below the store's own tmp/: made for
// the store, and removed after.
func (s *Store) isStaged(dir *os.File) bool {
	at, err := os.Readlink(fdPath(int(dir.Fd())))
	if err != nil {
		return false
	}
	tmp, err := filepath.EvalSymlinks(s.Path("tmp"))
	return err == nil && strings.HasPrefix(at, tmp+"/")
}

// adopt makes the file itself an object, where that is as good as a copy: root's
// own, no other name, no attributes that a copy would not have, nobody who could
// still write to it. ok is false where it is not, or where the object's place
// could not be taken in one step.
//
// What a sandbox wrote is meant: it is dead, but a descriptor may have been
// handed on. A read lease is given only while no one has the file open for
// writing, by descriptor or mapping, so it is taken before the content is read.
func (s *Store) adopt(f *os.File, exec bool) (digest string, size int64, ok bool, err error) {
	fd := int(f.Fd())
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", 0, false, fmt.Errorf("store object: %w", err)
	}
	if st.Nlink != 1 || st.Uid != 0 || st.Gid != 0 || st.Size == 0 {
		return "", 0, false, nil
	}
	if n, err := unix.Flistxattr(fd, nil); n > 0 || err != nil && !errors.Is(err, unix.ENOTSUP) {
		return "", 0, false, nil //nolint:nilerr // copied: that takes none along
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK); err != nil {
		return "", 0, false, nil //nolint:nilerr // somebody may write, or no leases here
	}
	defer func() { _, _ = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_UNLCK) }()
	h := sha256.New()
	if size, err = io.Copy(h, f); err != nil {
		return "", 0, false, fmt.Errorf("store object: %w", err)
	}
	digest = hex.EncodeToString(h.Sum(nil))
	if s.HasObject(digest, size, exec) {
		return digest, size, true, nil
	}
	mode := uint32(0o444)
	if exec {
		mode = 0o555
	}
	to := s.objectPath(digest, exec)
	times := []unix.Timeval{unix.NsecToTimeval(layerTime.UnixNano()), unix.NsecToTimeval(layerTime.UnixNano())}
	err = errors.Join(unix.Fchmod(fd, mode), unix.Futimes(fd, times), os.MkdirAll(filepath.Dir(to), 0o700))
	if err != nil {
		return "", 0, false, fmt.Errorf("store object: %w", err)
	}
	// By descriptor: what was read is what gets the name.
	err = unix.Linkat(unix.AT_FDCWD, fdPath(fd), unix.AT_FDCWD, to, unix.AT_SYMLINK_FOLLOW)
	if err == nil || errors.Is(err, unix.EEXIST) && s.HasObject(digest, size, exec) {
		return digest, size, true, nil
	}
	return "", 0, false, nil // another file system, a damaged object in the way
}
