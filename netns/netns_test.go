package netns

import (
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sbxrun/sbxrun/test/need"
)

func nsID(t *testing.T, path string) string {
	t.Helper()
	l, err := os.Readlink(path)
	require.NoError(t, err)
	return l
}

func newNS(t *testing.T) *NS {
	t.Helper()
	need.Root(t)
	n, err := New()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	return n
}

func listen(n *NS, network, address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

func TestNewHasOnlyLoUp(t *testing.T) {
	n := newNS(t)
	require.NotEqual(t, nsID(t, "/proc/self/ns/net"), nsID(t, n.Path()))
	require.NoError(t, n.Do(func() error { // netlink is the oracle
		links, err := netlink.LinkList()
		require.NoError(t, err)
		require.Len(t, links, 1)
		a := links[0].Attrs()
		require.Equal(t, "lo", a.Name)
		require.NotZero(t, a.Flags&net.FlagUp)
		require.NotZero(t, a.Flags&net.FlagLoopback)
		addrs, err := netlink.AddrList(links[0], netlink.FAMILY_V4)
		require.NoError(t, err)
		require.Len(t, addrs, 1)
		require.Equal(t, "127.0.0.1/8", addrs[0].IPNet.String())
		routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
		require.NoError(t, err)
		require.Empty(t, routes)
		return nil
	}))
}

// The process as others see it, and every thread that lives on, stay where they were.
func TestThisProcessStaysWhereItIs(t *testing.T) {
	before := func() string { return nsID(t, "/proc/self/ns/net") }()
	// By what they are, not by number: descriptors of earlier tests (pipes that
	// the runtime keeps for splice) may go meanwhile, and must not hide new ones.
	fds := func() map[string]bool {
		ents, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		open := map[string]bool{}
		for _, e := range ents {
			if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil { // else: of this reading itself
				open[e.Name()+" "+to] = true
			}
		}
		return open
	}
	newNS(t)
	start := fds()
	for range 50 {
		n, err := New()
		require.NoError(t, err)
		l, err := listen(n, "tcp", "127.0.0.1:0")
		require.NoError(t, err)
		require.NoError(t, l.Close())
		require.NoError(t, n.Close())
	}
	for fd := range fds() {
		require.Contains(t, start, fd, "a descriptor was left")
	}
	require.Equal(t, before, nsID(t, "/proc/self/ns/net"))
	require.Eventually(t, func() bool { // threads take a moment to die
		ents, err := os.ReadDir("/proc/self/task")
		require.NoError(t, err)
		for _, e := range ents {
			if id, err := os.Readlink("/proc/self/task/" + e.Name() + "/ns/net"); err == nil && id != before {
				return false
			}
		}
		return true
	}, 5*time.Second, 10*time.Millisecond)
}

func TestListenerIsInside(t *testing.T) {
	n := newNS(t)
	l, err := listen(n, "tcp", "127.0.0.1:3128")
	require.NoError(t, err)
	defer l.Close()
	other := newNS(t) // the same address is free elsewhere
	l2, err := listen(other, "tcp", "127.0.0.1:3128")
	require.NoError(t, err)
	defer l2.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = io.WriteString(c, "inside")
			c.Close()
		}
	}()
	var got []byte
	require.NoError(t, n.Do(func() error {
		c, err := net.Dial("tcp", "127.0.0.1:3128")
		if err != nil {
			return err
		}
		defer c.Close()
		got, err = io.ReadAll(c)
		return err
	}))
	require.Equal(t, "inside", string(got))
	_, err = listen(n, "tcp", "127.0.0.1:3128")
	require.ErrorIs(t, err, unix.EADDRINUSE)
}

func TestCountersOfAnInterface(t *testing.T) {
	n := newNS(t)
	err := n.Do(func() error {
		return netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "d0"}})
	})
	if err != nil {
		t.Skipf("needs the dummy driver: %v", err)
	}
	err = n.Do(func() error {
		link, err := netlink.LinkByName("d0")
		require.NoError(t, err)
		require.NoError(t, netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 0, 1), Mask: net.CIDRMask(24, 32)}}))
		require.NoError(t, netlink.LinkSetUp(link))
		c, err := net.Dial("udp", "10.0.0.2:9")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(make([]byte, 1000))
		return err
	})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		_, tx, err := n.Counters()
		require.NoError(t, err)
		return tx > 0
	}, 3*time.Second, 20*time.Millisecond)
}

func TestDoOutlivesAGoroutineThatEnds(t *testing.T) {
	n := newNS(t)
	require.Error(t, n.Do(func() error { runtime.Goexit(); return nil }))
}

func TestParseDev(t *testing.T) {
	const head = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n"
	rx, tx, err := parseDev(head + "    lo:  5 1 0 0 0 0 0 0 5 1 0 0 0 0 0 0\n  eth0:100 2 0 0 0 0 0 0 7 2 0 0 0 0 0 0\n  v1: 18446744073709551 2 0 0 0 0 0 0 3 2 0 0 0 0 0 0\n")
	require.NoError(t, err)
	require.Equal(t, [2]uint64{18446744073709651, 10}, [2]uint64{rx, tx})
	for _, bad := range []string{"eth0: 1 2", "eth0: x 2 0 0 0 0 0 0 7"} {
		_, _, err := parseDev(bad)
		require.Error(t, err)
	}
}

func BenchmarkNew(b *testing.B) {
	need.Root(b)
	for b.Loop() {
		n, err := New()
		if err != nil {
			b.Fatal(err)
		}
		n.Close()
	}
}
