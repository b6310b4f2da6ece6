package cgroup

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// devices are those of a sandbox's /dev: null zero full random urandom tty
// ptmx and its terminals. The rule stands behind nodev, the user namespace and
// the filter, which refuse the making and the opening of any other.
var devices = []string{"c 1:3 rw", "c 1:5 rw", "c 1:7 rw", "c 1:8 rw", "c 1:9 rw", "c 5:0 rw", "c 5:2 rw", "c 136:* rw"}

// limitDevices restricts a v1 group. A group inherits what its parent was
// restricted to, so mostly there is only one file to read.
func limitDevices(dir string) error {
	b, err := readFile(dir + "/devices.list")
	if err != nil {
		return fmt.Errorf("limit devices: %w", err)
	}
	if !strings.HasPrefix(string(b), "a ") {
		return nil
	}
	if err := write(dir, "devices.deny", "a"); err != nil {
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
