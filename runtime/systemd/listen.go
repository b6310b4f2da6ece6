package systemd

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// FirstFD is the first descriptor that is passed (SD_LISTEN_FDS_START).
const FirstFD = 3

// MaxFDs is how many descriptors can be passed.
const MaxFDs = 64

// Listened gives how many sockets systemd passed to this process, and their
// names (LISTEN_FDNAMES) as they came.
func Listened() (n int, names string, err error) {
	v := os.Getenv("LISTEN_FDS")
	if v == "" || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return 0, "", nil // meant for another process, which started this one
	}
	n, err = strconv.Atoi(v)
	if err != nil || n < 0 || n > MaxFDs {
		return 0, "", fmt.Errorf("LISTEN_FDS=%q: not a number of at most %d descriptors", v, MaxFDs)
	}
	return n, os.Getenv("LISTEN_FDNAMES"), nil
}

// The kinds of anonymous file systems whose files are handles of the kernel.
const (
	nsfsMagic  = 0x6e736673
	pidfsMagic = 0x50494446
)

// Take gives the n descriptors from FirstFD up, for a sandbox, and keeps
// everything else that this process starts from having them. All are looked at
// before the first is changed.
func Take(n int) ([]*os.File, error) {
	for i := range n {
		if err := check(FirstFD + i); err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", FirstFD+i, err)
		}
	}
	var out []*os.File
	for i := range n {
		unix.CloseOnExec(FirstFD + i)
		out = append(out, os.NewFile(uintptr(FirstFD+i), "descriptor "+strconv.Itoa(FirstFD+i)))
	}
	return out, nil
}

// check says whether a descriptor of the caller's may be given to a sandbox:
// files, pipes, sockets and character devices. A folder, of whatever kind, is a
// way out of the root (CVE-2024-21626); handles of namespaces, processes and
// mounts are ways to others.
func check(fd int) error {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC != 0 { // those with the flag are our own
		return hinted.New(errors.New("not open"), "open it in the calling shell (3<file), or pass fewer")
	}
	var st unix.Stat_t
	var fs unix.Statfs_t
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err := errors.Join(err, unix.Fstat(fd, &st), unix.Fstatfs(fd, &fs)); err != nil {
		return err
	}
	what := ""
	switch mode := st.Mode & unix.S_IFMT; {
	case fl&unix.O_PATH != 0:
		what = "the descriptor of a place (O_PATH)"
	case mode == unix.S_IFDIR:
		what = "a folder"
	case fs.Type == nsfsMagic || fs.Type == pidfsMagic:
		what = "the handle of a namespace or a process"
	case mode == unix.S_IFREG, mode == unix.S_IFIFO, mode == unix.S_IFSOCK, mode == unix.S_IFCHR:
		return nil
	default:
		what = "of a kind that"
	}
	return hinted.New(errors.New(what+" is not passed to a sandbox"), "files, pipes, sockets and character devices are; -v shows a folder")
}

// OfNetwork says whether f is a socket that belongs to a network. Through one the
// command reaches the network that it was made in, also where it only listens:
// connect(2) with AF_UNSPEC or shutdown(2) turns it around.
func OfNetwork(f *os.File) bool {
	domain, err := unix.GetsockoptInt(int(f.Fd()), unix.SOL_SOCKET, unix.SO_DOMAIN)
	return err == nil && domain != unix.AF_UNIX
}
