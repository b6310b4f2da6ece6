package direct

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/rootfs"
	"github.com/sbxrun/sbxrun/runtime/engine"
)

var devNodes = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

// makeDev gives the sandbox's /dev: a small tmpfs of ours with real nodes, so
// that nothing of the image's or the host's /dev is ever looked at. Where we
// may not make nodes (no CAP_MKNOD, a device cgroup), the host's are bound over
// placeholders: those come back as mounts below /dev.
func makeDev(l *engine.Launch) (_ *os.File, binds []engine.Mount, err error) {
	attr := 0
	for _, m := range l.Mounts {
		if m.Target == "/dev" {
			attr = int(attrs(m.Flags))
		}
	}
	root := fmt.Sprint(l.IDBase)
	fd, err := rootfs.Fsmount("tmpfs", attr, [][2]string{
		{"source", "tmpfs"}, {"mode", "755"}, {"size", "64k"}, {"nr_inodes", "64"}, {"uid", root}, {"gid", root},
	}...)
	if err != nil {
		return nil, nil, err
	}
	dev := os.NewFile(uintptr(fd), "/dev")
	defer func() {
		if err != nil {
			dev.Close()
		}
	}()
	for _, n := range devNodes {
		err := unix.Mknodat(fd, n.name, unix.S_IFCHR|0o666, int(unix.Mkdev(n.major, n.minor)))
		if errors.Is(err, unix.EPERM) {
			var m engine.Mount
			if m, err = bindNode(fd, n.name, unix.Mkdev(n.major, n.minor)); err == nil {
				binds = append(binds, m)
			}
		} else if err == nil {
			err = unix.Fchmodat(fd, n.name, 0o666, 0) // past the umask
		}
		if err != nil {
			return nil, nil, fmt.Errorf("make /dev/%s: %w", n.name, err)
		}
	}
	for _, d := range []string{"pts", "shm"} {
		if err := unix.Mkdirat(fd, d, 0o755); err != nil {
			return nil, nil, fmt.Errorf("make /dev/%s: %w", d, err)
		}
	}
	for _, s := range [][2]string{
		{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"},
	} {
		if err := unix.Symlinkat(s[0], fd, s[1]); err != nil {
			return nil, nil, fmt.Errorf("make /dev/%s: %w", s[1], err)
		}
		if err := unix.Fchownat(fd, s[1], int(l.IDBase), int(l.IDBase), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, nil, fmt.Errorf("make /dev/%s: %w", s[1], err)
		}
	}
	if l.TTY {
		if err := unix.Mknodat(fd, "console", unix.S_IFREG|0o600, 0); err != nil {
			return nil, nil, fmt.Errorf("make /dev/console: %w", err)
		}
	}
	return dev, binds, nil
}

// bindNode shows the host's node, if it is the device that its name says.
func bindNode(dev int, name string, rdev uint64) (engine.Mount, error) {
	if err := unix.Mknodat(dev, name, unix.S_IFREG|0o600, 0); err != nil {
		return engine.Mount{}, err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/dev/"+name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return engine.Mount{}, err
	}
	m := engine.Mount{Type: "bind", Target: name, Tree: os.NewFile(uintptr(fd), "/dev/"+name), File: true}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != rdev) {
		err = errors.New("the host's is not that device")
	}
	if err == nil {
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC})
	}
	if err != nil {
		m.Tree.Close()
	}
	return m, err
}
