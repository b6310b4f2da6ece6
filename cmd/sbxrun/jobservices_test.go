package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/netns"
	"github.com/sbxrun/sbxrun/test/need"
)

// A server that takes no connection must not hang who looks whether it does.
func TestAcceptsDoesNotWaitForAFullBacklog(t *testing.T) {
	need.Root(t)
	ns, err := netns.New()
	require.NoError(t, err)
	defer ns.Close()
	to := &unix.SockaddrInet4{Port: 8000, Addr: [4]byte{127, 0, 0, 1}}
	var fds []int
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	require.NoError(t, ns.Do(func() error {
		for i := range 4 {
			s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
			if err != nil {
				return err
			}
			fds = append(fds, s)
			if i > 0 {
				_ = unix.Connect(s, to)
				continue
			}
			if err := unix.Bind(s, to); err != nil {
				return err
			}
			if err := unix.Listen(s, 0); err != nil {
				return err
			}
		}
		return nil
	}))
	begun := time.Now()
	ok, err := accepts(ns.File(), to.Port)
	require.NoError(t, err)
	require.False(t, ok)
	require.Less(t, time.Since(begun), 5*time.Second)
}
