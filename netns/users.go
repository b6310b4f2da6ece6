package netns

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// OpenToUsers lets a sandbox, which has no capabilities here, serve on any port
// and ping, as the default of docker is.
func (n *NS) OpenToUsers() error { return n.Do(openToUsers) }

func openToUsers() error {
	proc := unix.AT_FDCWD
	for _, s := range [][2]string{
		{"/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"},
		{"/proc/sys/net/ipv4/ping_group_range", "0 2147483647"},
	} {
		err := writeAt(proc, s[0], s[1])
		if errors.Is(err, unix.EROFS) && proc == unix.AT_FDCWD { // ProtectKernelTunables= of a unit's: that is for the host's
			if proc, err = procfs(); err != nil {
				return fmt.Errorf("set up network: %w", err)
			}
			defer unix.Close(proc)
			err = writeAt(proc, s[0], s[1])
		}
		if err != nil {
			return fmt.Errorf("set up network: %w", err)
		}
	}
	return nil
}

// writeAt writes a file of procfs; with a procfs of our own the path is below it.
func writeAt(proc int, path, text string) error {
	if proc != unix.AT_FDCWD {
		path = strings.TrimPrefix(path, "/proc/")
	}
	fd, err := unix.Openat(proc, path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		return &os.PathError{Op: "write", Path: path, Err: err}
	}
	return nil
}

// procfs mounts one that nobody else sees.
func procfs() (int, error) {
	fs, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount procfs: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount procfs: %w", err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("mount procfs: %w", err)
	}
	return fd, nil
}
