package rootfs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// Upper is the writable part of a root, bounded in bytes and inodes.
type Upper struct {
	Kind       string `json:"kind"` // "tmpfs" (charged to memory) or "disk"
	SizeBytes  int64  `json:"size_bytes"`
	Inodes     int64  `json:"inodes"`
	ScratchDir string `json:"scratch_dir,omitempty"` // where a disk's image lies
}

// mount gives a detached mount of the upper's file system.
func (u Upper) mount() (f *os.File, notes []string, err error) {
	fd := -1
	switch u.Kind {
	case "tmpfs":
		fd, err = Fsmount("tmpfs", safeAttr, [][2]string{
			{"source", "sbxrun-upper"},
			{"mode", "0711"},
			{"size", strconv.FormatInt(u.SizeBytes, 10)},
			{"nr_inodes", strconv.FormatInt(u.Inodes, 10)},
		}...)
	case "disk":
		fd, notes, err = u.mountDisk()
	default:
		err = fmt.Errorf("mount upper: unknown kind %q", u.Kind)
	}
	if err != nil {
		return nil, notes, err
	}
	return os.NewFile(uintptr(fd), "upper"), notes, nil
}

// mountDisk makes an ext4 in a file without a name, on a loop device that
// frees itself: a crash at any moment leaves nothing on disk.
func (u Upper) mountDisk() (m int, notes []string, err error) {
	if err := os.MkdirAll(u.ScratchDir, 0o700); err != nil {
		return -1, nil, fmt.Errorf("make scratch directory: %w", err)
	}
	fd, err := unix.Open(u.ScratchDir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return -1, nil, hinted.New(fmt.Errorf("make disk image in %q: %w", u.ScratchDir, err), "the state directory must be on a file system with O_TMPFILE (ext4, xfs, btrfs)")
	}
	img := os.NewFile(uintptr(fd), "disk image")
	defer img.Close()
	// Room for the file system's own: inode tables, and the blocks it reserves
	// (2 %, at most 4096), so that what is left is the promised size.
	size := u.SizeBytes + min(u.SizeBytes/50, 4096*4096) + u.Inodes*256 + 2<<20
	size = (size + 4095) &^ 4095
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && int64(fs.Bavail)*fs.Bsize < u.SizeBytes {
		notes = append(notes, fmt.Sprintf("the disk limit is %d bytes, but only %d are free in %q", u.SizeBytes, int64(fs.Bavail)*fs.Bsize, u.ScratchDir))
	}
	if err := img.Truncate(size); err != nil {
		return -1, nil, fmt.Errorf("size disk image to %d: %w", size, err)
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		if mkfs = "/sbin/mkfs.ext4"; !isFile(mkfs) {
			return -1, nil, hinted.New(errors.New("make disk image: mkfs.ext4 not found"), "apt-get install e2fsprogs")
		}
	}
	cmd := exec.Command(mkfs, "-q", "-F", "-b", "4096", "-m", "0", "-N", fmt.Sprint(u.Inodes), "-O", "^has_journal,^resize_inode",
		"-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{img}
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "MKE2FS_SKIP_CHECK_MSG=1"}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return -1, nil, fmt.Errorf("make file system in disk image: %w: %s", err, strings.TrimSpace(out.String()))
	}
	loop, err := attachLoop(img, false)
	if err != nil {
		return -1, nil, err
	}
	defer loop.Close() // the mount holds it; with AUTOCLEAR it goes with the mount
	m, err = Fsmount("ext4", safeAttr|unix.MOUNT_ATTR_NOATIME, [][2]string{
		{"source", loop.Name()}, {"nodiscard", ""}, {"noinit_itable", ""}, // the image stays sparse
	}...)
	if err != nil {
		return -1, nil, fmt.Errorf("mount disk image: %w", err)
	}
	_ = unix.Unlinkat(m, "lost+found", unix.AT_REMOVEDIR)
	return m, notes, nil
}

func isFile(p string) bool {
	st, err := os.Stat(p)
	return err == nil && st.Mode().IsRegular()
}

// attachLoop finds a free loop device for img (LOOP_CONFIGURE: Linux 5.8). It
// frees itself with its last user.
func attachLoop(img *os.File, readOnly bool) (*os.File, error) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, hinted.New(fmt.Errorf("find loop device: %w", err), "modprobe loop; or a --disk of at most half of --memory, which needs none")
	}
	defer ctl.Close()
	for try := 0; try < 64; try++ {
		n, err := unix.IoctlRetInt(int(ctl.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
			// Without udev the node of a new device has to be made.
			if err := unix.Mknod(path, unix.S_IFBLK|0o660, int(unix.Mkdev(7, uint32(n)))); err != nil && !errors.Is(err, unix.EEXIST) {
				return nil, fmt.Errorf("make %q: %w", path, err)
			}
		}
		mode, flags := os.O_RDWR, uint32(unix.LO_FLAGS_AUTOCLEAR)
		if readOnly {
			mode, flags = os.O_RDONLY, flags|unix.LO_FLAGS_READ_ONLY
		}
		dev, err := os.OpenFile(path, mode, 0)
		if err != nil {
			return nil, fmt.Errorf("open loop device: %w", err)
		}
		cfg := unix.LoopConfig{Fd: uint32(img.Fd())}
		cfg.Info.Flags = flags
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg)
		if err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) { // another took it between the two calls
			return nil, fmt.Errorf("configure %q: %w", path, err)
		}
	}
	return nil, errors.New("find loop device: all are taken as soon as they are found")
}
