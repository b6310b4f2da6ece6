package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/internal/hinted"
)

// readFile reads a kernel file. Unlike os.ReadFile it does not try to poll it:
// that is four system calls more, and a launch reads many.
func readFile(path string) ([]byte, error) {
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 512)
	for {
		n, err := unix.Read(fd, b[len(b):cap(b)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return b, nil
		default:
			b = b[:len(b)+n]
			if len(b) == cap(b) {
				b = append(b, 0)[:len(b)]
			}
		}
	}
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

func write(dir, file, value string) error {
	path := filepath.Join(dir, file)
	fd, err := open(path, unix.O_WRONLY)
	if err != nil {
		return fmt.Errorf("set limit: %w", &os.PathError{Op: "open", Path: path, Err: err})
	}
	defer unix.Close(fd)
	for {
		if _, err = unix.Write(fd, []byte(value)); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("set limit %s=%q: %w", file, value, err)
	}
	return nil
}

func flock(fd, how int) error {
	for {
		if err := unix.Flock(fd, how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// mkdir makes one group; the error says which and why.
func mkdir(dir string) error {
	err := os.Mkdir(dir, 0o755)
	if hint := mountHint(err); hint != "" {
		return hinted.New(fmt.Errorf("make cgroup: %w", err), hint)
	}
	return err
}

// subgroups lists the groups right below dir.
func subgroups(dir string) ([]string, error) {
	all, err := os.ReadDir(dir)
	var out []string
	for _, e := range all {
		if e.IsDir() {
			out = append(out, e.Name())
		}
	}
	return out, err
}
