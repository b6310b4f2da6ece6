package cgroup

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// devices are those of a sandbox's /dev: null zero full random urandom tty
// ptmx and its terminals. The rule stands behind nodev, the user namespace and
// the filter, which refuse the making and the opening of any other.
var devices = []string{"c 1:3 rw", "c 1:5 rw", "c 1:7 rw", "c 1:8 rw", "c 1:9 rw", "c 5:0 rw", "c 5:2 rw", "c 136:* rw"}

// limitDevices restricts a v1 group. A group inherits what its parent was
// restricted to when it was made, so mostly there is only one file to read. The
// rule is several writes: those of others who do the same at once, or who died
// between two, are waited for and repaired.
func limitDevices(dir string) error {
	if ok, err := limited(dir); ok || err != nil {
		return err
	}
	fd, err := open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("limit devices: %w", &os.PathError{Op: "open", Path: dir, Err: err})
	}
	defer unix.Close(fd)
	if err := unix.Flock(fd, unix.LOCK_EX); err != nil {
		return fmt.Errorf("limit devices: lock %q: %w", dir, err)
	}
	if ok, err := limited(dir); ok || err != nil {
		return err
	}
	if err := write(dir, "devices.deny", "a"); err != nil {
		if errors.Is(err, unix.EINVAL) { // it has groups below: each of them is restricted by itself
			return nil
		}
		return err
	}
	for _, d := range devices {
		// A parent that denies one of them decides that.
		if err := write(dir, "devices.allow", d); err != nil && !errors.Is(err, unix.EPERM) {
			return err
		}
	}
	return nil
}

// limited says whether the group's list is the one that is wanted.
func limited(dir string) (bool, error) {
	b, err := readFile(dir + "/devices.list")
	if err != nil {
		return false, fmt.Errorf("limit devices: %w", err)
	}
	return strings.TrimSpace(string(b)) == strings.Join(devices, "\n"), nil
}
