// Package libcontainer is the reference engine: it starts a prepared sandbox
// with runc's library. It is the only importer of that library and lives in
// the second binary, because cgo and the library's own initialisation would
// be paid at every launch of the command line.
//
// Everything a policy decides comes in the Launch. Limits are not its
// business: the cgroup is made and limited by runtime/cgroup, here pid 1 only
// joins it; the seccomp filter is loaded by pid 1, compiled ahead.
package libcontainer

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // the writer of device rules
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // the C stages that enter the namespaces
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/engine"
)

// Init runs libcontainer's own stage inside the new namespaces. It does not
// return.
func Init() { libcontainer.Init() }

// Start makes the namespaces, enters the root and executes pid 1. It returns
// the host pid of pid 1, which becomes the caller's caller's child.
func Start(l *engine.Launch, f engine.Files, record *os.File) (int, error) {
	// Its warnings would land in the command's stderr; failures come back as errors.
	logrus.SetOutput(io.Discard)
	c, err := libcontainer.Create(l.StateDir, l.ID, config(l, f.NetNS))
	if err != nil {
		return 0, fmt.Errorf("create container: %w", err)
	}
	noNewPrivs := true
	p := &libcontainer.Process{
		// By descriptor: nothing of ours has a name inside.
		Args:            []string{fmt.Sprintf("/proc/self/fd/%d", 3+3)},
		Env:             []string{"PATH=/"},
		UID:             int(l.UID),
		GID:             int(l.GID),
		Cwd:             l.Cwd,
		ExtraFiles:      append([]*os.File{record, f.Status, f.Lifeline, f.Init}, f.Passed...),
		Capabilities:    &configs.Capabilities{},
		NoNewPrivileges: &noNewPrivs,
		Init:            true,
		LogLevel:        "4",
	}
	if l.TTY {
		p.ConsoleSocket = f.Console
		p.ConsoleWidth, p.ConsoleHeight = l.Cols, l.Rows
	} else {
		p.Stdin, p.Stdout, p.Stderr = f.Stdin, f.Stdout, f.Stderr
	}
	if err := c.Run(p); err != nil {
		return 0, errors.Join(fmt.Errorf("start container: %w", err), destroy(c))
	}
	return p.Pid()
}

// destroy ends what a failed start left.
func destroy(c *libcontainer.Container) (err error) {
	defer func() {
		if recover() != nil { // the library looks at the process also where none was started: then nothing is left
			err = nil
		}
	}()
	_ = c.Signal(unix.SIGKILL) // nothing to kill is fine
	if err := c.Destroy(); err != nil {
		return fmt.Errorf("destroy container: %w", err)
	}
	return nil
}

func config(l *engine.Launch, netns *os.File) *configs.Config {
	ids := []configs.IDMap{{ContainerID: 0, HostID: int64(l.IDBase), Size: int64(l.IDSize)}}
	c := &configs.Config{
		Rootfs:          l.Rootfs,
		Readonlyfs:      l.ReadOnly,
		RootPropagation: unix.MS_PRIVATE | unix.MS_REC,
		Hostname:        l.Hostname,
		MaskPaths:       l.MaskPaths,
		ReadonlyPaths:   l.ReadonlyPaths,
		UIDMappings:     ids,
		GIDMappings:     ids,
		NoNewPrivileges: true,
		Capabilities:    &configs.Capabilities{}, // all five sets empty
		Namespaces: configs.Namespaces{
			{Type: configs.NEWUSER},
			{Type: configs.NEWNS},
			{Type: configs.NEWPID},
			{Type: configs.NEWIPC},
			{Type: configs.NEWUTS},
			{Type: configs.NEWCGROUP},
			{Type: configs.NEWTIME},
		},
		Cgroups: &cgroups.Cgroup{Path: l.CgroupPath, Resources: &cgroups.Resources{
			// Beside nodev and the user namespace: deny all, then what is in /dev.
			Devices: []*devices.Rule{{Type: devices.WildcardDevice, Major: devices.Wildcard, Minor: devices.Wildcard, Permissions: "rwm"}},
		}},
	}
	if l.ResetOOMScore {
		c.OomScoreAdj = new(int)
	}
	switch l.NetNS {
	case "":
		c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWNET})
		c.Networks = []*configs.Network{{Type: "loopback"}}
	case "fd":
		c.Namespaces = append(c.Namespaces, configs.Namespace{
			Type: configs.NEWNET, Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), netns.Fd()),
		})
	}
	for _, m := range l.Mounts {
		c.Mounts = append(c.Mounts, &configs.Mount{
			Device: m.Type, Source: m.Source, Destination: m.Target, Flags: int(m.Flags), Data: m.Data,
		})
	}
	for _, d := range []struct {
		path         string
		major, minor int64
	}{{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7}, {"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0}} {
		dev := &devices.Device{
			Path: d.path, FileMode: 0o666,
			Rule: devices.Rule{Type: devices.CharDevice, Major: d.major, Minor: d.minor, Permissions: "rw", Allow: true},
		}
		c.Devices = append(c.Devices, dev)
		c.Cgroups.Resources.Devices = append(c.Cgroups.Resources.Devices, &dev.Rule)
	}
	// The sandbox's own terminals: ptmx and the pts that it makes.
	for _, r := range []devices.Rule{
		{Type: devices.CharDevice, Major: 5, Minor: 2, Permissions: "rw", Allow: true},
		{Type: devices.CharDevice, Major: 136, Minor: devices.Wildcard, Permissions: "rw", Allow: true},
	} {
		c.Cgroups.Resources.Devices = append(c.Cgroups.Resources.Devices, &r)
	}
	return c
}
