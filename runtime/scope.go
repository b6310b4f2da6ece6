package runtime

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/runtime/pid1"
	"github.com/sbxrun/sbxrun/runtime/systemd"
)

// With the cgroup manager systemd a sandbox lies in a scope of its own:
//
//	sbxrun.slice/sbxrun-ID.scope    limits as systemd's properties, Delegate=yes
//	  hold                          a process that does nothing (pid1.HoldArg)
//	  sandbox                       the limits, exact; pid 1 and all of the command
//
// A scope cannot be made without a process and goes with its last one, counters
// and all. That process is neither the supervisor, which the limits are not for
// (a scope at its limit would stall or kill it), nor pid 1, with whose end the
// counters would go before they are read. The supervisor is the scope's
// controller: `systemctl stop` asks it, and it stops the command as on a signal.

// holdPids and holdBytes are the room that the scope's own limits leave above
// the sandbox's, for the process that holds it.
const (
	holdPids  = 1
	holdBytes = 1 << 20
)

// holdPatience is what systemd waits beyond our own grace before it kills.
const holdPatience = 10 * time.Second

// Scope is a scope that was made.
type Scope interface {
	// Cgroup is its path below the mount point.
	Cgroup() string
	// Stopped is closed when systemd wants it stopped.
	Stopped() <-chan struct{}
	Close() error
}

// ScopeMaker makes one. It is the caller's: this package has no D-Bus.
type ScopeMaker func(systemd.ScopeRequest) (Scope, error)

// checkScope says why there can be no scope.
func checkScope(parent string, host *Host) error {
	no := func(why, hint string) error {
		return planErr("use cgroup manager", managerSystemd, errors.New(why), hint)
	}
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return no("systemd is not this machine's pid 1", "--cgroup-manager cgroupfs")
	}
	if host.Cgroup != nil && host.Cgroup.Mode != "v2" {
		return no("cgroups are "+host.Cgroup.Mode+", not v2", "boot with systemd.unified_cgroup_hierarchy=1, or --cgroup-manager cgroupfs")
	}
	if _, err := slicePath(parent); err != nil {
		return planErr("use cgroup parent", parent, err, "with the systemd manager it is a slice: machine.slice")
	}
	return nil
}

// slicePath gives a slice's cgroup: a-b.slice lies in a.slice. "" is
// sbxrun.slice.
func slicePath(slice string) (string, error) {
	if slice == "" {
		slice = "sbxrun.slice"
	}
	name, ok := strings.CutSuffix(slice, ".slice")
	if !ok || strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, "-") || strings.HasSuffix(name, "-") || strings.Contains(name, "--") || name == "" {
		return "", errors.New("not the name of a slice")
	}
	p := "/"
	for i := range name + "-" {
		if i == len(name) || name[i] == '-' {
			p = path.Join(p, name[:i]+".slice")
		}
	}
	return p, nil
}

// scopePath gives the cgroup of a sandbox's scope.
func scopePath(slice, id string) (string, error) {
	p, err := slicePath(slice)
	return path.Join(p, "sbxrun-"+id+".scope"), err
}

// makeScope makes the scope that has the cgroup parent, with a process in it.
func (s *sandbox) makeScope(parent string) error {
	if s.io.Scope == nil {
		return errors.New("no way to systemd")
	}
	dirs, err := s.host.Paths(parent, "hold")
	if err != nil {
		return err
	}
	hold, err := s.startHold()
	if err != nil {
		return fmt.Errorf("hold scope: %w", err)
	}
	l := s.plan.cgroupLimits()
	req := systemd.ScopeRequest{
		Unit: path.Base(parent), Slice: path.Base(path.Dir(parent)), PID: hold, Description: "sbxrun sandbox " + s.id,
		MemoryBytes: l.MemoryBytes, SwapBytes: l.SwapBytes, MemoryLowBytes: l.MemoryLowBytes, MemoryHighBytes: l.MemoryHighBytes,
		StopTimeout: s.plan.StopTimeout + holdPatience,
		CPUs:        l.CPUs, CPUWeight: l.Weight(), CPUSet: l.CPUSet, CPUSetMems: l.CPUSetMems, Pids: l.Pids,
	}
	for _, r := range l.IO {
		req.IO = append(req.IO, systemd.IORate{Device: r.Device, ReadBPS: r.ReadBPS, WriteBPS: r.WriteBPS, ReadIOPS: r.ReadIOPS, WriteIOPS: r.WriteIOPS})
	}
	if s.plan.Name != "" {
		req.Description += " (" + s.plan.Name + ")"
	}
	if req.MemoryBytes > 0 {
		req.MemoryBytes += holdBytes
	}
	if req.Pids > 0 {
		req.Pids += holdPids
	}
	if s.scope, err = s.io.Scope(req); err != nil {
		return err
	}
	s.push(s.scope.Close)
	if got := s.scope.Cgroup(); got != parent {
		return fmt.Errorf("systemd put it into %q", got)
	}
	// A group with processes can have no limited children.
	for _, d := range dirs {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path.Join(d, "cgroup.procs"), []byte(strconv.Itoa(hold)), 0); err != nil {
			return err
		}
	}
	return nil
}

// startHold starts the process that keeps the scope. It ends with this one.
func (s *sandbox) startHold() (int, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer r.Close()
	init, err := pid1.Open()
	if err != nil {
		return 0, errors.Join(err, w.Close())
	}
	defer init.Close()
	exe, err := unix.FcntlInt(init.Fd(), unix.F_DUPFD_CLOEXEC, 20) // see spawn in runtime/engine/direct
	if err != nil {
		return 0, errors.Join(err, w.Close())
	}
	defer unix.Close(exe)
	pid, err := syscall.ForkExec("/proc/self/fd/"+strconv.Itoa(exe), []string{"sbxrun-hold", pid1.HoldArg}, &syscall.ProcAttr{
		Dir: "/", Env: []string{}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), r.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, errors.Join(err, w.Close())
	}
	s.push(func() error {
		err := w.Close()
		for {
			if _, werr := unix.Wait4(pid, nil, 0, nil); !errors.Is(werr, unix.EINTR) {
				return err
			}
		}
	})
	return pid, nil
}
