package rootfs

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
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
		return nil, hinted.New(fmt.Errorf("make user namespace: %w", err), "sysctl user.max_user_namespaces must not be 0")
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

// openPath opens what a host path names now: what is looked at is what is
// mounted, whatever the path names later.
func openPath(path string) (int, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

// openExact is openPath of a path with no symbolic link in it: what a program of
// a sandbox may have put in its place meanwhile is refused.
func openExact(path string) (int, unix.Stat_t, error) {
	var st unix.Stat_t
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return -1, st, err
	}
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return -1, st, err
	}
	return fd, st, nil
}

// cloneTree gives a detached copy of the mount of what src is open on, with
// mapped owners where ns is not nil and with attr set. path is for messages.
func cloneTree(src int, path string, recursive bool, ns *os.File, attr uint64) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(src, "", flags)
	if err != nil {
		return -1, fmt.Errorf("clone mount of %q: %w", path, err)
	}
	if err := setTree(fd, path, recursive, ns, attr); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// setTree sets the attributes of a detached mount, see cloneTree.
func setTree(fd int, path string, recursive bool, ns *os.File, attr uint64) error {
	at := uint(unix.AT_EMPTY_PATH)
	if recursive {
		at |= unix.AT_RECURSIVE
	}
	set := unix.MountAttr{Attr_set: attr, Propagation: unix.MS_PRIVATE}
	if ns != nil {
		set.Attr_set |= unix.MOUNT_ATTR_IDMAP
		set.Userns_fd = uint64(ns.Fd())
	}
	if err := unix.MountSetattr(fd, "", at, &set); err != nil {
		if ns != nil && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM)) {
			return fmt.Errorf("map owners of %q: %w: %w", path, errNoIDMap, err)
		}
		return fmt.Errorf("set attributes of %q: %w", path, err)
	}
	return nil
}

// moveTo attaches a detached mount on target. fd goes on to name the mount.
func moveTo(fd int, target string) error {
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

// swapped maps all ids on disk below the range's size to themselves inside,
// but owner to inside and, where it has a place, inside to owner.
func swapped(owner, inside uint32, ids IDMap) []syscall.SysProcIDMap {
	var out []syscall.SysProcIDMap
	add := func(disk, in, n uint32) {
		if n > 0 {
			out = append(out, syscall.SysProcIDMap{ContainerID: int(disk), HostID: int(ids.Base + in), Size: int(n)})
		}
	}
	switch {
	case owner == inside:
		add(0, 0, ids.Size)
	case owner >= ids.Size:
		add(0, 0, inside)
		add(inside+1, inside+1, ids.Size-inside-1)
		add(owner, inside, 1)
	default:
		lo, hi := min(owner, inside), max(owner, inside)
		add(0, 0, lo)
		add(lo, hi, 1)
		add(lo+1, lo+1, hi-lo-1)
		add(hi, lo, 1)
		add(hi+1, hi+1, ids.Size-hi-1)
	}
	return out
}
