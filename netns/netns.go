// Package netns owns network namespaces that are made before a sandbox: a
// fresh one with lo up, and what is said to and by sbxrun-net, the helper that
// opens it to the outside as far as was asked (packages egress, routed and
// publish). It must never know sandboxes or engines, and never import package
// net: sbxrun links it at every launch.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// NS is a network namespace held open by a descriptor: when the descriptor
// and the last process in it are gone, the kernel removes it and all in it.
type NS struct{ file *os.File }

// onThread runs f on a thread that dies afterwards: its namespace could not be
// restored safely. The main thread cannot die, and what it is in is what
// /proc/PID shows of the process, so f never runs there.
func onThread(f func() error) error {
	ch := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			ch <- onThread(f) // another thread, as this goroutine holds the main one
			runtime.UnlockOSThread()
			return
		}
		err := errors.New("the function ended its goroutine")
		defer func() { ch <- err }() // also on Goexit, which a failed test calls
		err = f()                    // never unlocked
	}()
	return <-ch
}

// New makes a network namespace whose only interface, lo, is up. It needs
// CAP_SYS_ADMIN.
func New() (*NS, error) {
	n := &NS{}
	err := onThread(func() (err error) {
		n.file, err = create()
		return err
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

func create() (*os.File, error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return nil, fmt.Errorf("unshare network namespace: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return nil, err
	}
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", err)
	}
	return f, nil
}

// loopbackUp sets lo up by ioctl: half the cost of netlink.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open socket: %w", err)
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// Path names the namespace, also for other processes, while this one lives and
// n is open.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// FromFile is a namespace that another process made. f stays the namespace's
// and is closed with it.
func FromFile(f *os.File) *NS { return &NS{file: f} }

// File is the namespace's descriptor.
func (n *NS) File() *os.File { return n.file }

// Close lets the namespace go.
func (n *NS) Close() error { return n.file.Close() }

// Do runs f on a thread inside the namespace. Sockets that f makes stay there;
// goroutines that it starts are outside.
func (n *NS) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// Counters gives the bytes received and sent by all interfaces but lo since the
// namespace was made: what crossed its border. With lo alone both are 0.
func (n *NS) Counters() (rx, tx uint64, err error) {
	var b []byte
	err = n.Do(func() (err error) {
		b, err = os.ReadFile("/proc/thread-self/net/dev")
		return err
	})
	if err == nil {
		rx, tx, err = parseDev(string(b))
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read traffic counters: %w", err)
	}
	return rx, tx, nil
}

// parseDev reads /proc/net/dev: two lines of titles, then "name: rx … tx …".
func parseDev(s string) (rx, tx uint64, err error) {
	for _, line := range strings.Split(s, "\n") {
		name, rest, ok := strings.Cut(line, ":")
		if !ok || strings.TrimSpace(name) == "lo" {
			continue
		}
		f := strings.Fields(rest)
		if len(f) < 9 {
			return 0, 0, fmt.Errorf("line %q", line)
		}
		r, err1 := strconv.ParseUint(f[0], 10, 64)
		t, err2 := strconv.ParseUint(f[8], 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			return 0, 0, err
		}
		rx, tx = rx+r, tx+t
	}
	return rx, tx, nil
}

// Inside is a thread that stays in a namespace and makes sockets there on
// demand. Only entering takes privileges: it goes on when they are dropped.
type Inside struct{ work chan func() }

// Enter parks a thread inside. Close lets it go.
func (n *NS) Enter() (*Inside, error) {
	in := &Inside{work: make(chan func())}
	entered := make(chan error, 1)
	go func() {
		err := n.Do(func() error {
			entered <- nil
			for f := range in.work {
				f()
			}
			return nil
		})
		entered <- err // has room: the first was taken, or this is the first
	}()
	if err := <-entered; err != nil {
		return nil, err
	}
	return in, nil
}

// Do runs f on the thread inside, one at a time: f makes a socket and does not
// wait for anything.
func (in *Inside) Do(f func() error) error {
	ch := make(chan error, 1)
	in.work <- func() { ch <- f() }
	return <-ch
}

// Close ends the thread. Nothing may be asked of it afterwards.
func (in *Inside) Close() { close(in.work) }
