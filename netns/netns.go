// Package netns owns network namespaces that are made before a sandbox: a
// fresh one with lo up, sockets opened inside it, and the egress proxy that
// serves them from the host. It must never know sandboxes or engines.
package netns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// NS is a network namespace held open by a descriptor: when the descriptor
// and the last process in it are gone, the kernel removes it and all in it.
type NS struct{ file *os.File }

// New makes a network namespace whose only interface, lo, is up.
func New() (*NS, error) {
	type result struct {
		f   *os.File
		err error
	}
	ch := make(chan result)
	go func() {
		// Never unlocked: the thread dies with the goroutine, its namespace
		// could not be restored safely.
		runtime.LockOSThread()
		f, err := create()
		ch <- result{f, err}
	}()
	r := <-ch
	if r.err != nil {
		return nil, r.err
	}
	return &NS{file: r.f}, nil
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

// Path names the namespace for this process and those it tells.
func (n *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// File is the namespace's descriptor.
func (n *NS) File() *os.File { return n.file }

// Close lets the namespace go.
func (n *NS) Close() error { return n.file.Close() }

// Do runs f on a thread inside the namespace. Sockets that f makes stay there.
func (n *NS) Do(f func() error) error {
	ch := make(chan error)
	go func() {
		runtime.LockOSThread() // and dies with the goroutine
		if err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET); err != nil {
			ch <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		ch <- f()
	}()
	return <-ch
}

// Listen opens a listener inside; it is served from here.
func (n *NS) Listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := n.Do(func() (err error) {
		// Numbers only: nothing may be looked up inside.
		if host, _, serr := net.SplitHostPort(address); serr != nil || net.ParseIP(host) == nil {
			return errors.Join(fmt.Errorf("listen on %q: not an address", address), serr)
		}
		var lc net.ListenConfig
		l, err = lc.Listen(context.Background(), network, address)
		return err
	})
	return l, err
}
