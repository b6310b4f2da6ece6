package rootfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// IDMap is a range of host ids: inside id i is host id Base+i, for i < Size.
type IDMap struct {
	Base uint32 `json:"base"`
	Size uint32 `json:"size"`
}

// userns gives a user namespace that maps an id on disk to a host id, for an
// idmapped mount (Linux 5.12). A process must be in a namespace for it to be
// opened: a stopped one that never runs a line of its program.
func userns(uids, gids []syscall.SysProcIDMap) (*os.File, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: uids, GidMappings: gids,
		Ptrace: true, Pdeathsig: unix.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return nil, &hinted{fmt.Errorf("make user namespace: %w", err), "sysctl user.max_user_namespaces must not be 0"}
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // killed by us
	if err != nil {
		return nil, fmt.Errorf("open user namespace: %w", err)
	}
	return f, nil
}

// errNoIDMap says that a file system cannot be mounted with mapped owners.
var errNoIDMap = errors.New("file system cannot map owners")

// cloneTree gives a detached copy of the mount of path, with mapped owners
// where ns is not nil and with attr set.
func cloneTree(path string, recursive bool, ns *os.File, attr uint64) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	at := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
		at |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, flags)
	if err != nil {
		return -1, fmt.Errorf("clone mount of %q: %w", path, err)
	}
	set := unix.MountAttr{Attr_set: attr, Propagation: unix.MS_PRIVATE}
	if ns != nil {
		set.Attr_set |= unix.MOUNT_ATTR_IDMAP
		set.Userns_fd = uint64(ns.Fd())
	}
	if err := unix.MountSetattr(fd, "", at, &set); err != nil {
		unix.Close(fd)
		if ns != nil && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM)) {
			return -1, fmt.Errorf("map owners of %q: %w: %w", path, errNoIDMap, err)
		}
		return -1, fmt.Errorf("set attributes of %q: %w", path, err)
	}
	return fd, nil
}

// attach puts a detached mount on target and closes it.
func attach(fd int, target string) error {
	defer unix.Close(fd)
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach mount on %q: %w", target, err)
	}
	return nil
}

func onePair(disk, host uint32) []syscall.SysProcIDMap {
	return []syscall.SysProcIDMap{{ContainerID: int(disk), HostID: int(host), Size: 1}}
}

// pairs maps ids on disk from first on to a range of host ids.
func pairs(first uint32, ids IDMap) []syscall.SysProcIDMap {
	return []syscall.SysProcIDMap{{ContainerID: int(first), HostID: int(ids.Base), Size: int(ids.Size)}}
}
