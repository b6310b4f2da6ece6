package publish

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
	"github.com/sbxrun/sbxrun/netns"
)

func listenUnix(p netns.UnixPort) (net.Listener, error) {
	err := checkInside(p.ContainerPort)
	var l *net.UnixListener
	if err == nil {
		l, err = placeUnix(p.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("expose UNIX socket %q: %w", p.Path, err)
	}
	return l, nil
}

// placeUnix makes the socket under a name of its own and moves it to path: at no
// moment is path there and not served, and of two at once one wins.
func placeUnix(path string) (_ *net.UnixListener, err error) {
	// The directory by its descriptor, as an address holds 107 bytes only.
	dir, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, hinted.New(fmt.Errorf("open its directory: %w", err), "give a path in a directory that is there")
	}
	defer unix.Close(dir)
	at := func(name string) string { return filepath.Join("/proc/self/fd", strconv.Itoa(dir), name) }
	base, name := filepath.Base(path), ".sbxrun-"+strconv.Itoa(os.Getpid())+"-"+strconv.Itoa(dir)
	// The socket file's mode is the socket's own less the umask, so there is no
	// window in which it is wider.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
		return errors.Join(cerr, err)
	}}
	listener, err := lc.Listen(context.Background(), "unix", at(name))
	if err != nil {
		return nil, err
	}
	l := listener.(*net.UnixListener)
	l.SetUnlinkOnClose(false) // by the name it had then, and the privilege is gone
	defer func() {
		if err != nil {
			l.Close()
			_ = unix.Unlinkat(dir, name, 0)
		}
	}()
	err = unix.Renameat2(dir, name, dir, base, unix.RENAME_NOREPLACE)
	if !errors.Is(err, unix.EEXIST) {
		return l, err
	}
	if err := stale(at(base)); err != nil {
		return nil, err
	}
	if err := unix.Renameat2(dir, name, dir, base, unix.RENAME_EXCHANGE); err != nil {
		return nil, fmt.Errorf("replace it: %w", err)
	}
	// Another may have come between: what is thrown away is what was looked at now.
	if err := stale(at(name)); err != nil {
		return nil, errors.Join(err, unix.Renameat2(dir, name, dir, base, unix.RENAME_EXCHANGE))
	}
	if err := unix.Unlinkat(dir, name, 0); err != nil {
		return nil, fmt.Errorf("remove the stale one: %w", err)
	}
	return l, nil
}

// stale is nil for a socket that nobody listens on any more.
func stale(path string) error {
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if st.Mode().Type() != os.ModeSocket {
		return hinted.New(unix.EEXIST, "it is not a socket, so it stays; choose another path, or remove it")
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return hinted.New(unix.EADDRINUSE, "a program listens on it; choose another path")
	}
	return nil
}
